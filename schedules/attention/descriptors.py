"""The layout of descriptors of blocks that updates and scores agree on.

Descriptors that are scored, ``e16``: ``[KV, ceil(E/16), parts, D, 16]``, so that the lanes of a vector are 16
entries and a score needs no sum over lanes. Of bfloat16, ``e16.d2``: ``[KV, ceil(E/16), parts, ceil(D/2), 16,
2]``, pairs along d as in caches of keys; the pad of an odd D is zero. In memory the last two extents are one.

Those that matmuls or choices of channels read (kinds `peak` and `pool3`) stay ``[E, KV, parts, D]``.
"""

from __future__ import annotations

import numpy as np

from mimo_compile.ir.caches import CacheFormat
from mimo_compile.ir.ops.base import Array
from mimo_compile.schedules.emit.vector import LANES

LANED = frozenset({"bounds", "mean"})
"""Kinds of descriptors whose entries stand in lanes."""


def layout_name(fmt: CacheFormat) -> str:
    """Return the name of the layout of descriptors in a format."""
    return "e16" if fmt.bits == 32 else "e16.d2"


def shape(entries: int, kv: int, parts: int, d: int, fmt: CacheFormat) -> tuple[int, ...]:
    """Return the extents of the laid out array."""
    pair = 32 // fmt.bits
    return (kv, -(-entries // LANES), parts, -(-d // pair), LANES * pair)


def laid_out(desc: Array, fmt: CacheFormat) -> Array:
    """Return canonical descriptors ``[E, KV, parts, D]`` as kernels read them; padding is zero."""
    entries, kv, parts, d = desc.shape
    pair = 32 // fmt.bits
    padded = np.pad(desc, ((0, -entries % LANES), (0, 0), (0, 0), (0, -d % pair)))
    lanes = padded.reshape(-1, LANES, kv, parts, -(-d // pair), pair).transpose(2, 0, 3, 4, 1, 5)
    return np.ascontiguousarray(lanes).reshape(shape(entries, kv, parts, d, fmt))


def canonical(array: Array, entries: int, d: int, fmt: CacheFormat) -> Array:
    """Inverse of `laid_out`."""
    kv, _, parts, wide, _ = array.shape
    pair = 32 // fmt.bits
    lanes = array.reshape(kv, -1, parts, wide, LANES, pair).transpose(1, 4, 0, 2, 3, 5)
    return np.ascontiguousarray(lanes.reshape(-1, kv, parts, wide * pair)[:entries, ..., :d])
