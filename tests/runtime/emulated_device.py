"""A device for the runtime that runs an artifact's own CUDA text on the CPU, thread by thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mimo_compile.ir.hardware import CUDA
from mimo_compile.runtime.device_code import Code
from mimo_compile.schedules.cuda.emulate import emulate
from mimo_compile.schedules.cuda.limits import array_bytes
from mimo_compile.schedules.cuda.memory import carrier
from mimo_compile.schedules.cuda.table import kernel_of

BASE = 1 << 40  # no address of this process


class EmulatedDevice:
    """See `runtime.gpu_device.Device`; what is queued takes place at once."""

    name, capability, cuda = "Emulated", (9, 0), (99, 0)

    def __init__(self, target: str = "cuda:sm_90a") -> None:
        self.hardware = CUDA[target]
        self.capability = {"cuda:sm_80": (8, 0), "cuda:sm_90a": (9, 0)}[target]
        self.launched: list[str] = []
        """Kernels in the order of their calls."""
        self._pieces: list[tuple[int, np.ndarray]] = []
        self._end = BASE

    def enter(self) -> None:
        pass

    def allocate(self, size: int, what: str) -> int:
        address = self._end
        memory = np.full(max(size, 1), 0xFF, np.uint8)  # NaN
        self._pieces.append((address, memory))
        self._end += -(-max(size, 1) // 4096) * 4096 + 4096
        return address

    def host(self, size: int) -> Any:
        return np.zeros(size, np.uint8)

    def _at(self, address: int, size: int) -> np.ndarray:
        base, memory = next((b, m) for b, m in reversed(self._pieces) if b <= address)
        assert address + size <= base + len(memory), "outside of what was allocated"
        return memory[address - base : address - base + size]

    def write(self, address: int, data: Any) -> None:
        self._at(address, data.nbytes)[:] = data

    def read(self, address: int, into: Any) -> None:
        into[:] = self._at(address, into.nbytes)

    def copy(self, address: int, source: int, size: int) -> None:
        self._at(address, size)[:] = self._at(source, size).copy()

    def zero(self, address: int, size: int) -> None:
        self._at(address, size)[:] = 0

    def kernel(self, name: str, code: Code, places: Mapping[str, int]) -> Callable[[], None]:
        kernel = kernel_of(name, code.table.kernels[name], code.text(name))
        args = {a.name: a for a in kernel.args}

        def array(arg: Any) -> np.ndarray:
            memory = self._at(places[arg.name], array_bytes(arg))
            return memory.view(carrier(arg.dtype)).reshape(arg.shape)

        def run() -> None:
            self.launched.append(name)
            given = {a.name: array(a).copy() for a in kernel.args if a.role != "output"}
            for written, values in emulate(kernel, self.hardware, given).items():
                array(args[written])[...] = values

        return run

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def wait(self) -> None:
        pass

    def seconds(self, work: Callable[[], None]) -> float:
        work()
        return 1e-6
