"""A panel of weight rows against all tokens on matrix tiles, and activations in tile order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimo_compile.schedules.emit.amx import SIDE, Row, Tiles
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
from mimo_compile.schedules.emit.int_tile import minus_zero
from mimo_compile.schedules.emit.quantize import Activations, quantize_row
from mimo_compile.schedules.emit.tile import Weights, store_rows
from mimo_compile.schedules.emit.unpack import tables, unpack
from mimo_compile.schedules.mpgemm.problem import Problem

I32, F32 = vector_type("int32", SIDE), vector_type("float32", SIDE)


def quantise_tiles(problem: Problem, x: Any, depth: int, *, parallel: bool) -> Activations:
    """Quantise all rows of x into tiles ``[M/16, K/depth, 16, depth]``; rows behind M stay as they are."""
    layout = problem.layout
    blocks, steps = -(-problem.m // SIDE), -(-layout.k_padded // depth)
    rows = Activations(
        workspace((blocks, steps, SIDE, depth), "int8"),
        workspace((blocks * SIDE, layout.groups), "int32"),
        workspace((blocks * SIDE,), "float32"),
        lambda row, column: (row // SIDE, column // depth, row % SIDE, column % depth),
        steps * depth,
    )
    with loop(problem.m, parallel=parallel) as m:
        quantize_row(layout, x, (m,), rows, m)
    return rows


@dataclass(frozen=True, slots=True)
class Panel:
    """Emits ``rows`` blocks of 16 weight rows from block ``first`` on."""

    problem: Problem
    tiles: Tiles
    x: Activations
    weights: Weights
    bias: Any
    y: Any
    first: Any
    rows: int
    tokens: int
    columns: int
    depth: int

    @property
    def signed(self) -> bool:
        """True if the zero point leaves the codes as they are unpacked, and not the sums."""
        return not self.problem.layout.late_zero

    @property
    def single(self) -> bool:
        """True if a row is one group, whose integer sums pass through memory between runs of columns."""
        return self.problem.layout.groups == 1

    def emit(self) -> None:
        """Unpack a run of columns, multiply it with all tokens; repeat; scale and store."""
        layout = self.problem.layout
        blocks = -(-self.problem.m // SIDE)
        padded = -(-layout.k_padded // self.depth) * self.depth
        columns = min(self.columns, padded)
        panel = workspace((self.rows, columns // 4, 64), "int8" if self.signed else "uint8")
        kind = "int32" if self.single else "float32"
        sums = workspace((blocks * SIDE, self.rows * SIDE), kind)
        scratch = workspace((self.tokens * self.rows, SIDE, SIDE), "int32")
        depth = [(SIDE, self.depth)] * self.tokens + [(self.depth // 4, 64)] * self.rows
        self.tiles.begin([(SIDE, 64)] * (self.tokens * self.rows) + depth)
        with loop(blocks * SIDE * self.rows) as i:
            none = splat(T.cast(T.int32(0), kind), SIDE)
            store(sums, none, i // self.rows, i % self.rows * SIDE, lanes=SIDE)

        def run(start: Any, count: int, exist: int) -> None:
            self._unpack(panel, start, exist)
            self._over_tokens(
                blocks, lambda i, n: self._multiply(panel, sums, scratch, i, n, start, count)
            )

        whole = layout.k_padded // columns
        if whole:
            with loop(whole) as i:
                run(i * columns, columns, columns)
        if rest := padded - whole * columns:  # the activations behind the last column are zeros
            run(whole * columns, rest, layout.k_padded - whole * columns)
        self.tiles.end()
        with loop(self.problem.m) as m:
            self._write(sums, m)

    def _over_tokens(self, blocks: int, emit: Any) -> None:
        count, rest = divmod(blocks, self.tokens)
        if count:
            with loop(count) as i:
                emit(i * self.tokens, self.tokens)
        if rest:
            emit(count * self.tokens, rest)

    def _unpack(self, panel: Any, start: Any, columns: int) -> None:
        """Unpack ``columns`` columns of each block of rows; those behind the last stay as they are."""
        layout, constants = self.problem.layout, tables(self.problem.layout)
        point = int(layout.fmt.fixed_zero)
        zero = T.int8(point - 256 if point > 127 else point)  # subtraction wraps around
        for r in range(self.rows):

            def one(b: Any, r: int = r) -> None:
                block = start // layout.block + b
                lines = [
                    bind(
                        T.reinterpret(
                            I32,
                            load(
                                self.weights.codes,
                                self.first + r,
                                block * layout.lines + i,
                                0,
                                lanes=64,
                            ),
                        )
                    )
                    for i in range(layout.lines)
                ]
                for q, words in enumerate(unpack(layout, lines, SIDE, constants)):
                    value = T.reinterpret(vector_type(panel.dtype, 64), words)
                    if self.signed:
                        value = value - T.broadcast(zero, 64)
                    store(panel, value, r, b * layout.quads + q, 0, lanes=64)

            with loop(columns // layout.block) as b:
                one(b)

    def _multiply(
        self, panel: Any, sums: Any, scratch: Any, block: Any, tokens: int, start: Any, columns: int,
    ) -> None:  # fmt: skip
        """Add the products of ``tokens`` tiles of tokens with a run of columns to the sums."""
        grid = [(t, r) for t in range(tokens) for r in range(self.rows)]
        tile = {v: v[0] * self.rows + v[1] for v in grid}
        stride = 4 * SIDE * self.rows

        def place(t: int, r: int) -> Row:
            return rows_of(sums, (block + t) * SIDE, r * SIDE)

        def steps(begin: Any, count: int) -> None:
            with loop(count) as s:
                self._step(panel, block, tokens, begin + s, start)

        if self.single:
            for v in grid:
                self.tiles.load(tile[v], place(*v), stride)
            steps(0, columns // self.depth)
            for v in grid:
                self.tiles.store(tile[v], place(*v), stride)
            return
        size = self.problem.layout.fmt.group_size(self.problem.k)
        with loop(-(-columns // size)) as g:
            for v in grid:
                self.tiles.zero(tile[v])
            steps(g * (size // self.depth), size // self.depth)
            for v in grid:
                index = tile[v]
                self.tiles.store(index, rows_of(scratch, index, 0, 0), 4 * SIDE)
            for v in grid:
                self._scale_group(sums, scratch, tile[v], block + v[0], v[1], g, start, size)

    def _step(self, panel: Any, block: Any, tokens: int, s: Any, start: Any) -> None:
        """Load one step of columns of each side and multiply all pairs."""
        a, b = self.tokens * self.rows, self.tokens * self.rows + self.tokens
        quads = self.depth // 4
        step = start // self.depth + s
        for t in range(tokens):
            self.tiles.load(a + t, rows_of(self.x.codes, block + t, step, 0, 0), self.depth)
        for r in range(self.rows):
            self.tiles.load(b + r, rows_of(panel, r, s * quads, 0), 64)
        for t in range(tokens):
            for r in range(self.rows):
                self.tiles.dot(t * self.rows + r, a + t, b + r, signed=self.signed)

    def _scale_group(
        self, sums: Any, scratch: Any, tile: int, block: Any, r: int, g: Any, start: Any, size: int,
    ) -> None:  # fmt: skip
        """Add a group's sums, less its zero point and times its scale, to the running sums."""
        layout = self.problem.layout
        group = bind(start // size + g)
        scale = bind(T.cast(load(self.weights.scale, self.first + r, group, 0, lanes=SIDE), F32))
        zero = self._zero(group, r) if layout.late_zero else None
        with loop(SIDE) as i:
            token = block * SIDE + i
            value = self._corrected(load(scratch, tile, i, 0, lanes=SIDE), zero, token, group)
            old = load(sums, token, r * SIDE, lanes=SIDE)
            store(sums, old + value * scale, token, r * SIDE, lanes=SIDE)

    def _zero(self, group: Any, r: int) -> Any:
        layout = self.problem.layout
        if not layout.fmt.has_zero:
            return splat(T.float32(layout.fmt.fixed_zero), SIDE)
        return bind(T.cast(load(self.weights.zero, self.first + r, group, 0, lanes=SIDE), F32))

    def _corrected(self, value: Any, zero: Any, token: Any, group: Any) -> Any:
        """Return a row's sums less their zero point as float32."""
        if zero is None:
            return T.cast(value, F32)
        return minus_zero(value, zero, load(self.x.sums, token, group), self.problem.layout, SIDE)

    def _write(self, sums: Any, m: Any) -> None:
        """Scale the sums of a token, add the bias and store."""
        for r in range(self.rows):
            value = load(sums, m, r * SIDE, lanes=SIDE)
            if self.single:
                zero = self._zero(0, r) if self.problem.layout.late_zero else None
                scale = T.cast(load(self.weights.scale, self.first + r, 0, 0, lanes=SIDE), F32)
                value = self._corrected(value, zero, m, 0) * scale
            value = value * splat(self.x.scale[m], SIDE)
            if self.bias is not None:
                value = value + load(self.bias, self.first + r, 0, lanes=SIDE)
            last = r + 1 == self.rows
            store_rows(self.y, m, self.first + r, 0, SIDE, bind(value), self.problem.n, last=last)


def rows_of(buffer: Any, *first: Any) -> Row:
    """Return the rows of a tile that begins at ``first``: along the last axis but one."""
    *outer, row, column = first
    return lambda i: (buffer, (*outer, row + i, column))
