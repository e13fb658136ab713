"""The one way to TVM: two ways in, and the care that each of them needs.

`runtime()` is enough to execute compiled code: it loads the TVM runtime library and its Python
FFI, neither the compiler nor torch. `compiler()` is all of TVM. Both may be used in one process,
in any order, before or after torch.

What a caller must know:

* Kernels use aligned vector loads and check nothing. Give them memory from `empty_aligned`,
  or pass it through `from_numpy`, which refuses what is not aligned.
* The thread pool belongs to the calling thread: a second Python thread that runs a parallel
  kernel starts a second pool.
* A pool does not survive `fork`: the child hangs at its first parallel kernel. Spawn, or fork
  while no pool has started: `runtime` and `load_object` start none, `set_threads` and the first
  parallel kernel do.
"""

import ctypes
import importlib.metadata
import importlib.util
import inspect
import linecache
import math
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import ArtifactError, EnvironmentMismatch, UsageError

ALIGNMENT = 64
"""Bytes: what TVM assumes of every tensor's address."""

_TVM = "0.27.0.post1"
_FFI = re.compile(r"0\.1\.14\.post\d+(\+.*)?")  # TVM asks for 0.1.14.post0; 0.1.15 crashes in it
_REPAIR = "Run: pip install 'apache-tvm==0.27.0.post1' 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'"


def check_versions() -> None:
    """Check that the installed TVM and its FFI are the pair that works together.

    Reads package metadata only; nothing is imported.

    Raises:
        EnvironmentMismatch: A part is missing or of another version; the remedy repairs it.
    """
    tvm, ffi = _version("apache-tvm"), _version("apache-tvm-ffi")
    if tvm != _TVM:
        raise EnvironmentMismatch(
            f"apache-tvm {tvm or 'is not installed'}; this package needs {_TVM}", remedy=_REPAIR
        )
    if ffi is None or not _FFI.fullmatch(ffi):
        raise EnvironmentMismatch(
            f"apache-tvm-ffi {ffi or 'is not installed'}; with apache-tvm {_TVM} only "
            "0.1.14.post0 and later 0.1.14 releases work",
            remedy=_REPAIR,
        )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def configure(threads: int | None = None) -> None:
    """Set the limits of TVM's thread pools; call it before the first parallel kernel runs.

    TVM's own default is half of the logical CPUs, which on two of them is one thread, and it
    pins threads to cores, which every thread started later inherits. Variables that the user
    has set win.

    Args:
        threads: The most threads a pool may have; by default the CPUs open to this process.
    """
    limit = len(os.sched_getaffinity(0)) if threads is None else threads
    os.environ.setdefault("TVM_NUM_THREADS", str(limit))
    os.environ.setdefault("TVM_BIND_THREADS", "0")


def max_threads() -> int:
    """The most threads that `set_threads` accepts."""
    configure()
    text = os.environ["TVM_NUM_THREADS"]
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"TVM_NUM_THREADS is {text!r}", remedy="Set it to a positive number.")
    return int(text)


def set_threads(count: int) -> None:
    """Run parallel kernels of the calling thread on `count` threads from now on.

    Starts the pool of the calling thread if it has none yet.

    Raises:
        UsageError: `count` is below 1 or above `max_threads()`.
    """
    if not 1 <= count <= max_threads():
        raise UsageError(
            f"{count} threads asked for, 1 to {max_threads()} are possible",
            remedy="Set TVM_NUM_THREADS before the start to raise the limit.",
        )
    runtime().get_global_func("runtime.config_threadpool")(1, count)


class _TorchBlocker:
    """An import finder that hides torch from one thread; others may import it meanwhile."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Refuse torch to the thread that asked for it, and find nothing otherwise."""
        if name == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("torch is hidden while TVM is imported", name=name)
        return None


@contextmanager
def _without_torch() -> Iterator[None]:
    """Keep `tvm_ffi` from importing torch on its own (seconds, 200 MB); one there stays."""
    if "torch" in sys.modules:
        yield
        return
    blocker = _TorchBlocker()
    sys.meta_path.insert(0, blocker)
    try:
        yield
    finally:
        sys.meta_path.remove(blocker)


