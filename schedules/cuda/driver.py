"""Kernels on the GPU of this machine, through the driver's own library: results, and times by its events.

Written against ``cuda.h``; tests make every call to a library of its prototypes, in place of a driver.
No GPU has run it so far (docs/gpu-validation.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from functools import cache
from typing import Any

import numpy as np

from mimo_compile.errors import MimoError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Array
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.cuda import limits
from mimo_compile.schedules.cuda.code import Launch, TensorMap
from mimo_compile.schedules.cuda.memory import Cell, carrier, cells_of
from mimo_compile.schedules.cuda.nvcc import compile_device

_U3 = (c_uint, c_uint, c_uint)
# Without these ctypes would cut addresses down to 32 bits.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemsetD8Async": (c_uint64, ctypes.c_ubyte, c_size_t, c_void_p),
    "cuLaunchKernel": (c_void_p, *_U3, *_U3, c_uint, c_void_p, POINTER(c_void_p), c_void_p),
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
_MAX_DYNAMIC_SHARED = 8
"""Of CUfunction_attribute."""
_ELEMENTS = {
    "uint8": 0, "int8": 0, "float8_e4m3fn": 0, "float16": 6, "float32": 7, "bfloat16": 9,
}  # fmt: skip
"""Of CUtensorMapDataType; bytes of any meaning are uint8."""
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_PROMOTE_256 = 3
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


class Driver:
    """The driver's library with the first GPU's context, current in this thread."""

    def __init__(self, name: str = "libcuda.so.1") -> None:
        """Load it and make the context current.

        Raises:
            MimoError: there is no driver, or it fails.
        """
        try:
            self._library: Any = ctypes.CDLL(name)
        except OSError as error:
            raise MimoError(f"there is no NVIDIA driver: {error}") from error
        for function, kinds in _SIGNATURES.items():
            getattr(self._library, function).argtypes = kinds
        self("cuInit", 0)
        device, context = c_int(), c_void_p()
        self("cuDeviceGet", byref(device), 0)
        self("cuDevicePrimaryCtxRetain", byref(context), device)
        self("cuCtxSetCurrent", context)

    def __call__(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            MimoError: it answers with an error.
        """
        error = int(getattr(self._library, function)(*arguments))
        if error:
            name = c_char_p()
            self._library.cuGetErrorName(error, byref(name))
            text = (name.value or b"an unknown error").decode()
            raise MimoError(f"the NVIDIA driver answers {function} with {text} ({error})")

    def release(self, function: str, *arguments: Any) -> None:
        """Call a function that gives something back; after an error it fails as well, which tells no more."""
        getattr(self._library, function)(*arguments)


@cache
def driver() -> Driver:
    """Return the driver of this machine."""
    return Driver()


