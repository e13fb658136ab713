"""Attention in int8 arithmetic over float caches on x86: made for prompts, right for one token as well.

A first phase copies what is visible as int8, in the order of dots of bytes; then tiles of queries pass over
the copies as `x86_flash` does over caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.int8_attention import TILE
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import int8_dot
from mimo_compile.schedules.attention.flash import Tile
from mimo_compile.schedules.attention.int8_cache import Copies, copies_bytes
from mimo_compile.schedules.attention.int8_tile import (
    ByteScores,
    HalfDots,
    HalfPlain,
    HalfWidened,
    TileTiling,
    WholeInt8,
)
from mimo_compile.schedules.attention.int8_work import int8_work
from mimo_compile.schedules.attention.layout import kernel_args, round_up
from mimo_compile.schedules.attention.pairs import imported
from mimo_compile.schedules.attention.phases import emit
from mimo_compile.schedules.attention.reach import Tiling
from mimo_compile.schedules.attention.x86_flash import FlashConfig, X86Flash
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.emit.bf16 import NEEDS
from mimo_compile.schedules.emit.build import function
from mimo_compile.schedules.emit.vector import LANES, symbol


@dataclass(frozen=True, slots=True)
class Int8Config(FlashConfig):
    """Knobs of attention in int8 arithmetic; steps of ``arith=int8`` are tiles of weights."""

    values: str = "int8"
    """How weights meet values: ``int8``; or, where those stay floats, ``f32``, and over bfloat16 caches
    ``widen`` or ``dot``."""


KINDS: dict[str, type[ByteScores]] = {
    "int8": WholeInt8,
    "f32": HalfPlain,
    "widen": HalfWidened,
    "dot": HalfDots,
}
"""By the knob ``values``."""


class X86Int8(X86Flash):
    """``arith=int8`` and ``int8half`` of float32 and bfloat16 caches."""

    name = "cached_attention.x86_int8"
    version = 5
    config = Int8Config
    order = Schedule.order  # nothing is promised

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Both forms, with AVX2 or better."""
        if workload.op != self.op or hardware.kind != "cpu":
            return False
        return get_op(self.op).full(workload)["arith"] != "float" and bool(
            int8_dot.best_way(hardware)
        )

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return the float kernel's tiles, parts and register tiles."""
        p = get_op(self.op).full(workload)
        base = super().space(workload, hardware)
        knobs = dict(base.knobs)
        knobs["ahead"] = (0,)
        default = self.config_to_json(base.default) | {"ahead": 0}
        if p["arith"] == "int8":
            kinds: tuple[str, ...] = ("int8",)
            knobs["block"] = (TILE,)
            default["block"] = TILE
        elif p["c"] == "f32":
            kinds = ("f32",)
        else:
            kinds = ("dot", "widen") if hardware.features >= NEEDS else ("widen",)
        group, tile = p["h"] // p["kv"], int(default["tile"])
        most = max(n for n in knobs["rows"] if int(n) <= min(4, tile * group))
        config = Int8Config(**(default | {"rows": int(most)}), values=kinds[0])
        return Space(
            Int8Config, knobs | {"values": kinds}, config, lambda c: c.rows <= c.tile * group
        )

    def registers(self, config: FlashConfig, hardware: Hardware) -> int:
        """Return how many accumulator vectors are in flight."""
        return 24 if int8_dot.best_way(hardware) == "vnni" else 4

    def tiling(self, p: Any, c: FlashConfig, hardware: Hardware) -> Tiling:
        """Return the compile-time sizes of a config."""
        tokens = min(c.tile, p["t"])
        whole = p["arith"] == "int8"
        blocks = min(c.block // LANES, round_up(p["cap"]) // LANES)
        rows = min(c.rows, tokens * (p["h"] // p["kv"]))
        kind = TileTiling if whole else Tiling
        return kind(
            p, tokens, TILE // LANES if whole else blocks, rows, self.registers(c, hardware), 0,
            1.0, hardware.has_avx512,
        )  # fmt: skip

    def lower(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        assert isinstance(config, Int8Config)
        op, way = get_op(self.op), int8_dot.best_way(hardware)
        assert way is not None
        p = op.full(workload)
        s = self.tiling(p, config, hardware)
        name = symbol(self.op, self.name, self.version, workload, config, hardware.has_avx512, way)
        scale = float(p["scale"] or p["d"] ** -0.5)
        args, whole = kernel_args(workload), p["arith"] == "int8"

        def statements(q: Any, pos: Any, *rest: Any) -> None:
            sink, (k, v, out) = (rest[0] if p["sink"] else None), rest[-3:]
            copies = Copies(p, k, v, values=whole)
            copies.emit(pos, parallel=config.parallel)
            kind = bound(KINDS[config.values], copies, way)
            emit(s, config.splits, config.parallel, scale, q, pos, sink, k, v, out, kind)

        def body(*buffers: Any) -> None:
            with int8_dot.frame(way):
                if config.values == "dot":
                    with imported():
                        statements(*buffers)
                else:
                    statements(*buffers)

        scratch = copies_bytes(p, values=whole)
        if config.splits > 1:
            tasks = p["kv"] * s.tiles * config.splits
            scratch += 4 * tasks * s.height * (s.columns * LANES + 2)
        needs = int8_dot.WAYS[way] | (NEEDS if config.values == "dot" else frozenset())
        counts = self.work(workload, config, hardware)
        return Kernel(name, function(name, args, body), args, counts, scratch, needs)

    def work(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it."""
        assert isinstance(config, Int8Config)
        op: Any = get_op(self.op)
        p = op.full(workload)
        return int8_work(
            self.tiling(p, config, hardware), op.kv_length(p), config.splits, hardware,
            parallel=config.parallel, values=config.values,
        )  # fmt: skip


def bound(kind: type[ByteScores], copies: Copies, way: str) -> Callable[..., Tile]:
    """Return what makes tiles of a kind that read these copies."""

    def make(*args: Any) -> Tile:
        tile = kind(*args)
        tile.copies, tile.way = copies, way
        return tile

    return make
