"""The work of attention kernels for GPUs, from extents and config, at an op's nominal KV lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.ops.pages import paged, table_bytes
from mimo_compile.schedules.attention import cuda_layout as layout

HEIGHT = 16
"""Rows of a matrix tile: tokens and heads that share keys, ``row = token * group + head``."""
STATE = 2
"""Numbers that a row has besides its values: greatest logit, sum of weights."""


def tiles_of(tokens: int, group: int, height: int = HEIGHT) -> int:
    """Return how many tiles of rows tokens and heads of a group make."""
    return -(-tokens * group // height)


def spans(p: Mapping[str, Any], length: int, height: int) -> tuple[Any, Any]:
    """Return the first position that any row of each tile sees, and the one behind the last; int64 arrays.

    Args:
        p: Parameters of a `cached_attention`.
        length: Positions in the cache, those of the call's tokens among them.
        height: Rows of a tile.
    """
    group = p["h"] // p["kv"]
    tile = np.arange(tiles_of(p["t"], group, height))
    first, last = (
        tile * height // group,
        np.minimum((tile * height + height - 1) // group, p["t"] - 1),
    )
    start = length - p["t"]
    begin = np.full(len(tile), max(0, length - p["cap"]))
    if p["window"]:
        begin = np.maximum(begin, start + first - p["window"] + 1)
    return begin, start + last + 1


def steps_of(
    p: Mapping[str, Any], length: int, begin: Any, teams: tuple[int, int], keys: int
) -> Any:
    """Return how many tiles of keys each team of warps passes over; int64, teams of a block together.

    Args:
        p: Parameters of a `cached_attention`.
        length: Positions in the cache, those of the call's tokens among them.
        begin: The first position that any row of each block sees; see `spans`.
        teams: How many a block has, and rows of each: tiles that none of these sees are left out.
        keys: Of a tile.
    """
    group, start = p["h"] // p["kv"], length - p["t"]
    count, height = teams
    row = np.arange(len(begin) * count) * height
    oldest = start + row // group
    newest = start + np.minimum((row + height - 1) // group, p["t"] - 1)
    block = np.repeat(begin, count)
    last = np.where(row < p["t"] * group, (newest - block) // keys, -1)
    skipped = np.zeros_like(last)
    if p["window"]:
        blind = (oldest - p["window"] - keys + 1 - block) // keys + 1
        skipped = np.maximum(blind, 0)
    return np.maximum(last - skipped + 1, 0)


def copied_counts(
    p: Mapping[str, Any],
    heads: float,
    copied: float,
    held: float,
    scored: float,
    own: int,
    parts: int = 1,
) -> Counts:
    """Return the counts of passing over keys.

    Args:
        p: Parameters of the workload.
        heads: KV heads, or groups of query heads, which do the same.
        copied: Keys that blocks copy to shared memory, together.
        held: Keys that come from memory, at least once, together; the others from L2.
        scored: Keys that tiles of 16 rows are multiplied with, together.
        own: Keys of a softmax step.
        parts: Of the keys; each reads the queries by itself.
    """
    wide, sums = layout.whole(p["d"]), layout.whole(p["dv"])
    row = 2.0 * (wide + sums)
    cells = HEIGHT * scored * heads
    given = 4.0 * p["b"] * p["t"] * p["h"]
    through = heads * copied * row + given * (parts * p["d"] + p["dv"])
    return Counts(
        {
            "tile_bf16": cells * (wide + sums),
            "exp_f32": cells,
            # greatest, difference from it, sum; two values are rounded at once
            "add_f32": 3.0 * cells,
            "fma_f32": cells / own * sums,  # sums are rescaled in each step
            "int_op": 0.5 * cells,
        },
        {
            "dram": held * row + given * (p["d"] + p["dv"]),
            "l2": through,
            "l1": heads * scored * row + through,  # what was copied is read by each tile of rows
        },
    )


def with_merge(main: Counts, p: Mapping[str, Any], units: int, parts: int) -> Counts:
    """Return the counts of a kernel whose parts are merged by a launch of their own; see `CudaParts`."""
    if parts == 1:
        return main
    number = layout.whole(p["dv"]) + STATE
    rows, made = float(p["b"] * p["t"] * p["h"]), 4.0 * units * parts * HEIGHT * number
    result = 4.0 * rows * p["dv"]
    moved = {
        **main.bytes,
        "dram": main.bytes["dram"] - result,
        "l2": main.bytes["l2"] - result + made,
    }
    first = Counts(main.ops, moved, name="attend")
    merged = Counts(
        {"fma_f32": rows * parts * p["dv"], "exp_f32": rows * parts * p["dv"]},
        {"dram": result, "l2": result + 4.0 * rows * parts * number},
        name="merge",
    )
    return in_turn(first, merged)


def in_pages(
    counts: Counts, p: Mapping[str, Any], lengths: list[int], position: float | None = None
) -> Counts:
    """Return counts with the block tables, and without pages that sequences share; see `pages.counted`.

    ``position``: bytes of a position in the pages of all KV heads; None: of bfloat16 rows.
    """
    if not paged(p):
        return counts
    if position is None:
        position = 2.0 * p["kv"] * (layout.whole(p["d"]) + layout.whole(p["dv"]))
    twice = position * max(0, sum(lengths) - p["pool"] * p["page"])
    table = table_bytes(lengths, p["page"])
    return counts + Counts({}, {"dram": table - twice, "l2": table})
