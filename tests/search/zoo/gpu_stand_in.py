"""A driver in the place of NVIDIA's, for tests of what measures on GPUs (``schedules/fake_driver.c``)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOTS = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda")]
HEADERS = next((p / "include" for p in ROOTS if (p / "include" / "cuda.h").is_file()), None)
MISSING = HEADERS is None or shutil.which("gcc") is None


def compile_driver(folder: Path) -> Path:
    """Compile it as what every process finds that has the folder in LD_LIBRARY_PATH."""
    path = folder / "libcuda.so.1"
    source = Path(__file__).parents[2] / "schedules" / "fake_driver.c"
    flags = ["-O1", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{HEADERS}"]
    subprocess.run(["gcc", *flags, source, "-o", path, "-lm"], check=True)
    return path
