"""KV caches in groups of few bits (`ir.kv_groups`) on GPUs: codes lie as matrix products take them.

Layout ``mma64``. A 32-bit word of codes belongs to a lane of a warp (g = lane // 4, t = lane % 4); field f of
its bytes is one register of an operand (``device/groups.cuh`` says of which numbers). Words of a lane that
are used together lie together, up to four, then those of the next lane.

- ``k_cache`` ``[B * KV, groups, 8 * bits * DK]`` bytes, DK = 32 * ceil(D/32): four pairs of tiles, words of
  32 channels.
- ``k_scale`` ``[B * KV, groups, DK, 2]``: scale and zero point.
- ``k_tail`` ``[B * KV, tail, 16 * ceil(D/16)]`` float32.
- ``v_cache`` ``[B * KV, groups, 8 * bits * DW]`` bytes, DW = 16 * ceil(DV/16): words of eight columns.
- ``v_scale`` ``[B * KV, groups, scales of a value, 64, 2]``.
- ``v_tail`` ``[B * KV, tail, DW]`` float32.

Codes of 8 bits lie less 128, as signed bytes; padding of arrays is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.kv_groups import STATES, GroupedFormat, grouped, tail_of
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.pages import paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.cuda_group_words import (
    DEPTH,
    pack_keys,
    pack_values,
    unpack_keys,
    unpack_values,
)
from mimo_compile.schedules.attention.cuda_layout import NEEDS, whole

_BITS = (2, 4, 8)
"""Of codes: four registers, of two tiles or steps, are whole words."""


def takes(workload: Workload, hardware: Hardware) -> bool:
    """Say whether a workload has caches in groups of such codes, in no pool, on a GPU with matrix tiles."""
    on_gpu, p = (
        hardware.kind == "cuda" and not hardware.missing(NEEDS),
        get_op(workload.op).full(workload),
    )
    fmt = grouped(p)
    return on_gpu and fmt is not None and fmt.bits in _BITS and not paged(p)


def format_of(p: Mapping[str, Any]) -> GroupedFormat:
    """Return the format of a workload's caches.

    Raises:
        ValueError: they are not in groups.
    """
    if (found := grouped(p)) is None:
        raise ValueError(f"caches c={p['c']} are not in groups")
    return found


def layouts(workload: Workload) -> dict[str, str]:
    """Return the name of the layout of each array."""
    return dict.fromkeys(STATES, f"mma64.{get_op(workload.op).full(workload)['c']}")


def deep(width: int) -> int:
    """Return the channels of keys as codes, for a head of so many."""
    return -(-width // DEPTH) * DEPTH


def group_bytes(p: Mapping[str, Any]) -> int:
    """Return the bytes of a KV head's group: codes, scales and zero points."""
    fmt = format_of(p)
    keys = fmt.group * deep(p["d"]) * fmt.bits // 8 + 4 * deep(p["d"])
    values = fmt.group * (whole(p["dv"]) * fmt.bits // 8 + 4 * fmt.value_groups(p["dv"]))
    return keys + values


def shapes(p: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the packed shapes for an op's parameters."""
    fmt = format_of(p)
    heads, groups, tail = p["b"] * p["kv"], p["cap"] // fmt.group, tail_of(p, fmt)
    keys, values = deep(p["d"]), whole(p["dv"])
    return {
        "k_cache": (heads, groups, fmt.group * keys * fmt.bits // 8),
        "k_scale": (heads, groups, keys, 2),
        "k_tail": (heads, tail, whole(p["d"])),
        "v_cache": (heads, groups, fmt.group * values * fmt.bits // 8),
        "v_scale": (heads, groups, fmt.value_groups(p["dv"]), fmt.group, 2),
        "v_tail": (heads, tail, values),
    }


def kernel_args(workload: Workload) -> tuple[Arg, ...]:
    """Return the op's arguments with the cache's arrays in their packed shapes."""
    op = get_op(workload.op)
    packed = shapes(op.full(workload))
    return tuple(
        Arg(a.name, a.role, packed[a.name], a.dtype, a.mutated) if a.name in packed else a
        for a in op.args(workload)
    )


def constants(workload: Workload) -> dict[str, int | float | bool]:
    """Return the extents by which kernels over these caches find their numbers."""
    p = get_op(workload.op).full(workload)
    fmt = format_of(p)
    names = ("t", "h", "kv", "d", "dv", "cap")
    found: dict[str, int | float | bool] = {n.upper(): p[n] for n in names}
    return found | {
        "DK": deep(p["d"]), "DT": whole(p["d"]), "DW": whole(p["dv"]), "BITS": fmt.bits,
        "TAIL": tail_of(p, fmt),
    }  # fmt: skip


def _bias(fmt: GroupedFormat) -> np.uint8:
    """Return what codes are changed with to be as they lie."""
    return np.uint8(128 if fmt.bits == 8 else 0)


def _padded(array: Array, axis: int, extent: int) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, extent - array.shape[axis])
    return np.pad(array, widths)


def pack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Lay out the canonical arrays of a cache (those given); other arrays stay as they are."""
    p = get_op(workload.op).full(workload)
    fmt, packed, kv = format_of(p), shapes(p), p["kv"]
    out = {n: np.ascontiguousarray(a) for n, a in arrays.items() if n not in packed}
    for name in STATES:
        if name not in arrays:
            continue
        array, shape = arrays[name], packed[name]
        if name.endswith("cache"):
            wide = deep(p["d"]) if name == "k_cache" else whole(p["dv"])
            codes = (array & np.uint8(fmt.levels)) ^ _bias(fmt)
            by_head = codes.reshape(p["b"], -1, fmt.group, kv, array.shape[-1])
            by_head = _padded(by_head.transpose(0, 3, 1, 2, 4), -1, wide)
            flat = (pack_keys if name == "k_cache" else pack_values)(by_head, fmt.bits)
        elif name == "k_scale":
            flat = _padded(array.reshape(p["b"], -1, kv, p["d"], 2), -2, shape[-2])
            flat = flat.transpose(0, 2, 1, 3, 4)
        elif name == "v_scale":
            flat = array.reshape(p["b"], -1, fmt.group, kv, *array.shape[-2:])
            flat = flat.transpose(0, 3, 1, 4, 2, 5)
        else:
            flat = _padded(array.reshape(p["b"], -1, *array.shape[-2:]), -1, shape[-1])
            flat = flat.transpose(0, 2, 1, 3)
        out[name] = np.ascontiguousarray(flat).reshape(shape)
    return out


def unpack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Inverse of `pack`."""
    op = get_op(workload.op)
    p = op.full(workload)
    fmt, b, kv = format_of(p), p["b"], p["kv"]
    canonical = {a.name: a.shape for a in op.args(workload)}
    out = dict(arrays)
    for name in STATES:
        if name not in arrays:
            continue
        array = arrays[name].reshape(b, kv, *arrays[name].shape[1:])
        if name.endswith("cache"):
            keys = name == "k_cache"
            wide, width = (deep(p["d"]), p["d"]) if keys else (whole(p["dv"]), p["dv"])
            rows = (unpack_keys if keys else unpack_values)(array, wide, fmt.bits)[..., :width]
            rows = rows.transpose(0, 2, 3, 1, 4) ^ _bias(fmt)
        elif name == "k_scale":
            rows = array[..., : p["d"], :].transpose(0, 2, 1, 3, 4)
        elif name == "v_scale":
            rows = array.transpose(0, 2, 4, 1, 3, 5)
        else:
            width = p["d"] if name == "k_tail" else p["dv"]
            rows = array[..., :width].transpose(0, 2, 1, 3)
        out[name] = np.ascontiguousarray(rows).reshape(canonical[name])
    return out
