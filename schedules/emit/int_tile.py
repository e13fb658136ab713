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
from mimo_compile.schedules.emit.steps import Steps
from mimo_compile.schedules.emit.tile import (
    Out,
    Piece,
    Sums,
    TileKnobs,
    Weights,
    ask_ahead,
    grid_of,
    in_last,
    span_of,
    zeros,
)
from mimo_compile.schedules.emit.unpack import tables

GroupSums = Callable[[Any, TileKnobs, Piece | None], dict[tuple[int, int, int], Any]]
"""``sums(g, knobs, piece)``: by row block, part of it, and token, the int32 sums of group g, or of a piece of
it, less a fixed zero point."""


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
    piece: Piece | None = None,
) -> None:
    """Sum ``codes * x`` exactly in each step (`steps.Steps`), scale, add these up in float32 in their order.

    Args:
        dot: How to multiply and add, or to look up; it knows the layout.
        weights: Packed codes, scales and zero points.
        x: Quantised rows.
        blocks: For each row block its index into the weights' leading axes.
        tokens: For each token its row in ``x``.
        out: Takes each vector of sums; of a piece, what `finished` makes results of.
        knobs: See there.
        sums: Emits the sums of one group instead of dots.
        piece: The columns; None: all.
    """
    layout, lanes = dot.codes, dot.lanes
    steps = x.steps(layout)

    def sums_of(s: Any, count: int, knobs: TileKnobs, piece: Piece | None) -> dict[Any, Any]:
        if sums is not None:
            return sums(s, knobs, piece)
        assert isinstance(dot, Dot)
        return _step_sums(dot, weights, x, blocks, tokens, s, count, knobs, piece)

    if is_whole(steps):
        for (r, h, m), value in sums_of(0, steps.blocks, knobs, piece).items():
            at, lane = (blocks[r], tokens[m]), h * lanes
            if piece is None:
                out(r, m, lane, finished(dot, weights, x, *at, lane, value))
            else:
                out(r, m, lane, T.cast(value, vector_type("int32", lanes)))
        return
    grid = grid_of(lanes, len(blocks), len(tokens))
    total = {v: Register("float32", lanes, zeros(lanes)) for v in grid}
    f32 = vector_type("float32", lanes)
    even = steps.count if steps.last == steps.blocks else steps.count - 1
    begin, turns = span_of(piece, even)
    knobs = knobs.reading(piece, begin, turns, steps.blocks * layout.lines)

    def step(s: Any, count: int) -> None:
        for key, value in sums_of(s, count, knobs, None).items():
            r, h, m = key
            at = (*blocks[r], steps.weight_group(s), h * lanes)
            scale = T.cast(load(weights.scale, *at, lanes=lanes), f32)
            corrected = _corrected(dot, weights, x, at, tokens[m], s, value)
            if steps.group:
                factor = splat(x.scale[tokens[m], steps.act_group(s)], lanes)
                scale = factor if layout.groups == 1 else scale * factor
            total[key].set(total[key].get() + corrected * scale)

    if even:
        with loop(turns) as s:
            step(s if piece is None else bind(begin + s), steps.blocks)
    if even < steps.count:
        with in_last(piece):
            step(even, steps.last)
    for (r, h, m), register in total.items():
        value = register.get()
        if piece is None:
            value = finished(dot, weights, x, blocks[r], tokens[m], h * lanes, value)
        out(r, m, h * lanes, value)


def is_whole(steps: Steps) -> bool:
    """Say whether a row is one step, whose sums stay integers up to their end."""
    return steps.codes.groups == 1 and not steps.group


def finished(
    dot: Dot | Way, weights: Weights, x: Activations, block: tuple[Any, ...], token: Any, lane: int,
    value: Any,
) -> Any:  # fmt: skip
    """Return the results that sums over all columns stand for: int32 where `is_whole`, else float32.

    Args:
        dot: See `int_tile`.
        weights: Likewise.
        x: Likewise.
        block: Index of the row block.
        token: Row in ``x``.
        lane: First row in the block.
        value: Sums of the vector's rows.
    """
    layout, lanes = dot.codes, dot.lanes
    steps, at = x.steps(layout), (*block, 0, lane)
    if steps.group and layout.groups > 1:
        return value
    scale = T.cast(load(weights.scale, *at, lanes=lanes), vector_type("float32", lanes))
    if steps.group:
        return value * scale
    if layout.groups == 1:
        value = _corrected(dot, weights, x, at, token, 0, value) * scale
    return value * splat(x.scale[token], lanes)


