"""CUDA text to machine code with nvcc, or with NVRTC where there is none; with a GPU and without.

What a kernel computes is in its text: no fast mathematics is asked of the compiler, and approximate
instructions are written out where an error bound allows for them. Multiply-adds may be fused, as by default.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from mimo_compile.errors import EnvironmentMismatch, MimoError
from mimo_compile.ir.hardware import Hardware, gpu_of
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.cuda import kept, limits, nvrtc
from mimo_compile.schedules.cuda.cubin import clusters, most_threads

HEADERS = Path(__file__).with_name("device")
"""On the include path of each kernel."""
OPTIONS = (
    "-O3", "-std=c++17", "--expt-relaxed-constexpr",
    "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage",
)  # fmt: skip
USUAL = Path("/usr/local/cuda")
"""Where toolkits are installed by default."""
LEAST = (12, 0)
"""Release of CUDA whose compilers know sm_90a."""
LIMIT_S = 300.0
"""After which a compiler is given up."""
_NVRTC = (sys.executable, "-I", nvrtc.__file__)
"""NVRTC is a library: a process of its own has it."""

Kind = Literal["cubin", "ptx"]
_LOG = logging.getLogger(__name__)
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_STATIC = re.compile(r"(\d+) bytes smem")
_WARNING = re.compile(r"warning|\(C7\d{3}\)", re.IGNORECASE)
_ERROR = re.compile(r"\b(error|fatal)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Usage:
    """What one ``__global__`` function takes, as ptxas says. Unit: bytes."""

    registers: int
    """32-bit registers of a thread."""
    shared_bytes: int = 0
    """Static shared memory of a block."""
    stack_bytes: int = 0
    """Local memory of a thread that is no spill: an array that is indexed at run time."""
    spill_bytes: int = 0
    """Stored and loaded."""


@dataclass(frozen=True, slots=True)
class Binary:
    """Machine code of one text for one architecture."""

    arch: str
    cubin: bytes
    usage: Mapping[str, Usage]
    """By symbol."""
    warnings: tuple[str, ...] = ()
    """Lines of nvcc and ptxas that complain, e.g. about serialised ``wgmma`` (C7510)."""

    @property
    def local_bytes(self) -> int:
        """Bytes of stack and spills; anything but 0 is slow."""
        return sum(u.stack_bytes + u.spill_bytes for u in self.usage.values())

    @property
    def slow(self) -> str:
        """Why it can only be slow, or nothing: local memory, or ``wgmma`` one after the other."""
        if self.local_bytes:
            return f"it uses local memory: {self.local_bytes} bytes of stack and spills"
        return next((line for line in self.warnings if "(C7" in line), "")


@dataclass(frozen=True, slots=True)
class _Made:
    """What is kept: machine code or PTX, and what nvcc said."""

    data: bytes
    log: str


def find_tool(name: str) -> Path | None:
    """Return where a program of the CUDA toolkit is, or None.

    Looked at in this order: ``CUDA_HOME``, ``CUDA_PATH``, the ``PATH``, ``/usr/local/cuda``, and NVIDIA's
    packages for Python.
    """
    folders = [Path(os.environ[v], "bin") for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    on_path = shutil.which(name)
    found = [f / name for f in folders] + ([Path(on_path)] if on_path else [])
    found += [USUAL / "bin" / name, *_packaged(f"bin/{name}")]
    return next((p for p in found if p.is_file() and os.access(p, os.X_OK)), None)


def find_library() -> Path | None:
    """Return where NVRTC is, or None; looked at as for `find_tool`, but for the ``PATH``."""
    roots = [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    for name in nvrtc.NAMES:
        found = [r / lib / name for r in (*roots, USUAL) for lib in ("lib64", "lib")]
        found += _packaged(f"lib/{name}")
        if (path := next((p for p in found if p.is_file()), None)) is not None:
            return path
    return None


def _packaged(name: str) -> list[Path]:
    """Return the files of a name that NVIDIA's packages for Python have."""
    found = (sorted(Path(entry or ".").glob(f"nvidia/*/{name}")) for entry in sys.path)
    return [path for each in found for path in each]


