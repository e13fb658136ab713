"""float32 lanes to bfloat16 bit patterns as plain expressions, for kernels in either style of writing."""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.emit.vector import T, let, splat


def upper_half(value: Any, lanes: int) -> Any:
    """Return uint16 lanes: float32 ones rounded to bfloat16, half to even; a NaN stays one."""

    def kind(name: str) -> str:
        return name if lanes == 1 else f"{name}x{lanes}"

    def word(n: int) -> Any:
        return splat(T.int32(n), lanes)

    def rounded(bits: Any) -> Any:
        upper = T.shift_right(bits, word(16))
        total = bits + word(0x7FFF) + T.bitwise_and(upper, word(1))
        magnitude = T.bitwise_and(bits, word(0x7FFFFFFF))
        # adding to a NaN might carry into its sign
        nan = T.bitwise_or(upper, word(0x40))
        return T.Select(magnitude > word(0x7F800000), nan, T.shift_right(total, word(16)))

    return T.cast(let(T.reinterpret(kind("int32"), value), rounded), kind("uint16"))


def every_other(base: Any, lanes: int) -> Any:
    """Return the index of one half of ``lanes`` pairs."""
    return base if lanes == 1 else T.ramp(base, 2, lanes)
