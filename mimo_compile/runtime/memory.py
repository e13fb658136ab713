"""Zeroed memory that costs nothing until it is touched, and tensors on top of it."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile import _tvm
from mimo_compile.runtime import dtypes

Bytes = npt.NDArray[np.uint8]
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # a constant of Python only since 3.13
_HUGE = 4 << 20


class Zeroed:
    """A private mapping: zero at first, page aligned, without cost until touched."""

    def __init__(self, size: int, *, huge: bool = False, used: int | None = None) -> None:
        """Reserve `size` bytes.

        Args:
            size: Bytes.
            huge: Ask for huge pages (for memory that is used as a whole).
            used: Bytes from the first on that will be touched; None: all. No huge page reaches beyond.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        self._map = mmap.mmap(-1, max(size, 1), flags=flags)
        if huge and size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        end = whole if used is None else -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
        if end < whole and hasattr(mmap, "MADV_NOHUGEPAGE"):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_NOHUGEPAGE, end, whole - end)
        self.bytes: Bytes = np.frombuffer(self._map, np.uint8, size)
        """The memory; views of it keep the mapping alive."""

    def clear(self) -> None:
        """Make everything zero again by giving the pages back."""
        self._map.madvise(mmap.MADV_DONTNEED)


def as_array(data: Bytes, dtype: str, shape: tuple[int, ...], offset: int = 0) -> npt.NDArray[Any]:
    """View bytes, from `offset` on, as an array."""
    part = data[offset : offset + dtypes.size(dtype, shape)]
    return part.view(dtypes.numpy_dtype(dtype)).reshape(shape)


def as_tensor(array: npt.NDArray[Any]) -> Any:
    """View an array as a tensor that kernels take; it keeps the memory alive."""
    return _tvm.from_numpy(array, alignment=array.itemsize)
