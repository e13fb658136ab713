"""Quantise activation rows inside a kernel, bit for bit as `ir.ops.numerics.quantize_rows` does.

Rows have one scale each, or one for each group of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    splat,
    store,
    vector_type,
    workspace,
)
from mimo_compile.schedules.emit.layout import CodeLayout
from mimo_compile.schedules.emit.steps import Steps

LANES = 16


@dataclass(frozen=True, slots=True)
class Activations:
    """Quantised rows in the kernel's workspace."""

    codes: Any
    """``[M, k_padded]`` int8 (or whole numbers in float32); zeros behind column K."""
    sums: Any
    """``[M, steps]`` int32: sum of a step's codes, times minus the zero point (in units) if that is fixed."""
    scale: Any
    """``[M]`` float32, over the layout's unit; ``[M, groups]`` if rows have groups."""
    place: Callable[[Any, Any], tuple[Any, ...]] = lambda row, column: (row, column)
    """Index of a row's column in ``codes``; 16 columns from a multiple of 16 on are neighbours."""
    columns: int | None = None
    """Columns of ``codes``; None: the layout's."""
    group: int = 0
    """Columns that share a scale; 0: the row."""

    def steps(self, layout: CodeLayout) -> Steps:
        """Return what is summed as integers."""
        return Steps(layout, self.group)


def workspace_bytes(layout: CodeLayout, m: int, dtype: str, group: int = 0) -> int:
    """Return the scratch bytes of `alloc_activations`."""
    width, steps = 1 if dtype == "int8" else 4, Steps(layout, group)
    return m * (layout.k_padded * width + 4 * steps.count + 4 * steps.scales)


def alloc_activations(layout: CodeLayout, m: int, dtype: str, group: int = 0) -> Activations:
    """Allocate the workspace for ``m`` quantised rows with scales for each ``group`` columns (0: the row)."""
    steps = Steps(layout, group)
    return Activations(
        workspace((m, layout.k_padded), dtype),
        workspace((m, steps.count), "int32"),
        workspace((m, steps.scales) if group else (m,), "float32"),
        group=group,
    )


def quantize_row(
    layout: CodeLayout,
    x: Any,
    index: Sequence[Any],
    out: Activations,
    row: Any,
    *,
    offset: int | None = None,
) -> None:
    """Quantise the row ``x[*index, :K]`` (float32) into row ``row`` of ``out``.

    ``offset``: what weights lie above their values, instead of the format's zero point.
    """
    k, steps = layout.k, out.steps(layout)
    factor = 1 if layout.late_zero else -int(layout.fmt.fixed_zero) * layout.unit
    if offset is not None:
        factor = -offset

    def scaled(first: Any, columns: int, *place: Any) -> Any:
        """Store the scale of some columns and return what they are multiplied by."""
        amax = largest(x, index, first, columns)
        scale = amax / T.float32(127.0)
        if layout.unit > 1:  # a power of two
            scale = scale * T.float32(1 / layout.unit)
        store(out.scale, scale, *place)
        some = amax > T.float32(0.0)
        return bind(T.if_then_else(some, T.float32(127.0) / amax, T.float32(0.0)))

    def quantised(column: Any, inverse: Any, lanes: int) -> Any:
        value = load(x, *index, column, lanes=lanes) * splat(inverse, lanes)
        limit = T.max(splat(T.float32(-127.0), lanes), rint(value, lanes))
        limit = T.min(splat(T.float32(127.0), lanes), limit)
        return bind(T.cast(limit, vector_type("int32", lanes)))

    def write(column: Any, value: Any, lanes: int) -> None:
        value = T.cast(value, vector_type(out.codes.dtype, lanes))
        store(out.codes, value, *out.place(row, column), lanes=lanes)

    def span(step: Any, start: Any, columns: int, inverse: Any) -> None:
        """Quantise ``columns`` columns from ``start`` on: one step or the part of it that exists."""
        count, rest = divmod(columns, LANES)
        total = Register("int32", 1, T.int32(0))
        if count:
            lanes_total = Register("int32", LANES, splat(T.int32(0), LANES))
            with loop(count) as i:
                value = quantised(start + i * LANES, inverse, LANES)
                write(start + i * LANES, value, LANES)
                lanes_total.set(lanes_total.get() + value)
            total.set(T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", lanes_total.get()))
        if rest:
            with loop(rest) as i:
                column = bind(start + count * LANES + i)
                value = quantised(column, inverse, 1)
                write(column, value, 1)
                total.set(total.get() + value)
        store(out.sums, total.get() * T.int32(factor), row, step)

    def spans(step: Any, start: Any, columns: int, inverse: Any) -> None:
        whole, part = divmod(columns, steps.size)
        if whole:
            with loop(whole) as i:
                span(step + i, start + i * steps.size, steps.size, inverse)
        if part:
            span(step + whole, start + whole * steps.size, part, inverse)

    if steps.group:
        whole, part = divmod(k, steps.group)
        each = steps.group // steps.size
        if whole:
            with loop(whole) as g:
                start = g * steps.group
                spans(g * each, start, steps.group, scaled(start, steps.group, row, g))
        if part:
            start = whole * steps.group
            spans(whole * each, start, part, scaled(start, part, row, whole))
    else:
        spans(0, 0, k, scaled(0, k, row))
    columns = out.columns or layout.k_padded
    if columns > k:
        with loop(columns - k) as i:
            store(out.codes, T.cast(T.int32(0), out.codes.dtype), *out.place(row, k + i))


def largest(x: Any, index: Sequence[Any], first: Any, columns: int) -> Any:
    """Return the largest magnitude of some columns of a row, bound."""
    vectors, tail = divmod(columns, LANES)
    ways = max(1, min(4, vectors))
    parts = [Register("float32", LANES, splat(T.float32(0), LANES)) for _ in range(ways)]
    rounds, rest = divmod(vectors, ways)

    def take(way: int, column: Any) -> None:
        value = _abs(load(x, *index, first + column, lanes=LANES), LANES)
        parts[way].set(T.max(parts[way].get(), value))

    if rounds:
        with loop(rounds) as i:
            for way in range(ways):
                take(way, (i * ways + way) * LANES)
    for way in range(rest):
        take(way, (rounds * ways + way) * LANES)
    for part in parts[1:]:
        parts[0].set(T.max(parts[0].get(), part.get()))
    amax = Register("float32", 1, T.float32(0))
    if vectors:
        amax.set(T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fmax", parts[0].get()))
    if tail:
        with loop(tail) as i:
            amax.set(T.max(amax.get(), _abs(load(x, *index, first + vectors * LANES + i), 1)))
    return bind(amax.get())


def _abs(value: Any, lanes: int) -> Any:
    bits = T.bitwise_and(
        T.reinterpret(vector_type("int32", lanes), value), splat(T.int32(0x7FFFFFFF), lanes)
    )
    return T.reinterpret(vector_type("float32", lanes), bits)


def rint(value: Any, lanes: int) -> Any:
    """Return lanes rounded to whole numbers, half to even."""
    return T.call_llvm_pure_intrin(vector_type("float32", lanes), "llvm.rint", value)
