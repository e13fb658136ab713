"""The work of a flash attention kernel, from its extents and config, at the op's nominal KV length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import pages
from mimo_compile.schedules.attention.reach import Tiling, visited
from mimo_compile.schedules.emit.vector import LANES
from mimo_compile.schedules.work import Stream, Tile, work


def flash_work(
    s: Tiling,
    lengths: Sequence[int],
    splits: int,
    hardware: Hardware,
    *,
    parallel: bool,
    arith: str = "f32",
) -> Counts:
    """Return the counts on whole steps: scores of every visited slot, values of the written ones.

    Args:
        s: Sizes of the kernel.
        lengths: Positions in the cache of each sequence, those of this step's tokens among them.
        splits: Parts of the keys.
        hardware: Whose caches and threads count.
        parallel: Tasks are spread over threads.
        arith: ``f32``; over 8-bit floats ``float8`` (see `float8_tile`); over bfloat16 caches ``widen``,
            ``dot``, ``dot2`` (see `pairs`).
    """
    p, height, width = s.p, float(s.height), float(s.columns * LANES)
    first = np.arange(0, p["t"], s.tokens)
    each = [visited(s, length - p["t"], p["t"], first) for length in lengths]
    steps, live = (np.concatenate(parts) for parts in zip(*each, strict=True))
    scored, valued = steps * s.blocks * LANES, live
    slots, values, turns = (float(n.sum()) for n in (scored, valued, steps))
    heads = float(p["kv"])
    row_tiles = sum(count for _, count in s.row_tiles())
    ops = {
        **products(s, arith, heads, slots, values, row_tiles),
        "exp_f32": heads * height * slots,
        # maximum and difference of each score; the output is scaled in each step
        "add_f32": heads * height * (2.0 * slots + turns * width),
    }
    if splits > 1:
        merged = heads * s.sequences * s.tiles * height * splits * width
        ops["fma_f32"] = ops.get("fma_f32", 0.0) + merged
    tasks, share = spread(s, steps + 1.0, splits, hardware.threads if parallel else 1)
    rows = min(s.rows, s.height)
    step = s.cell * s.blocks * LANES
    useful = float(p["t"]) / (s.tiles * s.tokens) * (p["dv"] + p["d"]) / (p["d"] + width)
    return work(
        ops,
        _streams(s, lengths, slots, values, splits, row_tiles),
        hardware,
        tasks=tasks,
        share=share,
        useful=useful,
        tile=Tile(max(1, s.registers // rows), rows, step * p["d"] + 4.0 * height * p["d"]),
    )


def products(
    s: Tiling, arith: str, heads: float, slots: float, values: float, row_tiles: int
) -> dict[str, float]:
    """Return what multiplies queries with keys and weights with values, and turns pairs into operands."""
    d, width, height = float(s.p["d"]), float(s.columns * LANES), float(s.height)
    if arith == "f32":
        return {"fma_f32": heads * height * (slots * d + values * width)}
    if arith in ("widen", "float8"):  # one operation for each element that a row tile reads
        read = heads * row_tiles * (slots * d + values * width)
        read *= 3 if arith == "float8" else 1  # widen, shift, mask
        return {"fma_f32": heads * height * (slots * d + values * width), "int_op": read}
    even = d + d % 2
    terms = 2.0 if arith == "dot2" else 1.0
    return {
        "dot_bf16": heads * height * (terms * slots * even + values * width),
        # weights are rounded; of values, the half of a pair that was never written is masked
        "int_op": heads * (6.0 * height * slots + 0.5 * row_tiles * values * width),
    }


def spread(s: Tiling, cost: Any, splits: int, threads: int) -> tuple[int, float]:
    """Return the tasks, and the part of their cost that falls to the busiest of the threads.

    ``cost`` is that of each tile, of one sequence after the other.
    """
    heads = s.groups
    tasks = heads * s.sequences * s.tiles * splits
    if threads == 1 or tasks == 1:
        return 1, 1.0
    tile = np.arange(s.tiles)  # tiles come alternately from both ends
    order = np.where(tile % 2 == 0, tile // 2, s.tiles - 1 - tile // 2)
    each = np.tile(np.repeat(cost.reshape(-1, s.tiles)[:, order], splits), heads)
    run = -(-tasks // min(tasks, threads))
    return tasks, float(np.add.reduceat(each, np.arange(0, tasks, run)).max() / each.sum())


def _streams(
    s: Tiling, lengths: Sequence[int], slots: float, values: float, splits: int, row_tiles: int
) -> list[Stream]:
    """Return what tiles of queries pass over: caches once a tile, steps once a register tile."""
    p = s.p
    width = s.columns * LANES
    most = p["window"] + p["t"] - 1 if p["window"] else max(lengths)
    read, b = sum(min(length, most) for length in lengths), s.sequences
    once = s.cell * p["kv"] * read
    keys, held = slots / read, values / read  # passes over the caches by all tiles together
    between = s.cell * (slots * p["d"] + values * width) / b / s.tiles / splits
    state = 4.0 * s.height * (p["d"] + width + s.blocks * LANES)
    step = s.cell * s.blocks * LANES
    out = [
        Stream(once * p["d"], ((keys, between + state), (row_tiles, step * p["d"] + state))),
        Stream(once * p["dv"], ((held, between + state), (row_tiles, step * width + state))),
        Stream(4.0 * b * p["t"] * p["h"] * p["d"]),
        Stream(4.0 * b * p["t"] * p["h"] * p["dv"]),
    ]
    if pages.paged(p):
        out.append(Stream(pages.table_bytes(lengths, p["page"])))
    if splits > 1:
        parts = 4.0 * b * p["kv"] * s.tiles * splits * s.height * (width + 2)
        out.append(Stream(parts, ((2, 0.0),), made=True))
    return out
