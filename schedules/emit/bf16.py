"""Register tiles of bfloat16 dots (``vdpbf16ps``): two products and a float32 sum in each 32-bit lane.

Integer codes, FP3 and FP4 become bfloat16 in registers, which holds them exactly; their scales are applied
to each group's float32 sums. The instruction rounds to nearest, one multiply-add after the other, and takes
and gives zero for subnormal numbers, whatever the processor's mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile.ir.formats import WeightFormat
from mimo_compile.ir.ops.numerics import bf16_to_f32, f32_to_bf16
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
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout
from mimo_compile.schedules.emit.rounding import ALONE, bf16_bits
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
)

Chains = dict[tuple[int, int], list[Register]]
"""By row block and token: registers that share a sum."""
NEEDS = frozenset({"avx512f", "avx512bw", "avx512bf16"})
_LANES = 16
_PERMUTE = "llvm.x86.avx512.permvar.hi.512"
"""Picks 32 words by the low 5 bits of 32 indices."""
_NAME = "mimo_dot_bf16"
_MODULE = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define <16 x float> @{_NAME}(<16 x float> %a, <16 x i32> %b, <16 x i32> %c) {{
  %x = bitcast <16 x i32> %b to <32 x bfloat>
  %y = bitcast <16 x i32> %c to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float> %a, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}}
"""
"""TVM turns values of type bfloat16 into float32, so the instruction is wrapped in one of 32-bit lanes."""


def imported() -> Any:
    """Return the frame in which `dot` may be emitted."""
    return T.attr(T.int32(0), "pragma_import_llvm", _MODULE)


def dot(total: Any, words: Any, x: Any) -> Any:
    """Return float32 sums plus the products of pairs of bfloat16 in 16 lanes of 32 bits."""
    return T.call_extern("float32x16", _NAME, total, words, x)


def code_values(fmt: WeightFormat) -> tuple[float, ...] | None:
    """Return what a kernel multiplies for each code; None if bfloat16 does not hold it exactly.

    Codes with zero points of their own count from the middle code.
    """
    if fmt.is_integer:
        zero = float(1 << (fmt.bits - 1)) if fmt.has_zero else fmt.fixed_zero
        return tuple(c - zero for c in range(1 << fmt.bits))
    if fmt.family != "codebook" or fmt.two_sided:
        return None
    values = np.array(fmt.values, np.float32)
    return fmt.values if np.array_equal(bf16_to_f32(f32_to_bf16(values)), values) else None


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of x in the kernel's workspace."""

    pairs: Any
    """``[M, columns]`` bfloat16 bits as int16; zeros behind K. For codes, 1 and 2 of each 4 change places."""
    sums: Any = None
    """``[M, G]`` float32 sums of groups, where zero points differ by group."""

    def word(self, row: Any, column: Any) -> Any:
        """Return a pair of columns in all lanes, bound."""
        pair = self.pairs[row, T.ramp(column, 1, 2)]
        return bind(splat(T.reinterpret("int32", pair), _LANES))


def workspace_bytes(layout: CodeLayout | None, m: int, columns: int) -> int:
    """Return the scratch bytes of `bf16_rows`."""
    groups = layout.groups if layout is not None and layout.fmt.has_zero else 0
    return m * (2 * columns + 4 * groups)


