"""Numbers with the error that an honest kernel may make of them: running error analysis in numpy.

Values are computed in float64 (whole numbers and truth values in their own type); beside each stands the
largest absolute difference that rounding in the function's own types may bring about, in any order of sums
and with or without fused multiply-adds (Higham, Accuracy and Stability of Numerical Algorithms, 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Unit round-off of the types that are rounded."""
FLOORS = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
"""Below these magnitudes results may vanish."""
ERF_ERROR = 4e-7
"""Absolute: a formula of Abramowitz and Stegun (1.5e-7) and the rounding in it."""


class Unsupported(Exception):
    """A function does something that no reference is computed of; the text says what."""


@dataclass(frozen=True, slots=True)
class Num:
    """An array of numbers."""

    value: Array
    error: Array | None = None
    """Absolute; None: exact. For whole numbers and truth values: by how much they may be off."""

    @property
    def err(self) -> Any:
        """The error, 0 if there is none."""
        return 0.0 if self.error is None else self.error

    @property
    def mag(self) -> Array:
        """Magnitudes in float64."""
        out: Array = np.abs(np.asarray(self.value, np.float64))
        return out


def rounded(value: Array, error: Any, dtype: str, units: float = 1.0) -> Num:
    """Return a result of type ``dtype`` with ``units`` roundings; whole numbers are not rounded."""
    if dtype not in UNITS:
        return Num(np.asarray(value), None if error is None or np.ndim(error) == 0 else error)
    total = np.asarray(error + units * UNITS[dtype] * np.abs(value))
    if not np.isfinite(total).all():  # an infinite value is that exactly
        total = np.where(np.isfinite(value), total, 0.0)
    return Num(np.asarray(value), total)


def add(a: Num, b: Num, dtype: str) -> Num:
    """Return the sum."""
    return rounded(a.value + b.value, a.err + b.err, dtype)


def subtract(a: Num, b: Num, dtype: str) -> Num:
    """Return the difference."""
    return rounded(a.value - b.value, a.err + b.err, dtype)


def multiply(a: Num, b: Num, dtype: str) -> Num:
    """Return the product."""
    error: Any = 0.0
    if a.error is not None or b.error is not None:
        error = a.mag * b.err + b.mag * a.err + a.err * b.err
    return rounded(a.value * b.value, error, dtype)


def divide(a: Num, b: Num, dtype: str) -> Num:
    """Return the quotient; that of whole numbers is cut towards zero."""
    if dtype not in UNITS:
        _exact("a quotient of", a, b)
        sign = np.sign(a.value) * np.sign(b.value)
        whole = np.abs(a.value) // np.maximum(np.abs(b.value), 1)
        return Num(np.asarray((sign * whole).astype(a.value.dtype)))
    value = a.value / b.value
    room = b.mag - b.err
    error = np.where(
        room > 0, (a.err + np.abs(value) * b.err) / np.where(room > 0, room, 1), np.inf
    )
    return rounded(value, np.where(b.mag == 0, 0.0, error), dtype)


def floor_divide(a: Num, b: Num, dtype: str) -> Num:
    """Return the quotient of whole numbers, rounded down."""
    _exact("a quotient of", a, b)
    return Num(np.asarray(np.floor_divide(a.value, np.where(b.value == 0, 1, b.value))))


def floor_mod(a: Num, b: Num, dtype: str) -> Num:
    """Return the remainder of `floor_divide`."""
    _exact("a remainder of", a, b)
    return Num(np.asarray(np.mod(a.value, np.where(b.value == 0, 1, b.value))))


def cut_mod(a: Num, b: Num, dtype: str) -> Num:
    """Return the remainder of `divide`."""
    _exact("a remainder of", a, b)
    return Num(np.asarray(np.fmod(a.value, np.where(b.value == 0, 1, b.value))))


def extreme(pick: Callable[..., Any]) -> Callable[[Num, Num, str], Num]:
    """Return ``max`` or ``min`` of two: nothing is rounded.

    The error of one that certainly loses does not count: that of the rounded lowest number, say, which a
    maximum starts from.
    """

    def apply(a: Num, b: Num, dtype: str) -> Num:
        value = np.asarray(pick(a.value, b.value))
        if a.error is None and b.error is None:
            return Num(value)
        x, y = np.asarray(a.value, np.float64), np.asarray(b.value, np.float64)
        apart, unsure = (x - y if pick is np.maximum else y - x), a.err + b.err
        error = np.where(apart > unsure, a.err, np.maximum(a.err, b.err))
        return Num(value, np.where(apart < -unsure, b.err, error))

    return apply


