"""Ways of x86 CPUs to look sums up in tables: byte permutations of 512 bits, shuffles of 128."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, splat
from mimo_compile.schedules.emit.lut import Lookup
from mimo_compile.schedules.emit.tile import Sums

_LOW = 0x0F
_NUMBERS = 0x30201000
"""Which of four tables the bytes of a word look up in."""

Vectors = dict[tuple[int, int], list[tuple[Any, int]]]


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
        codes, step = self.codes, 2 - self.span % 2
        with loop(self.span // step) as s:
            for u in range(step):
                b = bind(first + s * step + u)
                if ask:
                    ask(b)
                for pair in range(codes.vectors // 2):
                    vectors: Vectors = {}
                    for (m, token), half in itertools.product(enumerate(tokens), range(2)):
                        at = (b * codes.vectors + 2 * pair + half) * 64
                        for table, weight in tables:
                            vector = T.reinterpret("int8x64", load(table, token, at, lanes=64))
                            vectors.setdefault((half, m), []).append((bind(vector), weight))
                    for r in range(rows):
                        self._look_up(lines, vectors, b, pair, r, acc, u)

    def _look_up(
        self,
        lines: Any,
        vectors: Vectors,
        b: Any,
        pair: int,
        r: int,
        acc: Sums,
        turn: int,
    ) -> None:
        """Look up eight runs in vectors by their half and the token; turns take registers in turn."""
        codes = self.codes
        signs = bind(lines(b, r, codes.lines - 1)) if self.signed else None
        for bit in range(codes.planes):
            words = bind(T.reinterpret("int32x16", lines(b, r, pair + bit)))
            for half in range(2):
                index = _index(words, half)
                for m in range(len(vectors) // 2):
                    chain = acc[r, 0, m]
                    register = chain[(2 * (pair + bit + turn) + half) % len(chain)]
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


LOOKUPS: dict[str, type[Lookup]] = {c.name: c for c in (Permute, Shuffle512, Shuffle)}
"""All ways by name, the fastest first."""


def _index(words: Any, half: int) -> Any:
    """Return the indices of four runs, each with its table's number, as bytes."""
    if half:
        words = T.shift_right(words, splat(T.int32(4), 16))
    nibbles = T.bitwise_and(words, splat(T.int32(_LOW * 0x01010101), 16))
    return bind(T.reinterpret("int8x64", T.bitwise_or(nibbles, splat(T.int32(_NUMBERS), 16))))