def bf16_rows(
    layout: CodeLayout | None,
    x: Any,
    m: int,
    k: int,
    columns: int,
    *,
    parallel: bool,
    room: int = 0,
    rows: Any = None,
) -> Rows:
    """Emit rows of x ``[m, k]`` float32 rounded to bfloat16.

    Args:
        layout: Of codes; None for float weights, whose columns keep their order.
        x: The rows.
        m: How many.
        k: Columns.
        columns: Columns with padding, a multiple of 4.
        parallel: Spread long ones over threads.
        room: Rows that there is room for, if not m; those behind m are not written.
        rows: How many of the m there are; None: all.
    """
    pairs = workspace((room or m, columns), "int16")
    sums = workspace((m, layout.groups), "float32") if layout and layout.fmt.has_zero else None
    out = Rows(pairs, sums)
    swapped = (0, 2, 1, 3) if layout else (0, 1, 2, 3)
    with loop(m if rows is None else rows, parallel=parallel and m * k > ALONE) as row:
        if k // _LANES:
            with loop(k // _LANES) as i:
                bits = bf16_bits(load(x, row, i * _LANES, lanes=_LANES), _LANES)
                half = T.cast(T.shift_right(bits, splat(T.int32(16), _LANES)), "int16x16")
                store(pairs, _middle_swapped(half) if layout else half, row, i * _LANES, lanes=16)
        for c in range(k // _LANES * _LANES, columns):
            value = T.int16(0)
            if c < k:
                value = T.cast(T.shift_right(bf16_bits(x[row, c], 1), T.int32(16)), "int16")
            store(pairs, value, row, c // 4 * 4 + swapped[c % 4])
        if layout is not None and sums is not None:
            size = layout.group_blocks * layout.block
            with loop(layout.groups) as g:
                store(sums, _sum(pairs, row, g * size, size), row, g)
    return out


def _middle_swapped(half: Any) -> Any:
    """Return 16 words, the second and third of each four exchanged."""

    def constant(value: int) -> Any:
        return T.broadcast(T.int64(value - (1 << 64) if value >> 63 else value), 4)

    fours = bind(T.reinterpret("int64x4", half))
    ends = T.bitwise_and(fours, constant(0xFFFF00000000FFFF))
    up = T.shift_left(T.bitwise_and(fours, constant(0xFFFF0000)), constant(16))
    down = T.bitwise_and(T.shift_right(fours, constant(16)), constant(0xFFFF0000))
    return T.reinterpret("int16x16", T.bitwise_or(T.bitwise_or(ends, up), down))


def _sum(pairs: Any, row: Any, start: Any, size: int) -> Any:
    """Return the sum of ``size`` columns in float32."""
    lanes = 16 if size % 16 == 0 else 4
    total = Register("float32", lanes, splat(T.float32(0), lanes))
    with loop(size // lanes) as i:
        half = load(pairs, row, start + i * lanes, lanes=lanes)
        words = T.shift_left(T.cast(half, f"int32x{lanes}"), splat(T.int32(16), lanes))
        total.set(total.get() + T.reinterpret(f"float32x{lanes}", words))
    zero = T.float32(0)
    return T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fadd", zero, total.get())


def pairs_work(
    layout: CodeLayout | None, rows: int, columns: int, m: float, passes: float
) -> dict[str, float]:
    """Return the operations on a matrix of padded extents; codes become bfloat16 in each pass.

    Args:
        layout: Of codes; None for float weights.
        rows: Rows of the matrix.
        columns: Its columns.
        m: Rows of x.
        passes: Times that the matrix is read.
    """
    ops = {"dot_bf16": float(m) * rows * columns}
    if layout is None:
        return ops
    if layout.lane_bits == 8:
        ops["int_op"] = 4.0 * rows * columns * passes
    else:
        ops["int_op"] = 0.5 * rows * columns * passes
        ops["shuffle_u8"] = 2.0 * rows * columns * passes
    ops["fma_f32"] = float(m) * rows * layout.groups * (2 if layout.fmt.has_zero else 1)
    return ops


def rounding_work(m: float, k: int) -> dict[str, float]:
    """Return the operations that round rows of x."""
    return {"int_op": 6.0 * m * k}


def float_pairs_tile(
    columns: int, weights: Weights, x: Rows, blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any], out: Out, knobs: TileKnobs, piece: Piece | None = None,
) -> None:  # fmt: skip
    """Sum bfloat16 weights in pairs times x; arguments as for `float_tile.float_tile`.

    One step of ``prefetch`` is a line of 64 bytes: a pair of columns of 16 rows.
    """
    total, pairs = _totals(blocks, tokens), columns // 2

    def pair(p: Any, chain: int, acc: Chains) -> None:
        words = [x.word(t, 2 * p) for t in tokens]
        for r, block in enumerate(blocks):
            line = load(weights.codes, *block, p, 0, lanes=2 * ROWS)
            w = bind(T.reinterpret("int32x16", line))
            for m in range(len(tokens)):
                chains = acc[r, m]
                register = chains[chain % len(chains)]
                register.set(dot(register.get(), w, words[m]))

    def run(first: Any, turns: Any) -> None:
        acc = _accumulators(blocks, tokens, knobs.unroll)
        with loop(turns) as s:
            for u in range(knobs.unroll):
                p = (first + s) * knobs.unroll + u
                ask_ahead(weights.codes, blocks, p, 1, knobs)
                pair(p, u, acc)
        for v, register in total.items():
            register.set(register.get() + _added(acc[v]))

    begin, count = span_of(piece, pairs // knobs.unroll)
    knobs = knobs.reading(piece, begin, count, knobs.unroll)
    in_runs(begin, count, CHAIN // 2 // knobs.unroll, run)
    for (r, m), register in total.items():
        out(r, m, 0, register.get())


def codes_tile(
    layout: CodeLayout, weights: Weights, x: Rows, blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any], out: Out, knobs: TileKnobs, piece: Piece | None = None,
) -> None:  # fmt: skip
    """Sum codes times x in each group, scale, add groups up; arguments as for `float_tile.float_tile`."""
    fmt, f32 = layout.fmt, vector_type("float32", ROWS)
    total = _totals(blocks, tokens)
    operands = _operands(layout)
    unroll = knobs.unroll if layout.group_blocks % knobs.unroll == 0 else 1

    def block_of(b: Any, acc: Chains) -> None:
        pairs = 2 * layout.quads
        words = [[x.word(t, b * layout.block + 2 * i) for i in range(pairs)] for t in tokens]
        for r, block in enumerate(blocks):
            ask_ahead(weights.codes, [block], b, 1, knobs)
            line = load(weights.codes, *block, b, 0, lanes=4 * ROWS)
            for i, w in enumerate(operands(bind(T.reinterpret("int32x16", line)))):
                for m in range(len(tokens)):
                    chains = acc[r, m]
                    register = chains[i % len(chains)]
                    register.set(dot(register.get(), w, words[m][i]))

    def add(g: Any, values: dict[tuple[int, int], Any], *, zero: bool) -> None:
        """Add sums of group g to the totals, scaled, less what zero points above the middle code are off."""
        for (r, m), own in values.items():
            value, at = own, (*blocks[r], g, 0)
            scale = T.cast(load(weights.scale, *at, lanes=ROWS), f32)
            if zero:
                point = T.cast(load(weights.zero, *at, lanes=ROWS), f32)
                above = point - splat(T.float32(1 << (fmt.bits - 1)), ROWS)
                value = value - above * splat(x.sums[tokens[m], g], ROWS)
            total[r, m].set(total[r, m].get() + value * scale)

    def run(g: Any, first: Any, turns: Any, *, zero: bool) -> None:
        acc = _accumulators(blocks, tokens, 2 * layout.quads)
        with loop(turns) as s:
            for u in range(unroll):
                block_of(first + s * unroll + u, acc)
        add(g, {v: _added(chains) for v, chains in acc.items()}, zero=zero)

    turns = layout.group_blocks // unroll
    begin, count = span_of(piece, layout.groups if layout.groups > 1 else turns)
    if layout.groups == 1:
        most = max(1, CHAIN // layout.block // unroll)
        knobs = knobs.reading(piece, begin, count, unroll)
        in_runs(begin, count, most, lambda first, n: run(0, first * unroll, n, zero=False))
        if fmt.has_zero:
            nothing = splat(T.float32(0), ROWS)
            with in_last(piece):
                add(0, dict.fromkeys(total, nothing), zero=True)
    else:
        knobs = knobs.reading(piece, begin, count, layout.group_blocks)
        with loop(count) as s:
            g = s if piece is None else bind(begin + s)
            run(g, g * layout.group_blocks, turns, zero=fmt.has_zero)
    for (r, m), register in total.items():
        out(r, m, 0, register.get())


def units(layout: CodeLayout | None, columns: int, unroll: int) -> int:
    """Return the runs of columns of a tile that lie in one piece each; no layout: of pairs."""
    if layout is None:
        return columns // 2 // unroll
    return layout.groups if layout.groups > 1 else layout.blocks // unroll


def _operands(layout: CodeLayout) -> Callable[[Any], list[Any]]:
    """Return what turns a line of codes, in 32-bit lanes, into pairs of bfloat16, each bound."""
    values = code_values(layout.fmt)
    assert values is not None
    if layout.lane_bits == 8:
        return lambda words: _converted(layout.fmt.bits, words)
    mask = (1 << layout.lane_bits) - 1
    entries = [values[i & mask] if (i & mask) < len(values) else 0.0 for i in range(32)]
    table = Register("int16", 32)
    for i, bits in enumerate(f32_to_bf16(np.array(entries, np.float32)).view(np.int16)):
        store(table.buffer, T.int16(int(bits)), i)
    book = bind(table.get())

    def looked_up(words: Any) -> list[Any]:
        out = []
        for shift in (8 * j + p * layout.lane_bits for p in range(layout.quads) for j in (0, 1)):
            moved = T.shift_right(words, splat(T.int32(shift), ROWS)) if shift else words
            index = T.reinterpret("int16x32", moved)
            found = T.call_llvm_pure_intrin("int16x32", _PERMUTE, book, index)
            out.append(bind(T.reinterpret("int32x16", found)))
        return out

    return looked_up


def _converted(bits: int, words: Any) -> list[Any]:
    """Return columns 0 and 2, then 1 and 3, of bytes less the middle code, which bfloat16 holds exactly."""
    top = (1 << (bits - 1)) * 0x01010101  # with its highest bit flipped a code is a signed number
    flipped = bind(T.bitwise_xor(words, splat(T.int32(top - (top >> 31 << 32)), ROWS)))

    def number(column: int) -> Any:
        up = 32 - bits - 8 * column
        moved = T.shift_left(flipped, splat(T.int32(up), ROWS)) if up else flipped
        code = T.shift_right(moved, splat(T.int32(32 - bits), ROWS))
        return T.reinterpret("uint32x16", T.cast(code, "float32x16"))

    out = []
    for j in (0, 1):
        low = T.shift_right(number(j), splat(T.uint32(16), ROWS))
        out.append(bind(T.reinterpret("int32x16", T.bitwise_or(low, number(j + 2)))))
    return out


def _totals(blocks: Sequence[Any], tokens: Sequence[Any]) -> dict[tuple[int, int], Register]:
    zero = splat(T.float32(0), ROWS)
    grid = [(r, m) for r in range(len(blocks)) for m in range(len(tokens))]
    return {v: Register("float32", ROWS, zero) for v in grid}


def _accumulators(blocks: Sequence[Any], tokens: Sequence[Any], most: int) -> Chains:
    """Return registers by row block and token: several where few would wait for each other."""
    count = max(1, min(most, 8 // (len(blocks) * len(tokens))))
    zero = splat(T.float32(0), ROWS)
    return {
        (r, m): [Register("float32", ROWS, zero) for _ in range(count)]
        for r in range(len(blocks))
        for m in range(len(tokens))
    }


def _added(chains: list[Register]) -> Any:
    total = chains[0].get()
    for register in chains[1:]:
        total = total + register.get()
    return bind(total)