def _tvm_folder() -> Path:
    """Where TVM is installed, found without importing it."""
    spec = importlib.util.find_spec("tvm")
    if spec is None or spec.origin is None:
        raise EnvironmentMismatch("TVM's Python package is not found", remedy=_REPAIR)
    return Path(spec.origin).parent


@cache
def runtime() -> Any:
    """Load what executing compiled code needs, and nothing more.

    Returns:
        The module `tvm_ffi`.

    Raises:
        EnvironmentMismatch: The installed versions do not fit; the remedy repairs it.
    """
    check_versions()
    configure()
    with _without_torch():
        import tvm_ffi
    library = _tvm_folder() / "lib" / "libtvm_runtime.so"
    try:
        # Global: compiled code looks up TVMBackendParallelLaunch by name, and without it a
        # parallel kernel jumps to address zero.
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise EnvironmentMismatch(
            f"TVM's runtime library does not load: {error}", remedy=_REPAIR
        ) from error
    return tvm_ffi


@cache
def compiler() -> Any:
    """Load all of TVM.

    Returns:
        The module `tvm`. After this call plain imports such as
        `from tvm.script import tirx as T` are safe everywhere.

    Raises:
        EnvironmentMismatch: The installed versions do not fit, or this process was told to use
            the runtime library alone.
    """
    runtime()
    with _without_torch():
        _defer_tensor_intrinsics()
        import tvm
        from tvm.base import _RUNTIME_ONLY
    if _RUNTIME_ONLY:
        raise EnvironmentMismatch(
            "TVM was loaded without its compiler",
            remedy="Unset TVM_USE_RUNTIME_LIB; if it is not set, " + _REPAIR.lower(),
        )
    _quicken_parser()
    return tvm


class _LeanInspect(ModuleType):
    """`inspect` with a `stack` that does not search all modules for the source of every frame."""

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)

    @staticmethod
    def stack(context: int = 1) -> list[Any]:
        """Return the callers' frames, innermost first, with one line of source each."""
        del context  # one line is what TVM asks for
        out = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name, line = frame.f_code.co_filename, frame.f_lineno
            text = linecache.getline(name, line)
            out.append(
                inspect.FrameInfo(
                    frame, name, line, frame.f_code.co_name, [text] if text else None, 0
                )
            )
            frame = frame.f_back
        return out


def _quicken_parser() -> None:
    """Keep TVMScript from reading every caller's source for each macro it expands.

    `inspect.getouterframes` walks all imported modules for every frame: with torch loaded, a kernel
    made of inlined helpers took minutes to parse.
    """
    from tvm.script.parser.core import parser
    from tvm.tirx.script.builder import ir
    from tvm.tirx.script.parser import entry

    key = parser.ScriptMacro.parser_object_name

    def find(self: Any) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if (found := frame.f_globals.get(key)) is not None:
                return found
            frame = frame.f_back
        raise RuntimeError(f"{key} not available")

    parser.ScriptMacro._find_parser_def = find
    entry.inspect = ir.inspect = _LeanInspect("inspect")


def _defer_tensor_intrinsics() -> None:
    """Keep `import tvm.s_tir.tensor_intrin` from parsing every shipped intrinsic (30 s of CPU).

    MetaSchedule imports the package without using it. The stand-in has the real search path, so
    that a submodule asked for by name (by the GPU schedules, say) is still found and parsed.
    """
    name = "tvm.s_tir.tensor_intrin"
    stand_in = ModuleType(name, "Stands in for the package; its submodules are the real ones.")
    stand_in.__path__ = [str(_tvm_folder() / "s_tir" / "tensor_intrin")]
    sys.modules.setdefault(name, stand_in)


