"""Logits over caches that keep the numbers of each key together (``lay=rows``).

A line of a query meets a line of a key; sixteen such sums, of some rows with some keys, are formed together
and their lanes added up by a transposing sum.
"""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.attention.lines import added_up, powers, widened
from mimo_compile.schedules.attention.score_slots import Slots, Tile, Whole
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, store, workspace
from mimo_compile.schedules.emit.vector import LANES, splat


def line_of(buffer: Any, *index: Any, bits: int) -> Any:
    """Return 16 numbers of a key as float32, bound."""
    if bits == 32:
        return bind(load(buffer, *index, lanes=LANES))
    return widened(buffer, *index)


class Lines(Tile):
    """Queries in lines of 16 numbers with zeros behind them."""

    lines: Any

    @property
    def depth(self) -> int:
        """Lines of a key."""
        return -(-int(self.s.p["d"]) // LANES)

    def fill(self, run: Any) -> None:
        """See `Tile.fill`; parts are loops, since their sums together would not stay in registers."""
        s = self.s
        with loop(s.run // LANES) as v:
            vector = self.held(run * (s.run // LANES) + v)
            for base, rows, count in powers(s.height, 4):
                with loop(count) as i, loop(rows) as part:
                    self._sixteen(vector, bind(i * rows + base), rows, part, v)
        self._mask(run)

    def _sixteen(self, vector: Any, row: Any, rows: int, part: Any, v: Any) -> None:
        """Multiply some rows with as many keys of a vector of slots as make sixteen sums."""
        bits = self.s.format.bits
        keys = LANES // rows
        seats = [bind(vector * LANES + (part * keys + i)) for i in range(keys)]
        acc = [[Register("float32", LANES, splat(0.0)) for _ in seats] for _ in range(rows)]
        with loop(self.depth) as j:
            found = [line_of(self.k, self.head, seat, j * LANES, bits=bits) for seat in seats]
            for r in range(rows):
                query = bind(load(self.lines, row + r, j * LANES, lanes=LANES))
                for register, key in zip(acc[r], found, strict=True):
                    register.set(register.get() + key * query)
        total = added_up([bind(register.get()) for own in acc for register in own])
        for r in range(rows):
            own = total
            if rows > 1:
                own = T.Shuffle([total], list(range(r * keys, (r + 1) * keys)))
            store(self.logits, own, row + r, v * LANES + part * keys, lanes=keys)

    def clear(self) -> None:
        """Make room for the queries, all zero."""
        self.lines = workspace((self.s.height, self.depth * LANES), "float32")
        with loop(self.s.height) as row, loop(self.depth) as j:
            store(self.lines, splat(0.0), row, j * LANES, lanes=LANES)


class WholeLines(Lines, Whole):
    """All channels."""

    def begin(self, q: Any, scale: float) -> None:
        """Load the queries, scaled."""
        self.clear()
        self.load(q, scale, self.lines, mean=False)


def by_lines(s: Slots) -> bool:
    """Say whether keys lie together."""
    return bool(s.p["lay"] == "rows")