def compare(test: Callable[..., Any]) -> Callable[[Num, Num, str], Num]:
    """Return a comparison; it is uncertain where errors may turn it round."""

    def apply(a: Num, b: Num, dtype: str) -> Num:
        value = np.asarray(test(a.value, b.value))
        if a.error is None and b.error is None:
            return Num(value)
        apart = np.abs(np.asarray(a.value, np.float64) - np.asarray(b.value, np.float64))
        unsure = np.asarray(apart <= a.err + b.err) & ((a.err + b.err) > 0)
        return Num(value, unsure.astype(np.float64) if unsure.any() else None)

    return apply


def logical(join: Callable[..., Any]) -> Callable[[Num, Num, str], Num]:
    """Return ``and`` or ``or``."""

    def apply(a: Num, b: Num, dtype: str) -> Num:
        error = None if a.error is None and b.error is None else np.maximum(a.err, b.err)
        return Num(np.asarray(join(a.value != 0, b.value != 0)), error)

    return apply


def whole(join: Callable[..., Any]) -> Callable[[Num, Num, str], Num]:
    """Return an operation on bits."""

    def apply(a: Num, b: Num, dtype: str) -> Num:
        _exact("bits of", a, b)
        return Num(np.asarray(join(a.value, b.value)))

    return apply


def _exact(what: str, *numbers: Num) -> None:
    if any(n.error is not None and np.any(n.error) for n in numbers):
        raise Unsupported(f"{what} numbers that rounding may change")


def negated(a: Num) -> Num:
    """Return ``not a``."""
    return Num(np.asarray(a.value == 0), a.error)


def select(condition: Num, a: Num, b: Num) -> Num:
    """Return ``a`` where the condition holds, else ``b``; either where it is uncertain."""
    value = np.where(condition.value != 0, a.value, b.value)
    if a.error is None and b.error is None and condition.error is None:
        return Num(value)
    error = np.where(condition.value != 0, a.err, b.err)
    if condition.error is not None:
        apart = np.abs(np.asarray(a.value, np.float64) - np.asarray(b.value, np.float64))
        apart = np.where(np.isfinite(apart), apart, np.inf)
        error = np.where(condition.error > 0, apart + a.err + b.err, error)
    return Num(value, error)


def cast(a: Num, source: str, target: str) -> Num:
    """Convert between types."""
    if target in UNITS:
        value = np.asarray(a.value, np.float64)
        narrow = UNITS[target] > UNITS.get(source, 0.0)
        if not narrow or (source not in UNITS and a.mag.size and a.mag.max() < 1 / UNITS[target]):
            return Num(value, a.error)
        return rounded(value, a.err, target)
    kind = np.dtype("bool" if target == "bool" else target)
    if target == "bool":
        return Num(np.asarray(a.value != 0), None if a.error is None else (a.err >= a.mag) * 1.0)
    if source in UNITS:
        steps = _steps(np.trunc, a)
        safe = np.where(np.isfinite(steps.value), steps.value, 0.0)
        return Num(safe.astype(kind), steps.error)
    return Num(np.asarray(a.value).astype(kind), a.error)


def _steps(jump: Callable[[Any], Any], a: Num) -> Num:
    """Return a rounding to whole numbers, which errors may carry over a step."""
    value = np.asarray(jump(a.value))
    if a.error is None:
        return Num(value)
    off = np.maximum(jump(a.value + a.err) - value, value - jump(a.value - a.err))
    return Num(value, np.where(np.isfinite(value), off, 0.0))


def _exponential(base: float) -> Callable[[Num, str], Num]:
    factor = float(np.log(base))

    def apply(a: Num, dtype: str) -> Num:
        value = np.exp(a.value * factor)
        error = value * np.expm1(np.minimum(a.err * factor, 300.0)) + FLOORS[dtype]
        return rounded(value, error, dtype, 4 + factor * 0.5)

    return apply


