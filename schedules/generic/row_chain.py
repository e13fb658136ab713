"""Chains over rows (softmax, norms): all blocks of a row one after the other, while the row is in cache.

A function fits when its only output is element-wise over ``[rows..., n]`` and every other block has the
same rows and at most one axis more. Left as separate passes, each block would send its whole result
through memory.
"""

from __future__ import annotations

import math
from typing import Any

from mimo_compile.schedules.generic.blocks import BlockFacts, extent
from mimo_compile.schedules.generic.rules import power


def row_chain(schedule: Any, blocks: list[BlockFacts], vector: int, wide: bool) -> bool:
    """Move all blocks under the loop over rows of the last one, in place; say whether they fit.

    Args:
        schedule: Left half-done if a primitive is refused: give it a copy.
        blocks: All blocks of the function, in program order.
        vector: Lanes; 1 leaves vectorisation to LLVM.
        wide: Spread the rows over threads.
    """
    if len(blocks) < 2 or not _fits(blocks):
        return False
    *chain, last = blocks
    if vector > 1:
        # only lanes that divide the row: `compute_at` loses the test for the end of a split reduction
        vector = power(last.extents[-1], vector)
        if vector < 4:
            return False
    rows = len(last.extents) - 1
    names = [name for facts in chain for name in _in_lanes(schedule, facts, rows, vector)]
    leading = schedule.get_loops(schedule.get_sblock(last.name))[:rows]
    row = schedule.fuse(*leading) if rows > 1 else leading[0]
    for name in reversed(names):
        before = _turns(schedule, name)
        schedule.compute_at(schedule.get_sblock(name), row)
        if _turns(schedule, name) > before:
            return False  # a row needs more than its own row of this block
    if wide:  # before a block stops to be a reduction as a whole
        schedule.parallel(row)
    for name in (*names, last.name):
        _vectorise(schedule, name, vector)
    return True


def _turns(schedule: Any, name: str) -> int:
    """Return the innermost iterations of a block."""
    loops = schedule.get_loops(schedule.get_sblock(name))
    return math.prod(extent(schedule.get(loop).extent) for loop in loops)


def _fits(blocks: list[BlockFacts]) -> bool:
    *chain, last = blocks
    rows = last.extents[:-1]
    if last.reduced or not last.output or not rows or math.prod(rows) < 2:
        return False
    if not any(f.reduced for f in chain) or any(f.output for f in chain):
        return False
    inner = last.extents[-1]
    return all(
        len(f.written) == 1
        and f.extents[: len(rows)] == rows
        and set(f.kinds[: len(rows)]) <= {"S"}
        and f.extents[len(rows) :] in ((), (inner,))
        for f in chain
    )


def _in_lanes(schedule: Any, facts: BlockFacts, rows: int, vector: int) -> list[str]:
    """Split a reduction along the row into lanes; return the names of what it becomes."""
    if facts.kinds[rows:] != ("R",) or vector == 1 or not facts.vectorisable:
        return [facts.name]
    block = schedule.get_sblock(facts.name)
    _, lane = schedule.split(schedule.get_loops(block)[-1], [None, vector])
    partial = schedule.rfactor(lane, rows)
    return [schedule.get(partial).name_hint, facts.name]


def _vectorise(schedule: Any, name: str, vector: int) -> None:
    """Vectorise a block's loops within a row: its lanes, or the row itself."""
    block = schedule.get_sblock(name)
    inner = schedule.get_loops(block)[1:]
    kinds = [int(v.iter_type) for v in schedule.get(block).iter_vars]
    if vector == 1 or not inner:
        return
    if len(inner) == 2:  # partial sums: lanes, then chunks of the row
        lane, chunk = inner
        schedule.reorder(chunk, lane)
        schedule.vectorize(lane)
        start = schedule.decompose_reduction(block, chunk)
        schedule.vectorize(schedule.get_loops(start)[-1])
    elif 2 not in kinds:
        schedule.vectorize(schedule.split(inner[0], [None, vector])[1])
