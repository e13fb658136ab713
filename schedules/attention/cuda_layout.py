"""KV caches on GPUs: each key, and each value, lies by itself, in rows that are copied 16 bytes at a time.

``rows.16``: ``[B * KV, slots, 16 * ceil(D/16)]`` bfloat16, values with DV; slots are ``cap``, those of all
pages where caches lie in a pool. The numbers behind a row's own are zero: matrix tiles multiply them. Append
and all kinds of attention share the layout, whatever order the op's ``lay`` asks of CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.pages import paged, width_of
from mimo_compile.ir.workload import Workload

LAYOUTS = {"k_cache": "rows.16", "v_cache": "rows.16"}
NEEDS = frozenset({"mma", "cp_async"})
"""Features of a GPU that attention's matrix tiles need."""
_STEP = 16


def layouts(workload: Workload) -> dict[str, str]:
    """Return the name of the layout of each cache."""
    return dict(LAYOUTS)


def takes(workload: Workload, hardware: Hardware, arith: str = "float") -> bool:
    """Say whether a workload has caches of this layout, and this arithmetic, on a GPU with `NEEDS`."""
    p = get_op(workload.op).full(workload)
    on_gpu = hardware.kind == "cuda" and not hardware.missing(NEEDS)
    return bool(on_gpu and p["c"] == "bf16" and p.get("arith", "float") == arith)


def whole(width: int) -> int:
    """Return the numbers of a cache's row for a head of so many."""
    return -(-width // _STEP) * _STEP


def slots_of(p: Mapping[str, Any]) -> int:
    """Return the slots of a cache, or of a pool of pages."""
    return int(p["pool"] * p["page"] if paged(p) else p["cap"])


def cache_shapes(p: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Return the packed shapes for an op's parameters; one without ``dv`` has keys alone."""
    heads = p["kv"] * (1 if paged(p) else p.get("b", 1))
    widths = (("k_cache", "d"), ("v_cache", "dv"))
    return {n: (heads, slots_of(p), whole(p[w])) for n, w in widths if w in p}


def kernel_args(workload: Workload) -> tuple[Arg, ...]:
    """Return the op's arguments with the caches in their packed shapes."""
    op = get_op(workload.op)
    shapes = cache_shapes(op.full(workload))
    return tuple(
        Arg(a.name, a.role, shapes[a.name], "uint16", a.mutated) if a.name in shapes else a
        for a in op.args(workload)
    )


def pack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Lay out canonical caches (those given); other arrays stay as they are."""
    p = get_op(workload.op).full(workload)
    shapes, out = cache_shapes(p), {}
    for name, array in arrays.items():
        if name not in shapes:
            out[name] = np.ascontiguousarray(array)
            continue
        _, slots, wide = shapes[name]
        width = array.shape[-1]
        by_head = array.reshape(-1, slots, p["kv"], width).transpose(0, 2, 1, 3)
        rows = by_head.reshape(-1, slots, width)
        out[name] = np.pad(rows, ((0, 0), (0, 0), (0, wide - width)))
    return out


def unpack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Inverse of `pack`."""
    op = get_op(workload.op)
    p, canonical = op.full(workload), {a.name: a.shape for a in op.args(workload)}
    out = dict(arrays)
    for name, (_, slots, _) in cache_shapes(p).items():
        if name in arrays:
            rows = arrays[name][..., : canonical[name][-1]]
            by_slot = rows.reshape(-1, p["kv"], slots, rows.shape[-1]).transpose(0, 2, 1, 3)
            out[name] = np.ascontiguousarray(by_slot).reshape(canonical[name])
    return out


def float32(number: float) -> float:
    """Return the nearest number that a constant of a kernel's text can be."""
    return float(np.float32(number))


def constants(workload: Workload) -> dict[str, int | float | bool]:
    """Return the extents by which kernels over these caches find their rows and slots."""
    p = get_op(workload.op).full(workload)
    names = ("t", "h", "kv", "d", "dv", "cap", "page")
    found: dict[str, int | float | bool] = {n.upper(): p.get(n, 0) for n in names}
    in_pool = width_of(p["cap"], p["page"]) if paged(p) else 0
    return found | {
        "DK": whole(p["d"]),
        "DW": whole(p["dv"]),
        "SLOTS": slots_of(p),
        "TABLE": in_pool,
    }
