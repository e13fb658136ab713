"""Arithmetic on vectors of f32 lanes as TIR expressions, without a call into any library.

Every function takes and returns expressions of ``lanes`` lanes (1 = a scalar), so that one text serves the
vector body and the scalar tail of a loop. LLVM splits 16 lanes where the CPU has narrower registers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from mimo_compile._tvm import compiler

compiler()
from tvm import tirx
from tvm.script import tirx as T

__all__ = [
    "LANES", "LOG2E", "T", "cos", "exp", "exp2", "fused", "horner", "let", "log2", "ramp", "rint", "sigmoid",
    "sin", "splat", "symbol",
]  # fmt: skip

LANES = 16
"""Lanes of a vector: 64 bytes of f32."""
LOG2E = 1.4426950408889634
_EXP_MOST = 88.7228
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # n * high is exact for |n| < 2**15
# Minimax polynomials (weighted least squares, reweighted): 2**f on [-1/2, 1/2] to 1.9e-9 relative, e**r on
# [-ln2/2, ln2/2] to 1.9e-9, sin(r)/r and cos(r) as polynomials of r*r on [0, pi/4] to 4.6e-12 and 5.6e-11.
_EXP2 = (1.0, 0.693147205737198, 0.24022646890479665, 0.05550328777076832, 0.009618488973827485,
         0.00133999311834326, 0.00015345807510021812)  # fmt: skip
_EXP = (1.0, 1.0000000363446433, 0.4999999207475564, 0.16666420072363858, 0.04166822626430511,
        0.00837482403424348, 0.001383683154797667)  # fmt: skip
_LOG2 = tuple(2 * LOG2E / n for n in (1, 3, 5, 7, 9, 11))  # of log2((1 + s) / (1 - s)) = s * f(s*s)
_SIN = (0.9999999999954517, -0.16666666630446259, 0.008333328690160069, -0.00019839178358401627,
        2.717152835222947e-06)  # fmt: skip
_COS = (0.9999999999439376, -0.49999999571556697, 0.04166661323347515, -0.001388652914719915,
        2.4372679185973023e-05)  # fmt: skip


def symbol(*parts: object) -> str:
    """Return a C identifier: the first part, then a hash over all parts (workload, config, target ...)."""
    digest = hashlib.sha256("\n".join(str(p) for p in parts).encode()).hexdigest()[:12]
    return "".join(c if c.isalnum() else "_" for c in str(parts[0])) + "_" + digest


def ramp(base: Any, lanes: int = LANES) -> Any:
    """Return the index of ``lanes`` neighbours from ``base`` (the index itself for one lane)."""
    return base if lanes == 1 else T.ramp(base, 1, lanes)


def splat(value: Any, lanes: int = LANES) -> Any:
    """Return a value in all lanes; a Python number becomes f32."""
    scalar = T.float32(value) if isinstance(value, (int, float)) else value
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def _splat64(value: float, lanes: int) -> Any:
    return T.float64(value) if lanes == 1 else T.broadcast(T.float64(value), lanes)


def _type(name: str, lanes: int) -> str:
    return name if lanes == 1 else f"{name}x{lanes}"


def let(value: Any, body: Callable[[Any], Any]) -> Any:
    """Return ``body(v)`` where ``v`` is the value computed once."""
    var = tirx.Var("v", value.ty)
    return tirx.Let(var, value, body(var))


def horner(x: Any, coefficients: Sequence[float], constant: Callable[[float], Any]) -> Any:
    """Return the polynomial with ``coefficients`` in ascending order."""
    out = constant(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        out = out * x + constant(c)
    return out


def _scale(p: Any, n: Any, lanes: int) -> Any:
    """Return ``p * 2**n`` for ``p`` near one, integral ``n``, and a result that is a normal number."""
    bits = T.reinterpret(_type("int32", lanes), p)
    shift = T.cast(n, _type("int32", lanes)) * splat(T.int32(1 << 23), lanes)
    return T.reinterpret(_type("float32", lanes), bits + shift)


def _clamp(x: Any, low: float, high: float, lanes: int) -> Any:
    # the limit stands first: max(limit, NaN) takes the second operand, so a NaN stays one
    return let(T.max(splat(low, lanes), x), lambda v: T.min(splat(high, lanes), v))


def fused(a: Any, b: Any, c: Any, lanes: int = LANES) -> Any:
    """Return ``a * b + c``, rounded once on every CPU that can.

    Elsewhere LLVM fuses as the code around a sum suits it, so that the same sum may differ by a rounding
    between kernels. Where they have to agree to the bit, this leaves it no choice.
    """
    kind = _type("float32", lanes)
    return T.call_llvm_pure_intrin(kind, "llvm.fmuladd", a, b, c)


def rint(x: Any) -> Any:
    """Round to the nearest integer, half to even (an operation that TVM's vectoriser knows)."""
    return T.nearbyint(x)


def exp2(x: Any, lanes: int = LANES) -> Any:
    """Return ``2**x`` to 2 units in the last place; 0 below -126, the largest number above 128."""

    def reduced(v: Any) -> Any:
        def scaled(n: Any) -> Any:
            p = let(v - n, lambda f: horner(f, _EXP2, lambda c: splat(c, lanes)))
            return T.Select(v < splat(-126.0, lanes), splat(0.0, lanes), _scale(p, n, lanes))

        return let(rint(v), scaled)

    return let(_clamp(x, -127.0, 127.99999, lanes), reduced)


def log2(x: Any, lanes: int = LANES) -> Any:
    """Return log2 of normal positive numbers to 2 units in the last place of 1 or it; -inf of 0 and below."""
    i32, f32 = _type("int32", lanes), _type("float32", lanes)
    shift = splat(T.int32(23), lanes)

    def parts(v: Any) -> Any:
        def scaled(n: Any) -> Any:
            # the fraction lies between the roots of 1/2 and 2
            fraction = T.reinterpret(f32, T.reinterpret(i32, v) - T.shift_left(n, shift))
            one = splat(1.0, lanes)
            ratio = let(fraction, lambda m: (m - one) / (m + one))

            def series(s: Any) -> Any:
                odd = let(s * s, lambda z: horner(z, _LOG2, lambda c: splat(c, lanes)))
                return T.cast(n, f32) + s * odd

            zero = splat(0.0, lanes)
            return T.Select(v > zero, let(ratio, series), splat(-math.inf, lanes))

        root = splat(T.int32(0x3F3504F3), lanes)  # bits of the root of 1/2
        return let(T.shift_right(T.reinterpret(i32, v) - root, shift), scaled)

    return let(x, parts)


def exp(x: Any, lanes: int = LANES) -> Any:
    """Return ``e**x`` to 2 units in the last place; 0 below -87.3, infinity above 88.7228."""

    def reduced(v: Any) -> Any:
        def scaled(n: Any) -> Any:
            r = (v - n * splat(_LN2_HIGH, lanes)) - n * splat(_LN2_LOW, lanes)
            p = let(r, lambda f: horner(f, _EXP, lambda c: splat(c, lanes)))
            value = T.Select(v < splat(-87.3, lanes), splat(0.0, lanes), _scale(p, n, lanes))
            return T.Select(v > splat(_EXP_MOST, lanes), splat(math.inf, lanes), value)

        return let(rint(v * splat(LOG2E, lanes)), scaled)

    return let(_clamp(x, -87.5, 88.723, lanes), reduced)


def sigmoid(x: Any, lanes: int = LANES) -> Any:
    """Return ``1 / (1 + e**-x)``; a NaN stays one."""
    one = splat(1.0, lanes)
    return let(x, lambda v: one / (one + exp(splat(0.0, lanes) - v, lanes)))


def _circular(angle: Any, lanes: int, turns: int) -> Any:
    """Return the sine of f32 ``angle`` plus ``turns`` right angles."""
    f32, f64, i64 = (_type(n, lanes) for n in ("float32", "float64", "int64"))
    half_pi_high, half_pi_low = 1.5707963267341256, 6.077100506506192e-11  # high has 33 bits
    one, two, zero = (splat(T.int64(i), lanes) for i in (1, 2, 0))

    def selected(k: Any, r: Any) -> Any:
        def pick(z: Any) -> Any:
            sine = r * horner(z, _SIN, lambda c: _splat64(c, lanes))
            cosine = horner(z, _COS, lambda c: _splat64(c, lanes))
            quadrant = T.cast(k, i64) + splat(T.int64(turns), lanes)
            value = T.Select((quadrant & one) == zero, sine, cosine)
            return T.Select((quadrant & two) == zero, value, _splat64(0.0, lanes) - value)

        return let(r * r, pick)

    def reduced(x: Any) -> Any:
        return let(
            rint(x * _splat64(0.6366197723675814, lanes)),
            lambda k: let(
                (x - k * _splat64(half_pi_high, lanes)) - k * _splat64(half_pi_low, lanes),
                lambda r: selected(k, r),
            ),
        )

    return T.cast(let(T.cast(angle, f64), reduced), f32)


def sin(angle: Any, lanes: int = LANES) -> Any:
    """Return the sine of f32 angles up to 2**30: reduced and evaluated in f64, rounded once to f32."""
    return _circular(angle, lanes, 0)


def cos(angle: Any, lanes: int = LANES) -> Any:
    """Return the cosine of f32 angles up to 2**30, as `sin` does."""
    return _circular(angle, lanes, 1)
