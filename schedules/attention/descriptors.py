"""The layout of descriptors of blocks that updates and scores agree on.

Descriptors that are scored, ``e16``: ``[KV, ceil(E/16), parts, D, 16]``, so that the lanes of a vector are 16
entries and a score needs no sum over lanes. Of bfloat16, ``e16.d2``: ``[KV, ceil(E/16), parts, ceil(D/2), 16,
2]``, pairs along d as in caches of keys; the pad of an odd D is zero. In memory the last two extents are one.

In a pool the n entries of a page are such a vector, ``en``: ``[KV, pages, parts, D, n]``, so that they lie
together, and kernels that score them put vectors of 16 together first.

Those that matmuls or choices of channels read (kinds `peak` and `pool3`) stay ``[E, KV, parts, D]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile.ir.caches import CacheFormat
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.pages import paged, rows_in_page, span_of
from mimo_compile.schedules.emit.vector import LANES

LANED = frozenset({"bounds", "mean"})
"""Kinds of descriptors whose entries stand in lanes."""


def lanes_of(p: Mapping[str, Any]) -> int:
    """Return how many entries are a vector, for an op's parameters: 16, or those of a page."""
    return rows_in_page(p["page"], span_of(p, "desc")) if paged(p) else LANES


def layout_name(fmt: CacheFormat, lanes: int = LANES) -> str:
    """Return the name of the layout of descriptors in a format."""
    return f"e{lanes}" if fmt.bits == 32 else f"e{lanes}.d2"


def shape(
    entries: int, kv: int, parts: int, d: int, fmt: CacheFormat, lanes: int = LANES
) -> tuple[int, ...]:
    """Return the extents of the laid out array."""
    pair = 32 // fmt.bits
    return (kv, -(-entries // lanes), parts, -(-d // pair), lanes * pair)


def laid_out(desc: Array, fmt: CacheFormat, lanes: int = LANES) -> Array:
    """Return canonical descriptors ``[E, KV, parts, D]`` as kernels read them; padding is zero."""
    entries, kv, parts, d = desc.shape
    pair = 32 // fmt.bits
    padded = np.pad(desc, ((0, -entries % lanes), (0, 0), (0, 0), (0, -d % pair)))
    packed = padded.reshape(-1, lanes, kv, parts, -(-d // pair), pair).transpose(2, 0, 3, 4, 1, 5)
    return np.ascontiguousarray(packed).reshape(shape(entries, kv, parts, d, fmt, lanes))


def canonical(array: Array, entries: int, d: int, fmt: CacheFormat, lanes: int = LANES) -> Array:
    """Inverse of `laid_out`."""
    kv, _, parts, wide, _ = array.shape
    pair = 32 // fmt.bits
    apart = array.reshape(kv, -1, parts, wide, lanes, pair).transpose(1, 4, 0, 2, 3, 5)
    return np.ascontiguousarray(apart.reshape(-1, kv, parts, wide * pair)[:entries, ..., :d])
