"""Flash attention on int8 copies of a cache: what differs from `flash.Tile`.

Logits are sums of bytes; they turn into floats once for each pair of query and key. `WholeInt8` also makes
bytes of the weights: a step is one tile of `ir.ops.int8_attention`, whose weights are relative to the tile's
own maximum, and the step's sums of integers are scaled when they join the row's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.ops.int8_attention import LEVELS, TILE
from mimo_compile.schedules.attention import exponent, int8_dot
from mimo_compile.schedules.attention.flash import START, Tile
from mimo_compile.schedules.attention.int8_cache import (
    BIAS,
    Copies,
    Keys,
    Values,
    code,
    magnitude,
)
from mimo_compile.schedules.attention.pairs import Dots, Widened
from mimo_compile.schedules.attention.reach import Reach, Tiling
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, store, when, workspace
from mimo_compile.schedules.emit.vector import LANES, LOG2E, rint, splat

INFINITE = 0x7F800000
"""Bits of infinity: those of a NaN, without its sign, are above."""


@dataclass(frozen=True, slots=True)
class TileTiling(Tiling):
    """Sizes of a kernel whose steps are tiles of weights."""

    @property
    def align(self) -> int:
        """See `Tiling.align`."""
        return TILE // LANES

    @property
    def cache_blocks(self) -> int:
        """Blocks of the copies."""
        return -(-int(self.p["cap"]) // TILE) * self.align


class ByteScores(Tile):
    """Logits of bytes; ``way`` names the instructions of `int8_dot`."""

    way = "vnni"
    copies: Copies

    def __init__(self, s: Tiling, k: Any, v: Any, head: Any, lead: Any = None) -> None:
        super().__init__(s, k, v, head, lead)
        assert not self.streams
        self.quads = -(-int(s.p["d"]) // 4)
        self.q_codes = workspace((s.height, 4 * self.quads), "int8")
        self.q_scale = workspace((s.height,), "float32")
        self.q_start = workspace((s.height,), "int32")

    @property
    def keys(self) -> Keys:
        """The quantised keys."""
        return self.copies.keys

    def begin(self, q: Any, first: Any, scale: float) -> None:
        """Quantise the queries from token ``first`` on, and clear the sums."""
        s = self.s
        with loop(s.tokens) as token:
            source = bind(T.min(first + token, T.int32(s.p["t"] - 1)))
            with loop(s.group) as g:
                row, head = bind(token * s.group + g), bind(self.lead * s.group + g)
                self._quantise(q, (source, head), row, scale)
        self.clear()

    def _quantise(self, q: Any, at: tuple[Any, Any], row: Any, scale: float) -> None:
        d = int(self.s.p["d"])
        bits = self._largest_bits(q, at, d)
        amax = bind(T.reinterpret("float32", bits))
        factor = T.if_then_else(bits < INFINITE, amax / T.float32(127.0), T.float32(math.nan))
        store(self.q_scale, factor * T.float32(scale * LOG2E), row)
        some = amax > T.float32(0.0)
        by = bind(T.if_then_else(some, T.float32(127.0) / amax, T.float32(0.0)))
        total = Register("int32", 1, T.int32(0))
        lanes = Register("int32", LANES, splat(T.int32(0)))
        if d // LANES:
            with loop(d // LANES) as j:
                found = code(load(q, *at, j * LANES, lanes=LANES), splat(by))
                store(self.q_codes, T.cast(found, "int8x16"), row, j * LANES, lanes=LANES)
                lanes.set(lanes.get() + found)
            total.set(T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", lanes.get()))
        for j in range(d // LANES * LANES, 4 * self.quads):
            if j >= d:
                store(self.q_codes, T.int8(0), row, j)
                continue
            rounded = rint(q[(*at, j)] * by)
            limit = T.min(T.float32(127.0), T.max(T.float32(-127.0), rounded))
            one = bind(T.cast(limit, "int32"))
            store(self.q_codes, T.cast(one, "int8"), row, j)
            total.set(total.get() + one)
        store(self.q_start, total.get() * T.int32(-BIAS), row)

    def _largest_bits(self, q: Any, at: tuple[Any, Any], d: int) -> Any:
        """Return the bits of the largest magnitude of a query; those of a NaN are above all numbers'."""
        lanes = Register("int32", LANES, splat(T.int32(0)))
        most = Register("int32", 1, T.int32(0))
        if d // LANES:
            with loop(d // LANES) as j:
                value = load(q, *at, j * LANES, lanes=LANES)
                lanes.set(T.max(lanes.get(), magnitude(value)))
            most.set(T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", lanes.get()))
        for j in range(d // LANES * LANES, d):
            one = T.bitwise_and(T.reinterpret("int32", q[(*at, j)]), T.int32(0x7FFFFFFF))
            most.set(T.max(most.get(), one))
        return bind(most.get())

    def denominator(self, row: Any) -> Any:
        """Return the sum of a row's weights; one that is NaN is its results', too, which have integers."""
        total = super().denominator(row)
        bits = T.bitwise_and(T.reinterpret("int32", total), T.int32(0x7FFFFFFF))
        with when(bits > INFINITE), loop(self.s.columns) as j:
            store(self.out, splat(math.nan), row, j * LANES, lanes=LANES)
        return total

    def _scores(self, reach: Reach, step: Any, part: Any, wide: int, first: Any, rows: int) -> None:
        blocks = [reach.block(step, part + u) for u in range(wide)]
        acc = []
        for r in range(rows):
            start = bind(splat(self.q_start[first + r]))
            acc.append([Register("int32", LANES, start) for _ in blocks])
        with loop(self.quads) as i:
            keys = [bind(load(self.keys.codes, self.head, b, i, 0, lanes=LANES)) for b in blocks]
            for r in range(rows):
                query = four(self.q_codes, first + r, 4 * i)
                for register, word in zip(acc[r], keys, strict=True):
                    register.set(int8_dot.dot(self.way, register.get(), word, query))
        scales = [bind(load(self.keys.scale, self.head, b * LANES, lanes=LANES)) for b in blocks]
        logs = [self.log_scale(b) for b in blocks]
        for r in range(rows):
            own = bind(splat(self.q_scale[first + r]))
            for u, (scale, log) in enumerate(zip(scales, logs, strict=True)):
                value = T.cast(acc[r][u].get(), "float32x16") * own * scale
                if log is not None:
                    value = value + log
                store(self.score, value, first + r, (part + u) * LANES, lanes=LANES)

    def log_scale(self, block: Any) -> Any | None:
        """Return what is added to the logits of 16 slots."""
        return None


def four(buffer: Any, row: Any, at: Any) -> Any:
    """Return four bytes in each of 16 lanes, bound."""
    return bind(splat(T.reinterpret("int32", load(buffer, row, at, lanes=4))))


class HalfPlain(ByteScores, Tile):
    """Logits of bytes, values as float32."""


class HalfWidened(ByteScores, Widened):
    """Logits of bytes, values of bfloat16 as float32."""


class HalfDots(ByteScores, Dots):
    """Logits of bytes, weights rounded to bfloat16."""


class WholeInt8(ByteScores):
    """Weights and values of bytes, too."""

    short = True

    def __init__(self, s: Tiling, k: Any, v: Any, head: Any, lead: Any = None) -> None:
        super().__init__(s, k, v, head, lead)
        self.codes = workspace((s.height, TILE), "uint8")
        self.own_top = workspace((self.lines * LANES,), "float32")
        """Maxima of the step alone."""
        self.part = workspace((self.lines * LANES,), "float32")
        """What a step's sums of integers are multiplied with."""

    @property
    def v_copy(self) -> Values:
        """The quantised values."""
        assert self.copies.values is not None
        return self.copies.values

    def log_scale(self, block: Any) -> Any | None:
        """Values' scales are part of what weights are before they are rounded."""
        return bind(load(self.v_copy.log_scale, self.head, block * LANES, lanes=LANES))

    def run(self, reach: Reach, first: Any, begin: Any, end: Any) -> None:
        """See `Tile.run`."""
        with T.serial(begin, end) as step:
            self.scores(reach, step)
            with when(T.Not(reach.clean(step))):
                self.mask(reach, step, first)
            self._weigh(reach.block(step, 0))
            self.values(reach, step)

    def _weigh(self, block: Any) -> None:
        """Turn the scores of a tile, which begins at ``block``, into bytes."""
        s = self.s
        with loop(s.height) as row:
            best = Register("float32", LANES, load(self.score, row, 0, lanes=LANES))
            for u in range(1, s.blocks):
                best.set(T.max(best.get(), load(self.score, row, u * LANES, lanes=LANES)))
            store(self.best, exponent.largest(T.max(best.get(), splat(START))), row)
        with loop(self.lines) as i:
            self.raise_top(i * LANES)
            best = self.best_of(i * LANES)
            below = best - load(self.top, i * LANES, lanes=LANES)
            store(self.part, self.factor2(below), i * LANES, lanes=LANES)
            store(self.own_top, best, i * LANES, lanes=LANES)
        with loop(s.height) as row:
            best = bind(splat(self.own_top[row]))
            total = Register("float32", LANES, splat(0.0))
            with loop(s.blocks) as u:
                at = u * LANES
                weight = bind(self.exp2(load(self.score, row, at, lanes=LANES) - best))
                # the lowest bits of a sum with 2**23 are the rounded integer
                level = T.reinterpret("int32x16", weight * splat(float(LEVELS)) + splat(2.0**23))
                store(self.codes, T.cast(level, "uint8x16"), row, at, lanes=LANES)
                by = load(self.v_copy.inverse, self.head, block * LANES + at, lanes=LANES)
                total.set(total.get() + weight * by)
            before = load(self.sum, row, 0, lanes=LANES) * splat(self.shrink[row])
            store(self.sum, before + total.get() * splat(self.part[row]), row, 0, lanes=LANES)

    def _values(self, reach: Reach, step: Any, first: Any, rows: int, columns: list[Any]) -> None:
        zero = splat(T.int32(0))
        acc = [[Register("int32", LANES, zero) for _ in columns] for _ in range(rows)]
        line = bind(reach.block(step, 0) * (LANES // 4))
        with loop(TILE // 4) as i:
            values = [
                bind(load(self.v_copy.codes, self.head, line + i, j, lanes=LANES)) for j in columns
            ]
            for r in range(rows):
                weights = four(self.codes, first + r, 4 * i)
                for register, word in zip(acc[r], values, strict=True):
                    register.set(int8_dot.dot(self.way, register.get(), weights, word))
        for r in range(rows):
            shrink = bind(splat(self.shrink[first + r]))
            part = bind(splat(self.part[first + r] * T.float32(1 / LEVELS)))
            for at, register in zip(columns, acc[r], strict=True):
                before = load(self.out, first + r, at, lanes=LANES) * shrink
                value = before + T.cast(register.get(), "float32x16") * part
                store(self.out, value, first + r, at, lanes=LANES)
