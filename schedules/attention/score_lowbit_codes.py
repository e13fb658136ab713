"""Codes of keys and queries for low-bit estimates: their means taken off, each token to its own scale.

Keys are coded once for all heads and tiles: four channels in each 32-bit lane of 16 slots, as dots of bytes
take them. Beside them lie the sums of each slot's codes (dots take one factor without a sign, so that queries
are moved up by `UP`), their scales, and the products with each head's mean query.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.caches import CacheFormat, parse_cache_format
from mimo_compile.schedules.attention import int8_dot
from mimo_compile.schedules.attention.layout import round_up
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import across, channels, lanes_of, over
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    store,
    workspace,
)
from mimo_compile.schedules.emit.vector import LANES, rint, splat

UP = 128
"""Added to a query's codes, so that they have no sign."""
FOUR = 4
"""Channels of a 32-bit lane."""
MOVED = 0x808080
"""128 in the three lower bytes of a lane."""
ONES = 0x01010101
"""1 in each byte of a lane."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Compile-time sizes of one kernel."""

    p: Mapping[str, Any]
    tiles: int
    blocks: int
    rows: int
    """Queries of a register tile."""
    wide: int
    """Vectors of slots of a register tile."""
    way: str
    """How bytes are multiplied."""

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return int(self.p["h"] // self.p["kv"])

    @property
    def vectors(self) -> int:
        """Vectors of slots of the cache."""
        return round_up(self.p["cap"]) // LANES

    @property
    def words(self) -> int:
        """Lanes of 32 bits that hold a token's codes."""
        return -(-int(self.p["d"]) // FOUR)

    @property
    def sampled(self) -> int:
        """Queries of a tile that are estimated."""
        return -(-int(self.p["rows"]) // int(self.p["every"]))

    @property
    def most(self) -> float:
        """The largest code."""
        return float(2 ** (self.p["bits"] - 1) - 1)

    @property
    def format(self) -> CacheFormat:
        """Format of the cache."""
        return parse_cache_format(self.p["c"])


class KeyCodes:
    """Codes of all keys and what goes with them."""

    def __init__(self, s: Sizes) -> None:
        self.s = s
        kv, slots = s.p["kv"], s.vectors * LANES
        self.codes = workspace((kv, s.vectors, s.words, LANES), "int32")
        self.sums = workspace((kv, slots), "int32")
        self.scales = workspace((kv, slots), "float32")
        self.means = workspace((s.p["h"], slots), "float32")

    def fill(self, k: Any, q_mean: Any, k_mean: Any, length: Any, parallel: bool) -> None:
        """Emit the phase that codes the keys of ``length`` slots."""
        s = self.s
        used = fixed(T.floordiv(length + (LANES - 1), T.int32(LANES)))
        with loop(s.p["kv"] * s.vectors, parallel=parallel) as task:
            head = fixed(T.floordiv(task, T.int32(s.vectors)))
            vector = fixed(T.floormod(task, T.int32(s.vectors)))
            with T.If(vector < used), T.Then():
                self._vector(k, q_mean, k_mean, head, vector)

    def _vector(self, k: Any, q_mean: Any, k_mean: Any, head: Any, vector: Any) -> None:
        s = self.s
        near = workspace((s.words * FOUR, LANES), "float32")
        pair = 32 // s.format.bits
        largest = Register("float32", LANES, splat(0.0))
        for c in range(s.p["d"], s.words * FOUR):
            store(near, splat(0.0), c, 0, lanes=LANES)

        def step(i: Any, count: int) -> None:
            found = lanes_of(k, head, vector, i, bits=s.format.bits, count=count)
            for half, value in enumerate(found):
                c = i * pair + half
                less = bind(value - splat(k_mean[head, c]))
                store(near, less, c, 0, lanes=LANES)
                largest.set(T.max(largest.get(), T.abs(less)))

        channels(s.p["d"], s.format.bits, step)
        self._means(near, q_mean, head, vector)
        most, zero = bind(largest.get()), splat(0.0)
        some = most > zero
        safe = T.Select(some, most, splat(1.0))
        inverse = bind(T.Select(some, splat(s.most) / safe, zero))
        store(self.scales, most / splat(s.most), head, vector * LANES, lanes=LANES)
        total = Register("int32", LANES, splat(T.int32(0)))
        with loop(s.words) as w:
            word = splat(T.int32(MOVED))
            for j in range(FOUR - 1):
                word = bind(word + self._shifted(near, w, j, inverse))
            # moved up, no byte takes from the next one; flipping its highest bit moves each down again
            low = T.bitwise_xor(word, splat(T.int32(MOVED)))
            word = bind(T.bitwise_or(low, self._shifted(near, w, FOUR - 1, inverse)))
            total.set(int8_dot.dot(s.way, total.get(), splat(T.int32(ONES)), word))
            store(self.codes, word, head, vector, w, 0, lanes=LANES)
        store(self.sums, total.get(), head, vector * LANES, lanes=LANES)

    @staticmethod
    def _shifted(near: Any, word: Any, j: int, inverse: Any) -> Any:
        """Return the codes of one of four channels at their place in a word; the sign is above it."""
        code = T.cast(_code(load(near, word * FOUR + j, 0, lanes=LANES), inverse), "int32x16")
        return T.shift_left(code, splat(T.int32(8 * j)))

    def _means(self, near: Any, q_mean: Any, head: Any, vector: Any) -> None:
        """Multiply the keys with the mean queries of the group's heads."""
        s = self.s
        for base in range(0, s.group, FOUR):
            heads = range(base, min(base + FOUR, s.group))
            acc = [Register("float32", LANES, splat(0.0)) for _ in heads]
            with loop(s.p["d"]) as c:
                value = bind(load(near, c, 0, lanes=LANES))
                for g, register in zip(heads, acc, strict=True):
                    by = splat(q_mean[head * s.group + g, c])
                    register.set(register.get() + value * by)
            for g, register in zip(heads, acc, strict=True):
                at = vector * LANES
                store(self.means, register.get(), head * s.group + g, at, lanes=LANES)


class QueryCodes:
    """Codes of a tile's queries of one head that are estimated, in words of four, and their scales."""

    def __init__(self, s: Sizes) -> None:
        self.s = s
        self.words = workspace((s.sampled, s.words), "int32")
        self.scales = workspace((s.sampled,), "float32")

    def fill(self, q: Any, q_mean: Any, head: Any, first: Any) -> None:
        """Code the queries from token ``first`` on that are estimated."""
        s = self.s
        near = workspace((s.words * FOUR,), "float32")
        for c in range(s.p["d"], s.words * FOUR):
            store(near, T.float32(0), c)
        with loop(s.sampled) as row:
            source = bind(T.min(first + row * s.p["every"], T.int32(s.p["t"] - 1)))
            wide = Register("float32", LANES, splat(0.0))
            lone = Register("float32", 1, T.float32(0))

            def step(
                at: Any, lanes: int, source: Any = source, wide: Any = wide, lone: Any = lone
            ) -> None:
                less = load(q, source, head, at, lanes=lanes) - load(q_mean, head, at, lanes=lanes)
                less = bind(less)
                store(near, less, at, lanes=lanes)
                held = lone if lanes == 1 else wide
                held.set(T.max(held.get(), T.abs(less)))

            over(s.p["d"], step)
            most = Register("float32", 1, T.max(across(T.max, wide.get()), lone.get()))
            inverse = Register("float32", 1, T.float32(0))
            with T.If(most.get() > T.float32(0)), T.Then():
                inverse.set(T.float32(s.most) / most.get())
            store(self.scales, most.get() / T.float32(s.most), row)
            with loop(s.words) as w:
                word = T.int32(0)
                for j in range(FOUR):
                    code = _code(near[w * FOUR + j], inverse.get())
                    byte = T.cast(code, "int32") + UP
                    word = bind(T.bitwise_or(word, T.shift_left(byte, T.int32(8 * j))))
                store(self.words, word, row, w)


def _code(value: Any, inverse: Any) -> Any:
    """Return codes as whole float32 numbers.

    The largest magnitude times its inverse is off by two roundings, which never reach the next whole number.
    """
    return bind(rint(value * inverse))
