"""Scores of blocks for prefill by dots of bytes on x86 (SALE).

Keys are coded once; a task then is a head with a tile of queries, which compares the codes of its queries
with those of every key between its sinks and its near keys. Only the greatest estimate of each slot is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import int8_dot, layout
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_lowbit_codes import KeyCodes, Sizes
from mimo_compile.schedules.attention.score_lowbit_tile import Tile as Queries
from mimo_compile.schedules.attention.x86_score_keys import FORMATS
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.emit.build import T, function, loop, workspace
from mimo_compile.schedules.emit.vector import LANES, symbol
from mimo_compile.schedules.work import Stream, Tile, busiest, work


@dataclass(frozen=True, slots=True)
class LowbitConfig:
    """Knobs."""

    rows: int = 8
    """Queries of a register tile."""
    wide: int = 2
    """Vectors of slots of a register tile."""
    parallel: bool = True


class X86ScoreLowbit(Schedule):
    """Dots of bytes, with ``vpdpbusd`` or pairs of words."""

    name = "score_lowbit.x86"
    op = "score_lowbit"
    config = LowbitConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op over float caches, on x86-64 with dots of bytes or words."""
        if workload.op != self.op or hardware.kind != "cpu" or not int8_dot.best_way(hardware):
            return False
        return get_op(self.op).full(workload)["c"] in FORMATS

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Register tile, threads."""
        p = get_op(self.op).full(workload)
        rows = tuple(n for n in (1, 2, 4, 8) if n <= -(-min(p["rows"], p["t"]) // p["every"]))
        most = 24 if hardware.has_avx512 else 8
        threads = (False, True) if hardware.threads > 1 else (False,)
        row = max(n for n in rows if n <= (8 if hardware.has_avx512 else 4))
        side = max(n for n in (1, 2, 4) if n * row <= most - 4 or n == 1)
        default = LowbitConfig(row, side, hardware.threads > 1)
        return Space(
            LowbitConfig, {"rows": rows, "wide": (1, 2, 4), "parallel": threads}, default,
            lambda c: c.rows * c.wide <= most,
        )  # fmt: skip

    def sizes(self, workload: Workload, config: LowbitConfig, hardware: Hardware) -> Sizes:
        """Return the compile-time sizes of a config."""
        op = get_op(self.op)
        tiles, _, blocks = next(a.shape for a in op.args(workload) if a.name == "score")
        way = int8_dot.best_way(hardware)
        assert way is not None
        return Sizes(op.full(workload), tiles, blocks, config.rows, config.wide, way)

    def lower(self, workload: Workload, config: LowbitConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        s = self.sizes(workload, config, hardware)
        op: Any = get_op(self.op)
        args = layout.kernel_args(workload)
        name = symbol(self.op, self.name, self.version, workload, config, s.way)

        def body(*arrays: Any) -> None:
            with int8_dot.frame(s.way):
                _emit(s, config.parallel, op.softmax_scale(s.p), *arrays)

        slots, p = s.vectors * LANES, s.p
        shared = slots * (p["kv"] * (s.words + 2) + p["h"])
        own = s.sampled * (s.words + 4) + best_size(s) + p["d"] * LANES
        room = 4 * (shared + own * (hardware.threads if config.parallel else 1))
        return Kernel(
            name, function(name, args, body), args, self.work(workload, config, hardware), room,
            int8_dot.WAYS[s.way],
        )  # fmt: skip

    def work(self, workload: Workload, config: LowbitConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it: every key before a tile, and its exact region."""
        s = self.sizes(workload, config, hardware)
        p, need = s.p, get_op(self.op).counts(workload)
        length, tiles = int(p["len"] or p["cap"]), s.tiles
        each = (length - p["t"] + min(i * p["rows"], p["t"]) for i in range(tiles))
        before = float(sum(each))
        exact = min(length, (p["first"] + p["last"]) * p["block"] + p["rows"])
        region = float(tiles * exact)
        span = float(s.sampled) if length > p["least"] else 0.0
        deep = float(s.words * 4)
        ops = {
            "dot_i8": max(need.ops["dot_i8"], p["h"] * before * span * deep),
            "fma_f32": p["h"] * region * span * p["d"] + p["h"] * length * p["d"],
            "int_op": max(need.ops["int_op"], 4.0 * p["h"] * before * span + 4.0 * p["kv"] * length * p["d"]),
            "exp_f32": p["h"] * region * span,
        }  # fmt: skip
        coded = float(p["kv"] * length * deep)
        own = coded / p["kv"]
        streams = [
            Stream(need.bytes["dram"]),
            Stream(coded, ((max(1.0, s.group * before / length), own),), made=True),
            Stream(4.0 * p["h"] * length, ((max(1.0, before / length), 4.0 * length),), made=True),
        ]
        tasks = p["h"] * tiles
        threads = hardware.threads if config.parallel else 1
        return work(
            ops, streams, hardware, tasks=tasks if threads > 1 else 1, share=busiest(tasks, threads),
            useful=min(1.0, need.ops["dot_i8"] / max(ops["dot_i8"], 1.0)),
            tile=Tile(s.wide, s.rows, deep * LANES * s.wide + span * deep),
        )  # fmt: skip

    def layouts(self, workload: Workload, config: LowbitConfig) -> dict[str, str]:
        """Return the name of the layout of the keys."""
        return {"k_cache": layout.layouts(workload)["k_cache"]}

    def pack(
        self, workload: Workload, config: LowbitConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the keys."""
        return layout.pack_caches(workload, arrays)

    def unpack_state(
        self, workload: Workload, config: LowbitConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return canonical keys."""
        return layout.unpack_caches(workload, arrays)


def best_size(s: Sizes) -> int:
    """Return how many numbers hold the greatest weight of each slot that a tile looks at."""
    return int((s.vectors + s.wide + s.p["block"]) * LANES)


def _emit(
    s: Sizes, parallel: bool, scale: float, q: Any, pos: Any, q_mean: Any, k_mean: Any, k: Any, score: Any,
) -> None:  # fmt: skip
    """Emit both phases."""
    span = (fixed(pos[0]), fixed(pos[1]))
    keys, length = KeyCodes(s), fixed(span[0] + span[1])
    coded = T.if_then_else(length > s.p["least"], length, T.int32(0))
    keys.fill(k, q_mean, k_mean, fixed(coded), parallel)
    with loop(s.p["h"] * s.tiles, parallel=parallel) as task:
        head = fixed(T.floordiv(task, T.int32(s.tiles)))
        # alternately from both ends, so that threads with a contiguous share get equal causal work
        turn = fixed(T.floormod(task, T.int32(s.tiles)))
        half = T.floordiv(turn, T.int32(2))
        tile = fixed(T.if_then_else(turn % 2 == 0, half, T.int32(s.tiles - 1) - half))
        own = Queries(s, keys, span, head, tile)
        own.queries.fill(q, q_mean, head, own.first)
        own.sum_region(q, k, k_mean, scale)
        best = workspace((best_size(s),), "float32")
        own.estimate(best, scale)
        own.write(best, score, tile)
