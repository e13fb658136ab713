"""Flash attention over bfloat16 caches in pairs: what differs from `flash.Tile`.

*Widened*: each 32-bit lane of a cache becomes two float32 numbers (a shift, a mask), then all arithmetic is
that of float32 caches. *Dots*: ``vdpbf16ps`` takes pairs as they lie; q and the weights are rounded to
bfloat16, or q is a sum of two. The rounded weights are summed, so that those of a row still add up to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


class Widened(Tile):
    """Pairs become float32 in registers: exact products, on any x86-64."""

    together = 2

    def __init__(self, s: Tiling, k: Any, v: Any, head: Any, lead: Any = None) -> None:
        super().__init__(s, k, v, head, lead)
        self.woven = 0
        """Lines of keys that are asked for with a pair of slots of a register tile's columns, in turns with
        lines of values; 0: those of keys are asked for with keys, those of values with values."""

    def run(self, reach: Reach, first: Any, begin: Any, end: Any) -> None:
        """See `Tile.run`; what lies apart is asked for in turns, a line of keys and one of values.

        Sixteen keys lie on one page, their values on another, and two answer faster than one: 1.2 times as
        fast where nothing but reading is done.
        """
        self.woven = self._weave() if self.streams and reach.apart else 0
        super().run(reach, first, begin, end)

    def _weave(self) -> int:
        """Return what `woven` is, if extents let lines be asked for in turns.

        With each two lines of keys go one of keys and one of values, the rest with the pairs of values.
        """
        d, values = int(self.s.p["d"]), self.s.columns * (LANES // 2)
        wide = self.columns_at_once(self.s.height)
        keys, rest = divmod(wide * (d // 4), values)  # a quarter of d: half the lines
        return keys if d % 4 == rest == self.s.columns % wide == 0 and keys <= wide else 0

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
                    prefetch(self.v, self.head, (b + far) * (LANES // 2), i * (2 * LANES))
                else:
                    prefetch(self.k, self.head, b + far, i, 0)

    def ask_with_values(self, block: Any, i: Any, far: Any, columns: list[Any]) -> None:
        """Prefetch lines that come some steps later, ``far`` blocks on, with pair ``i`` of one.

        As many lines as are read, but in the order in which they lie: where columns are read in turns, lines
        asked for in those turns would leave gaps, and blocks that lie alone take 1.3 times as long.
        """
        if not self.streams:
            return
        wide, keys = len(columns), self.woven
        if not keys:
            first = bind(columns[0] * (LANES // 2) + i * (wide * LANES))
            for n in range(wide):
                at = 2 * (first + n * LANES)
                prefetch(self.v, self.head, (block + far) * (LANES // 2), at)
            return
        done, values = int(self.s.p["d"]) // 4, wide - keys
        turn = bind(T.truncdiv(columns[0], T.int32(LANES * wide)) * (LANES // 2) + i)
        for n in range(max(keys, values)):
            if n < keys:
                prefetch(self.k, self.head, block + far, turn * keys + (done + n), 0)
            if n < values:
                at = (turn * values + (done + n)) * (2 * LANES)
                prefetch(self.v, self.head, (block + far) * (LANES // 2), at)

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
        block, i, far, slot = at
        pair = fixed(block * (LANES // 2) + i)
        mask = splat(T.int32(UPPER if both or halves is not None else 0))
        words = [paired(self.v, self.head, pair, 2 * j) for j in columns]
        if halves is not None:
            words = [bind(T.bitwise_and(w, splat(halves))) for w in words]
        self.ask_with_values(block, i, far, columns)
        values = [(_first(w), _second(w, mask)) for w in words]
        for r, row in enumerate(acc):
            for half in (0, 1):
                weight = bind(splat(self.score[first + r, slot + half]))
                for value, register in zip(values, row, strict=True):
                    register.set(fused(value[half], weight, register.get()))


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
        block, i, far, slot = at
        pair = fixed(block * (LANES // 2) + i)
        words = [paired(self.v, self.head, pair, 2 * j) for j in columns]
        if halves is not None or not both:
            mask = splat(T.int32(0xFFFF) if halves is None else halves)
            words = [bind(T.bitwise_and(w, mask)) for w in words]
        self.ask_with_values(block, i, far, columns)
        for r, row in enumerate(acc):
            weights = _pair(self.weights, first + r, slot)
            for values, register in zip(words, row, strict=True):
                register.set(dot(register.get(), values, weights))


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