def _logarithm(scale: float, shift: float = 0.0) -> Callable[[Num, str], Num]:
    def apply(a: Num, dtype: str) -> Num:
        inner = a.value + shift
        value = np.log1p(a.value) if shift else np.log(inner)
        room = inner - a.err
        error = np.where(room > 0, np.log1p(a.err / np.where(room > 0, room, 1)), np.inf)
        return rounded(value * scale, error * scale, dtype, 4)

    return apply


def _sqrt(a: Num, dtype: str) -> Num:
    value = np.sqrt(a.value)
    low = np.sqrt(np.maximum(a.value - a.err, 0.0))
    error = np.where(
        a.value > a.err, a.err / np.maximum(value + low, 1e-300), np.sqrt(a.mag + a.err)
    )
    return rounded(value, np.where(np.asarray(a.err) == 0, 0.0, error), dtype, 2)


def _rsqrt(a: Num, dtype: str) -> Num:
    value = 1.0 / np.sqrt(a.value)
    room = a.value - a.err
    error = np.where(room > 0, 1.0 / np.sqrt(np.where(room > 0, room, 1.0)) - value, np.inf)
    return rounded(value, np.where(np.asarray(a.err) == 0, 0.0, np.abs(error)), dtype, 4)


def _sigmoid(a: Num, dtype: str) -> Num:
    value = 1.0 / (1.0 + np.exp(-a.value))
    error = np.minimum(a.err / 4, value * np.expm1(np.minimum(a.err, 300.0))) + FLOORS[dtype]
    return rounded(value, error, dtype, 8)


def _gentle(function: Callable[[Any], Any], slope: float, absolute: float = 0.0) -> Any:
    """Return a function that nowhere rises faster than ``slope``."""

    def apply(a: Num, dtype: str) -> Num:
        value = np.asarray(function(a.value))
        return rounded(
            value, slope * a.err + absolute + 4 * UNITS[dtype] * (absolute == 0), dtype, 8
        )

    return apply


def erf(x: Any) -> Any:
    """Return the error function in float64."""
    from scipy.special import erf as exact

    return exact(x)


def _power(a: Num, b: Num, dtype: str) -> Num:
    value = np.power(a.value, b.value)
    room = np.maximum(a.mag - a.err, 1e-300)
    slope = np.where(a.mag == 0, 0.0, b.mag * a.err / room)
    if b.error is not None and np.any(b.error):
        slope = slope + np.abs(np.log(np.maximum(a.mag, 1e-300))) * b.err
    return rounded(value, np.abs(value) * np.expm1(np.minimum(slope, 300.0)), dtype, 16)


def _tested(function: Callable[[Any], Any]) -> Callable[[Num, str], Num]:
    return lambda a, dtype: Num(np.asarray(function(a.value)))


def _stepped(function: Callable[[Any], Any]) -> Callable[[Num, str], Num]:
    return lambda a, dtype: _steps(function, a)


def _away(x: Any) -> Any:
    """Round to the nearest, halves away from zero."""
    return np.copysign(np.floor(np.abs(x) + 0.5), x)


BINARY: Mapping[str, Callable[[Num, Num, str], Num]] = {
    "Add": add, "Sub": subtract, "Mul": multiply, "Div": divide, "Mod": cut_mod,
    "FloorDiv": floor_divide, "FloorMod": floor_mod,
    "Max": extreme(np.maximum), "Min": extreme(np.minimum),
    "EQ": compare(np.equal), "NE": compare(np.not_equal), "LT": compare(np.less),
    "LE": compare(np.less_equal), "GT": compare(np.greater), "GE": compare(np.greater_equal),
    "And": logical(np.logical_and), "Or": logical(np.logical_or),
    "BitwiseAnd": whole(np.bitwise_and), "BitwiseOr": whole(np.bitwise_or),
    "BitwiseXor": whole(np.bitwise_xor), "LShift": whole(np.left_shift),
    "RShift": whole(np.right_shift), "pow": _power,
}  # fmt: skip
"""By the name of the expression's class, or of the function called."""

