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
    m, blocks = problem.m, problem.row_blocks
    row_tiles, token_tiles = -(-blocks // config.rows), -(-m // config.tokens)
    chunk = min(config.chunk, row_tiles)
    tasks = -(-row_tiles // chunk)
    weights, x = problem.packed_bytes(), m * row_bytes
    panel, x_tile = weights * min(config.rows, blocks) / blocks, min(config.tokens, m) * row_bytes
    if config.order == "rows":
        weight_stream = Stream(weights, ((token_tiles, panel + x_tile),))
        x_stream = Stream(x, ((row_tiles, panel + x),), made=prepared)
    else:
        weight_stream = Stream(weights, ((token_tiles, chunk * panel + x_tile),))
        again = (chunk, panel + x_tile), (tasks, chunk * panel + x)
        x_stream = Stream(x, again, made=prepared)
    streams = [weight_stream, x_stream, Stream(4.0 * m * problem.n)]
    if prepared:  # one pass for the largest value of a row, one to make it
        streams += [Stream(4.0 * m * problem.k, ((2, 4.0 * problem.k),)), Stream(x, made=True)]
    threads = hardware.threads if config.parallel else 1
    most = -(-tasks // min(tasks, threads)) * chunk * config.rows  # a thread takes a run of tasks
    return work(
        ops,
        streams,
        hardware,
        tasks=tasks if threads > 1 else 1,
        share=min(most, blocks) / blocks,
        useful=problem.weight.useful,
        tile=Tile(
            config.rows * ROWS / lanes,
            min(config.tokens, m),
            panel + x_tile,
            lanes,
            4.0 if prepared else 1.0,
        ),
    )
