"""Transcendental functions of generic kernels as plain arithmetic, so that loops over them vectorise.

TVM would call libm once for each lane. Replaced: exp, sigmoid, tanh, erf of f32; others stay calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile._tvm import compiler
from mimo_compile.schedules.emit.vector import T, exp, horner, let, sigmoid

tvm = compiler()

_TANH = (1.0, -3.33332819422e-1, 1.33314422036e-1, -5.37397155531e-2, 2.06390887954e-2,
         -5.70498872745e-3)  # fmt: skip
# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: 1.5e-7 absolute
_ERF = (0.0, 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_ERF_P = 0.3275911


def _c(value: float) -> Any:
    return T.float32(value)


def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent: a polynomial near zero, exponentials elsewhere."""

    def body(x: Any) -> Any:
        small = let(x * x, lambda z: x * horner(z, _TANH, _c))
        large = let(exp(_c(2.0) * x, 1), lambda e: _c(1.0) - _c(2.0) / (e + _c(1.0)))
        return T.Select(T.abs(x) < _c(0.625), small, large)

    return let(x, body)


def erf(x: Any) -> Any:
    """Return the error function to 1.5e-7 absolute."""

    def body(x: Any) -> Any:
        t = _c(1.0) / (_c(1.0) + _c(_ERF_P) * T.abs(x))
        tail = let(t, lambda t: horner(t, _ERF, _c)) * exp(_c(0.0) - x * x, 1)
        return let(_c(1.0) - tail, lambda p: T.Select(x < _c(0.0), _c(0.0) - p, p))

    return let(x, body)


_REPLACED: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": lambda x: exp(x, 1),
    "tirx.sigmoid": lambda x: sigmoid(x, 1),
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


def widen_inside(func: Any) -> Any:
    """Return the PrimFunc with widening of bfloat16 within expressions as integer arithmetic.

    TVM's lowering of bfloat16 does not look into bindings (`Let`), and leaves a rounding whose result is
    widened at once, which LLVM's code generator fails on.
    """
    from tvm_ffi import structural_map

    def rounded(x: Any) -> Any:
        bits = T.reinterpret("uint32", x)
        odd = (bits >> T.uint32(16)) & T.uint32(1)
        even = (bits + odd + T.uint32(0x7FFF)) & T.uint32(0xFFFF0000)
        return T.Select(x == x, T.reinterpret("float32", even), x)  # noqa: PLR0124 - not for NaN

    def visit(cast: Any) -> Any:
        inner = cast.value
        if str(cast.ty) != "float32" or str(inner.ty) != "bfloat16":
            return cast
        if isinstance(inner, tvm.tirx.Cast) and str(inner.value.ty) == "float32":
            return let(inner.value, rounded)
        bits = T.Cast("uint32", T.reinterpret("uint16", inner))
        return T.reinterpret("float32", bits << T.uint32(16))

    return func.with_body(structural_map(func.body, (tvm.tirx.Cast, visit)))
