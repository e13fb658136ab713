"""The layout of KV caches that append and attention agree on.

Keys ``k16``: ``[KV, ceil(cap/16), D, 16]``, so that the lanes of a vector are 16 slots and a score needs no
sum over lanes. Values ``v16``: ``[KV, 16 * ceil(cap/16), 16 * ceil(DV/16)]``: whole vectors of a slot.

16-bit caches lie in pairs, so that a 32-bit lane holds the two factors that a dot product takes at once, and
tiles of matrix units load them as they lie. Keys ``k16.d2``: ``[KV, ceil(cap/16), ceil(D/2), 16, 2]``, pairs
along d; the pad of an odd D is zero. Values ``v16.s2``: ``[KV, 8 * ceil(cap/16), 16 * ceil(DV/16), 2]``,
pairs along slots. In memory the last two extents are one.

8-bit floats have the layout of `float8_layout`.

With ``lay=rows`` the numbers of each key, and of each value, lie together: see `rows_layout`. A copy of keys
that is read by channels has the layout of `channel_layout`.

Those of the sequences of a batch follow one another, in every layout: ``[B * KV, ...]``. A pool of pages is
laid out as one sequence's cache of all its slots.

Caches in groups of few bits have the layout of `group_layout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile.ir.caches import SCALED, single_format
from mimo_compile.ir.kv_groups import GROUPED, STATES, grouped
from mimo_compile.ir.ops import batches, get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.pages import flat, in_pool, paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import channel_layout, float8_layout, rows_layout, sequences
from mimo_compile.schedules.attention.group_layout import group_args, pack_groups, unpack_groups
from mimo_compile.schedules.emit.vector import LANES

_LAYOUTS = {
    "f32": {"k_cache": "k16", "v_cache": "v16"},
    "bf16": {"k_cache": "k16.d2", "v_cache": "v16.s2"},
}


def layouts(workload: Workload) -> dict[str, str]:
    """Return the names of the cache layouts of a workload."""
    p = get_op(workload.op).full(workload)
    if by_rows(p):
        return dict(rows_layout.LAYOUTS)
    c = p["c"]
    if by_channels(p):
        return {"k_cache": channel_layout.name(c)}
    if c in SCALED:
        return dict(float8_layout.LAYOUTS)
    return dict.fromkeys(STATES, f"g64.{c}") if c in GROUPED else dict(_LAYOUTS[c])


def by_rows(p: Mapping[str, Any]) -> bool:
    """Say whether a workload's parameters ask for caches that keep each key by itself."""
    return bool(p.get("lay") == "rows")


def by_channels(p: Mapping[str, Any]) -> bool:
    """Say whether a workload's keys are a copy by channels."""
    return bool(p.get("kind") == "channels")


