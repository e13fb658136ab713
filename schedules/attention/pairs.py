"""Flash attention over bfloat16 caches in pairs: what differs from `flash.Tile`.

*Widened*: each 32-bit lane of a cache becomes two float32 numbers (a shift, a mask), then all arithmetic is
that of float32 caches. *Dots*: ``vdpbf16ps`` takes pairs as they lie; q and the weights are rounded to
bfloat16, or q is a sum of two. The rounded weights are summed, so that those of a row still add up to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from mimo_compile.schedules.attention.flash import Tile, only
from mimo_compile.schedules.attention.lines import paired
from mimo_compile.schedules.attention.reach import Reach, Tiling, fixed
from mimo_compile.schedules.emit.bf16 import dot
from mimo_compile.schedules.emit.bf16 import imported as dots_imported
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    prefetch,
    store,
    when,
    workspace,
)
from mimo_compile.schedules.emit.rounding import bf16_bits
from mimo_compile.schedules.emit.vector import LANES, fused, splat

FEW = 8
"""Sums that hide the latency of a multiply-add: four cycles, two in each."""
UPPER = -0x10000
"""Mask of the second number of a pair."""
ONES = 0x3F803F80
"""A pair of ones."""
_NAME = "mimo_round_bf16"
_MODULE = f"""
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define <16 x i32> @{_NAME}(<16 x float> %low, <16 x float> %high) {{
  %b = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %r = bitcast <32 x bfloat> %b to <16 x i32>
  ret <16 x i32> %r
}}
"""
"""Rounds to nearest, half to even; subnormal numbers become zero, a NaN stays one."""


@contextmanager
def imported() -> Iterator[None]:
    """Enclose the statements of `Dots`."""
    with dots_imported(), T.attr(T.int32(0), "pragma_import_llvm", _MODULE):
        yield


def chains_of(cells: int) -> int:
    """Return the sums of a dot: one for each half of the pairs, where few would wait for each other."""
    return 2 if cells < FEW else 1


def _rounded(low: Any, high: Any) -> Any:
    """Return 32 bfloat16 numbers from float32, the 16 of ``low`` first, in 16 lanes."""
    return T.call_extern("int32x16", _NAME, low, high)


def _first(words: Any) -> Any:
    return bind(T.reinterpret("float32x16", T.shift_left(words, splat(T.int32(16)))))


def _second(words: Any, mask: Any) -> Any:
    return bind(T.reinterpret("float32x16", T.bitwise_and(words, mask)))


class Weave(NamedTuple):
    """How lines of keys and of values are asked for in turns."""

    rows: int
    """Of a pass over all columns of values; 0: columns are read one part after the other, by all rows."""
    keys: int
    """Lines of keys that a pair of slots of a register tile's columns asks for."""
    values: int
    """Lines of values."""


