"""The wheel alone, in an environment of its own: what a machine that only serves would have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SERVE = """
import sys
import mimo_compile
from mimo_compile import _tvm
assert mimo_compile.__file__.startswith(sys.prefix), mimo_compile.__file__
module = _tvm.load_object(open(sys.argv[1], "rb").read())
_tvm.set_threads(2)
a, b = _tvm.empty_aligned((64, 16)), _tvm.empty_aligned((64, 16))
a[:] = 3
module["scale"](_tvm.from_numpy(a), _tvm.from_numpy(b))
assert (b == 6).all()
try:
    import torch
except ImportError:
    print("served without torch")
"""


def run(*command: object, **environment: str) -> str:
    """Run a command to its end; a failure shows what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_with_base_dependencies_runs_compiled_code(
    tmp_path: Path, scale_object: Path
) -> None:
    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "build", "--no-isolation", "-o", tmp_path / "dist", ROOT)
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel)
    serve = run(python, "-I", "-c", SERVE, scale_object, PATH="", TVM_NUM_THREADS="2")
    assert serve.strip() == "served without torch"
