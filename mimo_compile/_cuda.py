"""The one way to NVIDIA GPUs: the driver's own library by ctypes, and launches through it.

Nothing else is needed to run machine code: neither a toolkit nor torch nor TVM. Written against ``cuda.h`` of
CUDA 12 and 13; tests make every call to a library of its prototypes, in place of a driver. No GPU has run it
so far (docs/gpu-validation.md).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal
from uuid import UUID

from mimo_compile.errors import DeviceLost, MimoError

LIBRARY = "libcuda.so.1"
_U3 = (c_uint, c_uint, c_uint)
# Without these ctypes would cut addresses down to 32 bits.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (c_void_p, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemAllocHost_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuMemsetD8Async": (c_uint64, ctypes.c_ubyte, c_size_t, c_void_p),
    "cuLaunchKernel": (c_void_p, *_U3, *_U3, c_uint, c_void_p, POINTER(c_void_p), c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphUpload": (c_void_p, c_void_p),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuTensorMapEncodeTiled": (
        c_void_p, c_int, c_uint, c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint),
        POINTER(c_uint), c_int, c_int, c_int, c_int,
    ),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}  # fmt: skip
_MAX_DYNAMIC_SHARED, _CLUSTER_WIDTH = 8, 11
"""Of CUfunction_attribute; the width is 0 where the text declares no clusters."""
_MAJOR, _MINOR = 75, 76
"""Compute capability, of CUdevice_attribute."""
MAP_ELEMENTS = {
    "uint8": (0, 1), "int8": (0, 1), "float8_e4m3fn": (0, 1), "float16": (6, 2), "float32": (7, 4),
    "bfloat16": (9, 2),
}  # fmt: skip
"""Numbers of CUtensorMapDataType, and bytes; bytes of any meaning are uint8."""
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_PROMOTE_256 = 3
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
OUT_OF_MEMORY = 2
_LOST = frozenset({214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999})
"""Errors after which the context answers everything with an error: memory that failed, and kernels that did
something which they must not."""
_RELAXED = 2
"""Of CUstreamCaptureMode: a thread that captures may give memory back, as the collector does at any time."""


class CudaError(MimoError):
    """The driver answered with an error."""

    def __init__(self, function: str, code: int, name: str) -> None:
        """Take the function that was called, CUresult, and its name."""
        super().__init__(f"the NVIDIA driver answers {function} with {name} ({code})")
        self.code = code


class CudaLost(CudaError, DeviceLost):
    """The driver answered with an error after which nothing can be done with the GPU in this process."""

    def __init__(self, function: str, code: int, name: str) -> None:
        """See `CudaError`."""
        super().__init__(function, code, name)
        self.remedy = "The GPU answers nothing more in this process: start another one"


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A matrix in device memory as the tensor memory accelerator reads it, box by box (row-major).

    The parameter of the kernel is ``const __grid_constant__ CUtensorMap``. What a box holds outside the
    matrix is zero. ``swizzle``: bytes of the pattern in shared memory, 0 for none; a row of a box is as long.
    A box begins at a multiple of 128 bytes of shared memory, of 1024 with a swizzle of 128; which 16 bytes
    change places goes by the address there, not by the row of the box.
    """

    array: str
    """Name of an argument or of a scratch array."""
    dtype: str
    """Of one element: ``bfloat16``, ``float16``, ``float8_e4m3fn``, ``int8``, ``uint8``, ``float32``."""
    rows: int
    columns: int
    box_rows: int
    box_columns: int
    swizzle: Literal[0, 32, 64, 128] = 128

    @property
    def bytes(self) -> int:
        """Of the whole matrix."""
        return self.rows * self.columns * MAP_ELEMENTS[self.dtype][1]


Operand = str | int | float | TensorMap
"""A parameter: the name of an argument or scratch array (a pointer), an int32, a float32, or a tensor map."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a ``__global__`` function."""

    symbol: str
    """An ``extern "C"`` name in the text."""
    grid: tuple[int, int, int]
    threads: int
    """Of a block, in x."""
    operands: tuple[Operand, ...]
    """Parameters in order."""
    shared_bytes: int = 0
    """Dynamic shared memory of a block."""
    cluster: int = 1
    """Blocks of a cluster, in x; the text declares as many, where the driver reads it."""


