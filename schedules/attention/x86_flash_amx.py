"""Attention of many tokens over a bfloat16 KV cache on x86 with matrix tiles (AMX)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.amx_tile import DEPTH, AmxTile
from mimo_compile.schedules.attention.flash import Tile
from mimo_compile.schedules.attention.layout import round_up
from mimo_compile.schedules.attention.pairs import imported
from mimo_compile.schedules.attention.reach import visited, visited_whole
from mimo_compile.schedules.attention.x86_flash import FlashConfig, X86Flash
from mimo_compile.schedules.base import Schedule, Space
from mimo_compile.schedules.emit.amx import NEEDS_BF16, SIDE
from mimo_compile.schedules.emit.bf16 import NEEDS
from mimo_compile.schedules.emit.vector import LANES


class X86FlashAmx(X86Flash):
    """Scores and weighted values by ``tdpbf16ps`` on the layouts that `x86_flash_pairs` reads."""

    name = "cached_attention.x86_flash_amx"
    stored = "bf16"
    streamed = 128
    order = Schedule.order  # nothing is promised
    tile_class: ClassVar[type[AmxTile]] = AmxTile

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Keys that fill tiles, 16 tokens or more (so that rows do), a cache of 32 slots that is no pool."""
        if not super().supports(workload, hardware) or not hardware.features >= NEEDS_BF16 | NEEDS:
            return False
        p = get_op(self.op).full(workload)
        fills = p["d"] % DEPTH == 0 and p["t"] >= SIDE and p["cap"] > SIDE
        return bool(fills and p["b"] == 1 and not p["pool"])

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return the tiles and steps of the vector kernel that fill matrix tiles."""
        base = super().space(workload, hardware)
        p = get_op(self.op).full(workload)
        group, most = p["h"] // p["kv"], -(-p["cap"] // SIDE) * SIDE
        # tokens beyond those of the call are left out, so a tile may not be longer than it
        tiles = tuple(n for n in (16, 32, 64, 128) if n <= p["t"] and (n == 16 or n * group <= 256))
        # steps that are longer than what is seen, or go beyond what was written, add values without tiles
        if p["window"]:
            most = min(most, round_up(p["window"] + p["t"]) + SIDE)
        blocks = tuple(n for n in (32, 64, 128, 256, 512) if n <= most)
        knobs = {**base.knobs, "tile": tiles, "block": blocks, "splits": (1,), "ahead": (0,)}
        few = max(n for n in base.knobs["rows"] if int(n) <= 4)
        far = not p["window"] and p["cap"] >= 8 * p["t"]
        step = max(n for n in blocks if n <= (256 if far else 64))
        tile = max(n for n in tiles if n * group <= 128 or n == 16)
        tasks = p["kv"] * -(-p["t"] // tile)
        parallel = hardware.threads > 1 and tasks > 1
        default = FlashConfig(tile, step, 1, int(few), parallel, 0)
        return Space(FlashConfig, knobs, default)

    def tile(self, config: FlashConfig) -> tuple[type[Tile], AbstractContextManager[Any] | None]:
        """Return the arithmetic, and the frame that its instructions need."""
        return type(self).tile_class, imported()

    def features(self, config: FlashConfig) -> frozenset[str]:
        """Return the features that the instructions need."""
        return NEEDS | NEEDS_BF16

    def arithmetic(self, config: FlashConfig) -> str:
        """Return how `flash_work` counts."""
        return "dot"

    def work(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it: scores, and values of whole steps, on tiles."""
        counts = super().work(workload, config, hardware)
        op: Any = get_op(self.op)
        p = op.full(workload)
        s, start = self.tiling(p, config, hardware), op.kv_length(p) - p["t"]
        first = np.arange(0, p["t"], s.tokens)
        steps, slots = (float(n.sum()) for n in visited_whole(s, start, p["t"], first))
        every = float(visited(s, start, p["t"], first)[1].sum())
        rows, width = float(p["kv"]) * s.height, float(s.columns * LANES)
        ops = dict(counts.ops)
        scores = ops.pop("dot_bf16") - rows * every * width
        ops["tile_bf16"] = scores + rows * steps * s.blocks * LANES * width
        if every > slots:
            ops["dot_bf16"] = rows * (every - slots) * width
        return replace(counts, ops=ops)
