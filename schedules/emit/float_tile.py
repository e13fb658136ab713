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
    Out,
    TileKnobs,
    Weights,
    ask_ahead,
    zeros,
)


def float_tile(
    layout: CodeLayout | None,
    k: int,
    weights: Weights,
    x: Any,
    blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any],
    out: Out,
    knobs: TileKnobs,
) -> None:
    """Sum ``weight * x`` in float32; integer codes become floats less their zero point in registers.

    Args:
        layout: Of integer codes; None for float32 or bfloat16 weights ``[..., N/16, K, 16]``.
        k: Columns.
        weights: Packed weights (`codes` holds the floats where there are no codes).
        x: ``[M, K]`` float32.
        blocks: See `int_tile.int_tile`.
        tokens: See there.
        out: See there.
        knobs: See there; one step of ``prefetch`` is one column of a float matrix.
    """
    grid = [(r, m) for r in range(len(blocks)) for m in range(len(tokens))]
    total = {v: Register("float32", ROWS, zeros(ROWS)) for v in grid}
    if layout is None:
        _float_columns(k, weights, x, blocks, tokens, total, knobs)
    else:
        _code_groups(layout, weights, x, blocks, tokens, total, knobs)
    for (r, m), register in total.items():
        out(r, m, 0, register.get())


def _float_columns(
    k: int,
    weights: Weights,
    x: Any,
    blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any],
    total: dict[tuple[int, int], Register],
    knobs: TileKnobs,
) -> None:
    def column(c: Any) -> None:
        values = [bind(x[t, c]) for t in tokens]
        for r, block in enumerate(blocks):
            w = load(weights.codes, *block, c, 0, lanes=ROWS)
            if weights.codes.dtype == "uint16":  # the upper half of a float32
                bits = T.cast(w, "uint32x16") << T.broadcast(T.uint32(16), ROWS)
                w = T.reinterpret("float32x16", bits)
            w = bind(w)
            for m in range(len(tokens)):
                register = total[r, m]
                register.set(register.get() + w * splat(values[m], ROWS))

    step = knobs.unroll
    with loop(k // step) as s:
        ask_ahead(weights.codes, blocks, s * step, step if knobs.turn else 1, knobs)
        for u in range(step):
            column(s * step + u)
    for u in range(k % step):
        column(k // step * step + u)


def _code_groups(
    layout: CodeLayout,
    weights: Weights,
    x: Any,
    blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any],
    total: dict[tuple[int, int], Register],
    knobs: TileKnobs,
) -> None:
    f32 = vector_type("float32", ROWS)
    table = code_table(layout) if knobs.lookup else None

    def block_of(
        b: Any, acc: dict[tuple[int, int], Register], zero: list[Any], columns: int
    ) -> None:
        values = [[bind(x[t, b * layout.block + c]) for c in range(columns)] for t in tokens]
        ask_ahead(weights.codes, blocks, b, 1, knobs)
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

    def group(g: Any, columns: int) -> None:
        acc = {v: Register("float32", ROWS, zeros(ROWS)) for v in total}
        if layout.fmt.has_zero:
            at = [load(weights.zero, *block, g, 0, lanes=ROWS) for block in blocks]
            zero = [bind(T.cast(z, f32)) for z in at]
        else:
            zero = [splat(T.float32(layout.fmt.fixed_zero), ROWS)] * len(blocks)
        whole, rest = divmod(columns, layout.block)
        if whole:
            with loop(whole) as s:
                block_of(bind(g * layout.group_blocks + s), acc, zero, layout.block)
        if rest:
            block_of(g * layout.group_blocks + whole, acc, zero, rest)
        for (r, m), register in acc.items():
            scale = T.cast(load(weights.scale, *blocks[r], g, 0, lanes=ROWS), f32)
            total[r, m].set(total[r, m].get() + register.get() * scale)

    size = layout.fmt.group_size(layout.k)
    whole, rest = divmod(layout.k, size)
    if whole:
        with loop(whole) as g:
            group(g, size)
    if rest:
        group(whole, rest)
