"""Some lanes of 16, moved together to the front: how lists are made of what passes a test, without a branch.

LLVM's ``vector.compress`` is ``vpcompressd`` with AVX-512, and a row of scalar moves elsewhere. TVM has no
type for masks of lanes in calls, so lanes that stay are said by integers that are not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mimo_compile.schedules.emit.build import Register, T, bind, store
from mimo_compile.schedules.emit.vector import LANES, splat

_PACKED, _COUNT = "mimo_packed_lanes", "mimo_count_lanes"
_VECTOR = f"<{LANES} x i32>"
_MODULE = f"""
declare {_VECTOR} @llvm.experimental.vector.compress.v{LANES}i32({_VECTOR}, <{LANES} x i1>, {_VECTOR})
declare i{LANES} @llvm.ctpop.i{LANES}(i{LANES})
define {_VECTOR} @{_PACKED}({_VECTOR} %value, {_VECTOR} %stays) {{
  %mask = icmp ne {_VECTOR} %stays, zeroinitializer
  %r = call {_VECTOR} @llvm.experimental.vector.compress.v{LANES}i32(
    {_VECTOR} %value, <{LANES} x i1> %mask, {_VECTOR} zeroinitializer)
  ret {_VECTOR} %r
}}
define i32 @{_COUNT}({_VECTOR} %stays) {{
  %mask = icmp ne {_VECTOR} %stays, zeroinitializer
  %bits = bitcast <{LANES} x i1> %mask to i{LANES}
  %some = call i{LANES} @llvm.ctpop.i{LANES}(i{LANES} %bits)
  %r = zext i{LANES} %some to i32
  ret i32 %r
}}
"""


def imported() -> Any:
    """Return what encloses statements that use this module."""
    return T.attr(T.int32(0), "pragma_import_llvm", _MODULE)


def flags(condition: Any) -> Any:
    """Return 16 lanes of 1 where a condition holds, of 0 elsewhere, bound."""
    return bind(T.Select(condition, splat(T.int32(1)), splat(T.int32(0))))


def packed(value: Any, stays: Any) -> Any:
    """Return the int32 lanes that stay, in order, from the first on, and zeros behind them."""
    return bind(T.call_extern("int32x16", _PACKED, value, stays))


def counted(stays: Any) -> Any:
    """Return how many lanes stay."""
    return bind(T.call_extern("int32", _COUNT, stays))


def append(buffers: Sequence[Any], values: Sequence[Any], stays: Any, count: Register) -> None:
    """Append to each buffer the lanes of its value that stay; up to 16 elements behind them become 0."""
    at = bind(count.get())
    for buffer, value in zip(buffers, values, strict=True):
        store(buffer, packed(value, stays), at, lanes=LANES)
    count.set(at + counted(stays))
