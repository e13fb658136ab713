"""Attention of many tokens over a bfloat16 KV cache on GPUs: warps have rows, and share a block's keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.cuda_flash import CudaFlash, StagesConfig
from mimo_compile.schedules.attention.cuda_work import (
    HEIGHT,
    in_pages,
    spans,
    steps_of,
    tiles_of,
)
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.cuda.code import Launch


class CudaPrefill(CudaFlash):
    """Blocks of 16 rows for each warp; tiles of keys that no row of a warp sees are left out."""

    name = "cached_attention.cuda_prefill"
    op = "cached_attention"
    config: ClassVar[type] = StagesConfig

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Keys and number of stages, warps."""
        p = get_op(self.op).full(workload)
        knobs = {"keys": (16, 32, 64, 128), "stages": (2, 3, 4), "warps": (1, 2, 4, 8)}
        tries = (StagesConfig(keys, 2, self.warps_of(p, hardware)) for keys in (64, 32, 16))
        default = next((c for c in tries if self.legal(p, c, hardware)), StagesConfig(16, 2, 1))
        return Space(StagesConfig, knobs, default, lambda c: self.legal(p, c, hardware))

    @staticmethod
    def warps_of(p: Mapping[str, Any], hardware: Hardware) -> int:
        """Return warps of a block by default: many, so that keys are read seldom, but no SM has much more."""
        busiest = {}
        for warps in (1, 2, 4, 8):
            tiles = tiles_of(p["t"], p["h"] // p["kv"], HEIGHT * warps)
            blocks = p["b"] * p["kv"] * tiles
            busiest[warps] = -(-blocks // hardware.cores) * warps
        return max(n for n, rows in busiest.items() if rows <= 1.25 * min(busiest.values()))

    def legal(self, p: Mapping[str, Any], config: StagesConfig, hardware: Hardware) -> bool:
        """Say whether a config can be launched."""
        return self.can(p, config, config.keys, hardware)

    def template(self) -> Path:
        """Return the file of the text."""
        return Path(__file__).with_suffix(".cu")

    def constants(self, workload: Workload) -> dict[str, int | float | bool]:
        """Return what the text is told of a workload."""
        return super().constants(workload) | {"B": get_op(self.op).full(workload)["b"]}

    def launches(self, workload: Workload, config: Any) -> tuple[Launch, ...]:
        """Return the one launch."""
        p = get_op(self.op).full(workload)
        tiles = tiles_of(p["t"], p["h"] // p["kv"], HEIGHT * config.warps)
        sink = "sink" if p["sink"] else "q"
        given = ("q", "pos", sink, *self.given(p), "out")
        grid = (p["kv"] * p["b"] * tiles, 1, 1)
        return (Launch("attend", grid, 32 * config.warps, given, self.shared_bytes(p, config)),)

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the kernel's work at the op's nominal KV lengths."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        copied = scored = held = 0.0
        for length in op.lengths(p):
            begin, end = spans(p, length, HEIGHT * config.warps)
            copied += float((end - begin).sum())
            held += float(end.max() - begin.min()) * p["kv"]
            steps = steps_of(p, length, begin, (config.warps, HEIGHT), config.keys)
            scored += float(steps.sum()) * config.keys
        found = self.counted(p, copied, held, scored, config.keys)
        return in_pages(found, p, op.lengths(p))