def _corrected(
    dot: Dot | Way, weights: Weights, x: Activations, at: tuple[Any, ...], token: Any, s: Any,
    value: Any,
) -> Any:  # fmt: skip
    """Return a step's sums as float32, less a zero point that was not taken off before."""
    layout, lanes = dot.codes, dot.lanes
    f32 = vector_type("float32", lanes)
    if not layout.late_zero:
        return T.cast(value, f32)
    zero = splat(T.float32(layout.fmt.fixed_zero), lanes)
    if layout.fmt.has_zero:
        zero = T.cast(load(weights.zero, *at, lanes=lanes), f32)
    return minus_zero(value, zero, load(x.sums, token, s), layout, lanes)


def _step_sums(
    dot: Dot,
    weights: Weights,
    x: Activations,
    blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any],
    g: Any,
    length: int,
    knobs: TileKnobs,
    piece: Piece | None,
) -> dict[tuple[int, int, int], Any]:
    """Emit the sums of step g, of so many blocks, less the fixed zero point; int32 or float32."""
    layout, lanes = dot.codes, dot.lanes
    grid = grid_of(lanes, len(blocks), len(tokens))
    runs = dot.exact_blocks
    split = runs is not None and runs < length
    if split and piece is not None:
        runs = min(runs or 1, -(-length // (4 * piece.count)))  # enough of them to share
    constants = tables(layout)

    def nothing(dtype: str) -> Any:
        return T.cast(splat(T.int32(0), lanes), vector_type(dtype, lanes))

    def start(m: int, dtype: str) -> Any:
        if layout.late_zero:
            return nothing(dtype)
        value = T.cast(load(x.sums, tokens[m], g), dtype)
        return splat(value if piece is None else piece.once(value, dtype), lanes)

    def run(acc: Sums, first: Any, total: int, piece: Piece | None, knobs: TileKnobs) -> None:
        unroll = knobs.unroll if total % knobs.unroll == 0 else 1
        begin, turns = span_of(piece, total // unroll)
        if piece is not None:
            knobs = knobs.reading(piece, begin, turns, unroll * layout.lines)
            first = bind(first + begin * unroll)
        with loop(turns) as s:
            for u in range(unroll):
                b = bind(first + s * unroll + u) if not _is_number(first + s) else first + s + u
                if u == 0 or not knobs.turn:
                    count = layout.lines * (unroll if knobs.turn else 1)
                    ask_ahead(weights.codes, blocks, b * layout.lines, count, knobs)
                # behind the branch of a prefetch, or loads and broadcasts become two instructions
                values = [dot.columns(x.codes, t, b * layout.block) for t in tokens]
                for r, block in enumerate(blocks):
                    for h in range(ROWS // lanes):
                        words = _unpacked(dot, weights, (*block, b * layout.lines), h, constants)
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
        run(acc, base, length, piece, knobs)
        for total, *rest_of in acc.values():
            for register in rest_of:
                total.set(total.get() + register.get())
        return {v: acc[v][0].get() for v in grid}
    # float32 holds only so many terms exactly: move each run's sum into integers
    assert runs is not None
    sums = {v: Register("int32", lanes, start(v[2], "int32")) for v in grid}
    whole, rest = divmod(length, runs)
    begin, turns = span_of(piece, whole)
    knobs = knobs.reading(piece, begin, turns, runs * layout.lines)

    def part(first: Any, count: int) -> None:
        acc: Sums = {v: [Register(dot.accumulator, lanes, zeros(lanes))] for v in grid}
        run(acc, first, count, None, knobs)
        for v in grid:
            whole_number = T.cast(acc[v][0].get(), vector_type("int32", lanes))
            sums[v].set(sums[v].get() + whole_number)

    with loop(turns) as i:
        part(base + (i if piece is None else bind(begin + i)) * runs, runs)
    if rest:
        with in_last(piece):
            part(base + whole * runs, rest)
    return {v: sums[v].get() for v in grid}


def _unpacked(
    dot: Dot, weights: Weights, at: tuple[Any, ...], part: int, constants: list[Any]
) -> list[Any]:
    """Load a part of the rows of a block of columns, whose first line is ``at``, and unpack it."""
    *block, line = at
    lines = [
        load(weights.codes, *block, line + i, part * 4 * dot.lanes, lanes=4 * dot.lanes)
        for i in range(dot.codes.lines)
    ]
    words = [bind(T.reinterpret(vector_type("int32", dot.lanes), i)) for i in lines]
    return dot.unpacked(words, constants)


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