@cache
def request_tiles() -> int:
    """Ask Linux for the AMX tile registers, which it grants to no process unasked.

    Returns:
        0 if they are granted (once for the process and its threads), or the error number.
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    refused = ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request_permission, tile_data)
    return ctypes.get_errno() if refused else 0


def load_object(data: bytes | bytearray | memoryview) -> Any:
    """Link object code in memory, from exactly these bytes, into a module.

    No compiler, no temporary file and no other program is used. The code is unloaded when the
    module and everything obtained from it are gone.

    Args:
        data: An ELF object file as TVM writes it.

    Returns:
        A `tvm_ffi.Module`: `module["kernel"](...)` calls a kernel.

    Raises:
        ArtifactError: The bytes are not object code that can be linked here.
    """
    runtime()
    request_tiles()  # refused where there are none; whoever needs them checks
    with _without_torch():
        from tvm_ffi_orcjit import default_session
    if bytes(data[:4]) != b"\x7fELF":
        raise ArtifactError("this is not object code: it does not start like an ELF file")
    try:
        # The C++ compiler it would look for is that of code with C++ in it; ours has none.
        return default_session().load_module(bytes(data), cxx=os.devnull)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].split(" failed: ")[-1]
        raise ArtifactError(f"object code cannot be linked: {reason}") from error


def empty_aligned(shape: int | Sequence[int], dtype: npt.DTypeLike = "float32") -> npt.NDArray[Any]:
    """An uninitialised C-contiguous array that starts on a 64-byte boundary.

    Args:
        shape: The extents; a plain number is one extent.
        dtype: A numpy dtype or its name; the names of `ml_dtypes` (`bfloat16`, `float8_e4m3fn`,
            ...) work too.
    """
    extents = (shape,) if isinstance(shape, int) else tuple(shape)
    kind = _dtype(dtype)
    size = math.prod(extents) * kind.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    # not slice and view: those move the address of an array that has no elements
    return np.ndarray(extents, kind, buffer=memory, offset=start)


def as_aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array itself if kernels can use it as it lies, else an aligned contiguous copy."""
    if _fits_kernels(array):
        return array
    copy = empty_aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def from_numpy(array: npt.NDArray[Any], *, alignment: int = ALIGNMENT) -> Any:
    """View an array as a tensor that kernels take, without copying; the tensor keeps it alive.

    Unlike numpy's own export this takes read-only arrays (weights mapped from a file: a kernel
    must not write them) and the 16- and 8-bit floats of `ml_dtypes`. Kernels take plain numpy
    arrays as well, but then nothing checks the alignment.

    Args:
        array: What to view.
        alignment: The boundary in bytes that its address must have; less than the default only
            for kernels that were compiled to accept less.

    Returns:
        A `tvm_ffi.Tensor` on the same memory.

    Raises:
        ValueError: The array is not C-contiguous on that boundary (see `as_aligned`).
        TypeError: Elements of this dtype have no counterpart.
    """
    if not _fits_kernels(array, alignment):
        raise ValueError(
            f"array {array.dtype}{list(array.shape)} is not contiguous on a {alignment}-byte "
            "boundary; allocate it with empty_aligned or pass it through as_aligned"
        )
    ffi = runtime()
    name = array.dtype.name
    foreign = array.dtype.isbuiltin != 1  # a dtype that numpy itself cannot export
    if foreign and not (name == "bfloat16" or name.startswith("float8_")):
        raise TypeError(f"kernels have no dtype for numpy's {array.dtype}")
    plain = array.view(f"u{array.itemsize}") if foreign else array
    if not plain.flags.writeable:
        plain = _writable_alias(plain)
    tensor = ffi.from_dlpack(plain, require_alignment=alignment, require_contiguous=True)
    if not foreign:
        return tensor
    view = ffi.get_global_func("runtime.TVMTensorCreateView")
    return view(tensor, ffi.Shape(array.shape), ffi.dtype(name), 0)


def _dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    try:
        return np.dtype(dtype)
    except TypeError:
        import ml_dtypes  # noqa: F401  (registers its dtypes with numpy)

        return np.dtype(dtype)


def _fits_kernels(array: npt.NDArray[Any], alignment: int = ALIGNMENT) -> bool:
    # not array.ctypes.data, which makes up an address for arrays without elements
    address: int = array.__array_interface__["data"][0]
    return array.flags.c_contiguous and address % alignment == 0


def _writable_alias(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory as an array that does not say it is read-only, and keeps `array` alive."""
    if not array.size:
        return empty_aligned(array.shape, array.dtype)
    memory: Any = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
    memory.owner = array
    return np.frombuffer(memory, array.dtype).reshape(array.shape)