def find_compiler() -> Path:
    """Return nvcc, or NVRTC's library where there is no nvcc that is new enough.

    Raises:
        EnvironmentMismatch: there is neither, or what there is is too old or cannot be loaded.
    """
    found = [path for path in (find_tool("nvcc"), find_library()) if path is not None]
    remedy = "Run: pip install 'mimo-compile[cuda]'. Or set CUDA_HOME to a CUDA toolkit"
    if not found:
        raise EnvironmentMismatch(
            "compiling CUDA kernels needs nvcc or NVRTC, which are in none of CUDA_HOME, CUDA_PATH, PATH, "
            "/usr/local/cuda and NVIDIA's packages for Python",
            remedy=remedy,
        )
    if (usable := next((path for path in found if release(path) >= LEAST), None)) is not None:
        return usable
    first = found[0]
    text = ".".join(str(n) for n in release(first))
    what = f"{name_of(first)} of CUDA {text} is too old"
    if release(first) == (0, 0):
        said = _asked(first).stderr.strip().splitlines()
        what = f"{name_of(first)} cannot be used: {said[-1] if said else 'it names no release'}"
    raise EnvironmentMismatch(what, where=first, remedy=f"{remedy} of 12.0 or later")


def name_of(compiler: Path) -> str:
    """Return what a compiler is called in messages."""
    return "NVRTC" if compiler.name in nvrtc.NAMES else "nvcc"


def version_text(path: Path) -> str:
    """Return what a compiler says of itself."""
    return _asked(path).stdout


@cache
def _asked(path: Path) -> subprocess.CompletedProcess[str]:
    """Return what a compiler answers when asked for its release, in the case of an error why it cannot."""
    command = [*_NVRTC, str(path)] if path.name in nvrtc.NAMES else [str(path)]
    return subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=False, timeout=LIMIT_S
    )


def release(path: Path) -> tuple[int, int]:
    """Return the release of CUDA that a compiler belongs to; (0, 0) if it does not say."""
    match = re.search(r"release (\d+)\.(\d+)", version_text(path))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def compile_device(kernel: Kernel, hardware: Hardware) -> Binary:
    """Compile a kernel for a GPU, or take what is kept of the same text, headers, options and compiler.

    Raises:
        EnvironmentMismatch: there is neither nvcc nor NVRTC.
        MimoError: it refuses the text, or gives it more registers or shared memory than can be launched; or
            a launch has more threads than the function's ``__launch_bounds__``, or clusters of other
            extents than its ``__cluster_dims__``.
        ValueError: the GPU cannot do a launch of the kernel (`limits.check`).
    """
    code = limits.check(kernel, hardware)
    made = _made(kernel, hardware, "cubin")
    binary = Binary(gpu_of(hardware).arch, made.data, usage_of(made.log), warnings_of(made.log))
    if missing := {launch.symbol for launch in code.launches} - set(binary.usage):
        raise ValueError(f"{kernel.name}: its text has no function {', '.join(sorted(missing))}")
    bounds, together = most_threads(made.data), clusters(made.data)
    for launch in code.launches:
        used = binary.usage[launch.symbol]
        text = limits.refusal(
            hardware,
            threads=launch.threads,
            shared_bytes=launch.shared_bytes + used.shared_bytes,
            registers=used.registers,
            cluster=launch.cluster,
        )
        if launch.threads > (bound := bounds.get(launch.symbol, launch.threads)):
            text = f"{launch.threads} threads, its __launch_bounds__ are {bound}"
        if (found := together.get(launch.symbol, (1, 1, 1))) != (launch.cluster, 1, 1):
            text = f"clusters of {launch.cluster} blocks, its __cluster_dims__ are {found}"
        if text:
            raise MimoError(
                f"{hardware.name} cannot launch {launch.symbol} of {kernel.name}: {text}"
            )
    return binary


def ptx_of(kernel: Kernel, hardware: Hardware) -> str:
    """Return a kernel as PTX; raises what `compile_device` does."""
    limits.check(kernel, hardware)
    return _made(kernel, hardware, "ptx").data.decode()


