"""Attention of a few tokens over a bfloat16 KV cache on GPUs: keys split over blocks and their warps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.cuda_flash import CudaParts, PartsConfig, merge_threads
from mimo_compile.schedules.attention.cuda_work import (
    HEIGHT,
    in_pages,
    spans,
    tiles_of,
    with_merge,
)
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.cuda.code import Launch

MOST_TILES = 8
"""Of a KV head: of more, each would pass over the keys, and `cuda_prefill` shares them."""


class CudaDecode(CudaParts):
    """Tiles of 16 rows; each warp has keys of its own, so that blocks meet once in a stage."""

    name = "cached_attention.cuda_decode"
    op = "cached_attention"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Workloads of few tokens with bfloat16 caches, of heads that a warp's registers hold."""
        if not super().supports(workload, hardware):
            return False
        return self._tiles(get_op(self.op).full(workload)) <= MOST_TILES

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Keys and number of stages, warps, parts."""
        p = get_op(self.op).full(workload)
        default = self.default(p, hardware)
        return Space(PartsConfig, self.knobs(p), default, lambda c: self.legal(p, c, hardware))

    def template(self) -> Path:
        """Return the file of the text."""
        return Path(__file__).with_suffix(".cu")

    def constants(self, workload: Workload) -> dict[str, int | float | bool]:
        """Return what the text is told of a workload."""
        p = get_op(self.op).full(workload)
        return super().constants(workload) | {"MERGE_THREADS": merge_threads(p)}

    def launches(self, workload: Workload, config: Any) -> tuple[Launch, ...]:
        """Return the launch over the parts, and the one that merges them."""
        p = get_op(self.op).full(workload)
        sink = "sink" if p["sink"] else "q"
        parts, states = (self.parts_of(p, config, n) for n in ("parts", "states"))
        first = Launch(
            "attend_part",
            (self.units(p), config.parts, 1),
            32 * config.warps,
            ("q", "pos", sink, *self.given(p), "out", parts, states),
            self.shared_bytes(p, config),
        )  # fmt: skip
        if config.parts == 1:
            return (first,)
        rows = p["b"] * p["t"] * p["h"]
        given = ("pos", sink, parts, states, "out")
        return first, Launch("merge", (rows, 1, 1), merge_threads(p), given)

    def units(self, p: Mapping[str, Any]) -> int:
        """Return how many tiles of 16 rows there are."""
        return int(p["b"] * p["kv"] * self._tiles(p))

    def reach(self, p: Mapping[str, Any]) -> int:
        """Return how many keys the rows of a tile may see."""
        return int(min(p["cap"], p["window"] + p["t"] - 1 if p["window"] else p["cap"]))

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the kernel's work at the op's nominal KV lengths."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        own = config.keys // config.warps
        copied = scored = held = 0.0
        for length in op.lengths(p):
            begin, end = spans(p, length, HEIGHT)
            copied += float((end - begin).sum())
            scored += float((-(-(end - begin) // own) * own).sum())
            held += float(end.max() - begin.min()) * p["kv"]
        found = self.counted(p, copied, held, scored, own, config.parts)
        return with_merge(in_pages(found, p, op.lengths(p)), p, self.units(p), config.parts)

    @staticmethod
    def _tiles(p: Mapping[str, Any]) -> int:
        return tiles_of(p["t"], p["h"] // p["kv"])
