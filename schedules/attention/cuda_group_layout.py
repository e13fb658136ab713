"""KV caches in groups of few bits (`ir.kv_groups`) on GPUs: codes lie as matrix products take them.

Layout ``mma64``. A 32-bit word of codes belongs to a lane of a warp (g = lane // 4, t = lane % 4); field f of
its bytes is one register of an operand (``device/groups.cuh`` says of which numbers). Words of a lane that
are used together lie together, up to four, then those of the next lane.

- ``k_cache`` ``[heads, groups, 8 * bits * DK]`` bytes, DK = 32 * ceil(D/32) (of one bit 64 * ceil(D/64)):
  four pairs of tiles, words of 32 channels (of 64).
- ``k_scale`` ``[heads, groups, DK * 2]``: scale and zero point of each channel.
- ``k_tail`` ``[B * KV, tail, 16 * ceil(D/16)]`` float32.
- ``v_cache`` ``[heads, groups, 8 * bits * DW]`` bytes, DW = 16 * ceil(DV/16): words of eight columns (of 16).
- ``v_scale`` ``[heads, groups, scales of a value * 64 * 2]``: scale and zero point of each token.
- ``v_tail`` ``[B * KV, tail, DW]`` float32.

Heads are KV of each sequence (B * KV), and groups those of a context; of a pool of pages they are KV, and all
groups of its pages.
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
from mimo_compile.ir.ops.pages import paged, width_of
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.cuda_group_words import (
    DEPTH,
    pack_keys,
    pack_values,
    unpack_keys,
    unpack_values,
)
from mimo_compile.schedules.attention.cuda_layout import NEEDS, whole


def takes(workload: Workload, hardware: Hardware) -> bool:
    """Say whether a workload has caches in groups, on a GPU with matrix tiles."""
    on_gpu = hardware.kind == "cuda" and not hardware.missing(NEEDS)
    return on_gpu and grouped(get_op(workload.op).full(workload)) is not None


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
    """Return the channels of keys, rounded up to whole products of bytes."""
    return -(-width // DEPTH) * DEPTH


def key_channels(p: Mapping[str, Any]) -> int:
    """Return the channels of keys as codes: whole words, which of one bit have those of two products."""
    unit = max(DEPTH, 64 // format_of(p).bits)
    return int(-(-p["d"] // unit) * unit)


def group_bytes(p: Mapping[str, Any]) -> int:
    """Return the bytes of a KV head's group: codes, scales and zero points."""
    fmt = format_of(p)
    keys = fmt.group * key_channels(p) * fmt.bits // 8 + 4 * key_channels(p)
    values = fmt.group * (whole(p["dv"]) * fmt.bits // 8 + 4 * fmt.value_groups(p["dv"]))
    return keys + values


def groups_of(p: Mapping[str, Any]) -> int:
    """Return the groups of a KV head in a cache, or in a pool of pages."""
    slots = p["pool"] * p["page"] if paged(p) else p["cap"]
    return int(slots // format_of(p).group)


def shapes(p: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the packed shapes for an op's parameters."""
    fmt = format_of(p)
    own, groups, tail = p["b"] * p["kv"], groups_of(p), tail_of(p, fmt)
    heads = p["kv"] if paged(p) else own
    keys, values = key_channels(p), whole(p["dv"])
    return {
        "k_cache": (heads, groups, fmt.group * keys * fmt.bits // 8),
        "k_scale": (heads, groups, keys * 2),
        "k_tail": (own, tail, whole(p["d"])),
        "v_cache": (heads, groups, fmt.group * values * fmt.bits // 8),
        "v_scale": (heads, groups, fmt.value_groups(p["dv"]) * fmt.group * 2),
        "v_tail": (own, tail, values),
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
    names = ("t", "h", "kv", "d", "dv", "page")
    found: dict[str, int | float | bool] = {n.upper(): p[n] for n in names}
    return found | {
        "DK": key_channels(p), "DT": whole(p["d"]), "DW": whole(p["dv"]), "BITS": fmt.bits,
        "TAIL": tail_of(p, fmt), "GROUPS": groups_of(p),
        "TABLE": width_of(p["cap"], p["page"]) if paged(p) else 0,
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
            wide = key_channels(p) if name == "k_cache" else whole(p["dv"])
            codes = (array & np.uint8(fmt.levels)) ^ _bias(fmt)
            by_head = codes.reshape(-1, shape[1], fmt.group, kv, array.shape[-1])
            by_head = _padded(by_head.transpose(0, 3, 1, 2, 4), -1, wide)
            flat = (pack_keys if name == "k_cache" else pack_values)(by_head, fmt.bits)
        elif name == "k_scale":
            flat = _padded(array.reshape(-1, shape[1], kv, p["d"], 2), -2, shape[-1] // 2)
            flat = flat.transpose(0, 2, 1, 3, 4)
        elif name == "v_scale":
            flat = array.reshape(-1, shape[1], fmt.group, kv, *array.shape[-2:])
            flat = flat.transpose(0, 3, 1, 4, 2, 5)
        else:
            flat = _padded(array.reshape(-1, shape[1], *array.shape[-2:]), -1, shape[-1])
            flat = flat.transpose(0, 2, 1, 3)
        out[name] = np.ascontiguousarray(flat).reshape(shape)
    return out


def unpack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Inverse of `pack`."""
    op = get_op(workload.op)
    p = op.full(workload)
    fmt, kv = format_of(p), p["kv"]
    canonical = {a.name: a.shape for a in op.args(workload)}
    out = dict(arrays)
    for name in STATES:
        if name not in arrays:
            continue
        array = arrays[name].reshape(-1, kv, *arrays[name].shape[1:])
        if name.endswith("cache"):
            keys = name == "k_cache"
            wide, width = (key_channels(p), p["d"]) if keys else (whole(p["dv"]), p["dv"])
            rows = (unpack_keys if keys else unpack_values)(array, wide, fmt.bits)[..., :width]
            rows = rows.transpose(0, 2, 3, 1, 4) ^ _bias(fmt)
        elif name == "k_scale":
            pairs = array.reshape(*array.shape[:-1], -1, 2)[..., : p["d"], :]
            rows = pairs.transpose(0, 2, 1, 3, 4)
        elif name == "v_scale":
            pairs = array.reshape(*array.shape[:-1], -1, fmt.group, 2)
            rows = pairs.transpose(0, 2, 4, 1, 3, 5)
        else:
            width = p["d"] if name == "k_tail" else p["dv"]
            rows = array[..., :width].transpose(0, 2, 1, 3)
        out[name] = np.ascontiguousarray(rows).reshape(canonical[name])
    return out
