"""Flash attention over caches that keep the numbers of each key, and of each value, together.

A key costs its own bytes only, wherever it lies, so single tokens may be listed. Scores are dot products
along d: sixteen of them, of some queries with some keys, are formed together and their lanes added up by a
transposing sum.
"""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.attention.flash import Tile
from mimo_compile.schedules.attention.lines import added_up, paired, powers, widened
from mimo_compile.schedules.attention.reach import Reach, Tiling
from mimo_compile.schedules.emit.bf16 import dot
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    prefetch,
    store,
    workspace,
)
from mimo_compile.schedules.emit.rounding import bf16_bits
from mimo_compile.schedules.emit.vector import LANES, fused, splat

LINE = 64
"""Bytes of a cache line."""


class Rows(Tile):
    """float32 caches."""

    line = LANES
    """Numbers that one step along d takes."""

    def __init__(self, s: Tiling, k: Any, v: Any, head: Any, lead: Any = None) -> None:
        super().__init__(s, k, v, head, lead)
        self.depth = int(-(-s.p["d"] // self.line))
        self.padded = workspace((s.height, self.depth * self.line), "float32")
        self.cell = int(s.cell)

    def begin(self, q: Any, first: Any, scale: float) -> None:
        """Load the queries as `Tile.begin` does, with zeros behind them."""
        super().begin(q, first, scale)
        d, wide = int(self.s.p["d"]), self.depth * self.line
        with loop(self.s.height) as row:
            if d >= LANES:
                with loop(d // LANES) as j:
                    value = load(self.q, row, j * LANES, lanes=LANES)
                    store(self.padded, value, row, j * LANES, lanes=LANES)
            for j in range(d // LANES * LANES, wide):
                store(self.padded, self.q[row, j] if j < d else T.float32(0), row, j)

    def query(self, row: Any, j: Any) -> Any:
        """Return a line of a row's query."""
        return bind(load(self.padded, row, j * LANES, lanes=LANES))

    def key(self, seat: Any, j: Any) -> Any:
        """Return a line of a key."""
        return bind(load(self.k, self.head, seat, j * LANES, lanes=LANES))

    def multiply(self, total: Any, key: Any, query: Any) -> Any:
        """Return sums plus the products of a line."""
        return total + key * query

    def value(self, seat: Any, column: Any) -> Any:
        """Return 16 numbers of a value."""
        return bind(load(self.v, self.head, seat, column, lanes=LANES))

    def scores(self, reach: Reach, step: Any) -> None:
        """Multiply queries with keys, sixteen pairs at a time: the knob ``rows`` shapes values alone."""
        s = self.s
        for base, rows, count in powers(s.height):
            keys = LANES // rows
            with loop(count) as tile, loop(s.blocks) as u, loop(LANES // keys) as part:
                first = bind(tile * rows + base)
                self._sixteen(reach, step, u, part * keys, first, rows)

    def _sixteen(self, reach: Reach, step: Any, u: Any, at: Any, first: Any, rows: int) -> None:
        keys = LANES // rows
        seats = [reach.seat(step, u, at + i) for i in range(keys)]
        self._ask(self.k, reach, step, u, [at + i for i in range(keys)], self.depth * self.line)
        acc = [[Register("float32", LANES, splat(0.0)) for _ in seats] for _ in range(rows)]
        with loop(self.depth) as j:
            lines = [self.key(seat, j) for seat in seats]
            for r in range(rows):
                query = self.query(first + r, j)
                for register, key in zip(acc[r], lines, strict=True):
                    register.set(self.multiply(register.get(), key, query))
        total = added_up([bind(register.get()) for row in acc for register in row])
        for r in range(rows):
            own = total
            if rows > 1:
                own = T.Shuffle([total], list(range(r * keys, (r + 1) * keys)))
            store(self.score, own, first + r, u * LANES + at, lanes=keys)

    def touch(self, reach: Reach, step: Any) -> None:
        """See `Tile.touch`; each key may lie on a page of its own."""
        with loop(self.s.blocks) as u, loop(LANES) as i:
            seat = reach.seat(step, u, i)
            prefetch(self.k, self.head, seat, 0, near=False)
            prefetch(self.v, self.head, seat, 0, near=False)

    def _ask(
        self, cache: Any, reach: Reach, step: Any, u: Any, places: list[Any], width: int
    ) -> None:
        """Prefetch keys or values that come some steps later."""
        if self.streams:
            for place in places:
                seat = reach.seat(step + self.s.ahead, u, place)
                for j in range(0, width, LINE // self.cell):
                    prefetch(cache, self.head, seat, j)

    def _values(self, reach: Reach, step: Any, first: Any, rows: int, columns: list[Any]) -> None:
        acc: list[list[Register]] = []
        for r in range(rows):
            shrink = bind(splat(self.shrink[first + r]))
            row = [load(self.out, first + r, j, lanes=LANES) * shrink for j in columns]
            acc.append([Register("float32", LANES, start) for start in row])
        with loop(self.s.blocks) as u, T.serial(0, reach.live(step, u)) as i:
            seat = reach.seat(step, u, i)
            if self.streams:
                later = reach.seat(step + self.s.ahead, u, i)
                for j in columns[:: max(1, LINE // self.cell // LANES)]:
                    prefetch(self.v, self.head, later, j)
            values = [self.value(seat, j) for j in columns]
            for r in range(rows):
                weight = bind(splat(self.score[first + r, u * LANES + i]))
                for value, register in zip(values, acc[r], strict=True):
                    register.set(fused(value, weight, register.get()))
        for r in range(rows):
            for at, register in zip(columns, acc[r], strict=True):
                store(self.out, register.get(), first + r, at, lanes=LANES)


class WidenedRows(Rows):
    """bfloat16 caches, whose numbers become float32 in registers."""

    def key(self, seat: Any, j: Any) -> Any:
        """Return a line of a key."""
        return widened(self.k, self.head, seat, j * LANES)

    def value(self, seat: Any, column: Any) -> Any:
        """Return 16 numbers of a value."""
        return widened(self.v, self.head, seat, column)


class DotRows(WidenedRows):
    """bfloat16 caches, whose keys are multiplied by ``vdpbf16ps`` with q rounded to bfloat16."""

    line = 2 * LANES

    def __init__(self, s: Tiling, k: Any, v: Any, head: Any, lead: Any = None) -> None:
        super().__init__(s, k, v, head, lead)
        self.rounded = workspace((s.height, self.depth * self.line), "int16")

    def begin(self, q: Any, first: Any, scale: float) -> None:
        """Load the queries as `Rows.begin` does, and round them."""
        super().begin(q, first, scale)
        with loop(self.s.height) as row, loop(2 * self.depth) as j:
            bits = bind(bf16_bits(load(self.padded, row, j * LANES, lanes=LANES), LANES))
            half = T.cast(T.shift_right(bits, splat(T.int32(16))), "int16x16")
            store(self.rounded, half, row, j * LANES, lanes=LANES)

    def query(self, row: Any, j: Any) -> Any:
        """Return a line of a row's query, in pairs."""
        return paired(self.rounded, row, j * self.line)

    def key(self, seat: Any, j: Any) -> Any:
        """Return a line of a key, in pairs."""
        return paired(self.k, self.head, seat, j * self.line)

    def multiply(self, total: Any, key: Any, query: Any) -> Any:
        """Return sums plus the products of a line."""
        return dot(total, key, query)


ROWS: dict[str, type[Rows]] = {"f32": Rows, "widen": WidenedRows, "dot": DotRows}
"""By format of the caches, and the knob ``arith`` of the schedule."""
EXACT_ROWS = frozenset({"f32", "widen"})
"""Arithmetic whose products are exact in float32."""
