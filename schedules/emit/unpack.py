"""Turn packed codes into operands of dots: one emitter for each layout of codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from mimo_compile.schedules.emit.build import Register, T, bind, splat, store, vector_type
from mimo_compile.schedules.emit.dense import Planes, SignedTrits, Trits
from mimo_compile.schedules.emit.layout import CodeLayout
from mimo_compile.schedules.emit.nibbles import BitPlanes

_SHUFFLE = {
    16: "llvm.x86.avx512.pshuf.b.512",
    8: "llvm.x86.avx2.pshuf.b",
    4: "llvm.x86.ssse3.pshuf.b.128",
}
"""Byte shuffles within 128 bits by 32-bit lanes."""
_PERMUTE = "llvm.x86.avx512.vpermi2var.qi.512"


def tables(codes: CodeLayout) -> list[Any]:
    """Return the constant vectors that `unpack` needs, each bound here."""
    if not isinstance(codes, SignedTrits):
        return []
    halves = (half for table in codes.tables() for half in (table[:64], table[64:]))
    return [bind(T.reinterpret("int8x64", constant_words(half))) for half in halves]


def unpack_cost(codes: CodeLayout) -> int:
    """Return the vector operations of `unpack`, for a block."""
    if isinstance(
        codes, BitPlanes
    ):  # copies, tests and joins; `unpack_ops` are those of looking up
        return 28 * codes.fmt.bits - 8
    return codes.unpack_ops


def unpack(codes: CodeLayout, lines: list[Any], lanes: int, constants: list[Any]) -> list[Any]:
    """Return a block's codes, times the layout's unit, as vectors of bytes in 32-bit lanes, each bound.

    Args:
        codes: The layout.
        lines: The block's lines (or halves of them) as 32-bit lanes.
        lanes: Rows.
        constants: From `tables`.
    """
    if isinstance(codes, Planes):
        return [_joined(codes, lines, quad, lanes) for quad in range(codes.quads)]
    if isinstance(codes, SignedTrits):
        return _signed_trits(lines[0], constants)
    if isinstance(codes, Trits):
        return _trits(lines[0], lanes)
    if isinstance(codes, BitPlanes):
        return _spread(codes, lines, lanes)
    bits = codes.lane_bits
    if bits == 8:
        return lines
    return [bind(field(lines[0], p * bits, bits, lanes)) for p in range(codes.quads)]


def field(words: Any, shift: int, bits: int, lanes: int, to: int = 0) -> Any:
    """Return ``bits`` bits from ``shift`` on of each byte, moved to bit ``to``."""
    if shift > to:
        words = T.shift_right(words, splat(T.int32(shift - to), lanes))
    elif shift < to:
        words = T.shift_left(words, splat(T.int32(to - shift), lanes))
    if bits == 8:
        return words
    return T.bitwise_and(words, splat(_bytes(((1 << bits) - 1) << to), lanes))


def _joined(codes: Planes, lines: list[Any], quad: int, lanes: int) -> Any:
    parts = [field(lines[i], bit, width, lanes, low) for i, bit, width, low in codes.place(quad)]
    total = parts[0]
    for part in parts[1:]:
        total = T.bitwise_or(total, part)
    return bind(total)


def _spread(codes: BitPlanes, lines: list[Any], lanes: int) -> list[Any]:
    """Turn the nibbles of each plane into bytes of four columns: copy the byte, test a bit in each copy."""
    kind, count = vector_type("int8", 4 * lanes), 4 * lanes
    zero, out = T.broadcast(T.int8(0), count), []
    copies = {}
    for j in range(4):
        pattern = np.arange(count, dtype=np.uint8) & 12 | j
        order = T.reinterpret(kind, constant_words(pattern))
        for bit, line in enumerate(lines):
            raw = T.reinterpret(kind, line)
            copies[j, bit] = bind(T.call_llvm_pure_intrin(kind, _SHUFFLE[lanes], raw, order))
    for quad in range(8):
        # byte c of a word: bit c of the nibble
        mask = T.reinterpret(kind, splat(_word(0x08040201 << (quad & 4)), lanes))
        total = None
        for bit in range(len(lines)):
            found = T.bitwise_and(copies[quad & 3, bit], mask) != zero
            part = T.Select(found, T.broadcast(T.int8(1 << bit), count), zero)
            total = part if total is None else T.bitwise_or(total, part)
        out.append(bind(T.reinterpret(vector_type("int32", lanes), total)))
    return out


def _trits(words: Any, lanes: int) -> list[Any]:
    """Take digits from the top: ``(q + q / 2) / 2`` has the digit of q in its two top bits.

    Averages of bytes round up, so they get ``q - 1``, which is kept in place of q: no q is 0.
    """
    kind, count = vector_type("uint8", 4 * lanes), 4 * lanes
    zero, one, two = (T.broadcast(T.uint8(v), count) for v in (0, 1, 2))
    less = bind(T.reinterpret(kind, words) - one)
    out = []
    for digit in range(5):
        if digit:
            less = bind(less + less + less + two)
        top = T.reinterpret(vector_type("int32", lanes), _average(less, _average(less, zero)))
        out.append(bind(T.bitwise_and(top, splat(_bytes(0xC0), lanes))))
    return out


def _average(a: Any, b: Any) -> Any:
    """Return ``(a + b + 1) >> 1`` of bytes, which LLVM knows as one instruction."""
    count = int(a.ty.dtype.lanes) if hasattr(a, "ty") else a.dtype.lanes
    wide, narrow = f"uint16x{count}", f"uint8x{count}"
    one = T.broadcast(T.uint16(1), count)
    return T.cast(T.shift_right(T.cast(a, wide) + T.cast(b, wide) + one, one), narrow)


def _signed_trits(words: Any, constants: list[Any]) -> list[Any]:
    """Look up the digits of magnitudes; a negative number has the codes ``2 - code``."""
    index = bind(T.reinterpret("int8x64", words))
    first = _looked_up(constants[0], constants[1], index, 0xAA)
    last = _looked_up(constants[2], constants[3], index, 0x02)
    return [*(bind(field(first, 2 * p, 2, 16)) for p in range(4)), last]


def _looked_up(low: Any, high: Any, index: Any, most: int) -> Any:
    """Return the table's byte, for a negative index ``most`` less it, as 32-bit lanes."""
    found = bind(T.call_llvm_pure_intrin("int8x64", _PERMUTE, low, index, high))
    turned = T.broadcast(T.int8(most - 256 if most > 127 else most), 64) - found
    value = T.Select(index < T.broadcast(T.int8(0), 64), turned, found)
    return bind(T.reinterpret("int32x16", value))


def _bytes(mask: int) -> Any:
    """Return a byte repeated in a 32-bit integer."""
    return _word(mask * 0x01010101)


def _word(bits: int) -> Any:
    return T.int32(bits - (1 << 32) if bits >= 1 << 31 else bits)


def constant_words(values: np.ndarray[Any, Any]) -> Any:
    """Return constant bytes as a vector of 32-bit lanes, bound."""
    words = np.ascontiguousarray(values, np.uint8).reshape(-1).view("<i4")
    register = Register("int32", len(words))
    for i, word in enumerate(words):
        store(register.buffer, T.int32(int(word)), i)
    return bind(register.get())
