"""Flash attention over KV caches of 8-bit floats (`ir.float8`): what differs from `flash.Tile`.

A code becomes float16 by a shift and a mask, which gives its number over 2**8, and float32 from there: all
are exact, numbers below the smallest normal one, too. The powers of two of 16 keys multiply their scores,
those of 16 values their weights, so that nothing is done to single numbers.
"""

from __future__ import annotations

from typing import Any

from mimo_compile.ir.float8 import LOST
from mimo_compile.schedules.attention.flash import Tile, only
from mimo_compile.schedules.attention.reach import Reach, fixed
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, prefetch, store
from mimo_compile.schedules.emit.vector import LANES, fused, splat

LINE = 64
"""Bytes of a cache line."""


def numbers(codes: Any) -> Any:
    """Return 16 codes, unsigned bytes, as float32 over 2**8, bound."""
    wide = T.cast(T.reinterpret("int8x16", codes), "int16x16")
    # the sign is now in all upper bits; float16 has one bit of exponent more below it
    moved = T.bitwise_and(T.shift_left(wide, splat(T.int16(7))), splat(T.int16(-0x4001)))
    return bind(T.cast(T.reinterpret("float16x16", moved), "float32x16"))


def powers(scale: Any) -> Any:
    """Return what 16 bytes of rows stand for, times 2**8; infinity for rows that are no numbers."""
    found = T.min(T.cast(scale, "int32x16") + splat(T.int32(8)), splat(T.int32(LOST)))
    return bind(T.reinterpret("float32x16", T.shift_left(found, splat(T.int32(23)))))


class Float8(Tile):
    """Codes become float32 in registers: exact products, on any x86-64."""

    def _scores(self, reach: Reach, step: Any, part: Any, wide: int, first: Any, rows: int) -> None:
        d = int(self.s.p["d"])
        blocks = [reach.block(step, part + u) for u in range(wide)]
        later = self.later(reach, step, part, wide)
        acc = [[Register("float32", LANES, splat(0.0)) for _ in blocks] for _ in range(rows)]

        def channels(i: Any, count: int) -> None:
            if self.streams:
                for b, far in zip(blocks, later, strict=True):
                    prefetch(self.k, self.head, b + far, i, 0)
            for j in range(count):
                keys = [numbers(load(self.k, self.head, b, i + j, 0, lanes=LANES)) for b in blocks]
                for r in range(rows):
                    query = bind(splat(self.q[first + r, i + j]))
                    for key, register in zip(keys, acc[r], strict=True):
                        register.set(register.get() + key * query)

        each = LINE // LANES
        if d // each:
            with loop(d // each) as line:
                channels(line * each, each)
        if d % each:
            channels(d // each * each, d % each)
        by = [powers(load(self.k, self.head, b, d, 0, lanes=LANES)) for b in blocks]
        for r in range(rows):
            for u, power in enumerate(by):
                score = acc[r][u].get() * power
                store(self.score, score, first + r, (part + u) * LANES, lanes=LANES)

    def values(self, reach: Reach, step: Any) -> None:
        """See `Tile.values`: weights take the powers of two of their values with them."""
        wide = self.s.columns * LANES
        with loop(self.s.blocks) as u:
            block = reach.block(step, u)
            power = powers(load(self.v, self.head, block, LANES * wide, lanes=LANES))
            with loop(self.s.height) as row:
                weight = load(self.score, row, u * LANES, lanes=LANES)
                store(self.score, weight * power, row, u * LANES, lanes=LANES)
        super().values(reach, step)

    def _values(self, reach: Reach, step: Any, first: Any, rows: int, columns: list[Any]) -> None:
        wide = self.s.columns * LANES
        acc: list[list[Register]] = []
        for r in range(rows):
            shrink = bind(splat(self.shrink[first + r]))
            row = [load(self.out, first + r, j, lanes=LANES) * shrink for j in columns]
            acc.append([Register("float32", LANES, start) for start in row])
        with loop(self.s.blocks) as u:
            block, live = reach.block(step, u), reach.live(step, u)
            kept, far = reach.kept(step, u), self.later(reach, step, u, 1)[0]
            with T.serial(0, live) as i:
                at = fixed(i * wide)
                with only(kept, i, 1):
                    if self.streams:
                        for n, j in enumerate(columns):
                            if n % (LINE // LANES) == 0:
                                prefetch(self.v, self.head, block + far, at + j)
                    weights = [
                        bind(splat(self.score[first + r, u * LANES + i])) for r in range(rows)
                    ]
                    for n, j in enumerate(columns):
                        value = numbers(load(self.v, self.head, block, at + j, lanes=LANES))
                        for r, weight in enumerate(weights):
                            acc[r][n].set(fused(value, weight, acc[r][n].get()))
        for r in range(rows):
            for at, register in zip(columns, acc[r], strict=True):
                store(self.out, register.get(), first + r, at, lanes=LANES)
