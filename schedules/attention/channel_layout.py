"""The layout of a copy of keys by channels, which `index_keys` writes and `score_keys` reads.

Float32 keys ``k16.c``: ``[KV, ceil(cap/16), D, 16]``; 16-bit ones ``k32.c``: ``[KV, ceil(cap/32), D, 32]``. A
line of memory, 64 bytes, holds one channel of neighbouring slots, so that a few channels are a few lines.

Peaks of spans stay in order, ``[E, KV, D]``. Those of a batch follow one another, as all states do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.ops.base import Arg, Array


def slots_of(c: str) -> int:
    """Return how many slots a line has, for caches of a format."""
    return int(64 // parse_cache_format(c).bytes)


def name(c: str) -> str:
    """Return the name of the layout."""
    return f"k{slots_of(c)}.c"


def shape(p: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the packed shape for an op's ``cap``, ``kv``, ``d``, ``c``, and ``b`` if any."""
    slots = slots_of(p["c"])
    return (p["kv"] * p.get("b", 1), -(-p["cap"] // slots), p["d"], slots)


def peaks(arg: Arg, b: int, stored: str) -> Arg:
    """Return the argument of peaks of ``b`` sequences as kernels take it."""
    shape = arg.shape if b == 1 else (b * arg.shape[1], *arg.shape[2:])
    return Arg(arg.name, arg.role, shape, stored, arg.mutated)


def pack(p: Mapping[str, Any], array: Array) -> Array:
    """Lay out keys ``[cap, KV, D]``; slots of padding are zero."""
    kv, lines, d, slots = shape(p)
    padded = np.pad(array, ((0, lines * slots - p["cap"]), (0, 0), (0, 0)))
    return np.ascontiguousarray(padded.reshape(lines, slots, kv, d).transpose(2, 0, 3, 1))


def unpack(p: Mapping[str, Any], array: Array) -> Array:
    """Inverse of `pack`."""
    kv, _, d, _ = shape(p)
    rows = array.transpose(1, 3, 0, 2).reshape(-1, kv, d)
    return np.ascontiguousarray(rows[: p["cap"]])
