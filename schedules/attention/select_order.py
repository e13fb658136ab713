"""The order of scores, and searches in it: scores as integers, thresholds by halving, sums above them.

A score becomes a signed integer that orders as it does; what may not be chosen (-inf, NaN) becomes `NONE`.
Rows of keys are padded with `NONE` to whole units of vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import reduced
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    choose,
    load,
    loop,
    store,
    vector_type,
    when,
)
from mimo_compile.schedules.emit.vector import LANES, splat

NONE = -(2**31)
"""Key of what may not be chosen."""
LEAST = NONE + 1
"""Every other key is at least this."""
MOST = 2**31 - 1
"""No key is as great."""
POSITIVE = 0x00800000
"""Key of the least normal float32."""
UNIT = 4
"""Vectors that a search looks at in one turn."""
_INFINITY = 0x7F800000
_SIGN = 0x7FFFFFFF


def keys_of(value: Any, lanes: int) -> Any:
    """Return the keys of float32 lanes; of both zeros they are alike."""

    def word(n: int) -> Any:
        return splat(T.int32(n), lanes)

    bits = bind(T.reinterpret(vector_type("int32", lanes), value))
    bits = bind(T.Select(bits == word(NONE), word(0), bits))  # -0
    key = bind(T.Select(bits < word(0), T.bitwise_xor(bits, word(_SIGN)), bits))
    lowest = -_INFINITY - 1  # of -inf; a NaN lies below it or above +inf
    outside = T.Or(key <= word(lowest), key > word(_INFINITY))
    return bind(T.Select(outside, word(NONE), key))


def is_nan(value: Any) -> Any:
    """Say whether a float32 number is none (comparing it with itself would be simplified away)."""
    magnitude = T.bitwise_and(T.reinterpret("int32", value), T.int32(_SIGN))
    return magnitude > T.int32(_INFINITY)


def values_of(key: Any, lanes: int) -> Any:
    """Return the float32 lanes that keys stand for, 0 for negative ones."""
    zero = splat(T.int32(0), lanes)
    return T.reinterpret(vector_type("float32", lanes), T.max(key, zero))


def fill_keys(
    keys: Any, score: Any, row: tuple[Any, ...], count: Any, unit: int, positive: bool
) -> Any:
    """Write the keys of a row's first ``count`` scores; returns the vectors that hold them, padded.

    With ``positive``, scores below the least normal float32 may not be chosen.
    """

    def allowed(value: Any, lanes: int) -> Any:
        key = keys_of(value, lanes)
        if not positive:
            return key
        return T.Select(key < splat(T.int32(POSITIVE), lanes), splat(T.int32(NONE), lanes), key)

    whole = fixed(T.floordiv(count, T.int32(LANES)))
    with T.serial(0, whole) as j:
        store(
            keys, allowed(load(score, *row, j * LANES, lanes=LANES), LANES), j * LANES, lanes=LANES
        )
    vectors = fixed(T.floordiv(count + (LANES * unit - 1), T.int32(LANES * unit)) * unit)
    with T.serial(0, fixed(vectors - whole)) as j:
        store(keys, splat(T.int32(NONE)), (whole + j) * LANES, lanes=LANES)
    with T.serial(0, fixed(count - whole * LANES)) as j:
        store(keys, allowed(score[(*row, whole * LANES + j)], 1), whole * LANES + j)
    return vectors


def pad_keys(keys: Any, count: Any, unit: int) -> Any:
    """Pad ``count`` keys to whole units; returns their vectors."""
    vectors = fixed(T.floordiv(count + (LANES * unit - 1), T.int32(LANES * unit)) * unit)
    with T.serial(0, fixed(vectors * LANES - count)) as j:
        store(keys, T.int32(NONE), count + j)
    return vectors


def _folded(
    keys: Any, vectors: Any, dtype: str, start: Any, fold: Callable[[Any, Any], Any]
) -> list[Register]:
    """Fold each key into one of `UNIT` registers."""
    acc = [Register(dtype, LANES, start) for _ in range(UNIT)]
    with T.serial(0, fixed(T.floordiv(vectors, T.int32(UNIT)))) as j:
        for u, register in enumerate(acc):
            key = bind(load(keys, (j * UNIT + u) * LANES, lanes=LANES))
            register.set(fold(register.get(), key))
    return acc


def _joined(acc: list[Register], fold: Callable[[Any, Any], Any]) -> Any:
    value = acc[0].get()
    for register in acc[1:]:
        value = fold(value, register.get())
    return value


def count_from(keys: Any, vectors: Any, level: Any) -> Any:
    """Return how many keys are at least ``level``."""
    least = bind(splat(level))
    one, zero = splat(T.int32(1)), splat(T.int32(0))
    acc = _folded(
        keys, vectors, "int32", zero, lambda a, key: a + T.Select(key >= least, one, zero)
    )
    return fixed(reduced("add", _joined(acc, lambda a, b: a + b)))


def sum_from(keys: Any, vectors: Any, level: Any) -> Any:
    """Return the sum of the scores, none negative, whose keys are at least ``level``."""
    least = bind(splat(level))
    zero = splat(0.0)
    acc = _folded(
        keys, vectors, "float32", zero,
        lambda a, key: a + T.Select(key >= least, values_of(key, LANES), zero),
    )  # fmt: skip
    total = Register("float32", LANES, _joined(acc, lambda a, b: a + b))
    out = Register("float32", 1, T.float32(0))
    with loop(LANES) as i:
        out.set(out.get() + total.lane(i))
    return bind(out.get())


def ends(keys: Any, vectors: Any) -> tuple[Any, Any]:
    """Return the least key that may be chosen and the greatest key."""
    high = _folded(keys, vectors, "int32", splat(T.int32(NONE)), T.max)
    most = fixed(reduced("smax", _joined(high, T.max)))
    never = splat(T.int32(NONE))
    low = _folded(
        keys, vectors, "int32", splat(T.int32(MOST)),
        lambda a, b: T.min(a, T.Select(b == never, splat(T.int32(MOST)), b)),
    )  # fmt: skip
    least = reduced("smin", _joined(low, T.min))
    return fixed(T.min(least, T.max(most, T.int32(LEAST)))), most


def search(low: Any, high: Any, judge: Callable[[Any, Register, Register], None]) -> Any:
    """Return the greatest level that still holds, known to lie in ``low ... high``.

    ``judge(middle, low, high)`` narrows the bounds: to ``low = middle`` where the level holds.
    """
    least, most = Register("int32", 1, low), Register("int32", 1, high)
    with T.serial(0, 32), when(least.get() < most.get()):
        a, b = bind(least.get()), bind(most.get())
        # half of their sum, rounded up, which never overflows
        half = T.shift_right(T.bitwise_xor(a, b), T.int32(1))
        judge(bind(T.bitwise_or(a, b) - half), least, most)
    return fixed(least.get())


def kth(keys: Any, vectors: Any, wanted: Any, low: Any, high: Any) -> Any:
    """Return the greatest level that at least ``wanted`` keys reach.

    Args:
        keys: Padded keys.
        vectors: How many vectors.
        wanted: At least one, at most as many as reach ``low``.
        low: A level that enough keys reach.
        high: The greatest key.
    """

    def judge(middle: Any, least: Register, most: Register) -> None:
        count = count_from(keys, vectors, middle)

        def enough() -> None:
            least.set(middle)
            with when(count == wanted):  # a lower level adds none, a higher one loses some
                most.set(middle)

        choose(count >= wanted, enough, lambda: most.set(middle - 1))

    return search(low, high, judge)


def by_mass(keys: Any, vectors: Any, wanted: Any, low: Any, high: Any) -> Any:
    """Return the greatest level at or above which scores sum to at least ``wanted``."""

    def judge(middle: Any, least: Register, most: Register) -> None:
        total = sum_from(keys, vectors, middle)
        choose(total >= wanted, lambda: least.set(middle), lambda: most.set(middle - 1))

    return search(low, high, judge)
