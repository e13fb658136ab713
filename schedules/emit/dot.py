"""Exact dots of unsigned codes with int8 activations: one class for each way an x86 CPU has.

Every way sums ``code * x`` over the four columns of each 32-bit lane into one accumulator lane for
each row. Integers stay exact: where an instruction or float32 has too few bits, the number of terms
that fit is derived from the largest term, not assumed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.emit.build import Register, T, bind, splat, store, vector_type
from mimo_compile.schedules.emit.layout import CodeLayout
from mimo_compile.schedules.emit.unpack import field, unpack, unpack_cost

PERMUTE = "llvm.x86.avx512.permvar.sf.512"
"""Picks 16 floats by the low 4 bits of 16 indices."""
LOOKUP = "lookup512"
"""Name of the float kernel that turns codes into floats by `PERMUTE`."""
MAX_ACTIVATION = 127
"""Largest magnitude of a quantised activation."""


def exact(codes: CodeLayout) -> bool:
    """Say whether the layout holds the format's integer codes and a row's sum fits 32 bits."""
    if not codes.fmt.is_integer or (codes.fmt.dense and not codes.dense):
        return False
    if not codes.whole_groups:
        return False
    return codes.max_value * MAX_ACTIVATION * codes.k_padded < 2**31


def as_bytes(words: Any, lanes: int, dtype: str) -> Any:
    """View 32-bit lanes as bytes."""
    return T.reinterpret(vector_type(dtype, 4 * lanes), words)


@dataclass(frozen=True, slots=True)
class Dot(ABC):
    """A way to multiply and add; ``codes`` is the layout of the matrix."""

    codes: CodeLayout
    name: ClassVar[str]
    lanes: ClassVar[int]
    """Rows in a vector."""
    needs: ClassVar[frozenset[str]]
    accumulator: ClassVar[str] = "int32"
    activation: ClassVar[str] = "int8"
    """Dtype that activations are stored in."""

    @classmethod
    def fits(cls, codes: CodeLayout, hardware: Hardware) -> bool:
        """Say whether the hardware has it (and it can hold the format's codes)."""
        return cls.needs <= hardware.features

    @property
    def exact_blocks(self) -> int | None:
        """Blocks of columns that one accumulator sums exactly; None: the whole row.

        32-bit integers wrap, so only a row's final sum has to fit (see `mpgemm` for its limit).
        """
        return None

    @abstractmethod
    def block(self, acc: Any, words: list[Any], x: list[Any]) -> Any:
        """Return the accumulator after one block.

        Args:
            acc: The accumulator before.
            words: The block's codes as `unpacked` returns them.
            x: The block's activations as `columns` returns them.
        """

    def columns(self, activations: Any, row: Any, column: Any) -> list[Any]:
        """Load the activations of one block from column ``column`` on, each in all lanes."""
        out = []
        for p in range(self.codes.quads):
            four = activations[row, T.ramp(column + 4 * p, 1, 4)]
            out.append(bind(splat(T.reinterpret("int32", four), self.lanes)))
        return out

    @property
    def work(self) -> dict[str, float]:
        """Operations of one block of ``lanes`` rows for one token, by kind of `ir.counts`."""
        return {"dot_i8": float(self.lanes * self.codes.block)}

    @property
    def unpack_work(self) -> dict[str, float]:
        """Operations that unpack one block of ``lanes`` rows once, shared by all tokens."""
        ops = unpack_cost(self.codes)
        return {"unpack_u8": 2.0 * self.lanes * ops} if ops else {}

    def unpacked(self, lines: list[Any], constants: list[Any]) -> list[Any]:
        """Return the operands of a block, each bound; see `unpack.unpack`."""
        return unpack(self.codes, lines, self.lanes, constants)


class Vnni(Dot):
    """``vpdpbusd``: four products and the sum in one instruction."""

    name, lanes, needs = "vnni512", 16, frozenset({"avx512f", "avx512bw", "avx512vnni"})

    def block(self, acc: Any, words: list[Any], x: list[Any]) -> Any:
        """See `Dot.block`."""
        for codes, four in zip(words, x, strict=True):
            acc = T.call_llvm_pure_intrin(
                f"int32x{self.lanes}",
                f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}",
                acc,
                as_bytes(codes, self.lanes, "uint8"),
                as_bytes(four, self.lanes, "int8"),
            )
        return acc


