"""Attention that scores blocks of keys on x86: while it passes over them, or by a second pass over keys."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.layout import kernel_args
from mimo_compile.schedules.attention.oracle import emit_oracle, noted_blocks
from mimo_compile.schedules.attention.phases import emit
from mimo_compile.schedules.attention.reach import Tiling
from mimo_compile.schedules.attention.score_emit import emit as emit_scores
from mimo_compile.schedules.attention.score_slots import Slots
from mimo_compile.schedules.attention.work import flash_work
from mimo_compile.schedules.attention.x86_flash import FlashConfig, X86Flash
from mimo_compile.schedules.attention.x86_flash_pairs import PairsConfig, X86FlashPairs
from mimo_compile.schedules.attention.x86_score_keys import KeysConfig, X86ScoreKeys
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.emit.build import function
from mimo_compile.schedules.emit.vector import LANES, symbol
from mimo_compile.schedules.work import Stream, moved

MOST_BLOCK = 512
"""Positions of the largest block: a step holds whole ones."""
MOST_NOTED = 1 << 28
"""Bytes of the largest scratch memory for noted logits."""


class X86Oracle(X86Flash):
    """Flash attention that notes the largest logit of each row and block."""

    name = "oracle_attention.x86_fused"
    op = "oracle_attention"
    streamed = 128
    version = 2

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Blocks of whole vectors, few enough that their logits fit scratch memory, on any x86-64."""
        if not super().supports(workload, hardware):
            return False
        p = self.extents(workload)
        noted = 4 * p["t"] * p["h"] * -(-p["cap"] // p["block"])
        whole = p["block"] % LANES == 0 and p["block"] <= MOST_BLOCK
        return bool(whole and noted <= MOST_NOTED)

    def extents(self, workload: Workload) -> dict[str, Any]:
        """Return the parameters that flash attention goes by."""
        return get_op(self.op).full(workload) | {"window": 0, "sink": 0}

    def tiling(self, p: Mapping[str, Any], c: FlashConfig, hardware: Hardware) -> Tiling:
        """Return the compile-time sizes of a config; steps hold whole blocks, the cache's last one too."""
        whole = -(-p["cap"] // p["block"]) * p["block"]
        return replace(super().tiling(p, c, hardware), blocks=min(c.block, whole) // LANES)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return the space of dense attention whose steps hold whole blocks."""
        p = self.extents(workload)
        group, cap = p["h"] // p["kv"], -(-p["cap"] // LANES) * LANES
        sizes = (1, 2, 4, 8, 16, 32, 64)
        tiles = tuple(n for n in sizes if n < 2 * p["t"] and n * group <= 256) or (1,)
        base = self.space_of(p, hardware, group, cap, tiles)
        whole = {int(n) for n in base.knobs["block"] if int(n) % p["block"] == 0}
        steps = tuple(sorted(whole | {p["block"]}))
        near = max((n for n in steps if n <= base.default.block), default=steps[0])
        default = replace(base.default, block=near)
        return Space(FlashConfig, {**base.knobs, "block": steps}, default, base.legal)

    def lower(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        op: Any = get_op(self.op)
        p = self.extents(workload)
        s = self.tiling(p, config, hardware)
        name = symbol(self.op, self.name, self.version, workload, config, hardware.has_avx512)
        args, scale = kernel_args(workload), op.softmax_scale(p)
        splits, parallel = config.splits, config.parallel

        def body(q: Any, pos: Any, *rest: Any) -> None:
            k, v, out, score = rest
            kind, frame = self.tile(config)
            with frame or nullcontext():
                emit_oracle(s, p["block"], splits, parallel, scale, q, pos, k, v, out, score, kind)

        rows = s.groups * s.tiles * s.height
        room = 4 * rows * noted_blocks(s, p["block"]) + 4 * p["t"] * p["h"]
        if config.splits > 1:
            room += 4 * rows * config.splits * (s.columns * LANES + 2)
        counts = self.work(workload, config, hardware)
        return Kernel(name, function(name, args, body), args, counts, room, self.features(config))

    def work(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it."""
        op: Any = get_op(self.op)
        p = self.extents(workload)
        s = self.tiling(p, config, hardware)
        length = op.kv_length(p)
        found = flash_work(
            s, [length], config.splits, hardware, parallel=config.parallel,
            arith=self.arithmetic(config),
        )  # fmt: skip
        rows, blocks = float(s.groups * s.tiles * s.height), -(-length // p["block"])
        # a maximum of each score, and of each noted one a power; noted, read again, and written as scores
        more = {"add_f32": rows * length + rows * blocks, "exp_f32": rows * blocks}
        ops = {**found.ops, **{n: found.ops.get(n, 0.0) + x for n, x in more.items()}}
        noted = 4.0 * rows * noted_blocks(s, p["block"])
        streams = [
            Stream(4.0 * rows * blocks, ((2, noted),), made=True),
            Stream(4.0 * p["t"] * p["kv"] * blocks),
        ]
        levels = moved(streams, hardware)
        return replace(found, ops=ops, bytes={n: x + levels[n] for n, x in found.bytes.items()})


class X86OraclePairs(X86FlashPairs, X86Oracle):
    """`X86Oracle` over bfloat16 caches, in float32: scores round nothing."""

    name = "oracle_attention.x86_fused_pairs"
    op = "oracle_attention"
    version = 3

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return the space over float32 caches: products of bfloat16 would round queries."""
        base = super().space(workload, hardware)
        return replace(base, knobs={**base.knobs, "arith": ("widen",)})


@dataclass(frozen=True, slots=True)
class TwiceConfig(PairsConfig):
    """Knobs of attention, and of the pass that scores."""

    score_tile: int = 1
    score_run: int = 64
    score_rows: int = 4
    score_wide: int = 4
    score_splits: int = 1
    score_ahead: int = 0


def _score_config(c: TwiceConfig) -> KeysConfig:
    own = {
        f.name: getattr(c, f"score_{f.name}") for f in fields(KeysConfig) if f.name != "parallel"
    }
    return KeysConfig(**own, parallel=c.parallel)


class X86OracleTwice(X86Flash):
    """Attention, then a second pass over the keys: blocks of any size, and attention in any arithmetic."""

    name = "oracle_attention.x86_twice"
    op = "oracle_attention"
    version = 2
    config = TwiceConfig
    flash: X86Flash = X86Flash()
    scores = X86ScoreKeys()

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op over caches that `flash` reads, on any x86-64."""
        return workload.op == self.op and all(
            s.supports(w, hardware)
            for s, w in zip((self.flash, self.scores), parts(workload), strict=True)
        )

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return the product of both spaces; both passes use threads, or neither."""
        dense, scored = parts(workload)
        first, second = self.flash.space(dense, hardware), self.scores.space(scored, hardware)
        more = {f"score_{n}": v for n, v in second.knobs.items() if n != "parallel"}
        attends, keys = (
            s.config_to_json(d.default) for s, d in ((self.flash, first), (self.scores, second))
        )
        parallel = attends.pop("parallel") or keys.pop("parallel")
        own = {f"score_{n}": v for n, v in keys.items() if n != "parallel"}
        default = TwiceConfig(**attends, **own, parallel=parallel)
        return Space(
            TwiceConfig,
            {**first.knobs, **more},
            default,
            lambda c: first.legal(c) and second.legal(_score_config(c)),
        )

    def lower(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        assert isinstance(config, TwiceConfig)
        op: Any = get_op(self.op)
        dense, scored = parts(workload)
        p = get_op(dense.op).full(dense)
        s = self.flash.tiling(p, config, hardware)
        slots = Slots.of(scored, _score_config(config))
        name = symbol(self.op, self.name, self.version, workload, config, hardware.has_avx512)
        args, scale = kernel_args(workload), op.softmax_scale(p)

        def body(q: Any, pos: Any, *rest: Any) -> None:
            k, v, out, score = rest
            kind, frame = self.flash.tile(config)
            with frame or nullcontext():
                emit(s, config.splits, config.parallel, scale, q, pos, None, k, v, out, kind)
            emit_scores(
                slots, config.score_splits, config.parallel, scale, q, pos, None, None, k, score
            )

        # either pass in its turn
        room = 4 * slots.height * (slots.run + p["d"])
        room += 4 * p["kv"] * slots.tiles * slots.height * (slots.blocks + slots.blocks_of_run)
        if config.splits > 1:
            tasks = p["kv"] * s.tiles * config.splits
            room = max(room, 4 * tasks * s.height * (s.columns * LANES + 2))
        counts = self.work(workload, config, hardware)
        features = self.flash.features(config)
        return Kernel(name, function(name, args, body), args, counts, room, features)

    def work(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it."""
        assert isinstance(config, TwiceConfig)
        dense, scored = parts(workload)
        first = self.flash.work(dense, config, hardware)
        second = self.scores.work(scored, _score_config(config), hardware)
        cost = [c.flops for c in (first, second)]
        both = {  # of the two passes, each by what it costs; loops are described by the first one's
            n: (first.traits[n] * cost[0] + second.traits[n] * cost[1]) / sum(cost)
            for n in ("share", "useful")
        }
        return replace(first + second, traits={**first.traits, **both})


class X86OracleTwicePairs(X86OracleTwice):
    """`X86OracleTwice` over bfloat16 caches: attention may round queries and weights, scores do not."""

    name = "oracle_attention.x86_twice_pairs"
    version = 3
    flash = X86FlashPairs()
    stored = "bf16"


def parts(workload: Workload) -> tuple[Workload, Workload]:
    """Return what both passes compute: `cached_attention` and `score_keys`."""
    op: Any = get_op(workload.op)
    found: tuple[Workload, Workload] = op.parts(workload)
    return found
