"""Argument memory for a kernel under test: aligned, guarded on both sides, poisoned, restorable."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile import _tvm

Array = npt.NDArray[Any]

GUARD = 16 << 10
"""Bytes of guard on each side of each argument."""
_BOUNDARY = 128
"""Arguments begin 64 bytes behind a multiple of it: aligned as is promised, and never better."""


class Buffer:
    """One argument: ``view`` is what the kernel gets, surrounded by guard bytes."""

    scratch = False

    def __init__(self, spec: dict[str, Any]) -> None:
        """Allocate for an argument ``{name, role, shape, dtype, mutated, file}``.

        ``file`` names the ``.npy`` file of its first contents; an output has none.
        """
        self.name: str = spec["name"]
        self.role: str = spec["role"]
        self.mutated: bool = bool(spec["mutated"])
        shape = tuple(spec["shape"])
        dtype = "uint16" if spec["dtype"] == "bfloat16" else spec["dtype"]
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = _tvm.empty_aligned(size + 2 * GUARD + 64 + _BOUNDARY, "uint8")
        start = (_tvm.ALIGNMENT - memory.ctypes.data - GUARD) % _BOUNDARY
        self._memory = memory[start : start + size + 2 * GUARD + 64]
        self._bytes = self._memory[GUARD : GUARD + size]
        self.view = self._bytes.view(dtype).reshape(shape)
        self.origin: Array | None = None
        if spec["file"]:
            self.origin = np.load(spec["file"], mmap_mode="r", allow_pickle=False)
            if self.origin.shape != shape or self.origin.dtype.itemsize != self.view.dtype.itemsize:
                raise ValueError(
                    f"argument {self.name}: the kernel wants {spec['dtype']}{list(shape)}, packing gave "
                    f"{self.origin.dtype}{list(self.origin.shape)}"
                )
        self.tensor_shape = shape
        self.tensor_dtype: str = spec["dtype"]
        self.restore()

    def tensor(self) -> Any:
        """Return the tensor that the kernel takes."""
        return as_tensor(self.view, self.tensor_dtype)

    def restore(self) -> None:
        """Write the first contents again (outputs keep what they hold)."""
        if self.origin is not None:
            self._bytes[...] = np.ascontiguousarray(self.origin).reshape(-1).view(np.uint8)

    def poison(self, pattern: int) -> None:
        """Fill the guards, and an output's elements, with a byte."""
        self._memory[:GUARD] = pattern
        self._memory[GUARD + self._bytes.size :] = pattern
        if self.role == "output":
            self._bytes[...] = pattern

    def guards_hold(self, pattern: int) -> bool:
        """True when no byte of the guards changed since `poison`."""
        before, after = self._memory[:GUARD], self._memory[GUARD + self._bytes.size :]
        return bool((before == pattern).all() and (after == pattern).all())

    @property
    def written(self) -> bool:
        """True for what the kernel may write."""
        return self.role == "output" or self.mutated

    def unchanged(self) -> bool:
        """True when the memory still holds the first contents, byte by byte."""
        assert self.origin is not None
        return np.array_equal(
            self._bytes, np.ascontiguousarray(self.origin).reshape(-1).view(np.uint8)
        )

    def digest(self) -> bytes:
        """Return a hash of the memory."""
        return hashlib.blake2b(self._bytes.data).digest()

    def contents(self) -> Array:
        """Return the memory itself."""
        return self.view

    def copy(self) -> Any:
        """Return a tensor on a copy of the memory without guards (to have cold data)."""
        memory = _tvm.empty_aligned(self.view.shape, self.view.dtype)
        memory[...] = self.view
        return as_tensor(memory, self.tensor_dtype)


def as_tensor(array: Array, dtype: str) -> Any:
    """View an array as a tensor; ``bfloat16`` arrays travel as uint16."""
    if dtype == "bfloat16":
        import ml_dtypes

        array = array.view(ml_dtypes.bfloat16)
    return _tvm.from_numpy(array)
