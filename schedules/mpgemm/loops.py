"""The loops around register tiles, and what happens to a tile's sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mimo_compile.schedules.emit.build import T, choose, load, loop, when
from mimo_compile.schedules.emit.tile import Out, TileKnobs, store_rows
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem


def tiles(
    problem: Problem,
    config: GemmConfig,
    tile: Callable[[list[tuple[Any, ...]], list[Any]], None],
) -> None:
    """Emit the loops around register tiles, with smaller tiles where rows or tokens run out.

    Args:
        problem: The matmul.
        config: Its tile, chunk, order and threads.
        tile: Emits one tile for row blocks and tokens.
    """
    wide = any(math.prod(a.shape) >= 2**31 for a in problem.args())
    full, part = divmod(problem.row_blocks, config.rows)
    row_tiles = full + (part > 0)
    chunk = min(config.chunk, row_tiles)

    def at_rows(index: Any, first: Any, count: int) -> None:
        def emit(rows: int) -> None:
            at = T.cast(index, "int64") if wide and not isinstance(index, int) else index
            blocks: list[tuple[Any, ...]] = [(at * config.rows + r,) for r in range(rows)]
            tile(blocks, [first + t for t in range(count)])

        if not part:
            emit(config.rows)
        elif not full:
            emit(part)
        else:
            choose(index < full, lambda: emit(config.rows), lambda: emit(part))

    def over_tokens(emit: Callable[[Any, int], None]) -> None:
        count, rest = divmod(problem.m, config.tokens)
        if count:
            with loop(count) as i:
                emit(i * config.tokens, config.tokens)
        if rest:
            emit(count * config.tokens, rest)

    def over_chunk(task: Any, emit: Callable[[Any], None]) -> None:
        with loop(chunk) as c:
            if row_tiles % chunk:
                with when(task * chunk + c < row_tiles):
                    emit(task * chunk + c)
            else:
                emit(task * chunk + c)

    tasks = -(-row_tiles // chunk)
    with problem.launch(tasks), loop(tasks, parallel=config.parallel) as task:
        problem.start_task()
        if config.order == "rows":
            over_chunk(task, lambda i: over_tokens(lambda first, n: at_rows(i, first, n)))
        else:
            over_tokens(lambda first, n: over_chunk(task, lambda i: at_rows(i, first, n)))


def tile_knobs(
    problem: Problem, config: GemmConfig, tokens: list[Any], *, lookup: bool = False
) -> TileKnobs:
    """Return the knobs of the tile that `tiles` emits for ``tokens``."""
    turns = config.turns(problem.m)
    turn = (T.floordiv(tokens[0], config.tokens), turns) if turns > 1 else None
    return TileKnobs(config.prefetch, config.unroll, lookup, config.rows, turn)


def writer(
    problem: Problem,
    y: Any,
    bias: Any,
    blocks: list[tuple[Any, ...]],
    tokens: list[Any],
    lanes: int,
) -> Out:
    """Return the ``out`` of a tile: add the bias and store, cutting off rows behind N."""

    def out(r: int, m: int, lane: int, value: Any) -> None:
        (block,) = blocks[r]
        if bias is not None:
            value = value + load(bias, block, lane, lanes=lanes)
        value = problem.finish(value, tokens[m], block, lane, lanes)
        last = r + 1 == len(blocks)  # the last block of all is the last of its tile
        store_rows(y, tokens[m], block, lane, lanes, value, problem.n, last=last)

    return out
