"""The work of attention over KV caches in groups for GPUs, from extents and config, at nominal KV lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.schedules.attention import cuda_group_layout as layout
from mimo_compile.schedules.attention.cuda_layout import whole
from mimo_compile.schedules.attention.cuda_work import HEIGHT, tiles_of

RUN = 16
"""Positions of the tail that are attended to at a time."""
_SPLIT_ADDS, _SPLIT_PACKS = 2.0, 1.5
"""What it takes to make three bfloat16 numbers of one in float32; two are packed at a time."""


@dataclass(frozen=True, slots=True)
class Visits:
    """What blocks pass over, of one KV head."""

    copied: float = 0.0
    """Groups that are copied to shared memory."""
    met: float = 0.0
    """Groups that tiles of 16 rows are multiplied with."""
    runs: float = 0.0
    """Runs of the tail that they are multiplied with."""
    rows: float = 0.0
    """Rows of the tail that they read."""
    held: float = 0.0
    """Groups that come from memory, at least once."""
    held_rows: float = 0.0
    """Rows of the tail that do."""

    def __add__(self, other: Visits) -> Visits:
        """Return those of both."""
        return Visits(*(getattr(self, n) + getattr(other, n) for n in self.__slots__))


def visits(p: Mapping[str, Any], length: int, warps: int) -> Visits:
    """Return what one sequence's blocks pass over whose warps have 16 rows each.

    Args:
        p: Parameters of a `cached_attention`.
        length: Positions in the cache, those of the call's tokens among them.
        warps: Of a block, which share its groups; 1: each tile of 16 rows copies its own.
    """
    group, size, start = p["h"] // p["kv"], layout.format_of(p).group, length - p["t"]

    def ends(height: int) -> tuple[Any, Any]:
        tile = np.arange(tiles_of(p["t"], group, height)) * height
        newest = np.minimum((tile + height - 1) // group, p["t"] - 1)
        return start + tile // group, start + newest

    oldest, newest = ends(HEIGHT)
    first = oldest // size * size
    rows = newest + 1 - first
    return Visits(
        copied=float((ends(HEIGHT * warps)[1] // size).sum()),
        met=float((newest // size).sum()),
        runs=float((-(-rows // RUN)).sum()),
        rows=float(rows.sum()),
        held=float((length - 1) // size),
        held_rows=float(length - start // size * size),
    )


def group_counts(
    p: Mapping[str, Any], seen: Visits, parts: int = 1, folded: int = HEIGHT
) -> Counts:
    """Return the counts of attention over codes and tail.

    Args:
        p: Parameters of the workload.
        seen: Of all sequences.
        parts: Of the keys; each reads the queries by itself.
        folded: Rows of a tile that are multiplied by scales.
    """
    fmt, heads = layout.format_of(p), float(p["kv"])
    deep, keys, sums = layout.key_channels(p), whole(p["d"]), whole(p["dv"])
    shares, cells, few = fmt.value_groups(p["dv"]), float(HEIGHT * fmt.group), fmt.bits < 8
    # of codes below 8 bits the integers' sums are products with ones, eight columns wide
    totals = 8.0 * HEIGHT * (deep + fmt.group * shares) * few
    registers = fmt.group * (deep + sums) / 4
    group = {
        "tile_i8": cells * (fmt.query_terms * deep + sums) + totals,
        "exp_f32": cells,
        "add_f32": 3.0 * cells,
        # queries and weights times scales, the largest, rounded; float parts; logits; sums, shrunk
        "fma_f32": folded * (5.0 * deep + 4.0 * fmt.group * shares)
        + HEIGHT * 2.0 * (sums + fmt.group),
        "int_op": 2.0 * registers * few
        + 0.75 * folded * (deep * fmt.query_terms + fmt.group * shares),
    }
    numbers = float(RUN * (2 * keys + sums) + HEIGHT * RUN)
    run = {
        "tile_bf16": 6.0 * HEIGHT * RUN * (keys + sums),
        "exp_f32": float(HEIGHT * RUN),
        "add_f32": 3.0 * HEIGHT * RUN + _SPLIT_ADDS * numbers,
        "fma_f32": float(HEIGHT * (RUN + 2 * sums)),
        "int_op": _SPLIT_PACKS * numbers,
    }
    ops = {
        k: heads * (seen.met * group.get(k, 0.0) + seen.runs * run.get(k, 0.0))
        for k in {*group, *run}
    }
    given, row = 4.0 * p["b"] * p["t"] * p["h"], 4.0 * (keys + sums)
    code = float(layout.group_bytes(p))
    return Counts(
        ops,
        {
            "dram": heads * (seen.held * code + seen.held_rows * row) + given * (p["d"] + p["dv"]),
            "l2": heads * (seen.copied * code + seen.rows * row)
            + given * (parts * p["d"] + p["dv"]),
        },
    )


def position_bytes(p: Mapping[str, Any]) -> float:
    """Return the bytes of a position's codes in all KV heads, with its share of scales, without padding."""
    fmt = layout.format_of(p)
    return float(p["kv"] * (fmt.bytes_of(p["d"], keys=True) + fmt.bytes_of(p["dv"], keys=False)))
