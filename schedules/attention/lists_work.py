"""The work of attention over lists, from extents and config, for full lists at the op's nominal KV length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import pages
from mimo_compile.schedules.attention.layout import by_rows
from mimo_compile.schedules.attention.lists import ListTiling
from mimo_compile.schedules.attention.work import products, spread
from mimo_compile.schedules.emit.vector import LANES
from mimo_compile.schedules.work import Stream, Tile, work


def visits(s: ListTiling, length: int) -> tuple[Any, Any]:
    """Return (parts, slots whose values are read) of each tile with a full list.

    Of blocks that do not fill a part, as many share one as do by chance.
    """
    p = s.p
    newest = np.minimum(length - p["t"] + np.arange(0, p["t"], s.tokens) + s.tokens, length) - 1.0
    there = np.floor(newest / p["block"]) + 1  # blocks that begin before the newest query ends
    taken = np.minimum(p["kmax"], there)
    keys = np.minimum(taken * p["block"], newest + 1)
    if s.chunk == LANES:
        parts = np.minimum(np.ceil(keys / LANES), s.cache_blocks)
    else:
        share = keys / (newest + 1)
        pieces = LANES / s.chunk if p["block"] < LANES else 1.0
        held = np.ceil((newest + 1) / LANES)
        together = held * (1 - (1 - share) ** pieces)
        parts = np.minimum(np.maximum(together, keys / LANES), max(s.parts, 1))
    own = np.minimum(p["window"] + (s.tokens - 1 if p["window"] else 0), newest + 1)
    keys = np.minimum(keys + own, newest + 1)
    if by_rows(p):  # keys stand alone, sixteen of them are a part
        return np.ceil(keys / LANES), keys
    parts = np.minimum(parts + -(-own // LANES), max(s.parts, 1))
    return parts, keys


def lists_work(
    s: ListTiling,
    lengths: Sequence[int],
    splits: int,
    hardware: Hardware,
    *,
    parallel: bool,
    arith: str = "f32",
) -> Counts:
    """Return the counts on whole steps, as `flash_work` does; arguments as there."""
    p, height, width = s.p, float(s.height), float(s.columns * LANES)
    each = [visits(s, length) for length in lengths]
    parts, live = (np.concatenate(found) for found in zip(*each, strict=True))
    steps = np.ceil(parts / s.blocks)
    scored = steps * s.blocks * LANES
    slots, values, turns = (float(n.sum()) for n in (scored, live, steps))
    groups = float(s.groups)
    row_tiles = sum(count for _, count in s.row_tiles())
    ops = {
        **products(s, arith, groups, slots, values, row_tiles),
        "exp_f32": groups * height * slots,
        "add_f32": groups * height * (2.0 * slots + turns * width),
    }
    if splits > 1:
        merged = groups * s.sequences * s.tiles * height * splits * width
        ops["fma_f32"] = ops.get("fma_f32", 0.0) + merged
    tasks, share = spread(s, steps + 1.0, splits, hardware.threads if parallel else 1)
    rows = min(s.rows, s.height)
    step = s.cell * s.blocks * LANES
    useful = float(p["t"]) / (s.tiles * s.tokens) * (p["dv"] + p["d"]) / (p["d"] + width)
    return work(
        ops,
        _streams(s, float(parts.sum()) * LANES, values, splits, row_tiles),
        hardware,
        tasks=tasks,
        share=share,
        useful=useful,
        tile=Tile(max(1, s.registers // rows), rows, step * p["d"] + 4.0 * height * p["d"]),
    )


def _streams(
    s: ListTiling, slots: float, values: float, splits: int, row_tiles: int
) -> list[Stream]:
    """Return what tiles pass over: lists share what they can of the caches, each reads its own part.

    ``slots`` and ``values`` are those of all sequences.
    """
    p, width = s.p, float(s.columns * LANES)
    groups, tiles, b = float(s.groups), float(s.tiles), float(s.sequences)
    # all lists of a KV head together see at most the whole cache
    shared = groups / p["kv"] * tiles
    room = b * s.cache_blocks * LANES
    own_keys, own_values = slots * groups / p["kv"], values * groups / p["kv"]
    held_keys = min(own_keys, room)
    held_values = min(own_values, room)
    between = s.cell * (slots * p["d"] + values * width) / b / tiles / splits
    state = 4.0 * s.height * (p["d"] + width + s.blocks * LANES)
    step = s.cell * s.blocks * LANES
    again_keys = max(own_keys / max(held_keys, 1.0), 1.0)
    again_values = max(own_values / max(held_values, 1.0), 1.0)
    inner = [(row_tiles, step * n + state) for n in (p["d"], width)]
    apart = between * max(shared, 1.0)
    out = [
        Stream(s.cell * p["kv"] * held_keys * p["d"], ((again_keys, apart), inner[0])),
        Stream(s.cell * p["kv"] * held_values * width, ((again_values, apart), inner[1])),
        Stream(4.0 * b * p["t"] * p["h"] * p["d"]),
        Stream(4.0 * b * p["t"] * p["h"] * (p["dv"] + 1.0)),
        Stream(4.0 * b * -(-p["t"] // p["rows"]) * p["hs"] * (p["kmax"] + 1.0)),
    ]
    if pages.paged(p):
        named = [min(int(slots / b), int(p["cap"]))] * int(b)
        out.append(Stream(pages.table_bytes(named, p["page"])))
    if splits > 1:
        parts = 4.0 * b * groups * tiles * splits * s.height * (width + 2)
        out.append(Stream(parts, ((2, 0.0),), made=True))
    return out
