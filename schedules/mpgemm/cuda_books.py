"""Codebooks as bytes that CUDA kernels look up: see `device/codes.cuh`.

Where matrix units multiply 16-bit floats, an entry is a sum of them: of three of bfloat16, which leaves less
than float32's own rounding u = 2^-24 of it, or of two of float16, which leaves less than 2 u. Books that take
two are multiplied by 2^12 beforehand, so that the second one keeps its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.ir.formats import WeightFormat
from mimo_compile.ir.ops.numerics import bf16_to_f32, f32_to_bf16

ENTRIES = 16
"""Of a book; those of 8 come twice."""
_RAISED = 2.0**12
"""What numbers are multiplied by that take two terms of float16."""
_MOST_TERMS = 3


@dataclass(frozen=True, slots=True)
class Book:
    """A codebook in the type of what it is multiplied with."""

    words: tuple[int, ...]
    """Four for each plane, the bytes of one significance of 16 entries."""
    planes: int
    """``int8``: 1. 16 bits: two for each term. ``f32``: 4, or 2 where bfloat16 holds the entries."""
    unit: float
    """What the numbers count."""

    @property
    def terms(self) -> int:
        """Products that a weight takes on matrix units (not of ``f32``)."""
        return max(1, self.planes // 2)


@cache
def book_of(fmt: WeightFormat, kind: str) -> Book:
    """Return the book of a format.

    Args:
        fmt: A codebook's format with one scale for both signs.
        kind: Of what it is multiplied with: ``int8``, ``bf16``, ``f16``, or ``f32`` without matrix units.

    Raises:
        ValueError: no 8-bit integers are the entries, in halves.
    """
    values = np.resize(np.array(fmt.values), ENTRIES)
    if kind == "int8":
        unit = 0.5 if (values % 1).any() else 1.0
        if (values / unit % 1).any():
            raise ValueError(f"{fmt} has entries that are no integers")
        return _book([(values / unit).astype(np.int8)], unit)
    bf16 = _terms(values, f32_to_bf16, bf16_to_f32)
    if kind == "bf16" or (kind == "f32" and len(bf16) == 1):
        return _book(bf16, 1.0)
    if kind == "f32":
        return _book([values.astype(np.float32)], 1.0)
    f16 = _terms(values, _half, np.asarray)
    return (
        _book(f16, 1.0)
        if len(f16) == 1
        else _book(_terms(values * _RAISED, _half, np.asarray)[:2], 1 / _RAISED)
    )


def takes_int8(fmt: WeightFormat) -> bool:
    """Say whether a book's entries are 8-bit integers, in halves."""
    return all(2 * value % 1 == 0 for value in fmt.values)


def _half(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.astype(np.float16)


def _terms(
    values: npt.NDArray[Any],
    narrow: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
    widen: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
) -> list[npt.NDArray[Any]]:
    """Return the 16-bit numbers that add up to values, the greatest first, three at most."""
    out: list[npt.NDArray[Any]] = []
    rest = values.astype(np.float64)
    while len(out) < _MOST_TERMS and (rest.any() or not out):
        out.append(narrow(rest))
        rest = rest - widen(out[-1])
    return out


def _book(numbers: list[npt.NDArray[Any]], unit: float) -> Book:
    planes = [
        n.view(np.uint8).reshape(ENTRIES, -1)[:, i] for n in numbers for i in range(n.itemsize)
    ]
    words = np.ascontiguousarray(planes).view("<u4")
    return Book(tuple(int(word) for word in words.ravel()), len(planes), unit)