class Loaded:
    """A kernel on the GPU with its arrays; made by `loaded`."""

    def __init__(self, on: Driver, kernel: Kernel, hardware: Hardware, cleanup: ExitStack) -> None:
        """Load the machine code and allocate the arrays; ``cleanup`` frees them."""
        self._on, self._cleanup = on, cleanup
        code = limits.check(kernel, hardware)
        if any(launch.cluster != 1 for launch in code.launches):
            raise ValueError(f"{kernel.name}: clusters of blocks are not launched")
        self._cells = cells_of(kernel, code)
        self._kept: list[Any] = []  # what the pointers to parameters point to
        module = c_void_p()
        on("cuModuleLoadData", byref(module), compile_device(kernel, hardware).cubin)
        cleanup.callback(on.release, "cuModuleUnload", module)
        self._place = {c.name: self.allocate(limits.array_bytes(c.arg)) for c in self._cells}
        self._zeroed = [
            (self._place[c.name], limits.array_bytes(c.arg)) for c in self._cells if c.zeroed
        ]
        self._calls = [self._prepared(module, launch) for launch in code.launches]

    def allocate(self, size: int) -> c_uint64:
        """Return device memory that is freed with the kernel."""
        place = c_uint64()
        self._on("cuMemAlloc_v2", byref(place), max(size, 1))
        self._cleanup.callback(self._on.release, "cuMemFree_v2", place)
        return place

    def fill(self, arrays: Mapping[str, Array]) -> None:
        """Copy inputs, weights and states to the GPU; all else is poisoned."""
        for cell in self._cells:
            host = np.ascontiguousarray(cell.filled(arrays))
            self._on("cuMemcpyHtoD_v2", self._place[cell.name], host.ctypes.data, host.nbytes)

    def call(self) -> None:
        """Queue all launches of one call."""
        for place, size in self._zeroed:
            self._on("cuMemsetD8Async", place, 0, size, None)
        for arguments in self._calls:
            self._on("cuLaunchKernel", *arguments)

    def results(self) -> dict[str, Array]:
        """Wait, and return outputs and mutated states."""
        self._on("cuCtxSynchronize")
        return {c.name: self._read(c) for c in self._cells if c.written and not c.scratch}

    def seconds(self, calls: int, flush_bytes: int) -> list[float]:
        """Return the time of each of some calls, with that many other bytes written before it."""
        self._on("cuCtxSynchronize")
        begin, end = c_void_p(), c_void_p()
        for event in (begin, end):
            self._on("cuEventCreate", byref(event), 0)
            self._cleanup.callback(self._on.release, "cuEventDestroy_v2", event)
        other = self.allocate(flush_bytes)
        out = []
        for _ in range(calls):
            self._on("cuMemsetD8Async", other, 0, flush_bytes, None)
            self._on("cuEventRecord", begin, None)
            self.call()
            self._on("cuEventRecord", end, None)
            self._on("cuEventSynchronize", end)
            passed = c_float()
            self._on("cuEventElapsedTime", byref(passed), begin, end)
            out.append(passed.value * 1e-3)
        return out

    def _read(self, cell: Cell) -> Array:
        host = np.empty(cell.arg.shape, carrier(cell.arg.dtype))
        self._on("cuMemcpyDtoH_v2", host.ctypes.data, self._place[cell.name], host.nbytes)
        return host

    def _prepared(self, module: c_void_p, launch: Launch) -> tuple[Any, ...]:
        """Return the arguments of ``cuLaunchKernel``."""
        function = c_void_p()
        self._on("cuModuleGetFunction", byref(function), module, launch.symbol.encode())
        self._on("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, launch.shared_bytes)
        values = [self._operand(operand) for operand in launch.operands]
        self._kept.append(values)
        pointers = (c_void_p * max(len(values), 1))(*(ctypes.addressof(v) for v in values))
        x, y, z = launch.grid
        return (function, x, y, z, launch.threads, 1, 1, launch.shared_bytes, None, pointers, None)

    def _operand(self, operand: str | int | float | TensorMap) -> Any:
        if isinstance(operand, str):
            return self._place[operand]
        if isinstance(operand, TensorMap):
            return self._tensor_map(operand)
        return c_int(operand) if isinstance(operand, int) else c_float(operand)

    def _tensor_map(self, m: TensorMap) -> Any:
        memory = (ctypes.c_ubyte * (_MAP_BYTES + _MAP_ALIGNMENT))()
        made = (ctypes.c_ubyte * _MAP_BYTES).from_buffer(
            memory, -ctypes.addressof(memory) % _MAP_ALIGNMENT
        )
        self._on(
            "cuTensorMapEncodeTiled", ctypes.addressof(made), _ELEMENTS[m.dtype], 2,
            self._place[m.array].value, (c_uint64 * 2)(m.columns, m.rows),
            (c_uint64 * 1)(m.columns * carrier(m.dtype).itemsize),
            (c_uint * 2)(m.box_columns, m.box_rows), (c_uint * 2)(1, 1), 0, _SWIZZLES[m.swizzle],
            _PROMOTE_256, 0,
        )  # fmt: skip
        return made


@contextmanager
def loaded(kernel: Kernel, hardware: Hardware, on: Driver | None = None) -> Iterator[Loaded]:
    """Give a kernel on the GPU; its memory is freed afterwards.

    Raises:
        MimoError: there is no driver, or it answers with an error.
        EnvironmentMismatch: there is no nvcc.
        ValueError: the GPU cannot do a launch of the kernel.
    """
    with ExitStack() as cleanup:
        yield Loaded(on or driver(), kernel, hardware, cleanup)


def run(
    kernel: Kernel, hardware: Hardware, arrays: Mapping[str, Array], *, order: int = 0
) -> dict[str, Array]:
    """Run a kernel once on the GPU of this machine, as `emulate.emulate` does on the CPU.

    Args:
        kernel: One with `Kernel.device`.
        hardware: The GPU.
        arrays: Its inputs, packed weights and packed states, by the names of `Kernel.args`.
        order: Of no consequence: a GPU has an order of its own.

    Returns:
        Outputs and mutated states, by name.
    """
    del order
    with loaded(kernel, hardware) as ready:
        ready.fill(arrays)
        ready.call()
        return ready.results()
