"""A panel of weight rows, unpacked run by run of columns, against register tiles of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    prefetch,
    splat,
    store,
    vector_type,
    workspace,
)
from mimo_compile.schedules.emit.dot import Dot
from mimo_compile.schedules.emit.int_tile import minus_zero
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.quantize import Activations
from mimo_compile.schedules.emit.tile import Weights, store_rows
from mimo_compile.schedules.emit.unpack import tables
from mimo_compile.schedules.mpgemm.problem import Problem

_SPAN = 64
"""Columns of a row without groups between two requests for what comes next."""
F32 = vector_type("float32", ROWS)


@dataclass(frozen=True, slots=True)
class UnpackedPanel:
    """Emits ``rows`` blocks of 16 weight rows from block ``first`` on."""

    problem: Problem
    dot: Dot
    x: Activations
    weights: Weights
    bias: Any
    y: Any
    first: Any
    rows: int
    tokens: int
    columns: int
    unroll: int
    next_panel: int
    """Row blocks to the thread's next panel, for prefetches; 0: none are made."""

    @property
    def single(self) -> bool:
        """True if a row is one group, whose integer sums pass through memory between runs of columns."""
        return self.problem.layout.groups == 1

    @property
    def unit(self) -> int:
        """Blocks of columns that are summed, and what comes next is asked for, at a time."""
        layout = self.problem.layout
        return max(1, _SPAN // layout.block) if self.single else layout.group_blocks

    def emit(self) -> None:
        """Unpack a run of columns, multiply it with all tokens; repeat; scale and store."""
        layout, m = self.problem.layout, self.problem.m
        unit = self.unit
        units = max(1, min(self.columns, layout.k_padded) // (unit * layout.block))
        words = workspace((units * unit * layout.quads, self.rows, ROWS), "int32")
        kind = "int32" if self.single else "float32"
        sums = workspace((m, self.rows, ROWS), kind)
        with loop(m) as t:
            for r in range(self.rows):
                none = splat(T.cast(T.int32(0), kind), ROWS)
                if self.single and not layout.late_zero:
                    none = splat(load(self.x.sums, t, 0), ROWS)
                store(sums, none, t, r, 0, lanes=ROWS)

        def run(start: Any, count: int, blocks: int) -> None:
            """Do ``count`` units of so many blocks from block ``start`` on."""
            self._unpack(words, start, count * blocks)
            ahead = units * unit if blocks == unit else 0
            self._over_tokens(
                lambda t, n, turn: self._tile(words, sums, t, n, turn, start, count, blocks, ahead)
            )

        whole, rest = divmod(layout.blocks, units * unit)
        if whole:
            with loop(whole) as i:
                run(i * (units * unit), units, unit)
        start = whole * units * unit
        if rest >= unit:
            run(start, rest // unit, unit)
        if rest % unit:
            run(start + rest // unit * unit, 1, rest % unit)
        with loop(m) as t:
            self._write(sums, t)

    def _over_tokens(self, emit: Callable[[Any, int, Any], None]) -> None:
        count, rest = divmod(self.problem.m, self.tokens)
        if count:
            with loop(count) as i:
                emit(i * self.tokens, self.tokens, i)
        if rest:
            emit(count * self.tokens, rest, count)

    def _unpack(self, words: Any, start: Any, blocks: int) -> None:
        """Unpack so many blocks of columns of each block of rows."""
        layout, constants = self.problem.layout, tables(self.problem.layout)
        with loop(blocks) as b:
            for r in range(self.rows):
                lines = [
                    load(
                        self.weights.codes,
                        self.first + r,
                        (start + b) * layout.lines + i,
                        0,
                        lanes=64,
                    )
                    for i in range(layout.lines)
                ]
                whole = [bind(T.reinterpret(f"int32x{ROWS}", line)) for line in lines]
                for q, word in enumerate(self.dot.unpacked(whole, constants)):
                    store(words, word, b * layout.quads + q, r, 0, lanes=ROWS)

    def _tile(
        self, words: Any, sums: Any, first: Any, tokens: int, turn: Any, start: Any, count: int,
        blocks: int, ahead: int,
    ) -> None:  # fmt: skip
        """Add the products of ``count`` units of columns to the sums of ``tokens`` tokens."""
        layout = self.problem.layout
        grid = [(r, t) for r in range(self.rows) for t in range(tokens)]
        kind = "int32" if self.single else "float32"
        total = {
            (r, t): Register(kind, ROWS, load(sums, first + t, r, 0, lanes=ROWS)) for r, t in grid
        }
        quads = blocks * layout.quads

        def unit(u: Any) -> None:
            if ahead:
                self._ask_ahead(start + u * blocks, blocks, ahead, turn)
            if self.single:
                self._dots(words, total, first, tokens, start, u * quads, quads)
                return
            group = bind(start // blocks + u)
            acc = {(r, t): Register("int32", ROWS, self._begin(first + t, group)) for r, t in grid}
            self._dots(words, acc, first, tokens, start, u * quads, quads)
            for r in range(self.rows):
                at = (self.first + r, group, 0)
                scale = bind(T.cast(load(self.weights.scale, *at, lanes=ROWS), F32))
                zero = self._zero(*at) if layout.late_zero else None
                for t in range(tokens):
                    value = self._corrected(acc[r, t].get(), zero, first + t, group)
                    total[r, t].set(total[r, t].get() + value * scale)

        with loop(count) as u:
            unit(u)
        for (r, t), register in total.items():
            store(sums, register.get(), first + t, r, 0, lanes=ROWS)

    def _dots(
        self, words: Any, acc: dict[tuple[int, int], Register], first: Any, tokens: int, start: Any,
        base: Any, quads: int,
    ) -> None:  # fmt: skip
        """Add the products of so many operands of four columns, the first of them ``base``."""
        layout = self.problem.layout
        unroll = next(u for u in (self.unroll, 2, 1) if quads % u == 0)
        with loop(quads // unroll) as s:
            at = bind(base + s * unroll)
            column = bind((start * layout.quads + at) * 4)
            x = [
                [self._four(first + t, column + 4 * u) for u in range(unroll)]
                for t in range(tokens)
            ]
            for r in range(self.rows):
                w = [bind(load(words, at + u, r, 0, lanes=ROWS)) for u in range(unroll)]
                for t in range(tokens):
                    register = acc[r, t]
                    for u in range(0, unroll, layout.quads):  # at most a block at a time
                        some = slice(u, u + layout.quads)
                        register.set(self.dot.block(register.get(), w[some], x[t][some]))

    def _four(self, token: Any, column: Any) -> Any:
        """Load four activations, in all lanes."""
        four = self.x.codes[token, T.ramp(column, 1, 4)]
        return bind(splat(T.reinterpret("int32", four), ROWS))

    def _begin(self, token: Any, group: Any) -> Any:
        if self.problem.layout.late_zero:
            return splat(T.int32(0), ROWS)
        return splat(load(self.x.sums, token, group), ROWS)

    def _zero(self, *at: Any) -> Any:
        layout = self.problem.layout
        if not layout.fmt.has_zero:
            return splat(T.float32(layout.fmt.fixed_zero), ROWS)
        return bind(T.cast(load(self.weights.zero, *at, lanes=ROWS), F32))

    def _corrected(self, value: Any, zero: Any, token: Any, group: Any) -> Any:
        """Return sums less their zero point as float32."""
        if zero is None:
            return T.cast(value, F32)
        return minus_zero(value, zero, load(self.x.sums, token, group), self.problem.layout, ROWS)

    def _ask_ahead(self, block: Any, blocks: int, ahead: int, turn: Any) -> None:
        """Prefetch this tile's share of the codes that the next run unpacks in place of these blocks."""
        if not self.next_panel:
            return
        layout = self.problem.layout
        turns = -(-self.problem.m // self.tokens)
        share = -(-blocks * layout.lines // turns)
        end = layout.blocks * layout.lines
        start = bind((block + ahead) * layout.lines + turn * share)
        for i in range(share):
            line = bind(T.Select(start + i >= end, start + i - end, start + i))
            jump = T.Select(start + i >= end, T.int32(self.next_panel), T.int32(0))
            for r in range(self.rows):
                prefetch(self.weights.codes, self.first + jump + r, line, 0, near=False)

    def _write(self, sums: Any, token: Any) -> None:
        """Scale the sums of a token, add the bias and store."""
        for r in range(self.rows):
            value, block = load(sums, token, r, 0, lanes=ROWS), self.first + r
            if self.single:
                at = (block, 0, 0)
                zero = self._zero(*at) if self.problem.layout.late_zero else None
                scale = T.cast(load(self.weights.scale, *at, lanes=ROWS), F32)
                value = self._corrected(value, zero, token, 0) * scale
            value = value * splat(self.x.scale[token], ROWS)
            if self.bias is not None:
                value = value + load(self.bias, block, 0, lanes=ROWS)
            last = r + 1 == self.rows
            store_rows(self.y, token, block, 0, ROWS, bind(value), self.problem.n, last=last)
