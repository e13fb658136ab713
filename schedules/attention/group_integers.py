"""Flash attention over KV caches in groups by integers: codes are multiplied as they are.

Scales of a channel are folded into q once in a group: with ``q' = q * scale`` a score is ``sum q' code + sum
q zero``, whose second sum is one number for each query and group. Scales of a token are folded into the
weights in the same way. What multiplies codes is rounded to an integer, of as many bits as `GroupedFormat`
says, for the largest in the group; one of 16 bits takes part in two dots of bytes. Codes count from the
middle one: what rounding changes at that is known, and goes into the second sum as well. Sums of integers are
exact. What the integers do to a result is in `ir.kv_rounding`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from mimo_compile.ir.kv_groups import GroupedFormat
from mimo_compile.schedules.attention import int8_dot
from mimo_compile.schedules.attention.group_layout import BLOCKS
from mimo_compile.schedules.attention.group_reach import GROUP, GroupReach
from mimo_compile.schedules.attention.group_tile import GroupTile, line
from mimo_compile.schedules.attention.reach import Tiling
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, store, workspace
from mimo_compile.schedules.emit.unpack import field
from mimo_compile.schedules.emit.vector import LANES, fused, rint, splat


def folded(buffer: Any, value: Any, join: Callable[[Any, Any], Any]) -> Any:
    """Return what joining all lanes of 16 gives, half by half.

    LLVM's own reductions of float32 go lane by lane. ``buffer`` has room for 16 lanes.
    """
    half = LANES
    while half > 1:
        store(buffer, value, 0, lanes=half)
        half //= 2
        value = join(load(buffer, 0, lanes=half), load(buffer, half, lanes=half))
    return bind(value)


def _largest(value: Any) -> Any:
    """Return the largest of 16 numbers, none of which is negative: then it is that of their bits."""
    bits = T.reinterpret("int32x16", value)
    most = T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", bits)
    return bind(T.reinterpret("float32", most))


def added(a: Any, b: Any) -> Any:
    """Return the sum."""
    return a + b


def _unit(most: Any, levels: int) -> tuple[Any, Any]:
    """Return what numbers up to ``most`` are multiplied by to be rounded, and what one unit stands for."""
    # below that the quotient would be infinite, and times zero not a number
    by = T.if_then_else(most > T.float32(1e-30), T.float32(levels) / most, T.float32(0))
    return bind(by), bind(most * T.float32(1 / levels))


def _four(buffer: Any, *index: Any) -> Any:
    """Return four neighbouring bytes in each lane, bound."""
    return bind(splat(T.reinterpret("int32", load(buffer, *index, lanes=4))))


class Asked:
    """Which lines of the codes of a later group are prefetched when.

    Asked for in the loops of dots alone, they would come in two bursts, and memory would be idle while
    queries and weights are rounded, which takes as long.
    """

    def __init__(self, lines: int, rounds: int, dots: int) -> None:
        """Spread ``lines`` over turns of rounding and of dots; few lines over those of dots alone."""
        self.each = lines // (rounds + dots)
        self.done = self.each * rounds
        self.more = -(-max(0, lines - self.done) // dots)

    def rounding(self, turn: Any) -> list[Any]:
        """Return the lines that a turn of rounding asks for."""
        return [turn * self.each + n for n in range(self.each)]

    def dots(self, turn: Any) -> list[Any]:
        """Return the lines that a turn of dots asks for."""
        return [self.done + turn * self.more + n for n in range(self.more)]


class Integers(GroupTile):
    """Codes times integers, in dots of bytes."""

    way: ClassVar[str]
    """Of `int8_dot`."""

    def __init__(
        self, s: Tiling, fmt: GroupedFormat, k: Any, v: Any, head: Any, lead: Any = None
    ) -> None:
        super().__init__(s, fmt, k, v, head, lead)
        self.terms = fmt.query_terms
        self.q = workspace((s.height, self.wide), "float32")
        self.scratch = workspace((max(self.wide, GROUP),), "float32")
        self.lanes = workspace((LANES,), "float32")
        self.queries = workspace((self.terms, s.height, self.wide), "int8")
        self.unit, self.offset = (workspace((s.height,), "float32") for _ in range(2))
        self.weights = workspace((self.value_groups, s.height, GROUP), "uint8")
        self.weight_unit = workspace((self.value_groups, s.height), "float32")
        self.middles = workspace((self.value_groups, s.height, LANES), "float32")
        # only tiles of one row tile prefetch
        rows, folds = min(s.rows, s.height), 2 * s.height
        parts = BLOCKS // self._side_by_side(self.terms * rows)
        columns = -(-s.columns // self._columns_at_once(rows))
        self.keys_asked = Asked(BLOCKS * self.words, folds * self.wide // LANES, parts * self.words)
        self.values_asked = Asked(
            s.columns * GROUP // self.per,
            folds * self.value_groups * BLOCKS,
            columns * GROUP // self.per,
        )

    def begin(self, q: Any, first: Any, scale: float) -> None:
        """Load the queries as `Tile.begin` does; padding of a query is zero."""
        super().begin(q, first, scale)
        with loop(self.s.height) as row:
            for j in range(int(self.s.p["d"]), self.wide):
                store(self.q, T.float32(0), row, j)
            with loop(self.value_groups) as g:
                store(self.middles, splat(0.0), g, row, 0, lanes=LANES)

    def old(self, reach: GroupReach, step: Any, held: Any, first: Any) -> None:
        """See `GroupTile.old`."""
        with loop(self.s.height) as row:
            self.round_query(held, row)
        for base, rows, count in self._row_tiles():
            wide = self._side_by_side(self.terms * rows)
            with loop(BLOCKS // wide) as part, loop(count) as tile:
                self.multiply_keys(held, part, wide, bind(tile * rows + base), rows)
        self.hide(reach, step, first)
        self.weigh()
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

    def round_query(self, step: Any, row: Any) -> None:
        """Fold the scales of a group's channels into a query, round it, sum up what middle codes give."""
        zero = splat(0.0)
        top, total, rounded = (Register("float32", LANES, zero) for _ in range(3))
        turn = bind(row * (2 * self.wide // LANES))
        with loop(self.wide // LANES) as j:
            for n in self.keys_asked.rounding(turn + j):
                self.ask_keys(step, 0, n)
            query = bind(load(self.q, row, j * LANES, lanes=LANES))
            value = bind(query * load(self.k_params, 0, j * LANES, lanes=LANES))
            total.set(total.get() + query * load(self.k_params, 1, j * LANES, lanes=LANES))
            top.set(T.max(top.get(), T.max(value, zero - value)))
            store(self.scratch, value, j * LANES, lanes=LANES)
        most = _largest(top.get())
        by, unit = _unit(most, self.fmt.query_levels)
        with loop(self.wide // LANES) as j:
            for n in self.keys_asked.rounding(turn + self.wide // LANES + j):
                self.ask_keys(step, 0, n)
            value = bind(rint(load(self.scratch, j * LANES, lanes=LANES) * splat(by)))
            rounded.set(rounded.get() + value)
            whole = bind(T.cast(value, "int32x16"))
            parts = [whole]
            if self.terms == 2:
                upper = bind(T.shift_right(whole + splat(T.int32(128)), splat(T.int32(8))))
                parts = [upper, whole - T.shift_left(upper, splat(T.int32(8)))]
            for term, part in enumerate(parts):
                store(self.queries, T.cast(part, "int8x16"), term, row, j * LANES, lanes=LANES)
        offset = total.get() - rounded.get() * splat(unit * T.float32(self.middle))
        store(self.offset, folded(self.lanes, offset, added), row)
        store(self.unit, unit, row)

    def multiply_keys(self, step: Any, part: Any, wide: int, first: Any, rows: int) -> None:
        """Write the scores of ``rows`` queries with the ``part``-th ``wide`` blocks of codes."""
        block = part * wide
        acc = [self._accumulators(self.terms, wide) for _ in range(rows)]
        with loop(self.words) as w:
            lines = [line(self.k_codes, self.head, step, block + u, w) for u in range(wide)]
            for n in self.keys_asked.dots(part * self.words + w):
                self.ask_keys(step, 0, n)
            for four in range(self.per // 4):
                codes = [bind(field(x, four * self.fmt.bits, self.fmt.bits, LANES)) for x in lines]
                for r in range(rows):
                    for term in range(self.terms):
                        x = _four(self.queries, term, first + r, w * self.per + 4 * four)
                        for code, register in zip(codes, acc[r][term], strict=True):
                            register.set(int8_dot.dot(self.way, register.get(), code, x))
        for r in range(rows):
            unit, offset = (bind(splat(a[first + r])) for a in (self.unit, self.offset))
            for u in range(wide):
                total = T.cast(acc[r][0][u].get(), "float32x16")
                if self.terms == 2:
                    lower = T.cast(acc[r][1][u].get(), "float32x16")
                    total = total * splat(256.0) + lower
                score = total * unit + offset
                store(self.score, score, first + r, (block + u) * LANES, lanes=LANES)

    def round_weights(self, step: Any, row: Any, g: Any) -> None:
        """Fold the scales of a group's tokens into a row's weights, and sum up what middle codes give."""
        top = Register("float32", LANES, splat(0.0))
        total = load(self.middles, g, row, 0, lanes=LANES) * splat(self.shrink[row])
        middles, rounded = Register("float32", LANES, total), Register("float32", LANES, splat(0.0))
        turn = bind((row * self.value_groups + g) * (2 * BLOCKS))
        with loop(BLOCKS) as u:
            for n in self.values_asked.rounding(turn + u):
                self.ask_values(step, 0, n)
            weight = bind(load(self.score, row, u * LANES, lanes=LANES))
            value = bind(weight * load(self.v_params, 0, g, u * LANES, lanes=LANES))
            middle = load(self.v_params, 1, g, u * LANES, lanes=LANES)
            middles.set(fused(weight, middle, middles.get()))
            top.set(T.max(top.get(), value))
            store(self.scratch, value, u * LANES, lanes=LANES)
        most = _largest(top.get())
        by, unit = _unit(most, self.fmt.weight_levels)
        with loop(BLOCKS) as u:
            for n in self.values_asked.rounding(turn + BLOCKS + u):
                self.ask_values(step, 0, n)
            value = bind(rint(load(self.scratch, u * LANES, lanes=LANES) * splat(by)))
            rounded.set(rounded.get() + value)
            whole = T.cast(T.cast(value, "int32x16"), "uint8x16")
            store(self.weights, whole, g, row, u * LANES, lanes=LANES)
        total = middles.get()
        if self.fmt.bits < 8:  # bytes count from the middle one as they lie
            total = total - rounded.get() * splat(unit * T.float32(self.middle))
        store(self.middles, total, g, row, 0, lanes=LANES)
        store(self.weight_unit, unit, g, row)

    def multiply_values(
        self, step: Any, column: Any, wide: int, turn: Any, first: Any, rows: int
    ) -> None:
        """Add ``wide`` vectors of weighted values, whose tokens share their scales, to ``rows`` rows."""
        acc = [self._accumulators(1, wide)[0] for _ in range(rows)]
        per_scale = self.fmt.columns // LANES
        g = bind(column // per_scale) if self.value_groups > 1 else 0
        with loop(GROUP // self.per) as run:
            lines = [line(self.v_codes, self.head, step, column + c, run) for c in range(wide)]
            for n in self.values_asked.dots(turn * (GROUP // self.per) + run):
                self.ask_values(step, 0, n)
            for four in range(self.per // 4):
                codes = [bind(field(x, four * self.fmt.bits, self.fmt.bits, LANES)) for x in lines]
                for r in range(rows):
                    x = _four(self.weights, g, first + r, run * self.per + 4 * four)
                    for code, register in zip(codes, acc[r], strict=True):
                        register.set(int8_dot.dot(self.way, register.get(), x, code))
        for r in range(rows):
            shrink = bind(splat(self.shrink[first + r]))
            unit = bind(splat(self.weight_unit[g, first + r]))
            for c in range(wide):
                at = (column + c) * LANES
                before = load(self.out, first + r, at, lanes=LANES) * shrink
                total = fused(T.cast(acc[r][c].get(), "float32x16"), unit, before)
                store(self.out, total, first + r, at, lanes=LANES)

    def finish(self) -> None:
        """Add what middle codes of values give."""
        per_scale = self.fmt.columns // LANES
        with loop(self.s.height) as row:
            for g in range(self.value_groups):
                middles = load(self.middles, g, row, 0, lanes=LANES)
                more = bind(splat(folded(self.lanes, middles, added)))
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
