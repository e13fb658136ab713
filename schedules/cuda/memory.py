"""The arrays of a CUDA kernel in device memory, wherever that is: what they hold before the first launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.cuda.code import DeviceCode

_CARRIERS: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("uint16"),
    "float8_e4m3fn": np.dtype("uint8"),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One array in the device's memory."""

    name: str
    arg: Arg
    written: bool
    scratch: bool = False
    zeroed: bool = False

    def filled(self, arrays: Mapping[str, Array]) -> Array:
        """Return what the array holds before the first launch; outputs and scratch arrays are poisoned."""
        arg, dtype = self.arg, carrier(self.arg.dtype)
        if self.zeroed:
            return np.zeros(arg.shape, dtype)
        if self.scratch or arg.role == "output":
            if arg.dtype in _CARRIERS:  # a NaN
                return np.full(arg.shape, 0x7FC0 if dtype.itemsize == 2 else 0x7F, dtype)
            if dtype.kind == "f":
                return np.full(arg.shape, np.nan, dtype)
            if dtype.kind == "b":  # neither of the two
                return np.full(arg.shape, 0xFF, np.uint8).view(dtype)
            # unsigned: all bits 1, a NaN where they hold floats; 0 would be what padding must be
            limits = np.iinfo(dtype)
            return np.full(arg.shape, limits.min if dtype.kind == "i" else limits.max, dtype)
        array = arrays[self.name]
        if array.shape != arg.shape or array.dtype.itemsize != dtype.itemsize:
            raise ValueError(
                f"{arg.name}: {array.dtype}{array.shape} instead of {arg.dtype}{arg.shape}"
            )
        return array


def carrier(dtype: str) -> np.dtype[Any]:
    """Return the type of numpy's arrays that hold numbers of a type that numpy does not have."""
    return _CARRIERS[dtype] if dtype in _CARRIERS else np.dtype(dtype)


def cells_of(kernel: Kernel, code: DeviceCode) -> list[Cell]:
    """Return a kernel's arguments and scratch arrays."""
    own = [Cell(a.name, a, a.role == "output" or a.mutated) for a in kernel.args]
    return own + [Cell(n, a, True, True, n in code.zeroed) for n, a in code.scratch.items()]
