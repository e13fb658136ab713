"""Work of a generic function's blocks from their loops and what is decided about them; no code is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mimo_compile._tvm import compiler
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.generic.blocks import BlockFacts, holds
from mimo_compile.schedules.work import Stream, Tile, busiest, work

tvm = compiler()

_ITEM = 4.0
"""Bytes of an element: most are f32."""


def part(
    facts: BlockFacts,
    operations: Mapping[str, float],
    told: Mapping[str, Any],
    wide: bool,
    hardware: Hardware,
    index: int,
) -> Counts:
    """Return the counts of one block.

    Args:
        facts: The block once others were inlined into it.
        operations: By kind, of one innermost iteration.
        told: What is decided about it; ``rule`` is always there.
        wide: Its outer loops are spread over threads.
        hardware: Threads and caches.
        index: Its place in the function.
    """
    rule = told["rule"]
    lanes = int(told.get("vector", 1)) if rule not in ("columns", "outer") else 1
    rows, vectors = int(told.get("tile", 1)), int(told.get("unroll", 1))
    if rule != "tiled":
        rows, vectors = 1, 1
    depth = math.prod(n for n, k in zip(facts.extents, facts.kinds, strict=True) if k == "R")
    spatial = max(1, facts.work // max(1, depth))
    tasks = max(1, math.ceil(spatial / (rows * vectors * (lanes if rule != "lanes" else 1))))
    share = busiest(tasks, hardware.threads) if wide else 1.0
    row_extent = math.prod(facts.extents[:-1]) if facts.extents else 1
    useful = 1.0
    if rule == "tiled" and rows > 1 and facts.reuse_axis is not None:
        n = facts.extents[facts.reuse_axis]
        useful = n / (rows * math.ceil(n / rows))
    own = 1.0 if facts.vector_axis is not None or facts.vectorisable else 0.0
    # what LLVM is left to vectorise has its own lanes where accesses are contiguous
    shown = lanes if lanes > 1 else (8 if own and rule in ("columns", "spatial", "chain") else 1)
    tile_bytes = depth * (rows + vectors * lanes) * _ITEM
    streams = []
    reads = [
        (min(size, facts.work), _itemsize(buffer))
        for buffer, size in facts.reads
        if not holds(facts.written, buffer)
    ]
    made = spatial * sum(_itemsize(b) for b in facts.written)
    total = made + sum(size * item for size, item in reads)
    for size, item in reads:
        passes = facts.work / max(1, size)
        if facts.reduced and passes > 1:
            reuse = rows if size * rows >= spatial else vectors * lanes
            passes = passes / max(1, reuse)
        passes = max(1.0, passes if facts.reduced else 1.0)
        touched = min(total, max(tile_bytes, row_extent * item))
        streams.append(Stream(size * item, ((passes, touched),)))
    streams.append(Stream(made))
    return work(
        {k: n * facts.work for k, n in operations.items() if n},
        streams,
        hardware,
        tasks=tasks if wide else 1,
        share=share,
        useful=useful,
        tile=Tile(vectors, rows, tile_bytes, shown, 1.0 if facts.reduced else 4.0),
    ).named(f"b{index}")


def _itemsize(buffer: Any) -> float:
    return float(tvm.DataType(str(buffer.dtype)).itemsize)


def joined(parts: Sequence[Counts]) -> Counts:
    """Return the counts of blocks that run one after the other."""
    whole = parts[0]
    for more in parts[1:]:
        whole = whole + more
    return Counts(whole.ops, whole.bytes, {}, parts=tuple(parts))