FUNCTIONS: Mapping[str, Callable[[Num, str], Num]] = {
    "exp": _exponential(np.e), "exp2": _exponential(2.0), "exp10": _exponential(10.0),
    "log": _logarithm(1.0), "log2": _logarithm(1 / np.log(2.0)), "log10": _logarithm(1 / np.log(10.0)),
    "log1p": _logarithm(1.0, 1.0), "sqrt": _sqrt, "rsqrt": _rsqrt, "sigmoid": _sigmoid,
    "tanh": _gentle(np.tanh, 1.0), "erf": _gentle(erf, 1.13, ERF_ERROR),
    "sin": _gentle(np.sin, 1.0), "cos": _gentle(np.cos, 1.0), "atan": _gentle(np.arctan, 1.0),
    "fabs": lambda a, dtype: Num(np.abs(a.value), a.error),
    "abs": lambda a, dtype: Num(np.abs(a.value), a.error),
    "floor": _stepped(np.floor), "ceil": _stepped(np.ceil), "trunc": _stepped(np.trunc),
    "round": _stepped(_away), "nearbyint": _stepped(np.rint),
    "isnan": _tested(np.isnan), "isinf": _tested(np.isinf), "isfinite": _tested(np.isfinite),
}  # fmt: skip


def total(x: Num, axes: tuple[int, ...], terms: int, dtype: str) -> Num:
    """Return the sum over axes (kept, of extent 1) of ``terms`` numbers in any order."""
    value = x.value.sum(
        axis=axes, keepdims=True, dtype=np.float64 if dtype in UNITS else x.value.dtype
    )
    if dtype not in UNITS:
        error = None if x.error is None else np.asarray(x.error).sum(axis=axes, keepdims=True)
        return Num(value, error)
    error = terms * UNITS[dtype] * (x.mag + x.err).sum(axis=axes, keepdims=True)
    if x.error is not None:
        error = error + x.error.sum(axis=axes, keepdims=True)
    return Num(value, np.where(np.isfinite(value), error, 0.0))


def contract(a: Num, b: Num, axes: tuple[int, ...], terms: int, dtype: str) -> Num:
    """Return ``total`` of the products of two arrays of one rank, whose extents are alike or 1."""
    unit = UNITS[dtype]
    value = matmul(np.asarray(a.value, np.float64), np.asarray(b.value, np.float64), axes)
    error = (terms + 2) * unit * matmul(a.mag, b.mag, axes)
    if a.error is not None:
        error = error + matmul(_like(a), b.mag + b.err, axes)
    if b.error is not None:
        error = error + matmul(a.mag, _like(b), axes)
    return Num(value, error)


def _like(x: Num) -> Array:
    return np.broadcast_to(np.asarray(x.err, np.float64), x.value.shape)


def matmul(a: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """Return the sum over axes of ``a * b`` by batched matrix products; summed axes keep extent 1."""
    rank = a.ndim
    shape = tuple(max(m, n) for m, n in zip(a.shape, b.shape, strict=True))
    for one, other in ((a, b), (b, a)):
        alone = tuple(i for i in axes if one.shape[i] > 1 and other.shape[i] == 1)
        if alone:
            reduced = one.sum(axis=alone, keepdims=True)
            return matmul(reduced, other, axes) if one is a else matmul(other, reduced, axes)
    inner = [i for i in axes if a.shape[i] > 1]
    free = [i for i in range(rank) if i not in axes]
    batch = [i for i in free if a.shape[i] > 1 and b.shape[i] > 1]
    left = [i for i in free if a.shape[i] > 1 and b.shape[i] == 1]
    right = [i for i in free if a.shape[i] == 1]
    rest = [i for i in axes if i not in inner]

    def size(at: list[int]) -> int:
        return int(np.prod([shape[i] for i in at], dtype=np.int64)) if at else 1

    first = a.transpose([*batch, *left, *inner, *right, *rest]).reshape(
        size(batch), size(left), size(inner)
    )
    second = b.transpose([*batch, *inner, *right, *left, *rest]).reshape(
        size(batch), size(inner), size(right)
    )
    out = first @ second
    order = [*batch, *left, *right]
    out = out.reshape([shape[i] for i in order] + [1] * len(axes))
    back = np.argsort([*order, *axes])
    return np.ascontiguousarray(out.transpose(back))


def plus(x: Num, start: Num) -> Num:
    """Add the start of a sum, whose rounding is counted among that of the terms."""
    error = None if x.error is None and start.error is None else x.err + start.err
    return Num(x.value + start.value, error)
