"""Register tiles of integer codes: exact sums of groups, then scaled and added up in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    splat,
    vector_type,
)
from mimo_compile.schedules.emit.dot import Dot
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout
from mimo_compile.schedules.emit.quantize import Activations
from mimo_compile.schedules.emit.tile import (
    Out,
    Sums,
    TileKnobs,
    Weights,
    ask_ahead,
    grid_of,
    zeros,
)
from mimo_compile.schedules.emit.unpack import tables

GroupSums = Callable[[Any], dict[tuple[int, int, int], Any]]
"""``sums(g)``: by row block, part of it, and token, the int32 sums of group g less a fixed zero point."""


class Way(Protocol):
    """What `int_tile` asks of the way that ``sums`` are made."""

    @property
    def codes(self) -> CodeLayout:
        """Layout of the matrix."""

    @property
    def lanes(self) -> int:
        """Rows in a vector."""


def int_tile(
    dot: Dot | Way,
    weights: Weights,
    x: Activations,
    blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any],
    out: Out,
    knobs: TileKnobs,
    sums: GroupSums | None = None,
) -> None:
    """Sum ``codes * x`` exactly in each step (`steps.Steps`), scale, add these up in float32 in their order.

    Args:
        dot: How to multiply and add, or to look up; it knows the layout.
        weights: Packed codes, scales and zero points.
        x: Quantised rows.
        blocks: For each row block its index into the weights' leading axes.
        tokens: For each token its row in ``x``.
        out: Takes each vector of sums.
        knobs: See there.
        sums: Emits the sums of one group instead of dots.
    """
    layout = dot.codes
    grid = grid_of(dot.lanes, len(blocks), len(tokens))
    steps = x.steps(layout)
    single = layout.groups == 1 and not steps.group
    f32 = vector_type("float32", dot.lanes)
    total = {} if single else {v: Register("float32", dot.lanes, zeros(dot.lanes)) for v in grid}

    def step(s: Any, count: int) -> None:
        if sums is None:
            assert isinstance(dot, Dot)
            found = _step_sums(dot, weights, x, blocks, tokens, s, count, knobs)
        else:
            found = sums(s)
        for key, value in found.items():
            r, h, m = key
            at = (*blocks[r], steps.weight_group(s), h * dot.lanes)
            scale = T.cast(load(weights.scale, *at, lanes=dot.lanes), f32)
            if layout.late_zero:
                zero = splat(T.float32(layout.fmt.fixed_zero), dot.lanes)
                if layout.fmt.has_zero:
                    zero = T.cast(load(weights.zero, *at, lanes=dot.lanes), f32)
                corrected = minus_zero(value, zero, load(x.sums, tokens[m], s), layout, dot.lanes)
            else:
                corrected = T.cast(value, f32)
            if single:
                out(r, m, h * dot.lanes, corrected * scale * splat(x.scale[tokens[m]], dot.lanes))
            elif steps.group:
                factor = splat(x.scale[tokens[m], steps.act_group(s)], dot.lanes)
                factor = factor if layout.groups == 1 else scale * factor
                total[key].set(total[key].get() + corrected * factor)
            else:
                total[key].set(total[key].get() + corrected * scale)

    if single:
        step(0, steps.blocks)
        return
    even = steps.count if steps.last == steps.blocks else steps.count - 1
    if even:
        with loop(even) as s:
            step(s, steps.blocks)
    if even < steps.count:
        step(even, steps.last)
    for (r, h, m), register in total.items():
        value = register.get()
        if not steps.group:
            value = value * splat(x.scale[tokens[m]], dot.lanes)
        elif layout.groups == 1:
            at = (*blocks[r], 0, h * dot.lanes)
            value = value * T.cast(load(weights.scale, *at, lanes=dot.lanes), f32)
        out(r, m, h * dot.lanes, value)


def _step_sums(
    dot: Dot,
    weights: Weights,
    x: Activations,
    blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any],
    g: Any,
    length: int,
    knobs: TileKnobs,
) -> dict[tuple[int, int, int], Any]:
    """Emit the sums of step g, of so many blocks, less the fixed zero point; int32 or float32."""
    layout, lanes = dot.codes, dot.lanes
    grid = grid_of(lanes, len(blocks), len(tokens))
    runs = dot.exact_blocks
    split = runs is not None and runs < length
    constants = tables(layout)

    def nothing(dtype: str) -> Any:
        return T.cast(splat(T.int32(0), lanes), vector_type(dtype, lanes))

    def start(m: int, dtype: str) -> Any:
        if layout.late_zero:
            return nothing(dtype)
        return splat(T.cast(load(x.sums, tokens[m], g), dtype), lanes)

    def run(acc: Sums, first: Any, total: int) -> None:
        unroll = knobs.unroll if total % knobs.unroll == 0 else 1
        with loop(total // unroll) as s:
            for u in range(unroll):
                b = bind(first + s * unroll + u) if not _is_number(first + s) else first + s + u
                values = [dot.columns(x.codes, t, b * layout.block) for t in tokens]
                if u == 0 or not knobs.turn:
                    count = layout.lines * (unroll if knobs.turn else 1)
                    ask_ahead(weights.codes, blocks, b * layout.lines, count, knobs)
                for r, block in enumerate(blocks):
                    for h in range(ROWS // lanes):
                        lines = [
                            load(
                                weights.codes,
                                *block,
                                b * layout.lines + i,
                                h * 4 * lanes,
                                lanes=4 * lanes,
                            )
                            for i in range(layout.lines)
                        ]
                        words = dot.unpacked(
                            [bind(T.reinterpret(vector_type("int32", lanes), i)) for i in lines],
                            constants,
                        )
                        for m in range(len(tokens)):
                            chains = acc[r, h, m]
                            count = len(chains)
                            if len(words) < count:
                                chains, count = [chains[u % count]], 1
                            for c, register in enumerate(chains):
                                mine = words[c::count], values[m][c::count]
                                register.set(dot.block(register.get(), *mine))

    base = g * x.steps(layout).blocks
    if not split:
        # additions to one register wait for each other: long groups of few rows get several
        most = max(knobs.unroll, layout.quads) if length > 4 else 1
        chains = min(max(1, 4 // len(grid)), most)
        acc: Sums = {}
        for v in grid:
            acc[v] = [Register(dot.accumulator, lanes, start(v[2], dot.accumulator))]
            others = range(1, chains)
            acc[v] += [Register(dot.accumulator, lanes, nothing(dot.accumulator)) for _ in others]
        run(acc, base, length)
        for total, *rest_of in acc.values():
            for register in rest_of:
                total.set(total.get() + register.get())
        return {v: acc[v][0].get() for v in grid}
    # float32 holds only so many terms exactly: move each run's sum into integers
    assert runs is not None
    sums = {v: Register("int32", lanes, start(v[2], "int32")) for v in grid}
    whole, rest = divmod(length, runs)

    def part(first: Any, count: int) -> None:
        acc: Sums = {v: [Register(dot.accumulator, lanes, zeros(lanes))] for v in grid}
        run(acc, first, count)
        for v in grid:
            whole_number = T.cast(acc[v][0].get(), vector_type("int32", lanes))
            sums[v].set(sums[v].get() + whole_number)

    with loop(whole) as i:
        part(base + i * runs, runs)
    if rest:
        part(base + whole * runs, rest)
    return {v: sums[v].get() for v in grid}


def minus_zero(value: Any, zero: Any, x_sum: Any, layout: CodeLayout, lanes: int) -> Any:
    """Return ``value - zero * x_sum`` in float32, exact for whole zero points."""
    f32 = vector_type("float32", lanes)
    if layout.max_value * 127 * layout.fmt.group_size(layout.k) < 2**24:
        return T.cast(value, f32) - zero * splat(T.cast(x_sum, "float32"), lanes)
    i32 = vector_type("int32", lanes)
    whole = bind(T.cast(zero, i32))
    difference = T.cast(value, i32) - whole * splat(x_sum, lanes)
    fraction = zero - T.cast(whole, f32)
    return T.cast(difference, f32) - fraction * splat(T.cast(x_sum, "float32"), lanes)


def _is_number(value: Any) -> bool:
    return isinstance(value, int)
