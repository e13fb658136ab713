"""Four rows in one vector of 16 lanes, and integers as the bytes that dots take.

Lane ``4 r + i`` is the i-th number of row r. So four rows are scaled, rounded and compared at once, and what
is summed up over lanes takes two shuffles for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.schedules.emit.build import T, bind
from mimo_compile.schedules.emit.vector import LANES, fused, splat

ROWS = 4
"""Rows of a vector."""
Join = Callable[[Any, Any], Any]
_WHOLE = 1.5 * 2**23
"""Numbers near it are integers; the low bits of ``_WHOLE + n`` are those of n."""
_EVEN, _ODD, _LOW = 0x00FF00FF, -0x00FF0100, 0xFFFF
_QUADS = range(0, LANES, ROWS)


def turned(value: Any) -> Any:
    """Return 16 lanes, taken as four rows of four, with rows and columns exchanged."""
    return T.Shuffle([value], [q + i for i in range(ROWS) for q in _QUADS])


def repeated(value: Any) -> Any:
    """Return four numbers in each row."""
    return T.Shuffle([bind(value)] * ROWS, list(range(LANES)))


def in_rows(value: Any, join: Join) -> Any:
    """Return what joining the four numbers of a row gives, in all of its lanes."""
    for far in (1, 2):
        value = bind(value)
        value = join(value, T.Shuffle([value], [lane ^ far for lane in range(LANES)]))
    return bind(value)


def of_four(vectors: list[Any], join: Join) -> Any:
    """Return what joining all lanes of the r-th of four vectors gives, in all lanes of row r."""

    def halves(a: Any, b: Any, size: int) -> Any:
        low = [i for i in range(2 * LANES) if i % (2 * size) < size]
        return bind(join(T.Shuffle([a, b], low), T.Shuffle([a, b], [i + size for i in low])))

    a, b, c, d = vectors
    return in_rows(halves(halves(a, b, 8), halves(c, d, 8), 4), join)


def largest(a: Any, b: Any) -> Any:
    """Return the larger numbers, as a `join`."""
    return T.max(a, b)


def added(a: Any, b: Any) -> Any:
    """Return the sums, as a `join`."""
    return a + b


def magnitude(value: Any) -> Any:
    """Return the bits of magnitudes: integers of the same order, above all of which is NaN."""
    return T.bitwise_and(T.reinterpret("int32x16", value), splat(T.int32(0x7FFFFFFF)))


def unit(most: Any, levels: int) -> tuple[Any, Any]:
    """Return what numbers up to ``most`` are multiplied by to be rounded, and what one integer stands for.

    Args:
        most: The `magnitude` of the largest.
        levels: The integer that it becomes.
    """
    high = bind(T.reinterpret("float32x16", most))
    # below that the quotient would be infinite, and times zero not a number
    by = T.Select(high > splat(1e-30), splat(float(levels)) / high, splat(0.0))
    return bind(by), bind(high * splat(1 / levels))


def rounded(value: Any, by: Any) -> Any:
    """Return 16 products of less than 2**15, rounded half to even: integers in the low 16 bits of lanes."""
    return bind(T.reinterpret("int32x16", fused(value, by, splat(_WHOLE))))


def in_bytes(words: list[Any], terms: int) -> list[Any]:
    """Return integers of four vectors as bytes: byte i of a lane is from that lane of the i-th vector.

    Args:
        words: From `rounded`.
        terms: 1: of integers that a byte holds; 2: upper bytes, then lower ones with a sign. Their sum, the
            upper one 256 times, is the integer.
    """
    low, up = (splat(T.int32(n)) for n in (_LOW, 16))
    even, odd = (
        bind(T.bitwise_or(T.bitwise_and(a, low), T.shift_left(b, up)))
        for a, b in ((words[0], words[2]), (words[1], words[3]))
    )
    lower = bind(_woven(even, T.shift_left(odd, splat(T.int32(8)))))
    if terms == 1:
        return [lower]
    half = splat(T.int16(128), 2 * LANES)
    even, odd = (
        bind(T.reinterpret("int32x16", T.reinterpret("int16x32", x) + half)) for x in (even, odd)
    )
    return [bind(_woven(T.shift_right(even, splat(T.int32(8))), odd)), lower]


def _woven(even: Any, odd: Any) -> Any:
    """Return the even bytes of one vector, the odd ones of another."""
    even = T.bitwise_and(even, splat(T.int32(_EVEN)))
    return T.bitwise_or(even, T.bitwise_and(odd, splat(T.int32(_ODD))))


def in_order(value: Any) -> Any:
    """Return 64 bytes of `in_bytes` vector by vector: lanes of the first of the four, of the second, ..."""
    size = 4 * LANES
    order = [ROWS * i + u for u in range(ROWS) for i in range(LANES)]
    bytes_ = T.Shuffle([T.reinterpret(f"int8x{size}", value)], order)
    return bind(T.reinterpret("int32x16", bytes_))
