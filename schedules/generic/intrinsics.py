"""Transcendental functions of generic kernels as plain arithmetic, so that loops over them vectorise.

TVM would call libm once for each lane. Replaced: exp, sigmoid, tanh, erf of f32; others stay calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile._tvm import compiler
from mimo_compile.schedules.emit.vector import LOG2E, T, horner, let

tvm = compiler()
from tvm import tirx

_EXP = (1.0, 1.0000000363446433, 0.4999999207475564, 0.16666420072363858, 0.04166822626430511,
        0.00837482403424348, 0.001383683154797667)  # fmt: skip
_TANH = (1.0, -3.33332819422e-1, 1.33314422036e-1, -5.37397155531e-2, 2.06390887954e-2,
         -5.70498872745e-3)  # fmt: skip
# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: 1.5e-7 absolute
_ERF = (0.0, 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_ERF_P = 0.3275911


def _c(value: float) -> Any:
    return T.float32(value)


def exp(x: Any) -> Any:
    """Return ``e**x`` as scalar arithmetic (`emit.vector.exp` with operations that TVM vectorises)."""

    def scaled(v: Any, n: Any) -> Any:
        r = (v - n * _c(0.693359375)) - n * _c(-2.12194440e-4)
        p = let(r, lambda f: horner(f, _EXP, _c))
        bits = T.reinterpret("int32", p) + T.cast(n, "int32") * T.int32(1 << 23)
        return T.Select(v < _c(-87.3), _c(0.0), T.reinterpret("float32", bits))

    def clamped(x: Any) -> Any:
        v = T.min(_c(88.0), T.max(_c(-87.5), x))
        return let(v, lambda v: let(T.nearbyint(v * _c(LOG2E)), lambda n: scaled(v, n)))

    # a NaN would be caught by the clamp: x - x keeps it
    return let(x, lambda x: clamped(x) + T.Select(tirx.isnan(x), x, _c(0.0)))


def sigmoid(x: Any) -> Any:
    """Return the logistic function."""
    return _c(1.0) / (_c(1.0) + exp(_c(0.0) - x))


def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent: a polynomial near zero, exponentials elsewhere."""

    def body(x: Any) -> Any:
        small = let(x * x, lambda z: x * horner(z, _TANH, _c))
        large = let(exp(_c(2.0) * x), lambda e: _c(1.0) - _c(2.0) / (e + _c(1.0)))
        return T.Select(T.abs(x) < _c(0.625), small, large)

    return let(x, body)


def erf(x: Any) -> Any:
    """Return the error function to 1.5e-7 absolute."""

    def body(x: Any) -> Any:
        t = _c(1.0) / (_c(1.0) + _c(_ERF_P) * T.abs(x))
        tail = let(t, lambda t: horner(t, _ERF, _c)) * exp(_c(0.0) - x * x)
        return let(_c(1.0) - tail, lambda p: T.Select(x < _c(0.0), _c(0.0) - p, p))

    return let(x, body)


_REPLACED: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": exp,
    "tirx.sigmoid": sigmoid,
    "tirx.tanh": tanh,
    "tirx.erf": erf,
}


def expand(func: Any) -> Any:
    """Return the PrimFunc with the calls that can be expanded replaced."""
    from tvm_ffi import structural_map

    def visit(call: Any) -> Any:
        replace = _REPLACED.get(getattr(call.op, "name", ""))
        if replace is None or str(call.ty) != "float32":
            return call
        return replace(call.args[0])

    return func.with_body(structural_map(func.body, (tvm.ir.Call, visit)))
