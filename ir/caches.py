"""Formats of KV caches: how kernels keep keys and values between calls.

Here are the formats that keep each number by itself; `kv_groups` has those of few bits with shared scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mimo_compile.errors import UsageError
from mimo_compile.ir import float8
from mimo_compile.ir.kv_groups import GROUPED, GroupedFormat
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.numerics import bf16_to_f32, f32_to_bf16


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """One storage format of keys and values."""

    name: str
    """As the ops' parameter ``c`` says it."""
    bits: int
    """Of one stored element."""
    scheme: str
    """Its spelling in ``--quant``, behind ``kv``; empty: the format of a scheme that names none."""
    dtype: str
    """Of the ops' arguments; `bfloat16` arrays travel as uint16 bit patterns, those of scaled formats as what
    their numbers stand for."""
    unit: float
    """Largest relative error of storing a float32 number (0: none)."""

    @property
    def bytes(self) -> float:
        """Bytes of one stored element."""
        return self.bits / 8

    @property
    def stored(self) -> str:
        """Element type of the arrays that kernels and artifacts hold."""
        if self.name in SCALED:
            return "uint8"
        return "uint16" if self.dtype == "bfloat16" else self.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """Element type of the caches of eager models."""
        found: Any = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    def encode(self, values: Array) -> Array:
        """Round float32 values (NaN too) to stored elements, half to even."""
        if self.name in SCALED:
            return float8.rounded_array(values)
        if self.dtype == "float32":
            return values.astype(np.float32)
        bits = f32_to_bf16(values)
        return np.where(np.isnan(values), np.uint16(0x7FC0), bits).astype(np.uint16)

    def decode(self, stored: Array) -> Array:
        """Return the float32 values of stored elements."""
        return stored if self.dtype == "float32" else bf16_to_f32(stored)

    def __str__(self) -> str:
        """Return the format's name."""
        return self.name


FORMATS = {
    f.name: f
    for f in (
        CacheFormat("f32", 32, "", "float32", 0.0),
        CacheFormat("bf16", 16, "16", "bfloat16", 2.0**-8),
    )
}
"""Every format that keeps each number by itself, by name."""


SCALED = {"e4m3": CacheFormat("e4m3", 8, "fp8", "float32", float8.UNIT)}
"""Formats that keep each number by itself but for a scale, which those of a row share, by name."""


def single_format(text: str) -> CacheFormat:
    """Return the format of a name, one of `FORMATS` or `SCALED`.

    Raises:
        UsageError: there is no such format.
    """
    return SCALED[text] if text in SCALED else parse_cache_format(text)


def parse_cache_format(text: str) -> CacheFormat:
    """Return the format of single numbers of a name: ``f32`` or ``bf16``.

    Raises:
        UsageError: there is no such format.
    """
    if text not in FORMATS:
        raise UsageError(
            f"unknown format of KV caches {text!r}", remedy=f"use one of {', '.join(FORMATS)}"
        )
    return FORMATS[text]


def check_cache_format(text: str) -> None:
    """Refuse names of which there is no format, neither of single numbers nor in groups.

    Raises:
        UsageError: there is no such format.
    """
    if text not in (known := [*FORMATS, *SCALED, *GROUPED]):
        raise UsageError(
            f"unknown format of KV caches {text!r}", remedy=f"use one of {', '.join(known)}"
        )


def scheme_cache_format(kv: str) -> CacheFormat | GroupedFormat:
    """Return the cache format of the KV part of a ``--quant`` value, e.g. ``16`` in ``w4g64a8kv16``."""
    known: list[CacheFormat | GroupedFormat] = [
        *FORMATS.values(),
        *SCALED.values(),
        *GROUPED.values(),
    ]
    return next(found for found in known if found.scheme == kv)


def window_cache_format(caches: CacheFormat | GroupedFormat) -> CacheFormat:
    """Return the format of window layers' rings in a model with these caches.

    Rings are small and groups of positions do not fit them: beside caches in groups they are bfloat16.
    """
    return FORMATS["bf16"] if isinstance(caches, GroupedFormat) else caches


def slot_of(position: Any, cap: int, first: int = 0) -> Any:
    """Return the slots of positions, an array or tensor of integers, in a cache of ``cap`` slots.

    The ``first`` positions stay in slots of their own; later ones share the rest as a ring.
    """
    ring = first + (position - first) % (cap - first)
    late = position >= first
    return ring * late + position * ~late if first else position % cap


def check_first(op: str, p: Mapping[str, Any]) -> None:
    """Refuse first positions, or a ring behind them, that do not fill whole vectors of 16 slots.

    Raises:
        UsageError: naming the op.
    """
    first, cap = p["first"], p["cap"]
    if first and not (first % 16 == 0 and cap % 16 == 0 and first < cap):
        raise UsageError(
            f"{op}: first={first} positions cannot stay in a cache of cap={cap}",
            remedy="use multiples of 16, and a greater cap than first",
        )
    if first and (p["c"] not in FORMATS or p["lay"] or p.get("page")):
        raise UsageError(
            f"{op}: first={first} is for caches of float numbers in their usual order",
            remedy="leave out page, lay and c, or use c=bf16",
        )


CACHE_ORDERS = ("", "rows")
"""How kernels keep caches: as the format of their numbers has it, for whole blocks of slots; or each key, and
each value, by itself, where single tokens are listed. A layer's ops must all say the same (``lay``);
`describe_blocks`, `score_lowbit` and int8 arithmetic have the first alone."""


def check_cache_order(op: str, p: Mapping[str, Any]) -> None:
    """Refuse an unknown order of caches (``lay``), and one that the format of their numbers does not have.

    Raises:
        UsageError: naming the op.
    """
    if p["lay"] not in CACHE_ORDERS:
        raise UsageError(f"{op}: lay={p['lay']} is unknown", remedy="leave it out, or use lay=rows")
    if p["lay"] and (p["c"] not in FORMATS or p.get("arith", "float") != "float"):
        raise UsageError(
            f"{op}: lay={p['lay']} is for caches of float numbers, and for float arithmetic",
            remedy="leave out lay, or c and arith",
        )
