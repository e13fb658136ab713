"""Attention over listed blocks of a bfloat16 KV cache on GPUs: rows of keys are gathered one by one.

As on CPUs, kernels trust a list to be as `block_lists` says, and read whatever slots it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.ops.pages import TABLE, paged, table_bytes
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_layout as layout
from mimo_compile.schedules.attention.cuda_flash import CudaParts, PartsConfig, merge_threads
from mimo_compile.schedules.attention.cuda_work import HEIGHT, copied_counts, tiles_of, with_merge
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.cuda.code import Launch


class CudaLists(CudaParts):
    """Tiles of 16 rows that share a list; blocks of any size, single tokens too."""

    name = "sparse_attention.cuda_lists"
    op = "sparse_attention"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Keys and number of stages, warps, parts."""
        p = get_op(self.op).full(workload)
        default = self.default(p, hardware)
        return Space(PartsConfig, self.knobs(p), default, lambda c: self.legal(p, c, hardware))

    def template(self) -> Path:
        """Return the file of the text."""
        return Path(__file__).with_suffix(".cu")

    def shared_bytes(self, p: Mapping[str, Any], config: PartsConfig) -> int:
        """Return the shared memory of a block, with positions and slots of a stage more than are copied."""
        return super().shared_bytes(p, config) + (config.stages + 1) * 2 * 4 * config.keys

    def registers(self, p: Mapping[str, Any], config: PartsConfig, own: int) -> int:
        """Return about how many registers a thread needs: more where rows of both caches differ."""
        differ = layout.whole(p["d"]) != layout.whole(p["dv"])
        return super().registers(p, config, own) + 20 * differ

    def constants(self, workload: Workload) -> dict[str, int | float | bool]:
        """Return what the text is told of a workload."""
        p = get_op(self.op).full(workload)
        names = {"HS": "hs", "FIRST": "first", "BLOCK": "block", "KMAX": "kmax", "LIST": "rows"}
        own = {name: int(p[n]) for name, n in names.items()}
        return super().constants(workload) | own | {"MERGE_THREADS": merge_threads(p)}

    def launches(self, workload: Workload, config: PartsConfig) -> tuple[Launch, ...]:
        """Return the launch over the parts, and the one that merges them."""
        p = get_op(self.op).full(workload)
        sink, table = "sink" if p["sink"] else "q", TABLE if paged(p) else "pos"
        parts, states = (self.parts_of(p, config, n) for n in ("parts", "states"))
        first = Launch(
            "attend_lists",
            (self.units(p), config.parts, 1),
            32 * config.warps,
            ("q", "pos", "idx", "cnt", table, sink, "k_cache", "v_cache", "out", "lse", parts, states),
            self.shared_bytes(p, config),
        )  # fmt: skip
        if config.parts == 1:
            return (first,)
        rows = p["b"] * p["t"] * p["h"]
        given = ("pos", sink, parts, states, "out", "lse")
        return first, Launch("merge", (rows, 1, 1), merge_threads(p), given)

    def units(self, p: Mapping[str, Any]) -> int:
        """Return how many tiles of 16 rows there are."""
        return int(p["b"] * blocks_of(p["t"], p["rows"]) * _groups(p) * _tiles(p))

    def reach(self, p: Mapping[str, Any]) -> int:
        """Return how many keys the rows of a tile may see."""
        return int(p["kmax"] * p["block"] + p["window"])

    def work(self, workload: Workload, config: PartsConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work for full lists at the op's nominal KV lengths."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        lists, tiles, groups = blocks_of(p["t"], p["rows"]), _tiles(p), _groups(p)
        tokens, group = min(p["rows"], p["t"]), p["h"] // groups
        tile = np.arange(tiles)
        first = np.arange(lists)[:, None] * p["rows"] + tile * HEIGHT // group
        within = np.minimum((tile * HEIGHT + HEIGHT - 1) // group, tokens - 1)
        last = np.minimum(np.arange(lists)[:, None] * p["rows"] + within, p["t"] - 1)
        rows = first <= last  # the last list may be shorter: its further tiles are empty
        copied = scored = held = 0.0
        for length in op.lengths(p):
            newest = length - p["t"] + last
            most = p["first"] // p["block"] if p["first"] else newest // p["block"] + 1
            listed = np.minimum(p["kmax"], most) * p["block"]
            oldest = np.maximum(length - p["t"] + first - p["window"] + 1, 0)
            recent = newest + 1 - oldest if p["window"] else np.zeros_like(newest)
            listed, recent = np.where(rows, listed, 0), np.where(rows, recent, 0)
            there = np.minimum(listed, newest + 1) + recent
            copied += float(there.sum())
            scored += float((-(-(listed + recent) // config.keys) * config.keys).sum())
            # lists of a KV head may all differ, but not be more than the cache
            apart = float(there.max(axis=1).sum()) * groups / p["kv"]
            held += p["kv"] * min(apart, float(min(length, p["cap"])))
        own = config.keys // config.warps
        found = copied_counts(p, groups, copied, held, scored, own, config.parts)
        named = 4.0 * (p["b"] * lists * p["hs"] * (p["kmax"] + 1) + p["b"] * p["t"] * p["h"])
        if paged(p):
            named += table_bytes(op.lengths(p), p["page"])
        found = found + Counts({}, {"dram": named, "l2": named * tiles * groups / p["hs"]})
        return with_merge(found, p, self.units(p), config.parts)


def _groups(p: Mapping[str, Any]) -> int:
    """Return how many groups of query heads have a list and a KV head in common."""
    return int(max(p["hs"], p["kv"]))


def _tiles(p: Mapping[str, Any]) -> int:
    """Return the tiles of rows that share a list."""
    return tiles_of(min(p["rows"], p["t"]), p["h"] // _groups(p))
