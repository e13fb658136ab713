"""The layout of KV caches in groups (`ir.kv_groups`), called ``g64``, on which append and attention agree.

Codes lie in 32-bit lanes: byte i of a lane holds the codes of elements i, 4 + i, 8 + i, ..., each in its
bits, the first in the lowest. So a mask and a shift give bytes whose fours are neighbours, as dots of bytes
take them.

- ``k_cache`` ``[KV, groups, 4, ceil(D/E), 64]``: lines of 16 slots, E = 32/bits channels in each lane.
- ``k_scale`` ``[KV, groups, 2, 16 * ceil(D/16)]``: scales, then zero points.
- ``k_tail`` ``[KV, tail/16, D, 16]``: as float32 caches (``k16``).
- ``v_cache`` ``[KV, groups, ceil(DV/16), 64/E, 64]``: lines of 16 channels, E slots in each lane; codes of
  8 bits less 128, as signed bytes.
- ``v_scale`` ``[KV, groups, 2, scales of a slot, 64]``: lanes are slots.
- ``v_tail`` ``[KV, tail, 16 * ceil(DV/16)]``: as float32 caches (``v16``).

A group is written at once, so that no line is ever read and changed. Of a pool of pages these are all groups;
tails are those of each sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile.ir.kv_groups import STATES, GroupedFormat, tail_of
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.pages import paged
from mimo_compile.schedules.emit.vector import LANES

BLOCKS = 4
"""Blocks of 16 slots in a group."""


def elements(fmt: GroupedFormat) -> int:
    """Return how many codes a 32-bit lane holds."""
    return 32 // fmt.bits


def key_channels(d: int, fmt: GroupedFormat) -> int:
    """Return the channels of a key rounded up to whole vectors and whole lanes of codes."""
    unit = max(LANES, elements(fmt))
    return -(-d // unit) * unit


def _up(n: int) -> int:
    return -(-n // LANES) * LANES


def group_shapes(p: Mapping[str, Any], fmt: GroupedFormat) -> dict[str, tuple[int, ...]]:
    """Return the packed shapes for an op's parameters."""
    assert fmt.group == BLOCKS * LANES
    own = p["kv"] * p.get("b", 1)
    kv, groups = (p["kv"], p["pool"] * p["page"]) if paged(p) else (own, p["cap"])
    groups, tail, per = groups // fmt.group, tail_of(p, fmt), elements(fmt)
    return {
        "k_cache": (kv, groups, BLOCKS, -(-p["d"] // per), 4 * LANES),
        "k_scale": (kv, groups, 2, _up(p["d"])),
        "k_tail": (own, tail // LANES, p["d"], LANES),
        "v_cache": (kv, groups, _up(p["dv"]) // LANES, fmt.group // per, 4 * LANES),
        "v_scale": (kv, groups, 2, fmt.value_groups(p["dv"]), fmt.group),
        "v_tail": (own, tail, _up(p["dv"])),
    }


def group_args(args: tuple[Arg, ...], p: Mapping[str, Any], fmt: GroupedFormat) -> tuple[Arg, ...]:
    """Return an op's arguments with a cache's arrays in their packed shapes."""
    shapes = group_shapes(p, fmt)
    return tuple(
        Arg(a.name, a.role, shapes[a.name], a.dtype, a.mutated) if a.name in shapes else a
        for a in args
    )


def _bias(name: str, fmt: GroupedFormat) -> np.uint8:
    """Return what codes are changed with to be as they lie."""
    return np.uint8(128 if name == "v_cache" and fmt.bits == 8 else 0)


def _joined(fields: Array, bits: int) -> Array:
    """Join codes ``[..., fields, 4]`` into bytes ``[..., 4]``."""
    shifts = np.arange(fields.shape[-2], dtype=np.uint8)[:, None] * np.uint8(bits)
    out: Array = np.bitwise_or.reduce(fields << shifts, axis=-2)
    return out


def _split(packed: Array, bits: int) -> Array:
    """Inverse of `_joined`."""
    shifts = np.arange(8 // bits, dtype=np.uint8)[:, None] * np.uint8(bits)
    out: Array = (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)
    return out


def pack_groups(
    p: Mapping[str, Any], fmt: GroupedFormat, arrays: Mapping[str, Array]
) -> dict[str, Array]:
    """Lay out the canonical arrays (those given); padding is zero, codes are cut to their bits."""
    kv, d, dv, per = p["kv"], p["d"], p["dv"], elements(fmt)
    shapes = group_shapes(p, fmt)
    out = {}
    for name, given in arrays.items():
        if name not in STATES:
            out[name] = np.ascontiguousarray(given)
            continue
        array = given
        if name.endswith("cache"):
            array = (given & np.uint8(fmt.levels)) ^ _bias(name, fmt)
        wide = -(-d // per) * per if name == "k_cache" else _up(d if name[0] == "k" else dv)
        if name == "k_cache":
            codes = np.pad(array, ((0, 0), (0, 0), (0, wide - d)))
            codes = codes.reshape(-1, BLOCKS, LANES, kv, wide // per, per // 4, 4)
            lanes = _joined(codes, fmt.bits).transpose(3, 0, 1, 4, 2, 5)
        elif name == "v_cache":
            codes = np.pad(array, ((0, 0), (0, 0), (0, wide - dv)))
            codes = codes.reshape(-1, fmt.group // per, per // 4, 4, kv, wide // LANES, LANES)
            lanes = _joined(codes.transpose(0, 1, 4, 5, 6, 2, 3), fmt.bits).transpose(
                2, 0, 3, 1, 4, 5
            )
        elif name == "k_scale":
            lanes = np.pad(array, ((0, 0), (0, 0), (0, wide - d), (0, 0))).transpose(1, 0, 3, 2)
        elif name == "v_scale":
            lanes = array.reshape(-1, fmt.group, *array.shape[1:]).transpose(2, 0, 4, 3, 1)
        elif name == "k_tail":
            lanes = array.reshape(-1, LANES, kv, d).transpose(2, 0, 3, 1)
        else:
            lanes = np.pad(array, ((0, 0), (0, 0), (0, wide - dv))).transpose(1, 0, 2)
        out[name] = np.ascontiguousarray(lanes).reshape(shapes[name])
    return out


def unpack_groups(
    p: Mapping[str, Any], fmt: GroupedFormat, arrays: Mapping[str, Array]
) -> dict[str, Array]:
    """Inverse of `pack_groups`."""
    kv, d, dv = p["kv"], p["d"], p["dv"]
    out = {}
    for name, array in arrays.items():
        if name not in STATES:
            out[name] = array
            continue
        if name == "k_cache":
            codes = _split(array.reshape(*array.shape[:-1], LANES, 4), fmt.bits)
            rows = codes.transpose(1, 2, 4, 0, 3, 5, 6).reshape(p["cap"], kv, -1)[..., :d]
        elif name == "v_cache":
            codes = _split(array.reshape(*array.shape[:-1], LANES, 4), fmt.bits)
            rows = codes.transpose(1, 3, 5, 6, 0, 2, 4).reshape(p["cap"], kv, -1)[..., :dv]
            rows = rows ^ _bias(name, fmt)
        elif name == "k_scale":
            rows = array.transpose(1, 0, 3, 2)[:, :, :d]
        elif name == "v_scale":
            rows = array.transpose(1, 4, 0, 3, 2).reshape(p["cap"], kv, -1, 2)
        elif name == "k_tail":
            rows = array.transpose(1, 3, 0, 2).reshape(-1, kv, d)
        else:
            rows = array.transpose(1, 0, 2)[..., :dv]
        out[name] = np.ascontiguousarray(rows)
    return out
