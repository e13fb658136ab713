"""Round rows of activations to 16-bit floats, or to int8 times a scale, kept as float32 for float kernels.

Bit for bit as `ir.ops.numerics.fake_quantize` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.ir.formats import ActFormat, WeightFormat
from mimo_compile.ir.ops.numerics import F16_MOST
from mimo_compile.schedules.emit.build import (
    T,
    bind,
    load,
    loop,
    splat,
    store,
    vector_type,
    workspace,
)
from mimo_compile.schedules.emit.quantize import LANES, largest, rint

ALONE = 64 << 10
"""Elements that one thread rounds before others would have woken up."""


def copies_rows(acts: ActFormat, fmt: WeightFormat) -> bool:
    """Say whether kernels read rounded copies of rows, where they do not quantise or pair them themselves.

    Groups of int8 meet integer codes as integers, other weights as the floats that they stand for.
    """
    return acts.rounded or (acts.group > 0 and not fmt.is_integer)


def rounded_rows(
    acts: ActFormat, x: Any, m: int, k: int, *, parallel: bool, rows: Any = None
) -> Any:
    """Emit a copy of x ``[m, k]`` float32 in the kernel's workspace, rounded; returns its buffer.

    ``rows``: how many rows there are of the m that have room; None: all.
    """
    out = workspace((m, k), "float32")
    with loop(m if rows is None else rows, parallel=parallel and m * k > ALONE) as row:
        if acts.rounded:
            _each(x, row, 0, k, lambda v, lanes: rounded(v, lanes, acts), out)
        else:
            _groups(acts, x, row, k, out)
    return out


def rounded(value: Any, lanes: int, acts: ActFormat) -> Any:
    """Return float32 lanes rounded to a 16-bit float format, half to even."""
    if acts.kind == "f16":
        most = T.min(splat(T.float32(F16_MOST), lanes), value)
        value = T.max(splat(T.float32(-F16_MOST), lanes), most)
        half = T.cast(value, vector_type("float16", lanes))
        return T.cast(half, vector_type("float32", lanes))
    return T.reinterpret(vector_type("float32", lanes), bf16_bits(value, lanes))


def bf16_bits(value: Any, lanes: int) -> Any:
    """Return the bits of float32 lanes rounded to bfloat16; the lower half of each is zero."""
    kind = vector_type("int32", lanes)
    bits = bind(T.reinterpret(kind, value))
    odd = T.bitwise_and(T.shift_right(bits, splat(T.int32(16), lanes)), splat(T.int32(1), lanes))
    total = bits + splat(T.int32(0x7FFF), lanes) + odd
    magnitude = T.bitwise_and(bits, splat(T.int32(0x7FFFFFFF), lanes))
    infinity = splat(T.int32(0x7F800000), lanes)
    # a NaN keeps its sign and becomes quiet: adding to it might carry into the sign
    nan = T.bitwise_or(bits, splat(T.int32(0x00400000), lanes))
    kept = T.Select(magnitude > infinity, nan, total)
    return T.bitwise_and(kept, splat(T.int32(-0x10000), lanes))


def _each(
    x: Any, row: Any, start: Any, columns: int, change: Callable[[Any, int], Any], out: Any
) -> None:
    whole, rest = divmod(columns, LANES)
    if whole:
        with loop(whole) as i:
            at = start + i * LANES
            store(out, change(load(x, row, at, lanes=LANES), LANES), row, at, lanes=LANES)
    if rest:
        with loop(rest) as i:
            at = start + whole * LANES + i
            store(out, change(load(x, row, at), 1), row, at)


def _groups(acts: ActFormat, x: Any, row: Any, k: int, out: Any) -> None:
    def group(start: Any, columns: int) -> None:
        amax = largest(x, (row,), start, columns)
        scale = bind(amax / T.float32(127.0))
        some = amax > T.float32(0.0)
        inverse = bind(T.if_then_else(some, T.float32(127.0) / amax, T.float32(0.0)))

        def change(value: Any, lanes: int) -> Any:
            code = rint(value * splat(inverse, lanes), lanes)
            code = T.min(
                splat(T.float32(127.0), lanes), T.max(splat(T.float32(-127.0), lanes), code)
            )
            return code * splat(scale, lanes)

        _each(x, row, start, columns, change, out)

    size = acts.group if acts.group > 0 else k
    whole, part = divmod(k, size)
    if whole:
        with loop(whole) as g:
            group(g * size, size)
    if part:
        group(whole * size, part)
