"""The layout of KV caches that append and attention agree on.

Keys ``k16``: ``[KV, ceil(cap/16), D, 16]``, so that the lanes of a vector are 16 slots and a score needs no
sum over lanes. Values ``v16``: ``[KV, 16 * ceil(cap/16), 16 * ceil(DV/16)]``: whole vectors of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.vector import LANES

LAYOUTS = {"k_cache": "k16", "v_cache": "v16"}


def round_up(n: int) -> int:
    """Return ``n`` rounded up to whole vectors."""
    return -(-n // LANES) * LANES


def cache_shapes(p: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the packed shapes for an op's parameters ``cap``, ``kv``, ``d``, ``dv``."""
    slots = round_up(p["cap"])
    return {
        "k_cache": (p["kv"], slots // LANES, p["d"], LANES),
        "v_cache": (p["kv"], slots, round_up(p["dv"])),
    }


def kernel_args(workload: Workload) -> tuple[Arg, ...]:
    """Return the op's arguments with the caches in their packed shapes."""
    op = get_op(workload.op)
    shapes = cache_shapes(op.full(workload))
    return tuple(
        Arg(a.name, a.role, shapes.get(a.name, a.shape), a.dtype, a.mutated)
        for a in op.args(workload)
    )


def pack_caches(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Lay out canonical caches (those given); slots and lanes of padding are zero."""
    shapes = cache_shapes(get_op(workload.op).full(workload))
    out = {}
    for name, array in arrays.items():
        if name not in shapes:
            out[name] = np.ascontiguousarray(array)
            continue
        cap, _, width = array.shape
        wide = width if name == "k_cache" else round_up(width)
        padded = np.pad(array, ((0, round_up(cap) - cap), (0, 0), (0, wide - width)))
        heads = padded.transpose(1, 0, 2)
        if name == "k_cache":
            heads = heads.reshape(heads.shape[0], -1, LANES, width).transpose(0, 1, 3, 2)
        out[name] = np.ascontiguousarray(heads)
    return out


def unpack_caches(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Inverse of `pack_caches`: canonical ``[cap, KV, D]`` and ``[cap, KV, DV]``."""
    p = get_op(workload.op).full(workload)
    out = {}
    for name, array in arrays.items():
        if name == "k_cache":
            slots = array.transpose(1, 3, 0, 2).reshape(-1, p["kv"], p["d"])
            out[name] = np.ascontiguousarray(slots[: p["cap"]])
        elif name == "v_cache":
            out[name] = np.ascontiguousarray(array.transpose(1, 0, 2)[: p["cap"], :, : p["dv"]])
        else:
            out[name] = array
    return out
