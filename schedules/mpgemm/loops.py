"""The loops around register tiles, and what happens to a tile's sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mimo_compile.schedules.emit.build import (
    T,
    bind,
    choose,
    load,
    loop,
    store,
    when,
    workspace,
)
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.tile import Out, Piece, TileKnobs, store_rows
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem

ADD_ALONE = 256 << 10
"""Sums of pieces that one thread adds before others would have woken up."""


Blocks = list[tuple[Any, ...]]


def panels(
    problem: Problem, rows: int, emit: Callable[[Any, int], None], *, parallel: bool
) -> None:
    """Emit the loop over panels of ``rows`` row blocks; ``emit(first, count)``: blocks from ``first`` on."""
    full, part = divmod(problem.row_blocks, rows)
    with loop(full + (part > 0), parallel=parallel) as index:
        if not part:
            emit(index * rows, rows)
        elif not full:
            emit(index * rows, part)
        else:
            choose(index < full, lambda: emit(index * rows, rows), lambda: emit(index * rows, part))


def tiles(problem: Problem, config: GemmConfig, tile: Callable[[Blocks, list[Any]], None]) -> None:
    """Emit the loops around register tiles over all columns; see `tiles_of_pieces`."""
    tiles_of_pieces(problem, config, lambda blocks, tokens, _: tile(blocks, tokens))


def tiles_of_pieces(
    problem: Problem,
    config: GemmConfig,
    tile: Callable[[Blocks, list[Any], Piece | None], None],
) -> None:
    """Emit the loops around register tiles, with smaller tiles where rows or tokens run out.

    Args:
        problem: The matmul.
        config: Its tile, chunk, order, pieces and threads.
        tile: Emits one tile for row blocks, tokens and a piece of the columns (None: all).
    """
    wide = any(math.prod(a.shape) >= 2**31 for a in problem.args())
    full, part = divmod(problem.row_blocks, config.rows)
    row_tiles = full + (part > 0)
    chunk = min(config.chunk, row_tiles)

    def at_rows(piece: Piece | None, index: Any, first: Any, count: int) -> None:
        def emit(rows: int) -> None:
            at = T.cast(index, "int64") if wide and not isinstance(index, int) else index
            blocks: Blocks = [(at * config.rows + r,) for r in range(rows)]
            tile(blocks, [first + t for t in range(count)], piece)

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

    chunks = -(-row_tiles // chunk)
    tasks = config.split * chunks
    with problem.launch(tasks), loop(tasks, parallel=config.parallel) as task:
        problem.start_task()
        piece, run = None, task
        if config.split > 1:
            # a thread takes a run of tasks: all rows of a piece, rather than all pieces of a row
            piece = Piece(bind(T.floordiv(task, chunks)), config.split)
            run = bind(T.floormod(task, chunks)) if chunks > 1 else 0
        if config.order == "rows":
            over_chunk(run, lambda i: over_tokens(lambda first, n: at_rows(piece, i, first, n)))
        else:
            over_tokens(lambda first, n: over_chunk(run, lambda i: at_rows(piece, i, first, n)))


@dataclass(frozen=True, slots=True)
class Results:
    """Where the results of tiles go, and what sums become on their way."""

    y: Any
    bias: Any
    lanes: int = ROWS
    """Rows in a vector of sums."""
    dtype: str = "float32"
    """Of the sums of a piece."""
    finish: Callable[[tuple[Any, ...], Any, int, Any], Any] | None = None
    """``finish(block, token, lane, sums)``: results for a vector of sums over all pieces; None: they are."""


def all_tiles(
    problem: Problem,
    config: GemmConfig,
    results: Results,
    tile: Callable[[Blocks, list[Any], Out, TileKnobs, Piece | None], None],
    *,
    lookup: bool = False,
) -> None:
    """Emit all tiles and what stores their results, over all columns or over pieces that are added then.

    Args:
        problem: The matmul.
        config: Its knobs.
        results: What sums become.
        tile: Emits one tile; without a piece its sums are results.
        lookup: See `TileKnobs`.
    """
    to, lanes = results, results.lanes
    if config.split == 1:

        def whole(blocks: Blocks, tokens: list[Any]) -> None:
            out = writer(problem, to.y, to.bias, blocks, tokens, lanes)
            tile(blocks, tokens, out, tile_knobs(problem, config, tokens, lookup=lookup), None)

        tiles(problem, config, whole)
        return
    sums = workspace((config.split, problem.m, problem.row_blocks * ROWS), to.dtype)

    def part(blocks: Blocks, tokens: list[Any], piece: Piece | None) -> None:
        assert piece is not None

        def out(r: int, m: int, lane: int, value: Any) -> None:
            at = blocks[r][0] * ROWS + lane
            store(sums, value, piece.index, tokens[m], at, lanes=lanes)

        tile(blocks, tokens, out, tile_knobs(problem, config, tokens, lookup=lookup), piece)

    tiles_of_pieces(problem, config, part)
    blocks = problem.row_blocks
    shared = config.parallel and config.split * problem.m * blocks * ROWS >= ADD_ALONE
    with loop(problem.m * blocks, parallel=shared) as index:
        token, block = bind(T.floordiv(index, blocks)), bind(T.floormod(index, blocks))
        out = writer(problem, to.y, to.bias, [(block,)], [token], lanes)
        for lane in range(0, ROWS, lanes):
            at = block * ROWS + lane
            value = load(sums, 0, token, at, lanes=lanes)
            for piece in range(1, config.split):
                value = value + load(sums, piece, token, at, lanes=lanes)
            value = bind(value)
            if to.finish is not None:
                value = to.finish((block,), token, lane, value)
            out(0, 0, lane, value)


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