class Vnni256(Vnni):
    """``vpdpbusd`` on 256 bits, which client CPUs without AVX-512 have."""

    name, lanes, needs = "vnni256", 8, frozenset({"avx2", "avxvnni"})


class Madd(Dot):
    """``pmaddubsw`` and ``pmaddwd``: products in 16 bits, sums in 32."""

    name, lanes, needs = "madd256", 8, frozenset({"avx2"})
    pairs: ClassVar[str] = "llvm.x86.avx2.pmadd.ub.sw"
    fours: ClassVar[str] = "llvm.x86.avx2.pmadd.wd"

    def _pairs(self, codes: Any, four: Any) -> Any:
        return T.call_llvm_pure_intrin(
            f"int16x{2 * self.lanes}",
            self.pairs,
            as_bytes(codes, self.lanes, "int8"),
            as_bytes(four, self.lanes, "int8"),
        )

    def _widen(self, pairs: Any, weight: int) -> Any:
        ones = T.broadcast(T.int16(weight), 2 * self.lanes)
        return T.call_llvm_pure_intrin(f"int32x{self.lanes}", self.fours, pairs, ones)

    @property
    def pairs_fit(self) -> int:
        """Products of two that 16 bits sum exactly."""
        return int((2**15 - 1) // (2 * self.codes.max_value * MAX_ACTIVATION))

    @property
    def work(self) -> dict[str, float]:
        """Products, and what widening them to 32 bits takes."""
        parts = self.codes.quads
        # 8 bits: mask, shift and mask, then twice the products, their widening and its sum
        extra = 8 if self.codes.fmt.bits == 8 else parts + -(-parts // self.pairs_fit)
        return {"dot_i8": float(self.lanes * self.codes.block), "int_op": float(self.lanes * extra)}

    def block(self, acc: Any, words: list[Any], x: list[Any]) -> Any:
        """See `Dot.block`."""
        bits = self.codes.fmt.bits
        if bits == 8:  # two products of 255 * 127 overflow 16 bits, those of its nibbles do not
            (codes,), (four,) = words, x
            low, high = field(codes, 0, 4, self.lanes), field(codes, 4, 4, self.lanes)
            acc = acc + self._widen(self._pairs(low, four), 1)
            return acc + self._widen(self._pairs(high, four), 16)
        sums: list[Any] = []
        for i, (codes, four) in enumerate(zip(words, x, strict=True)):
            product = self._pairs(codes, four)
            if i % self.pairs_fit == 0:
                sums.append(product)
            else:
                sums[-1] = sums[-1] + product
        for total in sums:
            acc = acc + self._widen(total, 1)
        return acc


class Madd512(Madd):
    """`Madd` on 512 bits."""

    name, lanes, needs = "madd512", 16, frozenset({"avx512f", "avx512bw"})
    pairs = "llvm.x86.avx512.pmaddubs.w.512"
    fours = "llvm.x86.avx512.pmaddw.d.512"


class Madd128(Madd):
    """`Madd` on 128 bits."""

    name, lanes, needs = "madd128", 4, frozenset({"ssse3"})
    pairs = "llvm.x86.ssse3.pmadd.ub.sw.128"
    fours = "llvm.x86.sse2.pmadd.wd"


class FloatDot(Dot):
    """Multiply-add of whole numbers in float32, on any CPU; exact below 2**24."""

    name, lanes, needs = "float", 16, frozenset[str]()
    accumulator = "float32"
    activation = "float32"

    @property
    def exact_blocks(self) -> int | None:
        """Blocks whose sum, started at their zero-point correction, stays below 2**24."""
        term = 2 * self.codes.max_value * MAX_ACTIVATION
        return max(1, (2**24 - 1) // (term * self.codes.block))

    def columns(self, activations: Any, row: Any, column: Any) -> list[Any]:
        """Each column in all lanes, as it is stored."""
        return [splat(activations[row, column + i], self.lanes) for i in range(self.codes.block)]

    def unpacked(self, lines: list[Any], constants: list[Any]) -> list[Any]:
        """One vector of whole numbers for each column."""
        return float_columns(self.codes, lines[0], self.lanes)

    def block(self, acc: Any, words: list[Any], x: list[Any]) -> Any:
        """See `Dot.block`."""
        for column, value in zip(words, x, strict=True):
            acc = acc + column * value
        return acc

    @property
    def work(self) -> dict[str, float]:
        """Multiply-adds."""
        return {"fma_f32": float(self.lanes * self.codes.block)}

    @property
    def unpack_work(self) -> dict[str, float]:
        """Shift, mask, convert."""
        return {"int_op": 3.0 * self.lanes * self.codes.block}


def code_table(codes: CodeLayout) -> Any:
    """Return 16 floats by the low 4 bits of a lane: its code, less the zero point if that is fixed."""
    table = Register("float32", 16)
    zero = 0 if codes.fmt.has_zero else codes.fmt.fixed_zero
    for i in range(16):
        store(table.buffer, T.float32((i & ((1 << codes.lane_bits) - 1)) - zero), i)
    return bind(table.get())


def float_columns(codes: CodeLayout, words: Any, lanes: int, table: Any = None) -> list[Any]:
    """Return a block's columns as float32 vectors, one for each, in order; each bound.

    Args:
        codes: The layout.
        words: The block as 32-bit lanes.
        lanes: Rows.
        table: From `code_table` (16 lanes, codes of up to 4 bits); None: mask and convert.
    """
    out = []
    mask = splat(T.int32((1 << codes.lane_bits) - 1), lanes)
    f32 = vector_type("float32", lanes)
    for j, p in ((j, p) for p in range(codes.per_byte) for j in range(4)):
        shift = 8 * j + p * codes.lane_bits
        code = T.shift_right(words, splat(T.int32(shift), lanes)) if shift else words
        if table is None:
            out.append(bind(T.cast(T.bitwise_and(code, mask), f32)))
        else:
            out.append(bind(T.call_llvm_pure_intrin(f32, PERMUTE, table, code)))
    return out


DOTS: dict[str, type[Dot]] = {d.name: d for d in (Vnni, Madd512, Vnni256, Madd, Madd128, FloatDot)}
"""All ways by name, the fastest first."""


def byte_ways(layouts: Sequence[CodeLayout], hardware: Hardware) -> tuple[str, ...]:
    """Return the dots of bytes that the hardware has for all of some layouts, the fastest first."""
    usable = (n for n, d in DOTS.items() if all(d.fits(layout, hardware) for layout in layouts))
    return tuple(n for n in usable if DOTS[n].activation == "int8")


def float_ways(codes: CodeLayout, hardware: Hardware) -> tuple[str, ...]:
    """Return the float kernels that can read the codes, the fastest first; ``""`` masks and converts."""
    lookup = hardware.has_avx512 and codes.lane_bits <= 4
    return (LOOKUP, "") if lookup else ("",)


def float_work(codes: CodeLayout, way: str) -> dict[str, float]:
    """Operations that turn one code into a float by a way of `float_ways`, by kind of `ir.counts`."""
    if way == LOOKUP:
        work = {"int_op": 1.0, "shuffle_u8": 4.0}
        return {**work, "add_f32": 1.0} if codes.fmt.has_zero else work
    return {"int_op": 3.0, "add_f32": 1.0}
