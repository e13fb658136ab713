"""Codes of codebooks and fp8 as floats in registers: permutations, arithmetic, or choices bit by bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mimo_compile.ir.formats import WeightFormat
from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.emit.build import Register, T, bind, splat, store, vector_type
from mimo_compile.schedules.emit.dot import PERMUTE
from mimo_compile.schedules.emit.layout import CodeLayout
from mimo_compile.schedules.emit.unpack import unpack

Word = tuple[Any, int]
"""32-bit lanes, and the bit of them that a code begins at; bits above the code may be anything."""


def sides(fmt: WeightFormat) -> tuple[tuple[float, ...], ...]:
    """Return the format's values; for two-sided ones those from 0 up, then those from 0 down."""
    if not fmt.two_sided:
        return (fmt.values,)
    return tuple(max(v, 0.0) for v in fmt.values), tuple(min(v, 0.0) for v in fmt.values)


def above_is_high(fmt: WeightFormat) -> bool:
    """Say whether codes with the top bit stand for the values above zero, and the others for the rest."""
    return fmt.values[-1] > 0


def columns(codes: CodeLayout, lines: list[Any], lanes: int, constants: list[Any]) -> list[Word]:
    """Return where the code of each column of a block is, in order."""
    if codes.dense:
        quads = unpack(codes, lines, lanes, constants)
        return [(quad, 8 * j) for quad in quads for j in range(4)]
    bits = codes.lane_bits
    return [(lines[0], 8 * j + p * bits) for p in range(codes.quads) for j in range(4)]


@dataclass(frozen=True, slots=True)
class Decoder(ABC):
    """A way to turn codes into the numbers of one or two tables."""

    fmt: WeightFormat
    name: ClassVar[str]
    lanes: ClassVar[int] = 16
    needs: ClassVar[frozenset[str]] = frozenset()
    work: ClassVar[dict[str, float]]
    """Operations for one code and table, by kind of `ir.counts`."""

    @classmethod
    def fits(cls, fmt: WeightFormat, hardware: Hardware) -> bool:
        """Say whether the hardware has it for a format's codes."""
        return fmt.family in ("codebook", "complex") and cls.needs <= hardware.features

    @abstractmethod
    def prepare(self, table: Sequence[float]) -> Any:
        """Return what `value` needs of a table, bound here."""

    @abstractmethod
    def value(self, table: Any, word: Word) -> Any:
        """Return the table's numbers for the codes of a word, float32, bound."""

    def top_bit(self, word: Word) -> Any:
        """Return the lanes whose code has its highest bit set."""
        words, bit = word
        up = 32 - bit - self.fmt.bits
        shifted = T.shift_left(words, splat(T.int32(up), self.lanes)) if up else words
        return shifted < splat(T.int32(0), self.lanes)


def _shifted(word: Word, lanes: int) -> Any:
    words, bit = word
    return T.shift_right(words, splat(T.int32(bit), lanes)) if bit else words


def _floats(values: Sequence[float]) -> Any:
    register = Register("float32", len(values))
    for i, value in enumerate(values):
        store(register.buffer, T.float32(value), i)
    return bind(register.get())


class Permute512(Decoder):
    """One ``vpermps`` of 16 numbers."""

    name = "vpermps512"
    needs = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
    work: ClassVar[dict[str, float]] = {"int_op": 1.0, "shuffle_u8": 4.0}

    def prepare(self, table: Sequence[float]) -> Any:
        """See `Decoder.prepare`."""
        return _floats([table[i % len(table)] for i in range(16)])

    def value(self, table: Any, word: Word) -> Any:
        """See `Decoder.value`."""
        index = _shifted(word, self.lanes)
        return bind(T.call_llvm_pure_intrin("float32x16", PERMUTE, table, index))


class Permute256(Decoder):
    """Two ``vpermps`` of 8 numbers, and the top bit of the code chooses."""

    name, lanes = "vpermps256", 8
    needs = frozenset({"avx2"})
    work: ClassVar[dict[str, float]] = {"int_op": 2.0, "shuffle_u8": 8.0}

    def prepare(self, table: Sequence[float]) -> Any:
        """See `Decoder.prepare`; a half of zeros is None."""
        halves = ([table[i % len(table)] for i in range(8)], table[8:])
        return [_floats(half) if any(half) else None for half in halves if half]

    def value(self, table: Any, word: Word) -> Any:
        """See `Decoder.value`."""
        index = bind(_shifted(word, self.lanes))
        zero = splat(T.float32(0), self.lanes)

        def look(half: Any) -> Any:
            if half is None:
                return zero
            return T.call_llvm_pure_intrin("float32x8", "llvm.x86.avx2.permps", half, index)

        found = [look(half) for half in table]
        if len(found) == 1:
            return bind(found[0])
        return bind(T.Select(self.top_bit(word), found[1], found[0]))


class Choices(Decoder):
    """Choose between pairs of numbers by each bit of the code: any CPU."""

    name = "choices"
    work: ClassVar[dict[str, float]] = {"int_op": 20.0}

    def prepare(self, table: Sequence[float]) -> Any:
        """See `Decoder.prepare`."""
        return tuple(table)

    def value(self, table: Any, word: Word) -> Any:
        """See `Decoder.value`."""
        words, bit = word
        level: list[Any] = [float(v) for v in table]
        for i in range(self.fmt.bits):
            mask = 1 << (bit + i)
            if mask >= 1 << 31:
                mask -= 1 << 32
            test = T.bitwise_and(words, splat(T.int32(mask), self.lanes))
            is_set = test != splat(T.int32(0), self.lanes)
            pairs = zip(level[0::2], level[1::2], strict=True)
            level = [self._chosen(is_set, high, low) for low, high in pairs]
        (value,) = level
        return bind(self._vector(value))

    def _chosen(self, is_set: Any, high: Any, low: Any) -> Any:
        if isinstance(high, float) and high == low:
            return high
        return T.Select(is_set, self._vector(high), self._vector(low))

    def _vector(self, value: Any) -> Any:
        return splat(T.float32(value), self.lanes) if isinstance(value, float) else value


class E4M3(Decoder):
    """Move exponent and mantissa to where float32 has them, then correct the exponent's bias.

    Subnormal numbers come out right, if the processor is not told to flush them.
    """

    name = "e4m3"
    work: ClassVar[dict[str, float]] = {"int_op": 3.0, "add_f32": 1.0}

    @classmethod
    def fits(cls, fmt: WeightFormat, hardware: Hardware) -> bool:
        """Any CPU."""
        return fmt.family == "fp8"

    def prepare(self, table: Sequence[float]) -> Any:
        """See `Decoder.prepare`."""
        return None

    def value(self, table: Any, word: Word) -> Any:
        """See `Decoder.value`."""
        words, bit = word
        up = T.shift_left(words, splat(T.int32(24 - bit), self.lanes)) if bit < 24 else words
        down = T.shift_right(up, splat(T.int32(4), self.lanes))  # copies of the sign above
        bits = T.bitwise_and(down, splat(T.int32(0x87F00000 - (1 << 32)), self.lanes))
        number = T.reinterpret(vector_type("float32", self.lanes), bits)
        return bind(number * splat(T.float32(2.0**120), self.lanes))


DECODERS: dict[str, type[Decoder]] = {d.name: d for d in (Permute512, Permute256, Choices, E4M3)}
"""All ways by name, the fastest first."""
