"""The work of a tiled matmul, from its extents and config: what `loops.tiles` passes over, and how often."""

from __future__ import annotations

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem
from mimo_compile.schedules.work import Stream, Tile, work


def gemm_work(
    problem: Problem,
    config: GemmConfig,
    hardware: Hardware,
    ops: dict[str, float],
    *,
    row_bytes: float,
    prepared: bool,
    lanes: int = ROWS,
) -> Counts:
    """Return the counts of a kernel that runs its tiles by `loops.tiles`.

    Args:
        problem: The matmul.
        config: Its knobs.
        hardware: Whose caches and threads count.
        ops: Arithmetic by kind.
        row_bytes: What a tile reads of one token's activations (or of its tables).
        prepared: The kernel makes these itself, from x, before the tiles.
        lanes: Rows in a vector.
    """
    m, blocks, split = problem.m, problem.row_blocks, config.split
    row_tiles, token_tiles = -(-blocks // config.rows), -(-m // config.tokens)
    chunk = min(config.chunk, row_tiles)
    tasks = -(-row_tiles // chunk)
    weights, x = problem.packed_bytes(), m * row_bytes
    panel, x_tile = weights * min(config.rows, blocks) / blocks, min(config.tokens, m) * row_bytes
    if config.order == "rows":  # a piece of the columns at a time
        weight_stream = Stream(weights, ((token_tiles, (panel + x_tile) / split),))
        x_stream = Stream(x, ((row_tiles, (panel + x) / split),), made=prepared)
    else:
        weight_stream = Stream(weights, ((token_tiles, chunk * panel + x_tile),))
        again = (chunk, panel + x_tile), (tasks, chunk * panel + x)
        x_stream = Stream(x, again, made=prepared)
    streams = [weight_stream, x_stream, Stream(4.0 * m * problem.n)]
    if prepared:  # one pass for the largest value of a row, one to make it
        streams += [Stream(4.0 * m * problem.k, ((2, 4.0 * problem.k),)), Stream(x, made=True)]
    if split > 1:
        parts = 4.0 * split * m * blocks * ROWS
        ops = {**ops, "add_f32": ops.get("add_f32", 0.0) + parts / 4}
        streams += [Stream(parts), Stream(parts, made=True)]
    threads = hardware.threads if config.parallel else 1
    return work(
        ops,
        streams,
        hardware,
        tasks=split * tasks if threads > 1 else 1,
        share=share_of(problem, config, threads),
        useful=problem.weight.useful,
        tile=Tile(
            config.rows * ROWS / lanes,
            min(config.tokens, m),
            (panel + x_tile) / split,
            lanes,
            4.0 if prepared else 1.0,
        ),
    )


def share_of(problem: Problem, config: GemmConfig, threads: int) -> float:
    """Return the share of the tiles that the busiest of some threads does: each takes a run of tasks."""
    blocks, row_tiles = problem.row_blocks, -(-problem.row_blocks // config.rows)
    chunk = min(config.chunk, row_tiles)
    tasks = config.split * -(-row_tiles // chunk)
    run = -(-tasks // min(tasks, threads))
    pieces, rest = divmod(run, -(-row_tiles // chunk))  # whole ones, and tasks of another
    return (pieces + min(rest * chunk * config.rows, blocks) / blocks) / config.split
