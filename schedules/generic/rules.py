"""How one block is scheduled: each rule transforms a schedule in place, or says that it does not fit.

A rule takes the schedule, the facts of its block, the config, and whether threads are worth their price.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mimo_compile.schedules.generic.blocks import BlockFacts, extent

ENOUGH_TASKS = 8
"""Outer iterations that keep threads evenly busy."""


@dataclass(frozen=True, slots=True)
class Knobs:
    """What the rules can be told about one block; each listens to what concerns it."""

    vector: int = 16
    """Lanes; 1 leaves vectorisation to LLVM."""
    unroll: int = 4
    """Vectors of a register tile along the output axis."""
    tile: int = 4
    """Rows of a register tile."""
    order: str = "auto"
    """Register tiles pass ``columns`` outermost (a panel of columns stays in cache) or ``rows``."""
    steps: int = 1
    """Steps of the innermost reduced loop that are written out."""


def divisor(n: int, most: int) -> int:
    """Return the largest divisor of ``n`` that is at most ``most``."""
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def power(n: int, most: int) -> int:
    """Return the largest power of two that divides ``n`` and is at most ``most``."""
    return min(n & -n, 1 << (most.bit_length() - 1))


def _spread(schedule: Any, loops: list[Any], wide: bool) -> None:
    """Fuse outer loops and run them on all threads."""
    if wide and loops:
        schedule.parallel(schedule.fuse(*loops) if len(loops) > 1 else loops[0])


def outer_rule(schedule: Any, facts: BlockFacts, config: Knobs, wide: bool) -> bool:
    """Only threads: over the leading spatial loops."""
    loops = schedule.get_loops(schedule.get_sblock(facts.name))
    leading = []
    for loop, kind in zip(loops, facts.kinds, strict=True):
        if kind != "S":
            break
        leading.append(loop)
    _spread(schedule, leading, wide)
    return True


def spatial_rule(schedule: Any, facts: BlockFacts, config: Knobs, wide: bool) -> bool:
    """Vectorise the last axis of an element-wise block, or all axes together where that is one axis."""
    block = schedule.get_sblock(facts.name)
    loops = schedule.get_loops(block)
    if not loops:
        return True
    total = math.prod(facts.extents)
    if facts.linear and len(loops) > 1:
        loops = [schedule.fuse(*loops)]
        last = total
    else:
        last = facts.extents[-1]
    *outer, inner = loops
    lanes = power(last, config.vector)
    if lanes >= 4 and facts.vectorisable:
        chunk, lane = schedule.split(inner, [None, lanes])
        schedule.vectorize(lane)
        outer = [*outer, chunk] if not outer or last // lanes > 1 else outer
    elif not outer:  # threads need a loop; LLVM vectorises the rest
        part = divisor(last, 64)
        outer = [schedule.split(inner, [part, None])[0]]
    _spread(schedule, outer, wide)
    return True


def tiled_rule(schedule: Any, facts: BlockFacts, config: Knobs, wide: bool) -> bool:
    """Register tile: vectors over an output axis that all operands follow, rows over the one before."""
    axis = facts.vector_axis
    if axis is None or config.vector == 1:
        return False
    lanes = power(facts.extents[axis], config.vector)
    if lanes < 4:
        return False
    chunks = facts.extents[axis] // lanes
    vectors = divisor(chunks, config.unroll)
    if 2 * vectors < config.unroll:
        vectors = divisor(chunks, 2 * config.unroll)
    spatial = [i for i, k in enumerate(facts.kinds) if k == "S"]
    row = facts.reuse_axis
    if row is None:
        row = next((i for i in reversed(spatial) if i < axis and facts.extents[i] > 1), None)
    rows = 1 if row is None else divisor(facts.extents[row], config.tile)
    ragged = row is not None and 2 * rows <= config.tile and facts.extents[row] > 2 * config.tile
    block = schedule.get_sblock(facts.name)
    cached = schedule.cache_write(block, 0, "global")
    loops = schedule.get_loops(block)
    column, column_in, lane = schedule.split(loops[axis], [None, vectors, lanes])
    outer = [loops[i] for i in spatial if i not in (axis, row)]
    inner, last = [], []
    if row is None:
        outer.append(column)
    else:
        part, within = schedule.split(loops[row], [None, config.tile if ragged else rows])
        inner.append(within)
        # a panel of columns stays in cache while the rows pass, if the columns can feed the threads
        panels = ragged or chunks // vectors >= ENOUGH_TASKS
        if config.order != "auto" and not ragged:
            panels = config.order == "columns"
        if panels:
            outer.append(column)
            last.append(part)
        else:
            outer += [part, column]
        if ragged:  # whole tiles without the test for the end, then the last one
            schedule.annotate(part, "pragma_loop_partition_hint", 1)
    reduced = [loops[i] for i, k in enumerate(facts.kinds) if k == "R"]
    written_out = []
    if config.steps > 1:
        *rest, deepest = reduced
        deep, step = schedule.split(deepest, [None, config.steps])
        reduced, written_out = [*rest, deep], [step]
    schedule.reorder(*outer, *last, *reduced, *written_out, *inner, column_in, lane)
    schedule.reverse_compute_at(cached, (outer + last)[-1])
    for loop in (*written_out, *inner, column_in):
        schedule.unroll(loop)
    schedule.vectorize(lane)
    _spread(schedule, outer, wide)  # before the block stops to be a reduction as a whole
    depth = (1 if wide else len(outer)) + len(last)
    start = schedule.decompose_reduction(block, reduced[0])
    for target in (start, cached):
        own = schedule.get_loops(target)[depth:]
        if extent(schedule.get(own[-1]).extent) == vectors * lanes and vectors > 1:
            own = [*own[:-1], *schedule.split(own[-1], [vectors, lanes])]
        for loop in own[:-1]:
            schedule.unroll(loop)
        schedule.vectorize(own[-1])
    return True


def columns_rule(schedule: Any, facts: BlockFacts, config: Knobs, wide: bool) -> bool:
    """The last output axis innermost, in memory, for LLVM to vectorise with whatever tail it has."""
    axis = facts.vector_axis
    if axis is None or facts.extents[axis] < 8:
        return False
    block = schedule.get_sblock(facts.name)
    loops = schedule.get_loops(block)
    outer = [loops[i] for i, k in enumerate(facts.kinds) if k == "S" and i != axis]
    reduced = [loops[i] for i, k in enumerate(facts.kinds) if k == "R"]
    schedule.reorder(*outer, *reduced, loops[axis])
    _spread(schedule, outer, wide)  # before the block stops to be a reduction as a whole
    schedule.decompose_reduction(block, reduced[0])
    return True


def lanes_rule(schedule: Any, facts: BlockFacts, config: Knobs, wide: bool) -> bool:
    """Partial sums in lanes over the innermost reduced axis, then the sum of the lanes."""
    if facts.kinds[-1] != "R" or config.vector == 1 or not facts.vectorisable:
        return False
    lanes = power(facts.extents[-1], config.vector)
    if lanes < 4:
        lanes = config.vector
        if facts.extents[-1] < 2 * lanes:
            return False
    block = schedule.get_sblock(facts.name)
    loops = schedule.get_loops(block)
    count = sum(k == "S" for k in facts.kinds)
    if any(k == "S" for k in facts.kinds[count:]):
        return False
    chunk, lane = schedule.split(loops[-1], [None, lanes])
    if facts.extents[-1] % lanes:  # whole chunks without the test for the end, then the last one
        schedule.annotate(chunk, "pragma_loop_partition_hint", 1)
    partial = schedule.rfactor(lane, count)
    own = schedule.get_loops(partial)
    # rfactor leaves the factor last: spatial..., reduced..., lane
    schedule.vectorize(own[-1])
    _spread(schedule, own[:count], wide)
    start = schedule.decompose_reduction(partial, own[count])
    schedule.vectorize(schedule.get_loops(start)[-1])
    return True
