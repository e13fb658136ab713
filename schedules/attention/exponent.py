"""Powers of two for weights of attention, and the largest of 16 numbers, by few instructions."""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.emit.build import T
from mimo_compile.schedules.emit.vector import exp2 as portable
from mimo_compile.schedules.emit.vector import horner, let, rint, splat

_SCALE = "llvm.x86.avx512.mask.scalef.ps.512"
"""a * 2**floor(b) for 16 lanes, with what masked lanes are, a mask and a rounding mode."""
_FULL = (1.0, 0.693147205737198, 0.24022646890479665, 0.05550328777076832, 0.009618488973827485,
         0.00133999311834326, 0.00015345807510021812)  # fmt: skip
_SHORT = (1.0, 0.6931212, 0.2402211, 0.0559208, 0.00967589)
"""Taylor's series of 2**f on [-1/2, 1/2], its terms of fifth and sixth order spread by Chebyshev's
polynomials over those below: within 4e-6 of it, and exact at 0."""


def exp2(x: Any, *, scaled: bool, short: bool = False) -> Any:
    """Return ``2**x`` for 16 lanes of numbers up to 127; 0 below -126 (short: -150), NaN for NaN and -inf.

    Short results below -126 are subnormal, and slow on some processors.

    Args:
        x: The lanes.
        scaled: The target has AVX-512.
        short: An error of 4e-6 will do (what is rounded to 8 bits afterwards); else 2 units in the last
            place. Only targets with AVX-512 gain by it.
    """
    if not scaled:
        return portable(x)
    coefficients = _SHORT if short else _FULL

    def reduced(v: Any) -> Any:
        def raised(n: Any) -> Any:
            p = let(v - n, lambda f: horner(f, coefficients, splat))
            power = T.call_llvm_pure_intrin(
                "float32x16", _SCALE, p, n, splat(0.0), T.int16(-1), T.int32(4)
            )
            return power if short else T.Select(v < splat(-126.0), splat(0.0), power)

        return let(rint(v), raised)

    return let(x, reduced)


def largest(value: Any) -> Any:
    """Return the largest of 16 numbers, as an integer of the same order (`from_order` turns it back).

    LLVM reduces floats one after the other, since one might be NaN; integers in halves.
    """
    return T.call_llvm_pure_intrin(
        "int32", "llvm.vector.reduce.smax", _ordered(T.reinterpret("int32x16", value))
    )


def from_order(value: Any) -> Any:
    """Return 16 numbers from integers of their order."""
    return T.reinterpret("float32x16", _ordered(value))


def _ordered(bits: Any) -> Any:
    """Flip the magnitude of negative numbers, so that integers compare as floats; and back."""

    def flipped(v: Any) -> Any:
        sign = T.shift_right(v, splat(T.int32(31)))
        return T.bitwise_xor(v, T.bitwise_and(sign, splat(T.int32(0x7FFFFFFF))))

    return let(bits, flipped)
