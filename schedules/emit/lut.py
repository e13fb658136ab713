"""Table lookup: sums of neighbouring activations, looked up by indices made of weights, exactly.

A table has the 16 sums that `nibbles` tells of a run of columns. Sums of four int8 numbers have more than
8 bits, but activations that quantise well are small but for a few, so tables hold bytes, and what such a
byte is too small for goes into a second table. A span of columns that needs it is looked up twice;
all other spans, usually all, once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    choose,
    load,
    loop,
    prefetch,
    splat,
    store,
    vector_type,
    when,
    workspace,
)
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.nibbles import NibbleLayout
from mimo_compile.schedules.emit.quantize import Activations
from mimo_compile.schedules.emit.tile import Sums, TileKnobs, Weights, lines_ahead
from mimo_compile.schedules.emit.unpack import constant_words

SPAN = 8
"""Blocks of columns that are looked up twice together."""
_LOW = 0x0F
_NUMBERS = 0x30201000
"""Which of four tables the bytes of a word look up in."""


Vectors = dict[tuple[int, int], list[tuple[Any, int]]]


@dataclass(frozen=True, slots=True)
class Tables:
    """Tables of rows in the kernel's workspace."""

    low: Any
    """``[M, 16 runs]`` bytes: sums as far as a byte goes."""
    rest: Any
    """Likewise: what is missing there, over `Lookup.rest_weight`; defined in spans with a flag."""
    flags: Any
    """``[M, spans]`` int32: not 0 where `rest` counts."""
    starts: Any
    """``[M, G]`` int32: what the sums of a group begin with."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """A way to look up and add; ``codes`` is the layout of the matrix."""

    codes: NibbleLayout
    name: ClassVar[str]
    lanes: ClassVar[int]
    """Rows in a vector of sums."""
    table_lanes: ClassVar[int]
    """Entries that are made at once."""
    needs: ClassVar[frozenset[str]]
    apart: ClassVar[bool]
    """Layouts that it reads."""

    @classmethod
    def fits(cls, codes: NibbleLayout, hardware: Hardware) -> bool:
        """Say whether the hardware has it, for this layout."""
        return cls.needs <= hardware.features and codes.apart == cls.apart

    @property
    def signed(self) -> bool:
        """True if tables hold int8 sums whose signs are stored apart, not unsigned bytes."""
        return self.codes.bias > 0

    @property
    def rest_weight(self) -> int:
        """What entries of the second table count."""
        return 2 if self.signed else 1

    @property
    def span(self) -> int:
        """Blocks with a common flag: they divide a group."""
        return next(s for s in range(self.most_blocks, 0, -1) if self.codes.group_blocks % s == 0)

    @property
    def most_blocks(self) -> int:
        """Blocks that are looked up with one look at a flag, at most."""
        return SPAN

    @property
    def runs(self) -> int:
        """Runs of columns in a row."""
        return self.codes.k_padded // self.codes.run

    @property
    def adding(self) -> dict[str, float]:
        """Operations that add up one looked-up byte, by kind of `ir.counts`."""
        return {"dot_i8": 1.0}

    @abstractmethod
    def products(self, acc: Any, codes: Any, x: Any) -> Any:
        """Return 32-bit sums of four products of unsigned and signed bytes, for `table_lanes`."""

    @abstractmethod
    def span_sums(
        self,
        lines: Any,
        tables: Sequence[tuple[Any, int]],
        tokens: Sequence[Any],
        rows: int,
        first: Any,
        acc: Sums,
        *,
        ask: Callable[[Any], None] | None = None,
    ) -> None:
        """Emit lookups of the blocks of a span and add them to ``acc``.

        Args:
            lines: ``lines(b, r, i)``: line i of block b in row block r as 64 bytes;
                ``lines(b, r, i, at, lanes)``: some of these.
            tables: ``[M, 16 runs]`` to look up in, and what their entries count.
            tokens: Rows of ``tables``.
            rows: Row blocks.
            first: First block of the span.
            acc: By row block, part of it, and token: registers to share the sum.
            ask: Prefetches what lies ahead of a block.
        """

    def alloc(self, m: int) -> Tables:
        """Allocate the tables of ``m`` rows."""
        shape, dtype = (m, 16 * self.runs), "int8" if self.signed else "uint8"
        spans = self.codes.blocks // self.span
        return Tables(
            workspace(shape, dtype),
            workspace(shape, dtype),
            workspace((m, spans), "int32"),
            workspace((m, self.codes.groups), "int32"),
        )

    def bytes(self, m: int) -> int:
        """Return the bytes of `alloc`."""
        return m * (32 * self.runs + 4 * self.codes.blocks // self.span + 4 * self.codes.groups)

    def build(self, x: Activations, out: Tables, m: Any) -> None:
        """Fill the tables of row ``m`` from its quantised activations."""
        codes, lanes = self.codes, self.table_lanes
        runs = self.span * codes.block // codes.run
        digits = [constant_words(codes.digits[i : i + lanes]) for i in range(0, 16, lanes)]
        zero = splat(T.int32(0), lanes)
        with loop(codes.groups) as g:
            bases = Register("int32", lanes, zero)
            with loop(codes.group_blocks // self.span) as s:
                span = bind(g * (codes.group_blocks // self.span) + s)
                top = Register("int32", lanes, zero)
                with loop(runs) as i:
                    run = bind(span * runs + i)
                    base, sums = self._sums(x, m, run, digits)
                    bases.set(bases.get() + base)
                    for part, value in enumerate(sums):
                        above, below = self._excess(value)
                        top.set(T.max(top.get(), T.max(above, below) if self.signed else above))
                        low = T.min(value, splat(T.int32(127 if self.signed else 255), lanes))
                        if self.signed:
                            low = T.max(low, splat(T.int32(-127), lanes))
                        self._store(out.low, low, m, run, part)
                most = T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", top.get())
                flag = bind(most)
                store(out.flags, flag, m, span)
                with when(flag > 0), loop(runs) as i:
                    run = bind(span * runs + i)
                    _, sums = self._sums(x, m, run, digits)
                    for part, value in enumerate(sums):
                        self._store_both(out, value, m, run, part)
            start = T.int32(0) if codes.late_zero or self.signed else load(x.sums, m, g)
            if not self.signed:
                start = start - bases.lane(0) * T.int32((1 << codes.planes) - 1)
            store(out.starts, start, m, g)

    def _sums(self, x: Activations, m: Any, run: Any, digits: list[Any]) -> tuple[Any, list[Any]]:
        """Return what unsigned sums are too large by, and the sums, each bound."""
        codes, lanes, count = self.codes, self.table_lanes, 4 * self.table_lanes
        i32, i8 = vector_type("int32", lanes), vector_type("int8", count)
        four = load(x.codes, m, run * codes.run, lanes=4)
        words = bind(splat(T.reinterpret("int32", four), lanes))
        negative = splat(T.int8(0), count) - T.reinterpret(i8, words)
        by = codes.bias
        if not self.signed:  # of a run's own columns, those below zero make its least sum
            negative = T.max(negative, splat(T.int8(0), count))
            by = int(codes.digits.max())
        negative = T.reinterpret(i32, negative)
        if codes.run == 2:
            negative = T.bitwise_and(negative, splat(T.int32(0xFFFF), lanes))
        zero, ones = splat(T.int32(0), lanes), splat(T.int32(by * 0x01010101), lanes)
        base = bind(self.products(zero, ones, negative))
        return base, [bind(self.products(base, d, words)) for d in digits]

    def _excess(self, value: Any) -> tuple[Any, Any]:
        """Return how far sums lie above and below what a byte holds, at least 0."""
        lanes = self.table_lanes
        zero = splat(T.int32(0), lanes)
        if not self.signed:
            return bind(T.max(value - splat(T.int32(255), lanes), zero)), zero
        limit = splat(T.int32(127), lanes)
        return bind(T.max(value - limit, zero)), bind(T.max(zero - limit - value, zero))

    def _store_both(self, out: Tables, value: Any, m: Any, run: Any, part: int) -> None:
        above, below = self._excess(value)
        if not self.signed:
            self._store(out.rest, above, m, run, part)
            return
        one = splat(T.int32(1), self.table_lanes)
        rest = bind(T.shift_right(above + one, one) - T.shift_right(below + one, one))
        self._store(out.rest, rest, m, run, part)
        self._store(out.low, value - rest - rest, m, run, part)

    def _store(self, buffer: Any, value: Any, m: Any, run: Any, part: int) -> None:
        lanes = self.table_lanes
        narrow = T.cast(value, vector_type(buffer.dtype, lanes))
        store(buffer, narrow, m, run * 16 + part * lanes, lanes=lanes)


class Permute(Lookup):
    """``vpermb`` looks up in four tables at once, ``vpdpbusd`` adds up and weighs bits."""

    name, lanes, table_lanes, apart = "vpermb512", 16, 16, False
    needs = frozenset({"avx512f", "avx512bw", "avx512vnni", "avx512vbmi"})

    def products(self, acc: Any, codes: Any, x: Any) -> Any:
        """See `Lookup.products`."""
        return T.call_llvm_pure_intrin(
            "int32x16", "llvm.x86.avx512.vpdpbusd.512",
            acc, T.reinterpret("uint8x64", codes), T.reinterpret("int8x64", x),
        )  # fmt: skip

    def span_sums(
        self,
        lines: Any,
        tables: Sequence[tuple[Any, int]],
        tokens: Sequence[Any],
        rows: int,
        first: Any,
        acc: Sums,
        *,
        ask: Callable[[Any], None] | None = None,
    ) -> None:
        """See `Lookup.span_sums`."""
        codes = self.codes
        with loop(self.span) as s:
            b = bind(first + s)
            if ask:
                ask(b)
            for pair in range(codes.vectors // 2):
                vectors: Vectors = {}
                for m, token in enumerate(tokens):
                    for half in range(2):
                        at = (b * codes.vectors + 2 * pair + half) * 64
                        for table, weight in tables:
                            raw = load(table, token, at, lanes=64)
                            vector = bind(T.reinterpret("int8x64", raw))
                            vectors.setdefault((half, m), []).append((vector, weight))
                for r in range(rows):
                    self._look_up(lines, vectors, b, pair, r, acc)

    def _look_up(
        self,
        lines: Any,
        vectors: Vectors,
        b: Any,
        pair: int,
        r: int,
        acc: Sums,
    ) -> None:
        """Look up eight runs in vectors by their half and the token."""
        codes = self.codes
        signs = bind(lines(b, r, codes.lines - 1)) if self.signed else None
        for bit in range(codes.planes):
            words = bind(T.reinterpret("int32x16", lines(b, r, pair + bit)))
            for half in range(2):
                index = _index(words, half)
                for m in range(len(vectors) // 2):
                    chain = acc[r, 0, m]
                    register = chain[(2 * (pair + bit) + half) % len(chain)]
                    for vector, weight in vectors[half, m]:
                        value = T.call_llvm_pure_intrin(
                            "int8x64", "llvm.x86.avx512.permvar.qi.512", vector, index
                        )
                        by = weight << bit
                        register.set(self._added(register.get(), value, by, signs, 2 * pair + half))

    def _added(self, acc: Any, value: Any, weight: int, signs: Any, v: int) -> Any:
        by = splat(T.int32(weight * 0x01010101), 16)
        if signs is None:
            return self.products(acc, value, by)
        value = bind(value)
        bit = T.bitwise_and(signs, splat(T.uint8(1 << v), 64))
        turned = T.Select(bit != splat(T.uint8(0), 64), splat(T.int8(0), 64) - value, value)
        return self.products(acc, by, turned)


class Shuffle(Lookup):
    """``pshufb`` looks up in one table for each 16 bytes; sums of 16 bits are widened after a span."""

    name, lanes, table_lanes, apart = "pshufb256", 8, 8, True
    needs = frozenset({"avx2"})
    shuffle: ClassVar[str] = "llvm.x86.avx2.pshuf.b"
    pairs: ClassVar[str] = "llvm.x86.avx2.pmadd.ub.sw"
    fours: ClassVar[str] = "llvm.x86.avx2.pmadd.wd"

    @property
    def width(self) -> int:
        """Bytes of a vector."""
        return 4 * self.table_lanes

    @property
    def most_blocks(self) -> int:
        """As many as 16 bits hold the sums of: each block adds two halves of its parts, of two tables."""
        return (2**16 - 1) // 255 // (2 * 2 * (64 // self.width))

    @property
    def adding(self) -> dict[str, float]:
        """Add, shift, add: 32-bit lanes."""
        return {"int_op": 3 / 4}

    def products(self, acc: Any, codes: Any, x: Any) -> Any:
        """See `Lookup.products`."""
        i8, lanes = f"int8x{self.width}", self.table_lanes
        two = T.call_llvm_pure_intrin(
            f"int16x{2 * lanes}", self.pairs, T.reinterpret(i8, codes), T.reinterpret(i8, x)
        )
        ones = splat(T.int16(1), 2 * lanes)
        return acc + T.call_llvm_pure_intrin(f"int32x{lanes}", self.fours, two, ones)

    def span_sums(
        self,
        lines: Any,
        tables: Sequence[tuple[Any, int]],
        tokens: Sequence[Any],
        rows: int,
        first: Any,
        acc: Sums,
        *,
        ask: Callable[[Any], None] | None = None,
    ) -> None:
        """See `Lookup.span_sums`."""
        codes, lanes = self.codes, self.width // 2
        zero = splat(T.uint16(0), lanes)
        keys = [
            (r, m, bit)
            for r in range(rows) for m in range(len(tokens)) for bit in range(codes.planes)
        ]  # fmt: skip
        # bytes of even and odd rows share 16 bits: all of them, and the odd ones alone
        both = {k: Register("uint16", lanes, zero) for k in keys}
        odd = {k: Register("uint16", lanes, zero) for k in keys}
        with loop(self.span) as s:
            b = bind(first + s)
            if ask:
                ask(b)
            for part in range(0, 64, self.width):
                vectors = {}
                for m, token in enumerate(tokens):
                    for half in range(2):
                        at = (b * codes.vectors + half) * 64 + part
                        vectors[half, m] = [
                            bind(load(table, token, at, lanes=self.width)) for table, _ in tables
                        ]
                for r, bit in ((r, bit) for r in range(rows) for bit in range(codes.planes)):
                    raw = bind(lines(b, r, bit, part, self.width))
                    for half in range(2):
                        index = self._nibbles(raw, half)
                        for m in range(len(tokens)):
                            for vector in vectors[half, m]:
                                self._add(both[r, m, bit], odd[r, m, bit], vector, index)
        for r, m, bit in keys:
            high, low = odd[r, m, bit], both[r, m, bit]
            low.set(low.get() - T.shift_left(high.get(), splat(T.uint16(8), lanes)))
            for half, sums in enumerate((low, high)):
                register = acc[r, half, m][0]
                for lane in range(0, lanes, 8):
                    wide = T.cast(load(sums.buffer, lane, lanes=8), "int32x8")
                    register.set(register.get() + T.shift_left(wide, splat(T.int32(bit), 8)))

    def _nibbles(self, raw: Any, half: int) -> Any:
        words = T.reinterpret(f"int32x{self.table_lanes}", raw)
        if half:
            words = T.shift_right(words, splat(T.int32(4), self.table_lanes))
        low = T.bitwise_and(words, splat(T.int32(_LOW * 0x01010101), self.table_lanes))
        return bind(T.reinterpret(f"int8x{self.width}", low))

    def _add(self, both: Register, odd: Register, vector: Any, index: Any) -> None:
        table = T.reinterpret(f"int8x{self.width}", vector)
        found = T.call_llvm_pure_intrin(f"int8x{self.width}", self.shuffle, table, index)
        value = bind(T.reinterpret(f"uint16x{self.width // 2}", found))
        both.set(both.get() + value)
        odd.set(odd.get() + T.shift_right(value, splat(T.uint16(8), self.width // 2)))


class Shuffle512(Shuffle):
    """`Shuffle` on 512 bits."""

    name, table_lanes, needs = "pshufb512", 16, frozenset({"avx512f", "avx512bw"})
    shuffle = "llvm.x86.avx512.pshuf.b.512"
    pairs = "llvm.x86.avx512.pmaddubs.w.512"
    fours = "llvm.x86.avx512.pmaddw.d.512"


def lut_sums(
    lookup: Lookup,
    tables: Tables,
    weights: Weights,
    blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any],
    g: Any,
    knobs: TileKnobs,
) -> dict[tuple[int, int, int], Any]:
    """Emit the sums of one group (less a fixed zero point) and return them, int32; see `int_tile`."""
    codes, lanes = lookup.codes, lookup.lanes

    def start(m: int) -> Any:
        return splat(load(tables.starts, tokens[m], g), lanes)

    grid = [
        (r, h, m)
        for r in range(len(blocks)) for h in range(ROWS // lanes) for m in range(len(tokens))
    ]  # fmt: skip
    zero = splat(T.int32(0), lanes)
    # additions to one register wait for each other: long groups of few rows get several
    chains = max(1, 4 // len(grid)) if codes.group_blocks > 4 and not lookup.apart else 1
    acc = {
        v: [Register("int32", lanes, zero if c else start(v[2])) for c in range(chains)]
        for v in grid
    }

    def lines(b: Any, r: int, i: int, at: int = 0, lanes: int = 64) -> Any:
        return load(weights.codes, *blocks[r], b * codes.lines + i, at, lanes=lanes)

    def ask(b: Any) -> None:
        for line in lines_ahead(codes, b, knobs):
            for block in blocks:
                prefetch(weights.codes, *block, line, 0)

    spans = codes.group_blocks // lookup.span
    with loop(spans) as s:
        span = bind(g * spans + s)
        first = bind(span * lookup.span)
        rows, low, rest = len(blocks), (tables.low, 1), (tables.rest, lookup.rest_weight)
        flags = [load(tables.flags, token, span) > 0 for token in tokens]

        def once() -> None:
            lookup.span_sums(lines, [low], tokens, rows, first, acc, ask=ask)

        def both() -> None:
            lookup.span_sums(lines, [low, rest], tokens, rows, first, acc, ask=ask)

        if len(tokens) == 1:
            choose(flags[0], both, once)
        else:
            once()
            for m, token in enumerate(tokens):
                mine = {(r, h, 0): a for (r, h, t), a in acc.items() if t == m}
                with when(flags[m]):
                    lookup.span_sums(lines, [rest], [token], rows, first, mine)
    out = {}
    for v, (total, *others) in acc.items():
        for register in others:
            total.set(total.get() + register.get())
        out[v] = total.get()
    return out


LOOKUPS: dict[str, type[Lookup]] = {c.name: c for c in (Permute, Shuffle512, Shuffle)}
"""All ways by name, the fastest first."""


def _index(words: Any, half: int) -> Any:
    """Return the indices of four runs, each with its table's number, as bytes."""
    if half:
        words = T.shift_right(words, splat(T.int32(4), 16))
    nibbles = T.bitwise_and(words, splat(T.int32(_LOW * 0x01010101), 16))
    return bind(T.reinterpret("int8x64", T.bitwise_or(nibbles, splat(T.int32(_NUMBERS), 16))))