def round_up(n: int) -> int:
    """Return ``n`` rounded up to whole vectors."""
    return -(-n // LANES) * LANES


def cache_shapes(p: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the packed shapes for an op's ``cap``, ``kv``, ``d``, ``c``, and ``dv`` and ``b`` if any."""
    p = flat(p)
    if by_rows(p):
        return rows_layout.row_shapes(p)
    if by_channels(p):
        return {"k_cache": channel_layout.shape(p)}
    if p["c"] in SCALED:
        return float8_layout.float8_shapes(p)
    slots, dv, heads = round_up(p["cap"]), p.get("dv", 0), p["kv"] * p.get("b", 1)
    if single_format(p["c"]).bits == 16:
        return {
            "k_cache": (heads, slots // LANES, -(-p["d"] // 2), 2 * LANES),
            "v_cache": (heads, slots // 2, 2 * round_up(dv)),
        }
    return {
        "k_cache": (heads, slots // LANES, p["d"], LANES),
        "v_cache": (heads, slots, round_up(dv)),
    }


def kernel_args(workload: Workload) -> tuple[Arg, ...]:
    """Return the op's arguments with the caches in their packed shapes."""
    op = get_op(workload.op)
    p = op.full(workload)
    if fmt := grouped(p):
        return group_args(op.args(workload), p, fmt)
    shapes, stored = cache_shapes(p), single_format(p["c"]).stored
    return tuple(
        Arg(a.name, a.role, shapes[a.name], stored, a.mutated) if a.name in shapes else a
        for a in op.args(workload)
    )


def _whole(workload: Workload) -> Workload:
    """Return the workload of one sequence that has all slots of a pool; one without is as it is."""
    p = get_op(workload.op).full(workload)
    return batches.alone(workload, cap=p["pool"] * p["page"]) if paged(p) else workload


def _tails(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return the arrays that each sequence has for itself beside pages that all have together."""
    p = get_op(workload.op).full(workload)
    apart = paged(p) and grouped(p) is not None
    return {n: a for n, a in arrays.items() if apart and n in STATES and not in_pool(p, n)}


def pack_caches(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Lay out canonical caches (those given); slots and lanes of padding are zero."""
    tails = _tails(workload, arrays)
    rest = {n: a for n, a in arrays.items() if n not in tails}
    out = sequences.pack_each(_whole(workload), rest, _pack)
    for name, array in tails.items():
        each = array[None] if array.ndim == 3 else array
        parts = [_pack(batches.alone(workload), {name: own})[name] for own in each]
        out[name] = np.concatenate(parts)
    return out


def _pack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Lay out the caches of one sequence."""
    p = get_op(workload.op).full(workload)
    if fmt := grouped(p):
        return pack_groups(p, fmt, arrays)
    shapes, pair = cache_shapes(p), 2 if single_format(p["c"]).bits == 16 else 1
    out = {}
    for name, array in arrays.items():
        if name not in shapes:
            out[name] = np.ascontiguousarray(array)
            continue
        if by_rows(p):
            out[name] = rows_layout.pack_rows(p, name, array)
            continue
        if by_channels(p):
            out[name] = channel_layout.pack(p, array)
            continue
        if p["c"] in SCALED:
            out[name] = float8_layout.pack_float8(p, name, array)
            continue
        cap, heads, width = array.shape
        wide = -(-width // pair) * pair if name == "k_cache" else round_up(width)
        padded = np.pad(array, ((0, round_up(cap) - cap), (0, 0), (0, wide - width)))
        if name == "k_cache":
            lanes = padded.reshape(-1, LANES, heads, wide // pair, pair).transpose(2, 0, 3, 1, 4)
        else:
            lanes = padded.reshape(-1, pair, heads, wide).transpose(2, 0, 3, 1)
        out[name] = np.ascontiguousarray(lanes).reshape(shapes[name])
    return out


def unpack_caches(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Inverse of `pack_caches`: canonical ``[cap, KV, D]`` and ``[cap, KV, DV]``, of a batch ``[B, ...]``."""
    tails, b = _tails(workload, arrays), get_op(workload.op).full(workload).get("b", 1)
    rest = {n: a for n, a in arrays.items() if n not in tails}
    out = sequences.unpack_each(_whole(workload), rest, _unpack)
    for name, array in tails.items():
        own = [_unpack(batches.alone(workload), {name: a})[name] for a in np.split(array, b)]
        out[name] = np.stack(own) if b > 1 else own[0]
    return out


def _unpack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return the canonical caches of one sequence."""
    p = get_op(workload.op).full(workload)
    if fmt := grouped(p):
        return unpack_groups(p, fmt, arrays)
    heads = p["kv"]
    pair = 2 if single_format(p["c"]).bits == 16 else 1
    out = {}
    for name, array in arrays.items():
        if name in ("k_cache", "v_cache") and by_rows(p):
            out[name] = rows_layout.unpack_rows(p, name, array)
        elif name == "k_cache" and by_channels(p):
            out[name] = channel_layout.unpack(p, array)
        elif name in ("k_cache", "v_cache") and p["c"] in SCALED:
            out[name] = float8_layout.unpack_float8(p, name, array)
        elif name == "k_cache":
            lanes = array.reshape(heads, -1, -(-p["d"] // pair), LANES, pair)
            slots = lanes.transpose(1, 3, 0, 2, 4).reshape(round_up(p["cap"]), heads, -1)
            out[name] = np.ascontiguousarray(slots[: p["cap"], :, : p["d"]])
        elif name == "v_cache":
            lanes = array.reshape(heads, -1, round_up(p["dv"]), pair).transpose(1, 3, 0, 2)
            slots = lanes.reshape(round_up(p["cap"]), heads, -1)
            out[name] = np.ascontiguousarray(slots[: p["cap"], :, : p["dv"]])
        else:
            out[name] = array
    return out
