"""Kernels on the GPU of this machine, through the driver's own library: what they compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from ctypes import byref, c_uint64, c_void_p

import numpy as np

from mimo_compile._cuda import Driver, Launches, driver
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Array
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.cuda import limits
from mimo_compile.schedules.cuda.memory import Cell, carrier, cells_of
from mimo_compile.schedules.cuda.nvcc import compile_device


class Loaded:
    """A kernel on the GPU with its arrays; made by `loaded`."""

    def __init__(self, on: Driver, kernel: Kernel, hardware: Hardware, cleanup: ExitStack) -> None:
        """Load the machine code and allocate the arrays; ``cleanup`` frees them."""
        self._on, self._cleanup = on, cleanup
        code = limits.check(kernel, hardware)
        self._cells = cells_of(kernel, code)
        module = c_void_p()
        on("cuModuleLoadData", byref(module), compile_device(kernel, hardware).cubin)
        cleanup.callback(on.release, "cuModuleUnload", module)
        self._place = {c.name: self.allocate(limits.array_bytes(c.arg)) for c in self._cells}
        self._zeroed = [
            (self._place[c.name], limits.array_bytes(c.arg)) for c in self._cells if c.zeroed
        ]
        try:
            self._launches = Launches(
                on, module, code.launches, lambda name: self._place[name].value
            )
        except ValueError as error:
            raise ValueError(f"{kernel.name}: {error}") from error

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
        self._launches()

    def results(self) -> dict[str, Array]:
        """Wait, and return outputs and mutated states."""
        self._on("cuCtxSynchronize")
        return {c.name: self._read(c) for c in self._cells if c.written and not c.scratch}

    def _read(self, cell: Cell) -> Array:
        host = np.empty(cell.arg.shape, carrier(cell.arg.dtype))
        self._on("cuMemcpyDtoH_v2", host.ctypes.data, self._place[cell.name], host.nbytes)
        return host


@contextmanager
def loaded(kernel: Kernel, hardware: Hardware, on: Driver | None = None) -> Iterator[Loaded]:
    """Give a kernel on the GPU; its memory is freed afterwards.

    Raises:
        MimoError: there is no driver, or it answers with an error.
        EnvironmentMismatch: there is neither nvcc nor NVRTC.
        ValueError: the GPU cannot do a launch of the kernel.
    """
    with ExitStack() as cleanup:
        on = on or driver()
        on.enter()
        yield Loaded(on, kernel, hardware, cleanup)


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
