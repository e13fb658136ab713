"""Register tiles: R blocks of 16 weight rows times a few tokens, over the whole K, in registers.

A tile leaves finding its rows and tokens, and what happens to its sums, to the kernel around it, so
that one text serves plain matmuls and routed experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    choose,
    load,
    loop,
    prefetch,
    splat,
    store,
    vector_type,
    when,
)
from mimo_compile.schedules.emit.dot import Dot, code_table, float_columns
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout
from mimo_compile.schedules.emit.quantize import Activations
from mimo_compile.schedules.emit.unpack import tables

Out = Callable[[int, int, int, Any], None]
"""``out(r, m, lane, value)``: sums of rows ``16 * block[r] + lane`` and following, for token m."""


Sums = dict[tuple[int, int, int], list[Register]]
"""By row block, part of it, and token: registers that share a sum."""
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


@dataclass(frozen=True, slots=True)
class Weights:
    """Buffers of one packed matrix (or of a stack of them: leading axes are part of an index)."""

    codes: Any
    scale: Any = None
    zero: Any = None


@dataclass(frozen=True, slots=True)
class TileKnobs:
    """What a tile may vary without changing its result."""

    prefetch: int = 0
    """Blocks of 64 bytes to ask for ahead, in each row block; 0: leave it to the CPU."""
    unroll: int = 1
    """Blocks of columns in the loop's body."""
    lookup: bool = False
    """Float tiles: turn codes of up to 4 bits into floats by a permutation (AVX-512)."""
    next_tile: int = 0
    """Row blocks from this tile to the one that the thread reads next, which prefetches behind the end
    of a row go to; 0: unknown."""
    turn: tuple[Any, int] | None = None
    """Which of how many tiles of tokens this is that read the same weights: each asks for its share of
    the next tile's, whatever the distance. None: weights are read once."""


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
    grid = _grid(dot.lanes, len(blocks), len(tokens))
    steps = x.steps(layout)
    single = layout.groups == 1 and not steps.group
    f32 = vector_type("float32", dot.lanes)
    total = {} if single else {v: Register("float32", dot.lanes, _zero(dot.lanes)) for v in grid}

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
    grid = _grid(lanes, len(blocks), len(tokens))
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
        acc: Sums = {v: [Register(dot.accumulator, lanes, _zero(lanes))] for v in grid}
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


def ask_ahead(
    codes: Any, blocks: Sequence[tuple[Any, ...]], line: Any, count: int, knobs: TileKnobs
) -> None:
    """Prefetch, in each row block, what a tile needs later while it reads some lines.

    Distances go on behind a row block's end in the next tile's rows, which lie ``next_tile - 1`` row
    blocks further on: without that, each tile would begin in memory.

    Args:
        codes: The packed weights ``[..., lines, 64 bytes]``.
        blocks: See `int_tile`.
        line: The first of the lines, a multiple of ``count``.
        count: How many.
        knobs: See there.
    """
    if not knobs.prefetch:
        return
    end = int(codes.shape[-2])
    if knobs.turn is None:
        for i in range(count):
            at = line + i + knobs.prefetch
            if knobs.next_tile not in (0, 1):
                jump = T.Select(at >= end, T.int32((knobs.next_tile - 1) * end), T.int32(0))
                at = bind(at + jump)
            for block in blocks:
                prefetch(codes, *block, at, 0)
        return
    index, turns = knobs.turn
    apart = math.lcm(count, turns)  # lines in which a share comes to whole lines
    first = T.floordiv(index * end + line, turns) + knobs.next_tile * end

    def ask() -> None:
        start = bind(first)
        for i, block in ((i, block) for i in range(apart // turns) for block in blocks):
            prefetch(codes, *block, start + i, 0, near=False)

    if apart == count:
        ask()
    else:
        with when(T.floormod(line, apart) == 0):
            ask()


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
        blocks: See `int_tile`.
        tokens: See `int_tile`.
        out: See `int_tile`.
        knobs: See there; one step of ``prefetch`` is one column of a float matrix.
    """
    grid = [(r, m) for r in range(len(blocks)) for m in range(len(tokens))]
    total = {v: Register("float32", ROWS, _zero(ROWS)) for v in grid}
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
        acc = {v: Register("float32", ROWS, _zero(ROWS)) for v in total}
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


def store_rows(
    y: Any, token: Any, block: Any, lane: int, lanes: int, value: Any, n: int, *, last: bool
) -> None:
    """Store sums of rows ``16 * block + lane`` and following to ``y[token]``, none behind row ``n``.

    Args:
        y: ``[M, n]`` float32.
        token: Its row.
        block: The block of 16 rows.
        lane: First row in the block.
        lanes: Rows in ``value``.
        value: The sums.
        n: Rows that exist.
        last: False if the block cannot be the last one.
    """
    final = -(-n // ROWS) - 1
    valid = n - final * ROWS

    def whole() -> None:
        store(y, value, token, block * ROWS + lane, lanes=lanes)

    def cut() -> None:
        if lane + lanes <= valid:
            whole()
        elif lane < valid:
            register = Register("float32", lanes, value)
            with loop(valid - lane) as i:
                store(y, register.lane(i), token, final * ROWS + lane + i)

    if valid == ROWS or not last:
        whole()
    elif isinstance(block, int):
        (cut if block == final else whole)()
    else:
        choose(block < final, whole, cut)


def _grid(lanes: int, rows: int, tokens: int) -> list[tuple[int, int, int]]:
    halves = ROWS // lanes
    return [(r, h, m) for r in range(rows) for h in range(halves) for m in range(tokens)]


def _zero(lanes: int) -> Any:
    return splat(T.float32(0), lanes)


def _is_number(value: Any) -> bool:
    return isinstance(value, int)
