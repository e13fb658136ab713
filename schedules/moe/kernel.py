"""The phases of an expert kernel: sort slots, gate and up, silu, down, weighted sum.

A slot is one (token, choice) pair. Slots are sorted by expert, stably, so that each weight is read
once for all tokens of its expert; both matmuls use the tiles and packed layouts of plain matmuls with
the expert as leading index. Ids outside ``[0, E)`` add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    splat,
    store,
    when,
    workspace,
)
from mimo_compile.schedules.emit.dot import LOOKUP
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.matrix import Matrix
from mimo_compile.schedules.emit.tile import Out, Share, TileKnobs, Weights, store_rows
from mimo_compile.schedules.emit.vector import sigmoid
from mimo_compile.schedules.moe.multiply import Multiply
from mimo_compile.schedules.moe.problem import Split
from mimo_compile.schedules.moe.slots import Slots, sorted_slots, visits


class ExpertKernel:
    """Emits the phases of one kernel."""

    def __init__(self, multiply: Multiply) -> None:
        self.multiply = multiply
        self.problem, self.config = problem, config = multiply.problem, multiply.config
        self.split13 = Split.of(problem.w13, config.rows13, config.tasks)
        self.split2 = Split.of(problem.w2, config.rows2, config.tasks)
        self.wide = any(math.prod(a.shape) >= 2**31 for a in problem.args())

    def body(self, *buffers: Any) -> None:
        """Emit everything, given the buffers of the parameters."""
        with self.multiply.frame():
            self.phases(*buffers)

    def phases(self, x: Any, ids: Any, weights: Any, *rest: Any) -> None:
        """Emit all phases in order."""
        p, config = self.problem, self.config
        *packed, y = rest
        half = len(packed) // 2
        w13, w2 = Weights(*packed[:half]), Weights(*packed[half:])
        slots = sorted_slots(p, ids)
        hidden = workspace((p.slots, p.hidden_width), "float32")
        rows = self.prepared(p.w13, x, p.t, p.t * p.d)
        with loop(self.split13.tasks, parallel=config.parallel) as task:
            self.gate_up(w13, rows, slots, hidden, task)
        inner = self.prepared(p.w2, hidden, slots.start[slots.hits[0]], p.slots * p.f)
        with loop(self.split2.tasks, parallel=config.parallel) as task:
            self.down(w2, inner, slots, weights, y, task)

    def prepared(self, matrix: Matrix, x: Any, rows: Any, size: int) -> Any:
        """Emit what the rows of ``x``, of ``size`` numbers, become before the tiles; return it."""
        parts, x = self.problem.parts, self.view(x)
        return self.multiply.prepared(matrix, x, rows if parts == 1 else parts * rows, size)

    def view(self, buffer: Any) -> Any:
        """Return rows of a token each as `Problem.parts` rows."""
        return buffer

    def tile(
        self, matrix: Matrix, weights: Weights, x: Any,
        blocks: list[tuple[Any, ...]], tokens: list[Any], out: Out, next_tile: int,
        share: Share | None,
    ) -> None:  # fmt: skip
        """Emit one register tile."""
        config = self.config
        lookup = config.dot == LOOKUP
        knobs = TileKnobs(config.prefetch, config.unroll, lookup, next_tile, share=share)
        self.multiply.tile(matrix, weights, x, blocks, tokens, out, knobs)

    def over_experts(
        self, slots: Slots, task: Any, split: Split,
        emit: Callable[[Any, list[Any], Any, Share | None], None],
    ) -> None:  # fmt: skip
        """Visit the hit experts, a task's tiles of rows, and the expert's slots in tiles.

        ``emit(expert, places, tile, share)``: the sorted positions of some of its slots, of which the last
        one may come several times; the tile's number in the task.
        """
        shares, size, once = self.config.share, self.config.tokens, self.config.once
        with T.serial(0, slots.hits[0]) as h:
            expert = slots.expert[h]
            expert = bind(T.cast(expert, "int64") if self.wide else expert)
            first, count = bind(slots.start[h]), bind(slots.start[h + 1] - slots.start[h])
            part: Any = bind(T.floordiv(T.int32(Share.WHOLE), count)) if shares else None

            def over_slots(tile: Any) -> None:
                away = self.next_tile(slots, h, expert, split, task, tile) if shares else None

                def visit(done: Any, room: int, sure: int) -> None:
                    share = Share(bind(done * part), bind(part * room), away) if shares else None
                    at = bind(first + done)
                    last = first + count - 1
                    some = [at + m if m < sure else bind(T.min(at + m, last)) for m in range(room)]
                    emit(expert, some, tile, share)

                visits(count, size, visit, once=once)

            self.over_tiles(task, split, over_slots)

    def next_tile(
        self, slots: Slots, h: Any, expert: Any, split: Split, task: Any, tile: Any
    ) -> tuple[Any, Any]:
        """Return how far the tile that a task reads next is away, in experts and in row blocks."""
        after = slots.expert[T.min(h + 1, slots.hits[0] - 1)]
        experts = (T.cast(after, "int64") if self.wide else after) - expert
        if split.chunk == 1:
            return bind(experts), 0
        at_end = T.Or(tile + 1 == split.chunk, task * split.chunk + tile + 1 == split.tiles)
        none = T.int64(0) if self.wide else T.int32(0)
        back = T.cast(-tile * split.rows, "int32")
        return bind(T.Select(at_end, experts, none)), bind(
            T.Select(at_end, back, T.int32(split.rows))
        )

    def over_tiles(self, task: Any, split: Split, emit: Callable[[Any], None]) -> None:
        """Visit a task's tiles."""
        with loop(split.chunk) as tile:
            if split.tiles % split.chunk:
                with when(task * split.chunk + tile < split.tiles):
                    emit(tile)
            else:
                emit(tile)

    def gate_up(self, w13: Weights, x: Any, slots: Slots, hidden: Any, task: Any) -> None:
        """Compute ``silu(gate) * up`` of some rows for all slots."""
        split, width = self.split13, self.multiply.lanes
        rows = split.rows

        def emit(expert: Any, places: list[Any], tile: Any, share: Share | None) -> None:
            start = split.first(task, tile)
            blocks: list[tuple[Any, ...]] = [
                (expert, half, start + r) for half in (0, 1) for r in range(rows)
            ]
            gates: dict[tuple[int, int, int], Register] = {}

            def out(r: int, m: int, lane: int, value: Any) -> None:
                if r < rows:
                    gates[r, m, lane] = Register("float32", width, value)
                    return
                gate = bind(gates[r - rows, m, lane].get())
                result = gate * sigmoid(gate, width) * value
                store(hidden, result, places[m], (start + r - rows) * ROWS + lane, lanes=width)

            tokens = [bind(slots.token[place]) for place in places]
            matrix = self.problem.w13
            if not self.config.apart:
                self.tile(matrix, w13, x, blocks, tokens, out, split.next_tile, share)
                return
            # the same rows of up come next, then the next rows of gate
            self.tile(matrix, w13, x, blocks[:rows], tokens, out, matrix.row_blocks, share)
            again = rows - matrix.row_blocks

            def up(r: int, m: int, lane: int, value: Any) -> None:
                out(rows + r, m, lane, value)

            self.tile(matrix, w13, x, blocks[rows:], tokens, up, again, share)

        self.over_experts(slots, task, split, emit)

    def down(self, w2: Weights, x: Any, slots: Slots, weights: Any, y: Any, task: Any) -> None:
        """Project some rows of all slots down and add each token's up in the order of its choices."""
        p, split, width = self.problem, self.split2, self.multiply.lanes
        rows, of_token, y = split.rows, p.parts, self.view(y)
        parts = workspace((of_token * p.slots, split.chunk * rows * ROWS), "float32")

        def emit(expert: Any, places: list[Any], tile: Any, share: Share | None) -> None:
            start = split.first(task, tile)
            blocks: list[tuple[Any, ...]] = [(expert, start + r) for r in range(rows)]

            def out(r: int, m: int, lane: int, value: Any) -> None:
                column = (tile * rows + r) * ROWS + lane
                row = of_token * places[m // of_token] + m % of_token
                store(parts, value, row, column, lanes=width)

            self.tile(p.w2, w2, x, blocks, places, out, split.next_tile, share)

        def add(t: Any, part: Any, tile: Any) -> None:
            sums = [Register("float32", ROWS, splat(T.float32(0), ROWS)) for _ in range(rows)]
            with loop(p.k) as j:
                at = bind(slots.place[t * p.k + j])
                with when(at >= 0):
                    weight = splat(bind(weights[t, j]), ROWS)
                    for r, total in enumerate(sums):
                        column = (tile * rows + r) * ROWS
                        value = load(parts, of_token * at + part, column, lanes=ROWS)
                        total.set(total.get() + weight * value)
            start, n = split.first(task, tile), p.d // of_token
            for r, total in enumerate(sums):
                place = of_token * t + part
                store_rows(y, place, start + r, 0, ROWS, total.get(), n, last=r + 1 == rows)

        self.over_experts(slots, task, split, emit)
        with loop(p.t) as t, loop(of_token) as part:
            self.over_tiles(task, split, lambda tile: add(t, part, tile))
