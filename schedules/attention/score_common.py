"""What kernels that score keys or blocks share: 16 neighbours in the lanes of a vector, channel by channel.

A channel of 16 neighbours (slots of a cache, entries of descriptors) is one vector of float32 numbers; of
16-bit ones, two channels lie in the 32-bit lanes of one vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.schedules.emit.build import Register, T, bind, choose, load, loop, store
from mimo_compile.schedules.emit.vector import LANES, splat

NEVER = float("-inf")
"""Score of what may not be chosen."""
UPPER = -0x10000
"""Mask of the second number of a pair."""


def channels(d: int, bits: int, step: Callable[[Any, int], None]) -> None:
    """Emit ``step(i, count)`` for all vectors of a row: vector i holds ``count`` channels."""
    pair = 32 // bits
    if d // pair:
        with loop(d // pair) as i:
            step(i, pair)
    if d % pair:
        step(d // pair, d % pair)


def lanes_of(buffer: Any, *index: Any, bits: int, count: int) -> list[Any]:
    """Return the channels of vector ``index`` as float32 lanes, bound; ``count`` of them are real."""
    if bits == 32:
        return [bind(load(buffer, *index, 0, lanes=LANES))]
    words = bind(T.reinterpret("int32x16", load(buffer, *index, 0, lanes=2 * LANES)))
    first = T.shift_left(words, splat(T.int32(16)))
    second = T.bitwise_and(words, splat(T.int32(UPPER)))
    return [bind(T.reinterpret("float32x16", w)) for w in (first, second)[:count]]


def single(buffer: Any, *index: Any, bits: int, lanes: int) -> Any:
    """Return neighbours at ``index`` that stand one by one as float32 lanes, bound."""
    found = load(buffer, *index, lanes=lanes)
    if bits == 32:
        return bind(found)
    int32, float32 = ("int32", "float32") if lanes == 1 else (f"int32x{lanes}", f"float32x{lanes}")
    wide = T.shift_left(T.cast(found, int32), splat(T.int32(16), lanes))
    return bind(T.reinterpret(float32, wide))


def over(extent: int, step: Callable[[Any, int], None]) -> None:
    """Emit ``step(at, lanes)`` over an extent: whole vectors, then the rest one by one."""
    if extent // LANES:
        with loop(extent // LANES) as j:
            step(j * LANES, LANES)
    for j in range(extent // LANES * LANES, extent):
        step(j, 1)


def across(fold: Callable[[Any, Any], Any], value: Any, dtype: str = "float32") -> Any:
    """Return all 16 lanes folded into one number, as a tree."""
    lanes = LANES
    while lanes > 1:
        register = Register(dtype, lanes, value)
        lanes //= 2
        halves = (load(register.buffer, at, lanes=lanes) for at in (0, lanes))
        value = bind(fold(*halves))
    return value


def add(a: Any, b: Any) -> Any:
    """Return a sum, as a fold."""
    return a + b


def reduced(kind: str, value: Any, dtype: str = "int32") -> Any:
    """Return all lanes folded by LLVM's ``vector.reduce`` of a kind, bound."""
    return bind(T.call_llvm_pure_intrin(dtype, f"llvm.vector.reduce.{kind}", value))


def put(buffer: Any, value: Any, row: tuple[Any, ...], at: Any, extent: int) -> None:
    """Store 16 lanes at ``buffer[*row, at:]``, as many as lie below ``extent``."""
    if extent % LANES == 0:
        store(buffer, value, *row, at, lanes=LANES)
        return
    held = Register("float32", LANES, value)

    def rest() -> None:
        for i in range(extent % LANES):
            store(buffer, held.lane(i), *row, at + i)

    if extent < LANES:
        rest()
        return
    choose(at + LANES <= extent, lambda: store(buffer, held.get(), *row, at, lanes=LANES), rest)


def most_complete(end: Any, size: int, stride: int, entries: int) -> Any:
    """Return how many entries are complete at position ``end``."""
    count = T.floordiv(end - (size - 1), T.int32(stride)) + 1
    return T.min(T.max(count, T.int32(0)), T.int32(entries))


def row_end(pos_start: Any, pos_valid: Any, row: Any, rows: int) -> Any:
    """Return the last position of a score row's tokens; -1 of a row of padding."""
    last = pos_start + T.min((row + 1) * rows, pos_valid) - 1
    return T.if_then_else(row * rows < pos_valid, last, T.int32(-1))
