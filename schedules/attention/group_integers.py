"""Flash attention over KV caches in groups by integers: codes are multiplied as they are.

Scales of a channel are folded into q once in a group: with ``q' = q * scale`` a score is ``sum q' code + sum
q zero``, whose second sum is one number for each query and group. Scales of a token are folded into the
weights in the same way. What multiplies codes is rounded to an integer, of as many bits as `GroupedFormat`
says, for the largest in the group; one of 16 bits takes part in two dots of bytes. Codes count from the
middle one: what rounding changes at that is known, and goes into the second sum as well. Sums of integers are
exact. What the integers do to a result is in `ir.kv_rounding`.

Beside dots, folding is most of the work. So queries are folded four rows at a time (`fours`), and weights are
relative to a maximum that may be somewhat passed: then neither sums nor weights wait for that of a group.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mimo_compile.ir.kv_groups import GroupedFormat
from mimo_compile.schedules.attention import exponent, fours, int8_dot
from mimo_compile.schedules.attention.asked import Asked
from mimo_compile.schedules.attention.fours import ROWS
from mimo_compile.schedules.attention.group_layout import BLOCKS
from mimo_compile.schedules.attention.group_reach import GROUP, GroupReach
from mimo_compile.schedules.attention.group_tile import GroupTile, line
from mimo_compile.schedules.attention.reach import Tiling
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, store, when, workspace
from mimo_compile.schedules.emit.unpack import field
from mimo_compile.schedules.emit.vector import LANES, fused, splat

FAR = 16.0
"""By how many powers of two a score may exceed the maximum that weights are relative to, before it is raised.
Sums of such weights are far from the largest float32."""
DOTS, QUERY_CYCLES, FOLD_CYCLES, WEIGHT_CYCLES = 2.0, 14.0, 12.0, 12.0
"""Roughly, with 512 bits: dots in a cycle; cycles for 16 channels of four queries, for 16 scores, and for the
weights of a row and a scale. What is prefetched is spread by them."""
_ONES = 0x01010101


def _four(buffer: Any, *index: Any) -> Any:
    """Return the four bytes of a lane in each lane, bound."""
    return bind(splat(load(buffer, *index)))


class Integers(GroupTile):
    """Codes times integers, in dots of bytes."""

    way: ClassVar[str]
    """Of `int8_dot`."""

    def __init__(
        self, s: Tiling, fmt: GroupedFormat, k: Any, v: Any, head: Any, lead: Any = None
    ) -> None:
        super().__init__(s, fmt, k, v, head, lead)
        self.terms = fmt.query_terms
        self.sets = -(-s.height // ROWS)
        rows, groups = self.sets * ROWS, self.value_groups
        self.q = workspace((s.height, self.wide), "float32")
        self.turned = workspace((self.sets, self.wide * ROWS), "float32")
        """Queries: of 16 channels, vectors of every fourth from the first, the second, ... of four rows."""
        self.scratch = workspace((self.wide * ROWS,), "float32")
        self.queries = workspace((self.terms, self.sets, self.wide), "int32")
        """Bytes of four channels, of four rows one after the other."""
        self.unit, self.offset = (workspace((rows * ROWS,), "float32") for _ in range(2))
        self.folded = workspace((groups, s.height, GROUP), "float32")
        self.most = workspace((groups, rows, LANES), "int32")
        self.weights = workspace((groups, s.height, LANES), "int32")
        self.weight_by, self.weight_unit = (
            workspace((groups, rows * ROWS), "float32") for _ in range(2)
        )
        self.middles = workspace((groups, s.height, LANES), "float32")
        # only tiles of one row tile prefetch
        tile = min(s.rows, s.height)
        wide, columns = self._side_by_side(self.terms * tile), self._columns_at_once(tile)
        dots = tile * self.per / 4 / DOTS
        self.keys_asked = Asked(
            BLOCKS * self.words,
            (
                (2 * self.sets * self.wide // LANES, QUERY_CYCLES),
                (BLOCKS // wide * self.words, dots * self.terms * wide),
            ),
        )
        runs = GROUP // self.per
        self.values_asked = Asked(
            s.columns * runs,
            (
                (s.height * BLOCKS, FOLD_CYCLES),
                (s.height * groups, WEIGHT_CYCLES),
                # left-over columns run one by one
                ((s.columns // columns + s.columns % columns) * runs, dots * columns),
            ),
        )

    def begin(self, q: Any, first: Any, scale: float) -> None:
        """Load the queries as `Tile.begin` does, and keep them as they are folded; padding is zero."""
        super().begin(q, first, scale)
        height = self.s.height
        for row in range(height, self.sets * ROWS):
            at = row % ROWS * ROWS
            with loop(self.wide // ROWS) as j:
                store(self.turned, splat(0.0, ROWS), row // ROWS, j * LANES + at, lanes=ROWS)
            for g in range(self.value_groups):
                store(self.most, splat(T.int32(0)), g, row, 0, lanes=LANES)
        with loop(height) as row:
            for j in range(int(self.s.p["d"]), self.wide):
                store(self.q, T.float32(0), row, j)
            with loop(self.value_groups) as g:
                store(self.middles, splat(0.0), g, row, 0, lanes=LANES)
            with loop(self.wide // LANES) as j:
                numbers = bind(load(self.q, row, j * LANES, lanes=LANES))
                for v in range(ROWS):
                    part = T.Shuffle([numbers], list(range(v, LANES, ROWS)))
                    at = (j * ROWS + v) * LANES + row % ROWS * ROWS
                    store(self.turned, part, row // ROWS, at, lanes=ROWS)

    def prepare(self, reach: GroupReach, step: Any) -> None:
        """Round the queries of a step."""
        held, kept = reach.held(step), self.further
        if self.ask:
            self.further = reach.further(step)
        self.widen_keys(held)
        with loop(self.sets) as rows:
            self.round_queries(held, rows)
        self.further = kept

    def old(self, reach: GroupReach, step: Any, held: Any, first: Any, after: Any) -> None:
        """See `GroupTile.old`."""
        self.widen_values(held)
        for base, rows, count in self._row_tiles():
            wide = self._side_by_side(self.terms * rows)
            with loop(BLOCKS // wide) as part, loop(count) as tile:
                self.multiply_keys(held, part, wide, bind(tile * rows + base), rows)
        self.hide(reach, step, first)
        self.follow()
        with loop(self.s.height) as row:
            self.fold_weights(held, row)
        with loop(self.value_groups) as g, loop(self.sets) as rows:
            vectors = [load(self.most, g, rows * ROWS + r, 0, lanes=LANES) for r in range(ROWS)]
            most = fours.of_four([bind(v) for v in vectors], fours.largest)
            by, unit = fours.unit(most, self.fmt.weight_levels)
            store(self.weight_by, by, g, rows * LANES, lanes=LANES)
            store(self.weight_unit, unit, g, rows * LANES, lanes=LANES)
        # the processor does this while it waits for weights, whose results depend on each other
        self.prepare(reach, after)
        with loop(self.s.height) as row, loop(self.value_groups) as g:
            self.round_weights(held, row, g)
        for base, rows, count in self._row_tiles():
            wide = self._columns_at_once(rows)
            full, rest = divmod(self.s.columns, wide)
            for column, width, parts in ((0, wide, full), (full * wide, 1, rest)):
                if parts:
                    with loop(parts) as part, loop(count) as tile:
                        at = bind(part * width + column)
                        turn = part if width == wide else full + part
                        self.multiply_values(held, at, width, turn, bind(tile * rows + base), rows)

    def _side_by_side(self, sums: int) -> int:
        """Return how many vectors of codes are multiplied at once, for so many sums of each."""
        return max(w for w in (1, 2, 4) if w == 1 or sums * w <= self.s.registers)

    def _columns_at_once(self, rows: int) -> int:
        """Return how many columns of values are multiplied at once, for so many rows."""
        return min(self._side_by_side(rows), 1 << (self.s.columns.bit_length() - 1))

    def placed(self, scales: Any) -> Any:
        """Return 16 scales of channels in the order of ``turned``."""
        return fours.turned(scales)

    def round_queries(self, step: Any, rows: Any) -> None:
        """Fold the scales of a group's channels into four queries, round them, sum up what middles give."""
        count, zero = self.wide // LANES, splat(T.int32(0))
        # sums of their own, none of which waits for another
        tops = [Register("int32", LANES, zero) for _ in range(ROWS)]
        totals = [Register("float32", LANES, splat(0.0)) for _ in range(ROWS)]
        sums = [Register("int32", LANES, zero) for _ in range(self.terms)]
        turn = bind(rows * (2 * count))
        with loop(count) as j:
            asked = self.keys_asked.at(0, turn + j)
            for v, (top, total) in enumerate(zip(tops, totals, strict=True)):
                for n in asked[v::ROWS]:
                    self.ask_keys(step, 0, n)
                at = (j * ROWS + v) * LANES
                query = bind(load(self.turned, rows, at, lanes=LANES))
                scale, middle = (
                    fours.repeated(load(self.k_params, half, j * LANES + v * ROWS, lanes=ROWS))
                    for half in (0, 1)
                )
                value = bind(query * scale)
                total.set(fused(query, middle, total.get()))
                top.set(T.max(top.get(), fours.magnitude(value)))
                store(self.scratch, value, at, lanes=LANES)
        a, b, c, d = (bind(top.get()) for top in tops)
        most = fours.in_rows(T.max(T.max(a, b), T.max(c, d)), fours.largest)
        by, unit = fours.unit(most, self.fmt.query_levels)
        with loop(count) as j:
            words, asked = [], self.keys_asked.at(0, turn + count + j)
            for v in range(ROWS):
                for n in asked[v::ROWS]:
                    self.ask_keys(step, 0, n)
                at = (j * ROWS + v) * LANES
                words.append(fours.rounded(load(self.scratch, at, lanes=LANES), by))
            parts = fours.in_bytes(words, self.terms)
            for term, (part, register) in enumerate(zip(parts, sums, strict=True)):
                ones = splat(T.int32(_ONES))
                register.set(int8_dot.dot(self.way, register.get(), ones, part))
                store(self.queries, fours.turned(part), term, rows, j * LANES, lanes=LANES)
        rounded = T.cast(sums[0].get(), "float32x16")
        if self.terms == 2:
            rounded = rounded * splat(256.0) + T.cast(sums[1].get(), "float32x16")
        a, b, c, d = (bind(total.get()) for total in totals)
        offset = (a + b) + (c + d) - rounded * (unit * splat(self.middle))
        store(self.offset, fours.in_rows(offset, fours.added), rows * LANES, lanes=LANES)
        store(self.unit, unit, rows * LANES, lanes=LANES)

    def multiply_keys(self, step: Any, part: Any, wide: int, first: Any, rows: int) -> None:
        """Write the scores of ``rows`` queries with the ``part``-th ``wide`` blocks of codes."""
        block = part * wide
        acc = [self._accumulators(self.terms, wide) for _ in range(rows)]
        with loop(self.words) as w:
            lines = [line(self.k_codes, self.head, step, block + u, w) for u in range(wide)]
            for n in self.keys_asked.at(1, part * self.words + w):
                self.ask_keys(step, 0, n)
            for four in range(self.per // 4):
                codes = [bind(field(x, four * self.fmt.bits, self.fmt.bits, LANES)) for x in lines]
                for r in range(rows):
                    for term in range(self.terms):
                        own = first + r
                        at = (w * (self.per // 4) + four) * ROWS + own % ROWS
                        x = _four(self.queries, term, own // ROWS, at)
                        for code, register in zip(codes, acc[r][term], strict=True):
                            register.set(int8_dot.dot(self.way, register.get(), code, x))
        for r in range(rows):
            unit, offset = (bind(splat(a[(first + r) * ROWS])) for a in (self.unit, self.offset))
            for u in range(wide):
                total = T.cast(acc[r][0][u].get(), "float32x16")
                if self.terms == 2:
                    lower = T.cast(acc[r][1][u].get(), "float32x16")
                    total = total * splat(256.0) + lower
                score = total * unit + offset
                store(self.score, score, first + r, (block + u) * LANES, lanes=LANES)

    def follow(self) -> None:
        """Raise the maxima of the rows that have a score of the step far above theirs."""
        over = Register("int32", LANES, splat(T.int32(0)))
        with loop(self.s.height) as row:
            above = self.largest_scores(row) > splat(self.top[row]) + splat(FAR)
            found = T.Select(above, splat(T.int32(1)), splat(T.int32(0)))
            over.set(T.bitwise_or(over.get(), found))
        some = T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.or", over.get())
        with when(some != 0):
            self.raise_far()

    def largest_scores(self, row: Any) -> Any:
        """Return the largest scores of a row in a step, by lane of its blocks, bound."""
        a, b, c, d = (load(self.score, row, u * LANES, lanes=LANES) for u in range(BLOCKS))
        return bind(T.max(T.max(a, b), T.max(c, d)))

    def raise_far(self) -> None:
        """Raise maxima that are passed by far to the largest of the step; what was summed shrinks."""
        with loop(self.s.height) as row:
            store(self.best, exponent.largest(self.largest_scores(row)), row)
        with loop(self.lines) as i:
            before, best = bind(load(self.top, i * LANES, lanes=LANES)), self.best_of(i * LANES)
            top = bind(T.Select(best > before + splat(FAR), best, before))
            store(self.shrink, self.factor2(before - top), i * LANES, lanes=LANES)
            store(self.top, top, i * LANES, lanes=LANES)
        with loop(self.s.height) as row:
            shrink = bind(splat(self.shrink[row]))
            shrunk = [(self.sum, (row, 0)), *(
                (self.middles, (g, row, 0)) for g in range(self.value_groups)
            ), *((self.out, (row, j * LANES)) for j in range(self.s.columns))]  # fmt: skip
            for buffer, at in shrunk:
                store(buffer, load(buffer, *at, lanes=LANES) * shrink, *at, lanes=LANES)

    def fold_weights(self, step: Any, row: Any) -> None:
        """Turn a row's scores into weights, fold the scales of a group's tokens into them."""
        groups, top = range(self.value_groups), bind(splat(self.top[row]))
        total = Register("float32", LANES, load(self.sum, row, 0, lanes=LANES))
        middles = [
            Register("float32", LANES, load(self.middles, g, row, 0, lanes=LANES)) for g in groups
        ]
        most = [Register("int32", LANES, splat(T.int32(0))) for _ in groups]
        for u in range(BLOCKS):
            for n in self.values_asked.at(0, row * BLOCKS + u):
                self.ask_values(step, 0, n)
            at = u * LANES
            weight = bind(self.exp2(load(self.score, row, at, lanes=LANES) - top))
            total.set(total.get() + weight)
            for g in groups:
                scale, middle = (load(self.v_params, half, g, at, lanes=LANES) for half in (0, 1))
                value = bind(weight * scale)
                middles[g].set(fused(weight, middle, middles[g].get()))
                most[g].set(T.max(most[g].get(), T.reinterpret("int32x16", value)))
                store(self.folded, value, g, row, at, lanes=LANES)
        store(self.sum, total.get(), row, 0, lanes=LANES)
        for g in groups:
            store(self.middles, middles[g].get(), g, row, 0, lanes=LANES)
            store(self.most, most[g].get(), g, row, 0, lanes=LANES)

    def round_weights(self, step: Any, row: Any, g: Any) -> None:
        """Round a row's folded weights, and subtract what middle codes give."""
        for n in self.values_asked.at(1, row * self.value_groups + g):
            self.ask_values(step, 0, n)
        by = bind(splat(self.weight_by[g, row * ROWS]))
        words = [
            fours.rounded(load(self.folded, g, row, at, lanes=LANES), by)
            for at in range(0, GROUP, LANES)
        ]
        (whole,) = fours.in_bytes(words, 1)
        store(self.weights, fours.in_order(whole), g, row, 0, lanes=LANES)
        if self.fmt.bits < 8:  # bytes count from the middle one as they lie
            zero, ones = splat(T.int32(0)), splat(T.int32(_ONES))
            rounded = T.cast(int8_dot.dot(self.way, zero, whole, ones), "float32x16")
            less = splat(self.weight_unit[g, row * ROWS] * T.float32(self.middle))
            total = load(self.middles, g, row, 0, lanes=LANES) - rounded * less
            store(self.middles, total, g, row, 0, lanes=LANES)

    def multiply_values(
        self, step: Any, column: Any, wide: int, turn: Any, first: Any, rows: int
    ) -> None:
        """Add ``wide`` vectors of weighted values, whose tokens share their scales, to ``rows`` rows."""
        acc = [self._accumulators(1, wide)[0] for _ in range(rows)]
        per_scale = self.fmt.columns // LANES
        g = bind(column // per_scale) if self.value_groups > 1 else 0
        with loop(GROUP // self.per) as run:
            lines = [line(self.v_codes, self.head, step, column + c, run) for c in range(wide)]
            for n in self.values_asked.at(2, turn * (GROUP // self.per) + run):
                self.ask_values(step, 0, n)
            for four in range(self.per // 4):
                codes = [bind(field(x, four * self.fmt.bits, self.fmt.bits, LANES)) for x in lines]
                for r in range(rows):
                    x = _four(self.weights, g, first + r, run * (self.per // 4) + four)
                    for code, register in zip(codes, acc[r], strict=True):
                        register.set(int8_dot.dot(self.way, register.get(), x, code))
        for r in range(rows):
            unit = bind(splat(self.weight_unit[g, (first + r) * ROWS]))
            for c in range(wide):
                at = (column + c) * LANES
                before = load(self.out, first + r, at, lanes=LANES)
                total = fused(T.cast(acc[r][c].get(), "float32x16"), unit, before)
                store(self.out, total, first + r, at, lanes=LANES)

    def finish(self) -> None:
        """Add what middle codes of values give."""
        per_scale = self.fmt.columns // LANES
        with loop(self.s.height) as row:
            for g in range(self.value_groups):
                parts = [self.middles[g, row, i] for i in range(LANES)]
                while len(parts) > 1:
                    parts = [bind(a + b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
                more = bind(splat(parts[0]))
                for c in range(g * per_scale, min((g + 1) * per_scale, self.s.columns)):
                    total = load(self.out, row, c * LANES, lanes=LANES) + more
                    store(self.out, total, row, c * LANES, lanes=LANES)

    @staticmethod
    def _accumulators(terms: int, wide: int) -> list[list[Register]]:
        """Return sums by byte and block or column."""
        return [
            [Register("int32", LANES, splat(T.int32(0))) for _ in range(wide)] for _ in range(terms)
        ]


class Vnni(Integers):
    """Dots of bytes by ``vpdpbusd``."""

    way = "vnni"


class Madd(Integers):
    """Dots of bytes by ``vpmaddwd``, after widening."""

    way = "madd"
