"""KV caches of 8-bit floats (`ir.float8`) on GPUs: blocks of 16 rows, then the rows' bytes.

``k_cache`` ``[B * KV, ceil(cap/16), 16 * W + 16]`` bytes, W = 16 * ceil(D/16): rows of codes, then their
powers of two, each plus 127. ``v_cache`` the same with DV, but of 16 neighbouring columns the two halves
alternate, 0, 8, 1, 9 and so on: transposed loads take two codes as one number. Padding is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mimo_compile.ir import float8
from mimo_compile.ir.caches import SCALED
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.pages import paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.cuda_layout import NEEDS, whole

ROWS = 16
_PAIRED = np.arange(16).reshape(2, 8).T.reshape(-1)
"""Column of 16 that stands at each place of a value."""


def takes(workload: Workload, hardware: Hardware) -> bool:
    """Say whether a workload has caches of 8-bit floats, in no pool, in whole blocks if they are rings."""
    p = get_op(workload.op).full(workload)
    on_gpu = hardware.kind == "cuda" and not hardware.missing(NEEDS)
    ring = p.get("window") and p["cap"] % ROWS
    return bool(on_gpu and p["c"] in SCALED and not ring and not paged(p))


def layouts(workload: Workload) -> dict[str, str]:
    """Return the name of the layout of each cache."""
    return {"k_cache": "rows.e4m3", "v_cache": "rows.e4m3.2"}


def shapes(p: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Return the packed shapes for an op's parameters."""
    heads, blocks = p["b"] * p["kv"], -(-p["cap"] // ROWS)
    return {
        name: (heads, blocks, ROWS * (whole(p[width]) + 1))
        for name, width in (("k_cache", "d"), ("v_cache", "dv"))
    }


def kernel_args(workload: Workload) -> tuple[Arg, ...]:
    """Return the op's arguments with the caches in their packed shapes."""
    op = get_op(workload.op)
    packed = shapes(op.full(workload))
    return tuple(
        Arg(a.name, a.role, packed[a.name], "uint8", a.mutated) if a.name in packed else a
        for a in op.args(workload)
    )


def constants(workload: Workload) -> dict[str, int | float | bool]:
    """Return the extents by which kernels over these caches find their rows."""
    p = get_op(workload.op).full(workload)
    found: dict[str, int | float | bool] = {
        n.upper(): p[n] for n in ("t", "h", "kv", "d", "dv", "cap")
    }
    slots = -(-p["cap"] // ROWS) * ROWS
    return found | {"DK": whole(p["d"]), "DW": whole(p["dv"]), "SLOTS": slots}


def pack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Lay out canonical caches (those given); other arrays stay as they are."""
    p = get_op(workload.op).full(workload)
    packed, out = shapes(p), {}
    for name, array in arrays.items():
        if name not in packed:
            out[name] = np.ascontiguousarray(array)
            continue
        heads, blocks, size = packed[name]
        wide, width = size // ROWS - 1, array.shape[-1]
        by_head = array.reshape(p["b"], p["cap"], p["kv"], width).transpose(0, 2, 1, 3)
        given = torch.from_numpy(np.ascontiguousarray(by_head))
        codes, scale = (t.numpy().reshape(heads, p["cap"], -1) for t in float8.encode(given))
        spare = blocks * ROWS - p["cap"]
        codes = np.pad(codes, ((0, 0), (0, spare), (0, wide - width)))
        if name == "v_cache":
            codes = codes.reshape(*codes.shape[:2], -1, 16)[..., _PAIRED]
        scale = np.pad(scale, ((0, 0), (0, spare), (0, 0)))
        parts = (codes.reshape(heads, blocks, -1), scale.reshape(heads, blocks, ROWS))
        out[name] = np.concatenate(parts, 2)
    return out


def unpack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Inverse of `pack`: the float32 numbers of the caches."""
    op = get_op(workload.op)
    p, canonical = op.full(workload), {a.name: a.shape for a in op.args(workload)}
    out = dict(arrays)
    for name in shapes(p):
        if name not in arrays:
            continue
        heads, blocks, size = arrays[name].shape
        wide = size // ROWS - 1
        codes = arrays[name][..., : ROWS * wide].reshape(heads, blocks * ROWS, wide)
        if name == "v_cache":
            split = codes.reshape(heads, blocks * ROWS, -1, 16)[..., np.argsort(_PAIRED)]
            codes = split.reshape(codes.shape)
        scale = arrays[name][..., ROWS * wide :].reshape(heads, blocks * ROWS, 1)
        tensors = (torch.from_numpy(np.ascontiguousarray(a)) for a in (codes, scale))
        rows = float8.decode(*tensors).numpy()[:, : p["cap"], : canonical[name][-1]]
        rows = rows.reshape(p["b"], p["kv"], *rows.shape[1:]).transpose(0, 2, 1, 3)
        out[name] = np.ascontiguousarray(rows).reshape(canonical[name])
    return out