def _made(kernel: Kernel, hardware: Hardware, kind: Kind) -> _Made:
    """Return what the compiler makes of a kernel's text, now or when it was last asked."""
    text, arch, compiler = limits.code_of(kernel).text, gpu_of(hardware).arch, find_compiler()
    headers = [f"{path.name}\n{path.read_text()}" for path in sorted(HEADERS.glob("*.cuh"))]
    options = [*nvrtc.OPTIONS, *nvrtc.HEADERS.values()] if compiler.name in nvrtc.NAMES else OPTIONS
    key = kept.digest([version_text(compiler), arch, kind, *options, text, *headers])
    made = kept.load(key, _Made)
    if made is None:
        made = _run(compiler, text, arch, kind, kernel.name)
        kept.store(key, made)
    return made


def usage_of(log: str) -> dict[str, Usage]:
    """Read ``ptxas -v``: what each function takes."""
    found: dict[str, dict[str, int]] = {}
    values: dict[str, int] = {}
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            values = found.setdefault(match[1], {"registers": 0})
        if match := _STACK.search(line):  # of the function, or of one that it calls
            values["stack_bytes"] = max(values.get("stack_bytes", 0), int(match[1]))
            spilled = int(match[2]) + int(match[3])
            values["spill_bytes"] = values.get("spill_bytes", 0) + spilled
        if match := _REGISTERS.search(line):
            values["registers"] = int(match[1])
            static = _STATIC.search(line)
            values["shared_bytes"] = int(static[1]) if static else 0
    return {name: Usage(**values) for name, values in found.items()}


def warnings_of(log: str) -> tuple[str, ...]:
    """Return the lines of a log that complain, without the temporary file's folder."""
    lines = (re.sub(r"\S*/(?=kernel\.cu)", "", line).strip() for line in log.splitlines())
    return tuple(dict.fromkeys(line for line in lines if _WARNING.search(line)))


def _command(compiler: Path, source: Path, out: Path, arch: str, kind: Kind) -> list[str]:
    """Return how a file is compiled."""
    number = arch.removeprefix("sm_")
    # the long spelling: with -arch=sm_90a alone some releases also compile for plain sm_90
    code = f"compute_{number}" if kind == "ptx" else arch
    if compiler.name in nvrtc.NAMES:
        options = [*nvrtc.OPTIONS, f"-arch={code}", f"-I{HEADERS}"]
        return [*_NVRTC, str(compiler), str(source), str(out), kind, *options]
    return [
        str(compiler), f"--{kind}", *OPTIONS, "-gencode", f"arch=compute_{number},code={code}",
        f"-I{HEADERS}", "-o", str(out), str(source),
    ]  # fmt: skip


def _run(compiler: Path, text: str, arch: str, kind: Kind, what: str) -> _Made:
    """Run a compiler on a text."""
    env = {k: v for k, v in os.environ.items() if not re.fullmatch("NVCC_(AP|PRE)PEND_FLAGS", k)}
    with tempfile.TemporaryDirectory(prefix="mimo-") as folder:
        source, out = Path(folder, "kernel.cu"), Path(folder, f"kernel.{kind}")
        source.write_text(text)
        command = _command(compiler, source, out, arch, kind)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=env
            )
        except subprocess.TimeoutExpired:
            raise MimoError(
                f"{name_of(compiler)} took more than {LIMIT_S:g} s for {what}"
            ) from None
        log = done.stdout + done.stderr
        _LOG.debug("%s", log)
        if done.returncode:
            raise MimoError(
                f"{name_of(compiler)} refuses {what} for {arch}: {_errors(log) or 'it does not say why'}"
            )
        return _Made(out.read_bytes(), log)


def _errors(log: str) -> str:
    """Return the first lines of a log that name an error."""
    lines = [re.sub(r"\S*/(?=kernel\.cu)", "", x).strip() for x in log.splitlines()]
    return "; ".join([line for line in lines if _ERROR.search(line)][:3] or lines[-1:])
