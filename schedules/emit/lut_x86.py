"""Ways of x86 CPUs to look sums up in tables: byte permutations of 512 bits, shuffles of 128."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, splat
from mimo_compile.schedules.emit.lut import Lines, Lookup, Registers
from mimo_compile.schedules.emit.tile import Piece, Sums, span_of

_LOW = 0x0F
_NUMBERS = 0x30201000
"""Which of four tables the bytes of a word look up in."""
SPAN = 8
"""Blocks of columns that are looked up together at most, where sums are widened behind."""


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

    @property
    def part(self) -> int:
        """The runs of one vector of tables."""
        return 4

    @property
    def step(self) -> int:
        """Blocks in the loop's body."""
        return 2 - self.codes.group_blocks % 2

    @property
    def unit(self) -> int:
        """The vectors of tables of a turn."""
        return self.step * self.codes.vectors

    def sums(
        self,
        lines: Lines,
        table: Any,
        tokens: Sequence[Any],
        rows: int,
        g: Any,
        acc: Sums,
        ask: Callable[[Any], None],
        piece: Piece | None,
    ) -> None:
        """See `Lookup.sums`."""
        codes, step = self.codes, self.step
        begin, count = span_of(piece, codes.group_blocks // step)
        first = g * codes.group_blocks
        first = first if piece is None else bind(first + begin * step)
        with loop(count) as s:
            for u in range(step):
                b = bind(first + s * step + u)
                ask(b)
                for pair in range(codes.vectors // 2):
                    places = [(b * codes.vectors + 2 * pair + half) * 64 for half in range(2)]
                    vectors = [
                        [bind(load(table, t, at, lanes=64)) for t in tokens] for at in places
                    ]
                    for r in range(rows):
                        signs = bind(lines(b, r, codes.lines - 1)) if self.signed else None
                        for bit in range(codes.planes):
                            words = bind(T.reinterpret("int32x16", lines(b, r, pair + bit)))
                            for half in range(2):
                                index = _index(words, 4 * half)
                                turn = 2 * (pair + bit + u) + half
                                for m, vector in enumerate(vectors[half]):
                                    register = acc[r, 0, m][turn % len(acc[r, 0, m])]
                                    found = self._found(vector, index, signs, 2 * pair + half)
                                    self._add(register, found, 1 << bit)

    def part_sums(
        self, lines: Lines, table: Any, token: Any, rows: int, part: Any, acc: Registers
    ) -> None:
        """See `Lookup.part_sums`."""
        codes = self.codes
        b, v = bind(T.floordiv(part, codes.vectors)), bind(T.floormod(part, codes.vectors))
        pair, up = bind(T.floordiv(v, 2)), bind(T.floormod(v, 2) * 4)
        vector = bind(load(table, token, part * 64, lanes=64))
        for r in range(rows):
            signs = bind(lines(b, r, codes.lines - 1)) if self.signed else None
            for bit in range(codes.planes):
                words = bind(T.reinterpret("int32x16", lines(b, r, pair + bit)))
                found = self._found(vector, _index(words, up), signs, v)
                self._add(acc[r, 0, 0], found, self.rest_weight << bit)

    def _found(self, vector: Any, index: Any, signs: Any, v: Any) -> Any:
        """Look up the runs of vector ``v`` of a block and give sums their signs."""
        found = bind(
            T.call_llvm_pure_intrin(
                "int8x64",
                "llvm.x86.avx512.permvar.qi.512",
                T.reinterpret("int8x64", vector),
                index,
            )
        )
        if signs is None:
            return found
        bit = (
            T.uint8(1 << v) if isinstance(v, int) else T.cast(T.shift_left(T.int32(1), v), "uint8")
        )
        negative = T.bitwise_and(signs, splat(bit, 64)) != splat(T.uint8(0), 64)
        return T.Select(negative, splat(T.int8(0), 64) - found, found)

    def _add(self, register: Register, found: Any, weight: int) -> None:
        """Add what was looked up, times a weight; signed bytes are the second operand."""
        by = splat(T.int32(weight * 0x01010101), 16)
        pair = (by, found) if self.signed else (found, by)
        register.set(self.products(register.get(), *pair))


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
        """As many as 16 bits hold the sums of: each block adds two halves of its parts."""
        return (2**16 - 1) // 255 // (2 * (64 // self.width))

    @property
    def span(self) -> int:
        """Blocks that are summed in 16 bits; they divide a group."""
        most = min(self.most_blocks, SPAN)
        return next(s for s in range(most, 0, -1) if self.codes.group_blocks % s == 0)

    @property
    def part(self) -> int:
        """The runs of a span."""
        return self.span * self.codes.block // self.codes.run

    @property
    def unit(self) -> int:
        """One part."""
        return 1

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

    def sums(
        self,
        lines: Lines,
        table: Any,
        tokens: Sequence[Any],
        rows: int,
        g: Any,
        acc: Sums,
        ask: Callable[[Any], None],
        piece: Piece | None,
    ) -> None:
        """See `Lookup.sums`."""
        begin, count = span_of(piece, self.parts)
        first = g * self.parts if piece is None else bind(g * self.parts + begin)
        with loop(count) as p:
            self._span_sums(lines, table, tokens, rows, bind(first + p), acc, ask)

    def part_sums(
        self, lines: Lines, table: Any, token: Any, rows: int, part: Any, acc: Registers
    ) -> None:
        """See `Lookup.part_sums`."""
        registers = {key: [register] for key, register in acc.items()}
        self._span_sums(lines, table, [token], rows, part, registers, lambda b: None)

    def _span_sums(
        self,
        lines: Lines,
        table: Any,
        tokens: Sequence[Any],
        rows: int,
        part: Any,
        acc: Sums,
        ask: Callable[[Any], None],
    ) -> None:
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
            b = bind(part * self.span + s)
            ask(b)
            for half_line in range(0, 64, self.width):
                vectors = {}
                for m, token in enumerate(tokens):
                    for half in range(2):
                        at = (b * codes.vectors + half) * 64 + half_line
                        vectors[half, m] = bind(load(table, token, at, lanes=self.width))
                for r, bit in ((r, bit) for r in range(rows) for bit in range(codes.planes)):
                    raw = bind(lines(b, r, bit, half_line, self.width))
                    for half in range(2):
                        index = self._nibbles(raw, half)
                        for m in range(len(tokens)):
                            self._add(both[r, m, bit], odd[r, m, bit], vectors[half, m], index)
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


LOOKUPS: dict[str, type[Lookup]] = {c.name: c for c in (Permute, Shuffle512, Shuffle)}
"""All ways by name, the fastest first."""


def _index(words: Any, up: Any) -> Any:
    """Return the indices of four runs, from bit ``up`` of each byte on, with their tables' numbers."""
    if not isinstance(up, int) or up:
        words = T.shift_right(words, splat(T.int32(up) if isinstance(up, int) else up, 16))
    nibbles = T.bitwise_and(words, splat(T.int32(_LOW * 0x01010101), 16))
    return bind(T.reinterpret("int8x64", T.bitwise_or(nibbles, splat(T.int32(_NUMBERS), 16))))
