"""Flash attention of one tile of queries: scores, online softmax in base 2, weighted values, finish, merge.

All loops that carry accumulators keep them in registers; a tile's state (scaled queries, scores of a step,
running maximum, denominator, output) is a few KiB of scratch per task.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from mimo_compile.schedules.attention import exponent
from mimo_compile.schedules.attention.layout import round_up
from mimo_compile.schedules.attention.reach import Reach, Tiling, fixed
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    choose,
    load,
    loop,
    prefetch,
    store,
    when,
    workspace,
)
from mimo_compile.schedules.emit.vector import LANES, LOG2E, exp2, fused, splat

MASKED, START = -3e38, -1e30
"""A masked score lies below the maximum that a row starts with, so that its weight is exactly zero."""


class Tile:
    """State of a tile of queries while it passes over keys and values."""

    short: ClassVar[bool] = False
    """Weights are rounded afterwards, so that short powers of two do."""
    together: ClassVar[int] = 1
    """Slots whose values share a row of the cache."""

    def __init__(self, s: Tiling, k: Any, v: Any, head: Any, lead: Any = None) -> None:
        """``head`` is that of the caches; ``lead`` the group of query heads, where those differ."""
        self.s, self.k, self.v, self.head = s, k, v, head
        self.lead = head if lead is None else lead
        self.before: Any = None
        """Rows of queries of the sequences before this one; None: there are none."""
        self.watch: Callable[[Reach, Any, Any], None] | None = None
        """Emits what is to be done with the masked scores of a step, given the tile's first token."""
        width = s.blocks * LANES
        self.streams = s.ahead > 0 and s.height <= s.rows
        self.q = workspace((s.height, s.p["d"]), "float32")
        self.score = workspace((s.height, width), "float32")
        self.out = workspace((s.height, s.columns * LANES), "float32")
        self.lines = round_up(s.height) // LANES
        self.top, self.shrink = (workspace((self.lines * LANES,), "float32") for _ in range(2))
        self.best = workspace((self.lines * LANES,), "int32")
        """As `exponent.largest` says it."""
        self.sum = workspace((s.height, LANES), "float32")

    def begin(self, q: Any, first: Any, scale: float) -> None:
        """Load the queries from token ``first`` on, scaled for base 2, and clear the sums."""
        s, d = self.s, self.s.p["d"]
        with loop(s.tokens) as token:
            source = T.min(first + token, T.int32(s.p["t"] - 1))
            source = bind(source if self.before is None else self.before + source)
            with loop(s.group) as g:
                row, head = token * s.group + g, self.lead * s.group + g
                with loop(d // LANES) as j:
                    value = load(q, source, head, j * LANES, lanes=LANES)
                    store(self.q, value * splat(scale * LOG2E), row, j * LANES, lanes=LANES)
                for j in range(d // LANES * LANES, d):
                    store(self.q, q[source, head, j] * T.float32(scale * LOG2E), row, j)
        self.clear()

    def clear(self) -> None:
        """Begin with no sums, and maxima below all that is seen."""
        s = self.s
        with loop(self.lines) as i:
            store(self.top, splat(START), i * LANES, lanes=LANES)
            store(self.best, splat(T.int32(0)), i * LANES, lanes=LANES)
        with loop(s.height) as row:
            store(self.sum, splat(0.0), row, 0, lanes=LANES)
            with loop(s.columns) as j:
                store(self.out, splat(0.0), row, j * LANES, lanes=LANES)

    def scores(self, reach: Reach, step: Any) -> None:
        """Multiply queries with the keys of a step: lanes are slots, so nothing is summed over lanes."""
        s = self.s
        for base, rows, count in self._row_tiles():
            wide = largest_part(s.blocks, self.side_by_side(rows))
            with loop(s.blocks // wide) as group, loop(count) as tile:
                first = bind(tile * rows + base)
                self._scores(reach, step, group * wide, wide, first, rows)

    def side_by_side(self, rows: int) -> int:
        """Return how many blocks a register tile of so many rows may multiply at once."""
        return max(self.s.registers // rows, 1)

    def _scores(self, reach: Reach, step: Any, part: Any, wide: int, first: Any, rows: int) -> None:
        s = self.s
        blocks = [reach.block(step, part + u) for u in range(wide)]
        later = self.later(reach, step, part, wide)
        acc = [[Register("float32", LANES, splat(0.0)) for _ in blocks] for _ in range(rows)]
        with loop(s.p["d"]) as i:
            keys = [bind(load(self.k, self.head, b, i, 0, lanes=LANES)) for b in blocks]
            if self.streams:
                for b, far in zip(blocks, later, strict=True):
                    prefetch(self.k, self.head, b + far, i, 0)
            for r in range(rows):
                query = bind(splat(self.q[first + r, i]))
                for u, key in enumerate(keys):
                    acc[r][u].set(acc[r][u].get() + key * query)
        for r in range(rows):
            for u in range(wide):
                store(self.score, acc[r][u].get(), first + r, (part + u) * LANES, lanes=LANES)

    def later(self, reach: Reach, step: Any, part: Any, wide: int) -> list[Any]:
        """Return for each block how many blocks on the one lies that is to be prefetched with it."""
        return [reach.further(step, part + u) if self.streams else 0 for u in range(wide)]

    def touch(self, reach: Reach, step: Any) -> None:
        """Ask for a line of each key and value block of a far step, so that their pages are known by then."""
        with loop(self.s.blocks) as u:
            block = reach.block(step, u)
            prefetch(self.k, self.head, block, 0, 0, near=False)
            prefetch(self.v, self.head, block * (LANES // self.together), 0, near=False)

    def mask(self, reach: Reach, step: Any, first: Any) -> None:
        """Replace the scores of unseen slots (of whatever they hold, NaN too)."""
        s = self.s
        with loop(s.blocks) as u:
            positions = reach.positions(step, u)
            with loop(s.tokens) as token:
                limits = reach.limits(bind(reach.start + first + token))
                with loop(s.group) as g:
                    row = token * s.group + g
                    value = load(self.score, row, u * LANES, lanes=LANES)
                    value = T.Select(reach.sees(positions, limits), value, splat(MASKED))
                    store(self.score, value, row, u * LANES, lanes=LANES)

    def weigh(self) -> None:
        """Turn the scores of a step into weights relative to the new maximum of each row."""
        s = self.s
        with loop(s.height) as row:
            best = Register("float32", LANES, load(self.score, row, 0, lanes=LANES))
            for u in range(1, s.blocks):
                best.set(T.max(best.get(), load(self.score, row, u * LANES, lanes=LANES)))
            store(self.best, exponent.largest(best.get()), row)
        with loop(self.lines) as i:
            self.raise_top(i * LANES)
        with loop(s.height) as row:
            step = Register("float32", LANES, splat(0.0))
            self.weights_of(row, bind(splat(self.top[row])), step)
            before, shrink = load(self.sum, row, 0, lanes=LANES), splat(self.shrink[row])
            store(self.sum, fused(before, shrink, step.get()), row, 0, lanes=LANES)

    def raise_top(self, row: Any) -> None:
        """Raise the maxima of 16 rows to those of the step, and say what earlier sums shrink by."""
        before = bind(load(self.top, row, lanes=LANES))
        top = bind(T.max(self.best_of(row), before))
        store(self.shrink, self.factor2(before - top), row, lanes=LANES)
        store(self.top, top, row, lanes=LANES)

    def best_of(self, row: Any) -> Any:
        """Return the maxima of a step of 16 rows."""
        return bind(exponent.from_order(load(self.best, row, lanes=LANES)))

    def weights_of(self, row: Any, top: Any, total: Register) -> None:
        """Turn the scores of a row into weights relative to ``top`` and add them to ``total``."""
        with loop(self.s.blocks) as u:
            weight = bind(self.exp2(load(self.score, row, u * LANES, lanes=LANES) - top))
            total.set(total.get() + self.weight(weight, row, u * LANES))

    def exp2(self, x: Any) -> Any:
        """Return 16 powers of two of numbers up to 0, or little more where maxima may be passed."""
        return exponent.exp2(x, scaled=self.s.avx512, short=self.short)

    def factor2(self, x: Any) -> Any:
        """Return 16 powers of two that sums are multiplied with, again and again: not short ones."""
        return exponent.exp2(x, scaled=self.s.avx512)

    def weight(self, value: Any, row: Any, at: Any) -> Any:
        """Keep 16 weights of a row from slot ``at`` on; returns them as they are summed."""
        store(self.score, value, row, at, lanes=LANES)
        return value

    def values(self, reach: Reach, step: Any) -> None:
        """Add the weighted values of the step's slots that were ever written."""
        s = self.s
        for base, rows, count in self._row_tiles():
            wide = self.columns_at_once(rows)
            full, rest = divmod(s.columns, wide)
            for column, width, groups in ((0, wide, full), (full * wide, rest, 1)):
                if width:
                    with loop(groups) as group, loop(count) as tile:
                        first = bind(tile * rows + base)
                        columns = [bind((group * width + column + j) * LANES) for j in range(width)]
                        self._values(reach, step, first, rows, columns)

    def columns_at_once(self, rows: int) -> int:
        """Return how many vectors of values a register tile of so many rows takes."""
        columns = self.s.columns
        most = max(1, min(columns, self.s.registers // rows))
        return -(-columns // -(-columns // most))  # as many tiles, but of equal width

    def _values(self, reach: Reach, step: Any, first: Any, rows: int, columns: list[Any]) -> None:
        acc: list[list[Register]] = []
        for r in range(rows):
            shrink = bind(splat(self.shrink[first + r]))
            row = [load(self.out, first + r, j, lanes=LANES) * shrink for j in columns]
            acc.append([Register("float32", LANES, start) for start in row])
        with loop(self.s.blocks) as u:
            block, live = reach.block(step, u), reach.live(step, u)
            kept, far = reach.kept(step, u), self.later(reach, step, u, 1)[0]
            with T.serial(0, live) as i:
                slot = fixed(block * LANES + i)
                with only(kept, i, 1):
                    values = [bind(load(self.v, self.head, slot, j, lanes=LANES)) for j in columns]
                    if self.streams:
                        for j in columns:
                            prefetch(self.v, self.head, slot + far * LANES, j)
                    for r in range(rows):
                        weight = bind(splat(self.score[first + r, u * LANES + i]))
                        for j, value in enumerate(values):
                            acc[r][j].set(fused(value, weight, acc[r][j].get()))
        for r in range(rows):
            for at, register in zip(columns, acc[r], strict=True):
                store(self.out, register.get(), first + r, at, lanes=LANES)

    def run(self, reach: Reach, first: Any, begin: Any, end: Any) -> None:
        """Pass over the steps ``begin .. end-1``."""
        reach.prepare(begin, end)
        with T.serial(begin, end) as step:
            if self.streams and reach.touches:
                self.touch(reach, step + self.s.ahead + reach.touches)
            self.scores(reach, step)
            clean = reach.clean(step)
            if clean is None:
                self.mask(reach, step, first)
            else:
                with when(T.Not(clean)):
                    self.mask(reach, step, first)
            if self.watch is not None:
                self.watch(reach, first, step)
            self.weigh()
            self.values(reach, step)

    def end(self) -> None:
        """Give back what `begin` took."""

    def denominator(self, row: Any) -> Any:
        """Return the sum of a row's weights."""
        lanes = [self.sum[row, i] for i in range(LANES)]
        while len(lanes) > 1:
            lanes = [bind(a + b) for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
        return lanes[0]

    def _row_tiles(self) -> list[tuple[int, int, int]]:
        out, base = [], 0
        for rows, count in self.s.row_tiles():
            out.append((base, rows, count))
            base += rows * count
        return out


def largest_part(count: int, most: int) -> int:
    """Return the largest number up to ``most`` that divides a count."""
    return max(w for w in range(1, count + 1) if count % w == 0 and w <= most)


def only(kept: Any, at: Any, lanes: int) -> AbstractContextManager[None]:
    """Run the statements if a bit of ``kept`` is set for one of the slots from ``at`` on; None: always."""
    if kept is None:
        return nullcontext()
    return when(T.bitwise_and(T.shift_right(kept, at), T.int32((1 << lanes) - 1)) != 0)


def factor(top: Any, total: Any, sink: Any | None) -> Any:
    """Return what a row's sum of values is multiplied with; here the sink (base 2) joins, once."""
    zero = T.float32(0)
    if sink is None:
        return bind(T.if_then_else(total > zero, T.float32(1) / total, zero))
    high = bind(T.max(top, sink))
    own = Register("float32", 1, exp2(top - high, 1))
    whole = Register("float32", 1, fused(total, own.get(), exp2(sink - high, 1), 1))
    share = own.get() / whole.get()
    return bind(T.if_then_else(whole.get() > zero, share, zero))  # zero: no key, and a sink of -inf


def write_row(out: Any, token: Any, head: Any, dv: int, valid: Any, value: Any) -> None:
    """Write one output row: ``value(column, lanes)``, or zeros for a padded token."""

    def fill(at: Any) -> None:
        with loop(dv // LANES) as j:
            store(out, at(j * LANES, LANES), token, head, j * LANES, lanes=LANES)
        for j in range(dv // LANES * LANES, dv):
            store(out, at(j, 1), token, head, j)

    choose(valid, lambda: fill(value), lambda: fill(lambda _, lanes: splat(0.0, lanes)))