class Widened(Tile):
    """Pairs become float32 in registers: exact products, on any x86-64."""

    together = 2

    def __init__(self, s: Tiling, k: Any, v: Any, head: Any, lead: Any = None) -> None:
        super().__init__(s, k, v, head, lead)
        self.woven: Weave | None = None
        """None: lines of keys are asked for with keys, those of values with values."""

    def run(self, reach: Reach, first: Any, begin: Any, end: Any) -> None:
        """See `Tile.run`; what lies apart is asked for in turns, some lines of keys and some of values.

        Sixteen keys lie on one page, their values on another, and two answer faster than one: 1.2 times as
        fast where nothing but reading is done. Of blocks that are `Reach.alone`, values are read in the order
        in which they lie, too: 1.1 to 1.2 times as fast again, while longer runs are read faster with gaps.
        """
        self.woven = self._weave(reach.alone) if self.streams and reach.apart else None
        super().run(reach, first, begin, end)

    def _weave(self, alone: bool) -> Weave | None:
        """Return how lines are asked for in turns, if extents let them be.

        With each two lines of keys go one of keys and one of values, the rest with the pairs of values.
        """
        d, columns, height = int(self.s.p["d"]), self.s.columns, self.s.height
        rows, wide = height, self.columns_at_once(height)
        if alone and columns <= self.s.registers:
            passes = -(-height // (self.s.registers // columns))
            rows, wide = -(-height // passes), columns
        units = -(-height // rows) * (columns // wide) * (LANES // 2)
        keys, left = divmod(d // 4, units)  # a quarter of d: half the lines
        values, more = divmod(columns * (LANES // 2) - d // 4, units)
        if d % 4 or columns % wide or left or more or values < 0:
            return None
        return Weave(rows if wide == columns else 0, keys, values)

    def side_by_side(self, rows: int) -> int:
        """See `Tile.side_by_side`; keys that are read once are read in the order in which they lie."""
        return 1 if self.streams else super().side_by_side(rows)

    def _scores(self, reach: Reach, step: Any, part: Any, wide: int, first: Any, rows: int) -> None:
        blocks = [reach.block(step, part + u) for u in range(wide)]
        later = self.later(reach, step, part, wide)
        d, cells = int(self.s.p["d"]), rows * wide
        chains = chains_of(cells)
        sums = [Register("float32", LANES, splat(0.0)) for _ in range(chains * cells)]
        acc = [sums[r * wide * chains : (r + 1) * wide * chains] for r in range(rows)]
        if d > 1:
            with loop(d // 2 // self.turns) as i:
                for turn in range(self.turns):
                    self._score_pair(blocks, later, (i, turn), first, acc, 2)
        if d % 2:
            self._score_pair(blocks, later, (d // 2, 0), first, acc, 1)
        for r in range(rows):
            for u in range(wide):
                total = acc[r][u].get()
                if chains == 2:
                    total = total + acc[r][wide + u].get()
                store(self.score, total, first + r, (part + u) * LANES, lanes=LANES)

    def _score_pair(
        self, blocks: list[Any], later: list[Any], at: tuple[Any, int], first: Any,
        acc: list[list[Register]], parts: int,
    ) -> None:  # fmt: skip
        i = bind(at[0] * self.turns + at[1])
        words = [paired(self.k, self.head, b, i, 0) for b in blocks]
        self.ask_with_keys(blocks, later, *at)
        mask = splat(T.int32(UPPER))
        keys = [[_first(w), _second(w, mask)][:parts] for w in words]
        for r, row in enumerate(acc):
            for half in range(parts):
                query = bind(splat(self.q[first + r, 2 * i + half]))
                own = row[-len(blocks) :] if half else row[: len(blocks)]
                for u, register in enumerate(own):
                    register.set(register.get() + keys[u][half] * query)

    @property
    def turns(self) -> int:
        """Lines of keys that one of keys and, where they are `woven`, one of values are asked for with."""
        return 2 if self.woven else 1

    def ask_with_keys(self, blocks: list[Any], later: list[Any], i: Any, turn: int) -> None:
        """Prefetch line ``i`` of keys (in a second turn of values) that come ``later`` blocks on."""
        if self.streams:
            for b, far in zip(blocks, later, strict=True):
                if turn:
                    self._ask_value(b + far, i)
                else:
                    prefetch(self.k, self.head, b + far, i, 0)

    def _ask_value(self, block: Any, line: Any) -> None:
        prefetch(self.v, self.head, block * (LANES // 2), line * (2 * LANES))

    def asks_with_values(
        self, block: Any, i: Any, first: Any, columns: list[Any]
    ) -> list[Callable[[], None]]:
        """Return what prefetches lines of a later block with pair ``i`` of one, for rows from ``first`` on.

        As many lines as are read, but in the order in which they lie: where columns are read in turns, lines
        asked for in those turns would leave gaps, and blocks that lie alone take 1.3 times as long.
        """
        wide, woven = len(columns), self.woven
        if woven is None:
            start = bind(T.truncdiv(columns[0], T.int32(2)) + i * wide)
            return [partial(self._ask_value, block, start + n) for n in range(wide)]
        turn = (
            T.truncdiv(first, T.int32(woven.rows)) if woven.rows
            else T.truncdiv(columns[0], T.int32(LANES * wide))
        )  # fmt: skip
        part = bind(turn * (LANES // 2) + i)
        done = int(self.s.p["d"]) // 4
        keys = [part * woven.keys + (done + n) for n in range(woven.keys)]
        values = [part * woven.values + (done + n) for n in range(woven.values)]
        return [
            *(partial(prefetch, self.k, self.head, block, line, 0) for line in keys),
            *(partial(self._ask_value, block, line) for line in values),
        ]

    def values(self, reach: Reach, step: Any) -> None:
        """See `Tile.values`; all columns for some rows, then for others, where `Weave.rows` says so."""
        if self.woven is None or not self.woven.rows:
            super().values(reach, step)
            return
        height, few = self.s.height, self.woven.rows
        columns = [T.int32(j * LANES) for j in range(self.s.columns)]
        for first in range(0, height, few):
            self._values(reach, step, T.int32(first), min(few, height - first), columns)

    def _values(self, reach: Reach, step: Any, first: Any, rows: int, columns: list[Any]) -> None:
        acc: list[list[Register]] = []
        for r in range(rows):
            shrink = bind(splat(self.shrink[first + r]))
            row = [load(self.out, first + r, j, lanes=LANES) * shrink for j in columns]
            acc.append([Register("float32", LANES, start) for start in row])
        with loop(self.s.blocks) as u:
            block, live = reach.block(step, u), reach.live(step, u)
            kept, far = reach.kept(step, u), self.later(reach, step, u, 1)[0]
            whole = fixed(T.shift_right(live + int(kept is not None), T.int32(1)))
            with T.serial(0, whole) as i:
                at = (block, i, far, u * LANES + 2 * i)
                halves = None if kept is None else _halves(kept, 2 * i)
                with only(kept, 2 * i, 2):
                    self._value_pair(at, True, halves, first, acc, columns)
            if kept is None:
                # a slot that was never written may hold anything, beside one that was
                with when(2 * whole < live):
                    at = (block, whole, far, u * LANES + 2 * whole)
                    self._value_pair(at, False, None, first, acc, columns)
        for r in range(rows):
            for at, register in zip(columns, acc[r], strict=True):
                store(self.out, register.get(), first + r, at, lanes=LANES)

    def _value_pair(
        self, at: tuple[Any, Any, Any, Any], both: bool, halves: Any, first: Any, acc: list[list[Register]],
        columns: list[Any],
    ) -> None:  # fmt: skip
        """Add a pair of slots.

        ``at``: its block, which pair of it, how far on to prefetch, and where its weights lie. ``both``: the
        second slot counts, too; or ``halves`` masks a word.
        """
        mask = splat(T.int32(UPPER if both or halves is not None else 0))
        weights = [
            [bind(splat(self.score[first + r, at[3] + half])) for half in (0, 1)]
            for r in range(len(acc))
        ]
        kept = None if halves is None else splat(halves)
        for n, word in enumerate(self._pairs_of_values(at, kept, first, columns)):
            values = _first(word), _second(word, mask)
            for own, row in zip(weights, acc, strict=True):
                for weight, value in zip(own, values, strict=True):
                    row[n].set(fused(value, weight, row[n].get()))

    def _pairs_of_values(
        self, at: tuple[Any, Any, Any, Any], kept: Any | None, first: Any, columns: list[Any]
    ) -> Iterator[Any]:
        """Yield the words of two slots, or what a mask keeps of them; ask for later ones in between."""
        block, i, far, _ = at
        pair, wide = fixed(block * (LANES // 2) + i), len(columns)
        asks = self.asks_with_values(block + far, i, first, columns) if self.streams else []
        for n, column in enumerate(columns):
            word = paired(self.v, self.head, pair, 2 * column)
            for ask in asks[n * len(asks) // wide : (n + 1) * len(asks) // wide]:
                ask()
            yield word if kept is None else bind(T.bitwise_and(word, kept))


class Dots(Widened):
    """Two products at a time by ``vdpbf16ps``; ``terms`` bfloat16 numbers stand for each element of q."""

    terms, short = 1, True

    def __init__(self, s: Tiling, k: Any, v: Any, head: Any, lead: Any = None) -> None:
        super().__init__(s, k, v, head, lead)
        self.wide = -(-int(s.p["d"]) // LANES) * LANES
        self.queries = workspace((self.terms, s.height, self.wide), "int16")
        self.weights = workspace((s.height, s.blocks * LANES), "int16")

    def begin(self, q: Any, first: Any, scale: float) -> None:
        """Load the queries as `Tile.begin` does, and round them."""
        super().begin(q, first, scale)
        d = int(self.s.p["d"])
        with loop(self.s.height) as row:
            for j in range(d // LANES * LANES, self.wide):
                if j >= d:
                    for term in range(self.terms):
                        store(self.queries, T.int16(0), term, row, j)
                else:
                    self._round(row, j, 1)
            if d >= LANES:
                with loop(d // LANES) as j:
                    self._round(row, j * LANES, LANES)

    def _round(self, row: Any, at: Any, lanes: int) -> None:
        value = bind(load(self.q, row, at, lanes=lanes))
        for term in range(self.terms):
            bits = bind(bf16_bits(value, lanes))
            store(self.queries, _upper(bits, lanes), term, row, at, lanes=lanes)
            if term + 1 < self.terms:
                kind = "float32" if lanes == 1 else f"float32x{lanes}"
                value = bind(value - T.reinterpret(kind, bits))

    def _scores(self, reach: Reach, step: Any, part: Any, wide: int, first: Any, rows: int) -> None:
        blocks = [reach.block(step, part + u) for u in range(wide)]
        later = self.later(reach, step, part, wide)
        acc = [[Register("float32", LANES, splat(0.0)) for _ in blocks] for _ in range(rows)]
        with loop(-(-int(self.s.p["d"]) // 2) // self.turns) as line:
            for turn in range(self.turns):
                i = bind(line * self.turns + turn)
                words = [paired(self.k, self.head, b, i, 0) for b in blocks]
                self.ask_with_keys(blocks, later, line, turn)
                for r in range(rows):
                    for term in range(self.terms):
                        query = _pair(self.queries, term, first + r, 2 * i)
                        for register, keys in zip(acc[r], words, strict=True):
                            register.set(dot(register.get(), keys, query))
        for r in range(rows):
            for u in range(wide):
                store(self.score, acc[r][u].get(), first + r, (part + u) * LANES, lanes=LANES)

    def weights_of(self, row: Any, top: Any, total: Register) -> None:
        """See `Tile.weights_of`; two vectors of weights become bfloat16 in one instruction."""

        def power(at: Any) -> Any:
            return bind(self.exp2(load(self.score, row, at, lanes=LANES) - top))

        twos = self.s.blocks // 2
        if twos:
            with loop(twos) as u:
                words = bind(_rounded(power(u * 2 * LANES), power(u * 2 * LANES + LANES)))
                pairs = T.reinterpret("int16x32", words)
                store(self.weights, pairs, row, u * 2 * LANES, lanes=2 * LANES)
                total.set(dot(total.get(), words, splat(T.int32(ONES))))
        if self.s.blocks % 2:
            at = twos * 2 * LANES
            total.set(total.get() + self.weight(power(at), row, at))

    def weight(self, value: Any, row: Any, at: Any) -> Any:
        """Round 16 weights of a row, keep them, and return what they are now."""
        bits = bind(bf16_bits(value, LANES))
        store(self.weights, _upper(bits, LANES), row, at, lanes=LANES)
        return bind(T.reinterpret("float32x16", bits))

    def _value_pair(
        self, at: tuple[Any, Any, Any, Any], both: bool, halves: Any, first: Any, acc: list[list[Register]],
        columns: list[Any],
    ) -> None:  # fmt: skip
        kept = None if both else splat(T.int32(0xFFFF))
        if halves is not None:
            kept = splat(halves)
        weights = [_pair(self.weights, first + r, at[3]) for r in range(len(acc))]
        for n, word in enumerate(self._pairs_of_values(at, kept, first, columns)):
            for weight, row in zip(weights, acc, strict=True):
                row[n].set(dot(row[n].get(), word, weight))


class ExactQueryDots(Dots):
    """q as a sum of two bfloat16 numbers, to 2**-16 of it."""

    terms = 2


def _halves(kept: Any, slot: Any) -> Any:
    """Return the mask of a word of two slots, whose bits of ``kept`` say which of them count."""
    both = bind(T.bitwise_and(T.shift_right(kept, slot), T.int32(3)))
    low = T.bitwise_and(both, T.int32(1)) * T.int32(0xFFFF)
    return bind(low - T.shift_right(both, T.int32(1)) * T.int32(0x10000))


def _upper(bits: Any, lanes: int) -> Any:
    kind = "int16" if lanes == 1 else f"int16x{lanes}"
    return T.cast(T.shift_right(bits, splat(T.int32(16), lanes)), kind)


def _pair(buffer: Any, *index: Any) -> Any:
    """Return two neighbours in each lane, bound."""
    return bind(splat(T.reinterpret("int32", load(buffer, *index, lanes=2))))


TILES: dict[str, type[Tile]] = {"widen": Widened, "dot": Dots, "dot2": ExactQueryDots}
"""By the knob ``arith`` of the schedule."""
EXACT = frozenset({"widen"})
"""Arithmetic whose products are exact in float32, so that `CachedAttention.exact_bound` holds."""
