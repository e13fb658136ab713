"""The work of attention on int8 copies, from its extents and config."""

from __future__ import annotations

import numpy as np

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.attention.reach import Tiling, visited
from mimo_compile.schedules.attention.work import products, spread
from mimo_compile.schedules.emit.vector import LANES
from mimo_compile.schedules.work import Stream, Tile, work

COPY_OPS = 8.0
"""Integer operations on each element of a cache: measure it, round it, join it with others."""


def int8_work(
    s: Tiling, length: int, splits: int, hardware: Hardware, *, parallel: bool, values: str
) -> Counts:
    """Return the counts on whole steps, and of copying the written slots once.

    Args:
        s: Sizes of the kernel.
        length: Positions in the cache, those of this step's tokens among them.
        splits: Parts of the keys.
        hardware: Whose caches and threads count.
        parallel: Tasks are spread over threads.
        values: How weights meet values: ``int8``, or as `work.flash_work` has it.
    """
    p, height, width = s.p, float(s.height), float(s.columns * LANES)
    steps, live = visited(s, length - p["t"], p["t"], np.arange(0, p["t"], s.tokens))
    scored = steps * s.blocks * LANES
    slots, turns = float(scored.sum()), float(steps.sum())
    heads, whole = float(p["kv"]), values == "int8"
    weighed = slots if whole else float(live.sum())
    row_tiles = sum(count for _, count in s.row_tiles())
    deep = 4.0 * -(-int(p["d"]) // 4)
    stored = min(length, int(p["cap"]))
    copied = stored * heads * (deep + (width if whole else 0.0))
    ops = {
        "dot_i8": heads * height * slots * deep,
        "exp_f32": heads * height * slots,
        "add_f32": heads * height * (5.0 * slots + turns * width),
        "int_op": COPY_OPS * copied,
    }
    if whole:
        ops["dot_i8"] += heads * height * weighed * width
        ops["fma_f32"] = heads * height * (slots + turns * width)
    else:
        # what multiplies keys there, bytes do here
        both = products(s, values, heads, slots, weighed, row_tiles)
        keys = products(s, values, heads, slots, 0.0, row_tiles)
        for kind, count in both.items():
            alone = max(0.0, count - keys.get(kind, 0.0))
            ops[kind] = ops.get(kind, 0.0) + alone
    if splits > 1:
        ops["fma_f32"] = ops.get("fma_f32", 0.0) + heads * s.tiles * height * splits * width
    tasks, share = spread(s, steps + 1.0, splits, hardware.threads if parallel else 1)
    rows = min(s.rows, s.height)
    cell = parse_cache_format(p["c"]).bytes
    state = 4.0 * height * (p["d"] + width + s.blocks * LANES)
    value_cell = 1.0 if whole else cell
    between = (slots * deep + weighed * width * value_cell) / s.tiles / splits + state
    passes, inner = max(1.0, slots / stored), s.blocks * LANES
    key_turns = ((passes, between), (row_tiles, inner * deep + state))
    value_turns = (
        (max(1.0, weighed / stored), between),
        (row_tiles, inner * width * value_cell + state),
    )
    streams = [
        Stream(cell * heads * stored * p["d"]),
        Stream(deep * heads * stored, key_turns, made=True),
        Stream(4.0 * p["t"] * p["h"] * p["d"]),
        Stream(4.0 * p["t"] * p["h"] * p["dv"]),
    ]
    if whole:
        streams.append(Stream(cell * heads * stored * p["dv"]))
        streams.append(Stream(width * heads * stored, value_turns, made=True))
    else:
        streams.append(Stream(cell * heads * stored * p["dv"], value_turns))
    if splits > 1:
        parts = 4.0 * heads * s.tiles * splits * height * (width + 2)
        streams.append(Stream(parts, ((2, 0.0),), made=True))
    useful = float(p["t"]) / (s.tiles * s.tokens) * (p["dv"] + p["d"]) / (deep + width)
    return work(
        ops,
        streams,
        hardware,
        tasks=tasks,
        share=share,
        useful=min(1.0, useful),
        tile=Tile(max(1, s.registers // rows), rows, inner * deep + height * deep),
    )
