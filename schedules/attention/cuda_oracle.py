"""Attention that scores blocks of keys on GPUs: blocks' largest logits are kept while it passes over them.

A row keeps one number for each block of keys; a last launch makes probabilities of them, once the softmax
denominators are known. Scores are exact to float32: queries take three products of bfloat16, where
`cuda_prefill` has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_layout as layout
from mimo_compile.schedules.attention.cuda_flash import (
    LOG2_E,
    CudaFlash,
    PartsConfig,
    merge_threads,
)
from mimo_compile.schedules.attention.cuda_prefill import CudaPrefill
from mimo_compile.schedules.attention.cuda_work import HEIGHT, copied_counts, spans, tiles_of
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.cuda.code import Launch

MOST_NOTED = 1 << 28
"""Bytes of the largest scratch memory for noted logits."""
_KEYS = (64, 32, 16, 48, 80, 96, 112, 128)
"""Of a stage, the best first."""
_PARTS = (1, 2, 4, 8, 16, 32, 64)
_TERMS = 3
"""Numbers of bfloat16 whose sum is a query's."""
_STATE = 3
"""Numbers that a row of a part has: greatest logit, sums of weights for results and for scores."""
_SPARE = 84
"""Registers beside sums of values, logits, weights and fragments."""


class CudaOracle(CudaFlash):
    """Blocks of 16 rows for each warp, which share keys; parts of the keys in blocks of their own."""

    name = "oracle_attention.cuda"
    op = "oracle_attention"
    config: ClassVar[type] = PartsConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Blocks of 8 keys to 128, of which a stage holds whole ones, and few enough to be noted."""
        if workload.op != self.op:
            return False
        p = get_op(self.op).full(workload)
        noted = 4 * p["t"] * p["h"] * blocks_of(p["cap"], p["block"])
        return noted <= MOST_NOTED and super().supports(workload, hardware)

    def extents(self, workload: Workload) -> dict[str, Any]:
        """Return the parameters that attention goes by."""
        return get_op(self.op).full(workload) | {"window": 0, "sink": 0, "b": 1}

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Keys and number of stages, warps, parts."""
        p = self.extents(workload)
        keys = tuple(n for n in _KEYS if n % p["block"] == 0) or (HEIGHT,)
        most = max(1, p["cap"] // (2 * keys[0]))
        knobs = {
            "keys": tuple(sorted(keys)), "stages": (2, 3), "warps": (1, 2, 4),
            "parts": tuple(n for n in _PARTS if n <= most),
        }  # fmt: skip
        warps = min(4, CudaPrefill.warps_of(p, hardware))
        tries = (PartsConfig(n, 2, w, 1) for w in (warps, 1) for n in keys)
        first = next(
            (c for c in tries if self.legal(p, c, hardware)), PartsConfig(keys[0], 2, 1, 1)
        )
        tiles = p["kv"] * tiles_of(p["t"], p["h"] // p["kv"], HEIGHT * first.warps)
        room = max(1, self.resident(p, first, first.keys, hardware) // tiles)
        default = replace(first, parts=max(n for n in knobs["parts"] if n <= room))
        return Space(PartsConfig, knobs, default, lambda c: self.legal(p, c, hardware))

    def legal(self, p: Mapping[str, Any], config: PartsConfig, hardware: Hardware) -> bool:
        """Say whether a config can be launched."""
        whole = p["block"] % 8 == 0 and config.keys % p["block"] == 0
        return whole and self.can(p, config, config.keys, hardware)

    def shared_bytes(self, p: Mapping[str, Any], config: Any) -> int:
        """Return the shared memory of a block: stages, and the terms of each warp's queries."""
        terms = config.warps * _TERMS * layout.whole(p["d"]) * 32
        return super().shared_bytes(p, config) + int(terms)

    def registers(self, p: Mapping[str, Any], config: Any, own: int) -> int:
        """Return about how many registers a thread needs."""
        sums = 32 if own % 32 == 0 else 16
        return int(layout.whole(p["dv"]) // 2 + own // 2 + own // 4 + sums + _SPARE)

    def constants(self, workload: Workload) -> dict[str, int | float | bool]:
        """Return what the text is told of a workload."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        found: dict[str, int | float | bool] = layout.constants(workload)
        return found | {
            "SCALE": layout.float32(op.softmax_scale(p) * LOG2_E),
            "BLOCK": p["block"],
            "MERGE_THREADS": merge_threads(p),
        }

    def template(self) -> Path:
        """Return the file of the text."""
        return Path(__file__).with_suffix(".cu")

    def launches(self, workload: Workload, config: Any) -> tuple[Launch, ...]:
        """Return the launch over the parts, the one that merges them, and the one that scores."""
        p = self.extents(workload)
        tiles = tiles_of(p["t"], p["h"] // p["kv"], HEIGHT * config.warps)
        # without parts some array is given, not looked at
        own = ("parts", "states") if config.parts > 1 else ("out", "ends")
        first = Launch(
            "attend", (p["kv"] * tiles, config.parts, 1), 32 * config.warps,
            ("q", "pos", "k_cache", "v_cache", "out", "best", "ends", *own), self.shared_bytes(p, config),
        )  # fmt: skip
        threads = merge_threads(p)
        given = ("pos", "parts", "states", "out", "ends")
        merged = Launch("merge", (p["t"] * p["h"], 1, 1), threads, given)
        last = Launch("finish", (p["t"] * p["kv"], 1, 1), threads, ("pos", "best", "ends", "score"))
        return (first, merged, last) if config.parts > 1 else (first, last)

    def scratch(self, workload: Workload, config: Any) -> dict[str, Arg]:
        """Return noted logits, what closes a row, and what parts leave to be merged."""
        p = self.extents(workload)
        rows = (p["t"], p["h"])
        shapes: dict[str, tuple[int, ...]] = {
            "best": (*rows, blocks_of(p["cap"], p["block"])),
            "ends": (*rows, 2),
        }
        if config.parts > 1:
            shapes["parts"] = (*rows, config.parts, layout.whole(p["dv"]))
            shapes["states"] = (*rows, config.parts, _STATE)
        return {n: Arg(n, "output", shape, "float32") for n, shape in shapes.items()}

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the kernel's work at the op's nominal KV length."""
        op: Any = get_op(self.op)
        p = self.extents(workload)
        length, rows = op.kv_length(p), float(p["t"] * p["h"])
        begin, end = spans(p, length, HEIGHT * config.warps)
        scored = float((-(-spans(p, length, HEIGHT)[1] // config.keys) * config.keys).sum())
        found = copied_counts(
            p, p["kv"], float((end - begin).sum()), float(length * p["kv"]), scored, config.keys,
            config.parts,
        )  # fmt: skip
        cells, wide = HEIGHT * scored * p["kv"], layout.whole(p["d"])
        more = {"tile_bf16": (_TERMS - 1) * cells * wide, "add_f32": 4.0 * cells}
        noted = 4.0 * rows * length / p["block"]
        results = 4.0 * rows * p["dv"]
        first = found + Counts(more, {"dram": 0.0, "l2": noted})
        written = 4.0 * p["t"] * p["kv"] * blocks_of(p["cap"], p["block"])
        last = Counts(
            {"exp_f32": noted / 4, "fma_f32": noted / 4, "add_f32": noted / 2},
            {"dram": written, "l2": written + noted}, name="finish",
        )  # fmt: skip
        if config.parts == 1:
            return in_turn(first.named("attend"), last)
        made = 4.0 * rows * config.parts * (layout.whole(p["dv"]) + _STATE)
        moved = {
            **first.bytes,
            "dram": first.bytes["dram"] - results,
            "l2": first.bytes["l2"] - results + made,
        }
        sums = rows * config.parts * p["dv"]
        merged = Counts(
            {"fma_f32": sums, "exp_f32": sums},
            {"dram": results, "l2": results + made},
            name="merge",
        )
        return in_turn(Counts(first.ops, moved, name="attend"), merged, last)
