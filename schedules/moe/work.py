"""The work of an expert kernel, from its extents and config, for tokens that choose experts evenly."""

from __future__ import annotations

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.moe.multiply import Multiply
from mimo_compile.schedules.moe.problem import Split
from mimo_compile.schedules.moe.slots import rooms
from mimo_compile.schedules.work import Stream, Tile, busiest, work


def expert_work(multiply: Multiply, hardware: Hardware) -> Counts:
    """Return the counts under uniform routing, over padded extents."""
    p, config = multiply.problem, multiply.config
    hit = p.hit
    tiles, room = _tiles(p.slots / hit, config.tokens, config.once)
    visits = hit * tiles
    threads = hardware.threads if config.parallel else 1
    tokens = min(config.tokens, max(1.0, p.slots / hit))
    width = multiply.lanes
    tasks13 = Split.of(p.w13, config.rows13, config.tasks).tasks
    tasks2 = Split.of(p.w2, config.rows2, config.tasks).tasks
    cost13 = float(p.halves * p.w13.row_blocks * p.layout13.k)
    cost2 = float(p.w2.row_blocks * p.layout2.k)
    share = cost13 * busiest(tasks13, threads) + cost2 * busiest(tasks2, threads)
    rows13 = config.rows13 * (1 if config.apart else p.halves)
    panel = rows13 * p.w13.block_bytes
    row = multiply.row_bytes(p.w13)
    return work(
        _arithmetic(multiply, p.slots * room, visits),
        _streams(multiply, hit, visits),
        hardware,
        tasks=max(tasks13, tasks2) if threads > 1 else 1,
        share=share / (cost13 + cost2),
        useful=(2 * p.w13.useful + p.w2.useful) / 3,
        tile=Tile(rows13 * ROWS / width, tokens, panel + tokens * row, width),
    )


def _tiles(slots: float, size: int, once: bool) -> tuple[int, float]:
    """Return the register tiles that an expert's slots take, and their room, in parts of these slots.

    There are whole tiles, then halves of halves, or one (``once``) with room for what is left or more.
    """
    count = max(1, round(slots))
    whole, rest = divmod(count, size)
    if not once:
        return whole + rest.bit_count(), 1.0
    room = next(r for r in rooms(size) if r >= rest) if rest else 0
    return whole + (rest > 0), (whole * size + room) / count


def _arithmetic(multiply: Multiply, slots: float, visits: float) -> dict[str, float]:
    """Return dots or multiply-adds for the ``slots`` that tiles have room for, unpacking for each visit."""
    p = multiply.problem
    ops: dict[str, float] = {"exp_f32": float(p.slots * p.w13.row_blocks * ROWS)}

    def add(more: dict[str, float], times: int = 1) -> None:
        for kind, amount in more.items():
            ops[kind] = ops.get(kind, 0.0) + times * amount

    add(multiply.making(p.w13, p.t))
    add(multiply.making(p.w2, p.slots))
    add(multiply.work(p.w13, slots, visits), p.halves)
    add(multiply.work(p.w2, slots, visits))
    add({"fma_f32": float(p.slots * p.d)})
    return ops


def _streams(multiply: Multiply, hit: float, visits: float) -> list[Stream]:
    """Return what both matmuls pass over: in each task all hit experts, one tile of slots at a time."""
    p, config = multiply.problem, multiply.config
    out = [Stream(8.0 * p.t * p.d + 8.0 * p.slots)]
    for matrix, halves, rows, source in (
        (p.w13, p.halves, config.rows13, p.t),
        (p.w2, 1, config.rows2, p.slots),
    ):
        row = multiply.row_bytes(matrix)
        panel = halves * rows * matrix.block_bytes
        split = Split.of(matrix, rows, config.tasks)
        weights = hit * halves * matrix.row_blocks * matrix.block_bytes
        out.append(Stream(weights, ((visits / hit, panel + config.tokens * row),)))
        # a task reads each slot's row once; the next task comes after all panels and rows
        activations = (p.slots / source, hit * panel), (split.tasks, hit * panel + source * row)
        if split.chunk > 1:  # each tile of an expert's rows reads the expert's slots
            again = panel + p.slots / hit * row
            activations = (p.slots / source, hit * panel * split.chunk), (split.tiles, again)
        out.append(Stream(source * row, activations, made=True))
    hidden = 4.0 * p.slots * p.hidden_width
    return [*out, Stream(hidden, made=True), Stream(4.0 * p.slots * p.d, ((2, 0.0),), made=True)]
