"""bfloat16 weights times bfloat16 activations on AMX tiles, for many tokens.

Weights in pairs of columns (`emit.pairs`) are tiles as they lie in memory. A task takes a few blocks of 16
weight rows and sums them over all columns in tile registers, for a few tiles of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import KnobValue, Space
from mimo_compile.schedules.emit.amx import NEEDS_BF16, SIDE, TILES, AmxTiles, Row, Tiles
from mimo_compile.schedules.emit.bf16 import bf16_rows
from mimo_compile.schedules.emit.build import bind, load, loop, when, workspace
from mimo_compile.schedules.emit.pairs import DEPTH
from mimo_compile.schedules.emit.tile import store_rows
from mimo_compile.schedules.mpgemm.loops import panels
from mimo_compile.schedules.mpgemm.problem import Problem
from mimo_compile.schedules.mpgemm.x86_bf16 import X86Bf16
from mimo_compile.schedules.work import Stream, Tile, busiest, work


@dataclass(frozen=True, slots=True)
class AmxFloatConfig:
    """Knobs of a matmul of bfloat16 tiles."""

    rows: int = 2
    """Blocks of 16 weight rows that are summed together."""
    tokens: int = 2
    """Tiles of 16 tokens that are summed together."""
    parallel: bool = False
    """Spread the blocks of rows over threads."""


class X86AmxBf16(X86Bf16):
    """For CPUs with AMX bfloat16 tiles."""

    name = "mpgemm.x86_amx_bf16"
    config = AmxFloatConfig
    tiles_class: ClassVar[Callable[[], Tiles]] = AmxTiles

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """bfloat16 on both sides, 8 tokens or more."""
        problem = self.problem(workload)
        both = problem.act == "abf16" and problem.fmt.name == "bf16"
        return both and hardware.features >= NEEDS_BF16 and problem.m >= 8

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles in flight, threads."""
        problem = self.problem(workload)
        knobs: dict[str, tuple[KnobValue, ...]] = {
            "rows": (1, 2, 3),
            "tokens": (1, 2, 3),
            "parallel": (False, True) if hardware.threads > 1 else (False,),
        }

        def legal(config: AmxFloatConfig) -> bool:
            used = config.rows * config.tokens + config.rows + config.tokens
            few = (config.rows - 1) < problem.row_blocks and (config.tokens - 1) * SIDE < problem.m
            return used <= TILES and few

        rows, tokens = min(2, problem.row_blocks), 2 if problem.m > SIDE else 1
        default = AmxFloatConfig(rows, tokens, hardware.threads > 1 and problem.row_blocks > 2)
        return Space(AmxFloatConfig, knobs, default, legal)

    def scratch_bytes(self, problem: Problem, config: Any) -> int:
        """Rounded rows of whole tiles, and the sums of those in flight for two threads."""
        sums = 4 * SIDE * SIDE * config.rows * config.tokens
        return int(2 * _padded(problem.m) * self.columns(problem) + 2 * sums)

    def body(self, problem: Problem, config: Any, hardware: Hardware) -> Callable[..., None]:
        """Return the emitter."""
        columns, m = self.columns(problem), problem.m

        def emit(x: Any, w: Any, *rest: Any) -> None:
            bias, y = rest if problem.bias else (None, *rest)
            room, parallel = _padded(m), config.parallel
            pairs = bf16_rows(None, x, m, problem.k, columns, parallel=parallel, room=room).pairs

            def panel(first: Any, rows: int) -> None:
                tiles = type(self).tiles_class()
                _Panel(problem, tiles, pairs, w, bias, y, first, rows).emit(config.tokens, columns)

            panels(problem, config.rows, panel, parallel=parallel)

        return emit

    def arithmetic(self, problem: Problem, config: Any) -> dict[str, float]:
        """Return tile products over padded extents, and rounding."""
        rows = float(problem.row_blocks * SIDE)
        products = _padded(problem.m) * rows * self.columns(problem)
        return {"tile_bf16": products, "int_op": 6.0 * problem.m * problem.k}

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it."""
        problem = self.problem(workload)
        m, columns = problem.m, self.columns(problem)
        panels = -(-problem.row_blocks // config.rows)
        x = 2.0 * _padded(m) * columns
        panel = 2.0 * SIDE * config.rows * columns
        x_tile = 2.0 * SIDE * config.tokens * columns
        passes = -(-m // (SIDE * config.tokens))
        streams = [
            Stream(problem.packed_bytes(), ((passes, panel + x_tile),)),
            Stream(x, ((panels, x + panel),), made=True),
            Stream(4.0 * m * problem.n),
            Stream(4.0 * m * problem.k),
        ]
        threads = hardware.threads if config.parallel else 1
        return work(
            self.arithmetic(problem, config),
            streams,
            hardware,
            tasks=panels if threads > 1 else 1,
            share=busiest(panels, threads),
            useful=problem.weight.useful * m / _padded(m),
            tile=Tile(config.rows, config.tokens, panel + x_tile),
        )


@dataclass(frozen=True, slots=True)
class _Panel:
    """Emits ``rows`` blocks of 16 weight rows from block ``first`` on."""

    problem: Problem
    tiles: Tiles
    x: Any
    w: Any
    bias: Any
    y: Any
    first: Any
    rows: int

    def emit(self, tokens: int, columns: int) -> None:
        """Multiply with all tokens, ``tokens`` tiles at a time."""
        blocks = _padded(self.problem.m) // SIDE
        sums = workspace((tokens * self.rows * SIDE, SIDE), "float32")
        self.tiles.begin([(SIDE, 4 * SIDE)] * (tokens * self.rows + tokens + self.rows))
        count, rest = divmod(blocks, tokens)
        if count:
            with loop(count) as i:
                self._tokens(i * tokens, tokens, tokens, columns, sums)
        if rest:
            self._tokens(count * tokens, rest, tokens, columns, sums)
        self.tiles.end()

    def _tokens(self, block: Any, tokens: int, most: int, columns: int, sums: Any) -> None:
        grid = [(t, r) for t in range(tokens) for r in range(self.rows)]
        a = most * self.rows
        for t, r in grid:
            self.tiles.zero_f32(t * self.rows + r)
        with loop(columns // DEPTH) as s:
            for t in range(tokens):
                self.tiles.load(a + t, _rows(self.x, (block + t) * SIDE, s * DEPTH), 2 * columns)
            for r in range(self.rows):
                row = _rows(self.w, s * (DEPTH // 2), 0, self.first + r)
                self.tiles.load(a + most + r, row, 4 * SIDE)
            for t, r in grid:
                self.tiles.dot_bf16(t * self.rows + r, a + t, a + most + r)
        for t, r in grid:
            tile = t * self.rows + r
            self.tiles.store(tile, _rows(sums, tile * SIDE, 0), 4 * SIDE)
        for t, r in grid:
            self._write(sums, t * self.rows + r, (block + t) * SIDE, r)

    def _write(self, sums: Any, tile: int, token: Any, r: int) -> None:
        """Store a tile's rows that are tokens, with the bias added."""
        last = r + 1 == self.rows

        def one(i: Any) -> None:
            value = load(sums, tile * SIDE + i, 0, lanes=SIDE)
            if self.bias is not None:
                value = value + load(self.bias, self.first + r, 0, lanes=SIDE)
            n = self.problem.n
            store_rows(self.y, token + i, self.first + r, 0, SIDE, bind(value), n, last=last)

        with loop(SIDE) as i:
            if self.problem.m % SIDE:
                with when(token + i < self.problem.m):
                    one(i)
            else:
                one(i)


def _rows(buffer: Any, row: Any, column: Any, *outer: Any) -> Row:
    """Return the rows of a tile that begins at ``row`` and ``column``."""
    return lambda i: (buffer, (*outer, row + i, column))


def _padded(m: int) -> int:
    return -(-m // SIDE) * SIDE
