"""Caches that keep the numbers of each key, and of each value, together (``lay=rows``).

Keys ``rows``: ``[KV, 16 * ceil(cap/16), D]``, D padded with zeros to whole lines of 16 numbers (float32)
or 32 (bfloat16). Values ``rows``: ``[KV, 16 * ceil(cap/16), 16 * ceil(DV/16)]``. A key or value is read
alone, at its own bytes, where blocks of 16 slots would be read whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.ops.base import Array
from mimo_compile.schedules.emit.vector import LANES

LAYOUTS = {"k_cache": "rows", "v_cache": "rows"}
"""Names of the layouts."""


def row_shapes(p: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the packed shapes for an op's ``cap``, ``kv``, ``d``, ``c``, and ``dv`` and ``b`` if any."""
    slots = -(-p["cap"] // LANES) * LANES
    line, heads = int(64 // parse_cache_format(p["c"]).bytes), p["kv"] * p.get("b", 1)
    return {
        "k_cache": (heads, slots, -(-p["d"] // line) * line),
        "v_cache": (heads, slots, -(-p.get("dv", 0) // LANES) * LANES),
    }


def pack_rows(p: Mapping[str, Any], name: str, array: Array) -> Array:
    """Lay out a canonical cache ``[cap, KV, D]``; slots and numbers of padding are zero."""
    shape = row_shapes(p)[name]
    cap, _, width = array.shape
    padded = np.pad(array, ((0, shape[1] - cap), (0, 0), (0, shape[2] - width)))
    return np.ascontiguousarray(padded.transpose(1, 0, 2))


def unpack_rows(p: Mapping[str, Any], name: str, array: Array) -> Array:
    """Inverse of `pack_rows`."""
    width = p["d"] if name == "k_cache" else p["dv"]
    return np.ascontiguousarray(array.transpose(1, 0, 2)[: p["cap"], :, :width])