class Driver:
    """The driver's library, and this machine's first GPU."""

    def __init__(self, name: str | None = None) -> None:
        """Load it (None: this machine's) and find the GPU; `enter` makes it usable.

        Raises:
            MimoError: there is no driver, it is too old, it fails, or it finds no GPU.
        """
        try:
            self._library: Any = ctypes.CDLL(name or LIBRARY)
            self.process = os.getpid()
        except OSError as error:
            raise MimoError(f"there is no NVIDIA driver: {error}") from error
        for function, kinds in _SIGNATURES.items():
            try:
                getattr(self._library, function).argtypes = kinds
            except AttributeError as error:
                raise MimoError(
                    f"the NVIDIA driver is too old: it has no {function}",
                    remedy="Install one of CUDA 12 or later",
                ) from error
        self("cuInit", 0)
        count, self._device = c_int(), c_int()
        self("cuDeviceGetCount", byref(count))
        if count.value < 1:
            raise MimoError("the NVIDIA driver finds no GPU")
        self("cuDeviceGet", byref(self._device), 0)
        self._context: c_void_p | None = None

    def __call__(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            CudaError: it answers with an error.
            CudaLost: it answers with one after which it answers nothing else.
            MimoError: this process was forked from the one that began to use the driver.
        """
        if os.getpid() != self.process:
            raise MimoError(
                f"the GPU belongs to process {self.process}, from which this one was forked",
                remedy="Load the artifact in each process, and start processes by spawn.",
            )
        error = int(getattr(self._library, function)(*arguments))
        if error:
            name = c_char_p()
            self._library.cuGetErrorName(error, byref(name))
            kind = CudaLost if error in _LOST else CudaError
            raise kind(function, error, (name.value or b"an unknown error").decode())

    def release(self, function: str, *arguments: Any) -> None:
        """Call a function that gives something back; after an error it fails as well, which tells no more."""
        getattr(self._library, function)(*arguments)

    def enter(self) -> None:
        """Make the GPU's context current in the calling thread.

        Raises:
            CudaError: the driver refuses.
        """
        if self._context is None:
            context = c_void_p()
            self("cuDevicePrimaryCtxRetain", byref(context), self._device)
            self._context = context
        self("cuCtxSetCurrent", self._context)

    @property
    def name(self) -> str:
        """Of the GPU."""
        text = ctypes.create_string_buffer(256)
        self("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode(errors="replace")

    @property
    def uuid(self) -> str:
        """Of the GPU, as NVML spells it, whose numbers count GPUs in another order than CUDA does."""
        raw = (ctypes.c_ubyte * 16)()
        self("cuDeviceGetUuid_v2", raw, self._device)
        return f"GPU-{UUID(bytes=bytes(raw))}"

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the GPU, e.g. ``(9, 0)``."""
        value = [c_int(), c_int()]
        for into, number in zip(value, (_MAJOR, _MINOR), strict=True):
            self("cuDeviceGetAttribute", byref(into), number, self._device)
        return value[0].value, value[1].value

    @property
    def release_of_cuda(self) -> tuple[int, int]:
        """Release of CUDA that the driver is of, e.g. ``(13, 0)``."""
        value = c_int()
        self("cuDriverGetVersion", byref(value))
        return value.value // 1000, value.value % 1000 // 10


@cache
def driver() -> Driver:
    """Return the driver of this machine.

    Raises:
        MimoError: as `Driver`.
    """
    return Driver()


def captured(on: Driver, stream: c_void_p, work: Callable[[], None]) -> c_void_p:
    """Return what some work queues on a stream as an executable graph on the GPU; nothing takes place now.

    ``cuGraphExecDestroy`` gives it back.

    Raises:
        CudaError: the driver refuses to queue that into a graph, or there is no memory for one.
    """
    graph, made = c_void_p(), c_void_p()
    try:
        on("cuStreamBeginCapture_v2", stream, _RELAXED)
        work()
    except BaseException:
        on.release("cuStreamEndCapture", stream, byref(graph))
        if graph:
            on.release("cuGraphDestroy", graph)
        raise
    on("cuStreamEndCapture", stream, byref(graph))
    try:
        on("cuGraphInstantiateWithFlags", byref(made), graph, 0)
    finally:
        on.release("cuGraphDestroy", graph)
    try:
        # else its first launch, which may be one that is timed, would bring it to the GPU
        on("cuGraphUpload", made, stream)
    except BaseException:
        on.release("cuGraphExecDestroy", made)
        raise
    return made


class Launches:
    """The launches of one kernel with their parameters, on arrays that stay where they are."""

    def __init__(
        self,
        on: Driver,
        module: c_void_p,
        launches: Sequence[Launch],
        place: Callable[[str], int],
    ) -> None:
        """Prepare them.

        Args:
            on: The driver.
            module: Machine code, loaded.
            launches: In their order.
            place: Returns the address of an array by its name.

        Raises:
            CudaError: the code has no such function, or the driver refuses a tensor map.
            MimoError: the code was compiled for clusters of another size.
        """
        self._on = on
        self._kept: list[Any] = []  # what the pointers to parameters point to
        shared: dict[str, int] = {}
        for launch in launches:  # one function may be launched with different sizes
            shared[launch.symbol] = max(shared.get(launch.symbol, 0), launch.shared_bytes)
        functions = {symbol: self._function(module, symbol, n) for symbol, n in shared.items()}
        for launch in launches:
            self._check_cluster(functions[launch.symbol], launch)
        self._calls = [self._prepared(functions[x.symbol], x, place) for x in launches]

    def __call__(self, stream: c_void_p | None = None) -> None:
        """Queue all of them on a stream (None: the default one).

        Raises:
            CudaError: a launch is refused.
        """
        for arguments in self._calls:
            self._on("cuLaunchKernel", *arguments[:8], stream, *arguments[8:])

    def _function(self, module: c_void_p, symbol: str, shared_bytes: int) -> c_void_p:
        function = c_void_p()
        self._on("cuModuleGetFunction", byref(function), module, symbol.encode())
        self._on("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared_bytes)
        return function

    def _check_cluster(self, function: c_void_p, launch: Launch) -> None:
        width = c_int()
        self._on("cuFuncGetAttribute", byref(width), _CLUSTER_WIDTH, function)
        if max(width.value, 1) != launch.cluster:
            raise MimoError(
                f"{launch.symbol} is launched in clusters of {launch.cluster} blocks, and was compiled for "
                f"{max(width.value, 1)}"
            )

    def _prepared(
        self, function: c_void_p, launch: Launch, place: Callable[[str], int]
    ) -> tuple[Any, ...]:
        """Return the arguments of ``cuLaunchKernel`` but for the stream."""
        values = [self._operand(operand, place) for operand in launch.operands]
        self._kept.append(values)
        pointers = (c_void_p * max(len(values), 1))(*(ctypes.addressof(v) for v in values))
        x, y, z = launch.grid
        return (function, x, y, z, launch.threads, 1, 1, launch.shared_bytes, pointers, None)

    def _operand(self, operand: Operand, place: Callable[[str], int]) -> Any:
        if isinstance(operand, str):
            return c_uint64(place(operand))
        if isinstance(operand, int):
            return c_int(operand)
        if isinstance(operand, float):
            return c_float(operand)
        return tensor_map(self._on, operand, place(operand.array))


def tensor_map(on: Driver, given: TensorMap, address: int) -> Any:
    """Return a ``CUtensorMap`` of a matrix in device memory: 128 bytes, aligned as they must be.

    Raises:
        CudaError: the driver refuses it.
    """
    memory = (ctypes.c_ubyte * (_MAP_BYTES + _MAP_ALIGNMENT))()
    made = (ctypes.c_ubyte * _MAP_BYTES).from_buffer(
        memory, -ctypes.addressof(memory) % _MAP_ALIGNMENT
    )
    kind, size = MAP_ELEMENTS[given.dtype]
    on(
        "cuTensorMapEncodeTiled", ctypes.addressof(made), kind, 2, address,
        (c_uint64 * 2)(given.columns, given.rows), (c_uint64 * 1)(given.columns * size),
        (c_uint * 2)(given.box_columns, given.box_rows), (c_uint * 2)(1, 1), 0,
        _SWIZZLES[given.swizzle], _PROMOTE_256, 0,
    )  # fmt: skip
    return made
