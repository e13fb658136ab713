"""Register tiles of floats: weights as they are, or integer codes that become floats in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    splat,
    vector_type,
)
from mimo_compile.schedules.emit.dot import code_table, float_columns
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout
from mimo_compile.schedules.emit.tile import (
    CHAIN,
    Out,
    Piece,
    TileKnobs,
    Weights,
    ask_ahead,
    in_last,
    in_runs,
    span_of,
    zeros,
)

Totals = dict[tuple[int, int], Register]
"""By row block and token."""


def float_tile(
    layout: CodeLayout | None,
    k: int,
    weights: Weights,
    x: Any,
    blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any],
    out: Out,
    knobs: TileKnobs,
    piece: Piece | None = None,
) -> None:
    """Sum ``weight * x`` in float32; integer codes become floats less their zero point in registers.

    Sums of groups, or of `tile.CHAIN` columns where groups are larger, are added to each other.

    Args:
        layout: Of integer codes; None for float32 or bfloat16 weights ``[..., N/16, K, 16]``.
        k: Columns.
        weights: Packed weights (`codes` holds the floats where there are no codes).
        x: ``[M, K]`` float32.
        blocks: See `int_tile.int_tile`.
        tokens: See there.
        out: See there.
        knobs: See there; one step of ``prefetch`` is one column of a float matrix.
        piece: The columns; None: all.
    """
    grid = [(r, m) for r in range(len(blocks)) for m in range(len(tokens))]
    total = {v: Register("float32", ROWS, zeros(ROWS)) for v in grid}
    if layout is None:
        _float_columns(k, weights, x, blocks, tokens, total, knobs, piece)
    else:
        _code_groups(layout, weights, x, blocks, tokens, total, knobs, piece)
    for (r, m), register in total.items():
        out(r, m, 0, register.get())


def float_units(layout: CodeLayout | None, k: int, unroll: int) -> int:
    """Return the runs of columns of `float_tile` that lie in one piece each."""
    if layout is None:
        return k // unroll
    size = layout.fmt.group_size(k)
    return k // layout.block if layout.groups == 1 else k // size


def _float_columns(
    k: int,
    weights: Weights,
    x: Any,
    blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any],
    total: Totals,
    knobs: TileKnobs,
    piece: Piece | None,
) -> None:
    def column(c: Any, sums: Totals) -> None:
        values = [bind(x[t, c]) for t in tokens]
        for r, block in enumerate(blocks):
            w = load(weights.codes, *block, c, 0, lanes=ROWS)
            if weights.codes.dtype == "uint16":  # the upper half of a float32
                bits = T.cast(w, "uint32x16") << T.broadcast(T.uint32(16), ROWS)
                w = T.reinterpret("float32x16", bits)
            w = bind(w)
            for m in range(len(tokens)):
                register = sums[r, m]
                register.set(register.get() + w * splat(values[m], ROWS))

    step = knobs.unroll
    begin, count = span_of(piece, k // step)
    knobs = knobs.reading(piece, begin, count, step)

    def run(first: Any, turns: Any) -> None:
        sums = _sums_like(total)
        with loop(turns) as s:
            start = (first + s) * step
            ask_ahead(weights.codes, blocks, start, step if knobs.turn else 1, knobs)
            for u in range(step):
                column(start + u, sums)
        for v, register in total.items():
            register.set(register.get() + sums[v].get())

    in_runs(begin, count, max(1, CHAIN // step), run)
    with in_last(piece):
        for u in range(k % step):
            column(k // step * step + u, total)


def _code_groups(
    layout: CodeLayout,
    weights: Weights,
    x: Any,
    blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any],
    total: Totals,
    knobs: TileKnobs,
    piece: Piece | None,
) -> None:
    f32 = vector_type("float32", ROWS)
    table = code_table(layout) if knobs.lookup else None

    def block_of(b: Any, acc: Totals, zero: list[Any], columns: int) -> None:
        ask_ahead(weights.codes, blocks, b, 1, knobs)
        # behind the branch of a prefetch, or loads and broadcasts become two instructions
        values = [[bind(x[t, b * layout.block + c]) for c in range(columns)] for t in tokens]
        for r, block in enumerate(blocks):
            raw = load(weights.codes, *block, b, 0, lanes=4 * ROWS)
            words = bind(T.reinterpret(vector_type("int32", ROWS), raw))
            codes = float_columns(layout, words, ROWS, table)
            for c, code in enumerate(codes[:columns]):
                subtract = layout.fmt.has_zero or not knobs.lookup
                w = bind(code - zero[r]) if subtract else code
                for m in range(len(tokens)):
                    register = acc[r, m]
                    register.set(register.get() + w * splat(values[m][c], ROWS))

    def run(g: Any, first: Any, turns: Any, rest: int = 0) -> None:
        """Add some blocks of group g, the last of ``rest`` columns if any, to the totals."""
        acc = _sums_like(total)
        if layout.fmt.has_zero:
            at = [load(weights.zero, *block, g, 0, lanes=ROWS) for block in blocks]
            zero = [bind(T.cast(z, f32)) for z in at]
        else:
            zero = [splat(T.float32(layout.fmt.fixed_zero), ROWS)] * len(blocks)
        if not (isinstance(turns, int) and turns == 0):
            with loop(turns) as s:
                block_of(bind(first + s), acc, zero, layout.block)
        if rest:
            block_of(first + turns, acc, zero, rest)
        for (r, m), register in acc.items():
            scale = T.cast(load(weights.scale, *blocks[r], g, 0, lanes=ROWS), f32)
            total[r, m].set(total[r, m].get() + register.get() * scale)

    size = layout.fmt.group_size(layout.k)
    if layout.groups == 1:
        whole, rest = divmod(layout.k, layout.block)
        begin, count = span_of(piece, whole)
        knobs = knobs.reading(piece, begin, count, 1)
        in_runs(begin, count, CHAIN // layout.block, lambda first, n: run(0, first, n))
        if rest:
            with in_last(piece):
                run(0, whole, 0, rest)
        return
    groups, behind = divmod(layout.k, size)
    begin, count = span_of(piece, groups)
    knobs = knobs.reading(piece, begin, count, layout.group_blocks)

    def group(g: Any, columns: int) -> None:
        run(g, g * layout.group_blocks, *divmod(columns, layout.block))

    with loop(count) as g:
        group(g if piece is None else bind(begin + g), size)
    if behind:
        with in_last(piece):
            group(groups, behind)


def _sums_like(total: Totals) -> Totals:
    return {v: Register("float32", ROWS, zeros(ROWS)) for v in total}
