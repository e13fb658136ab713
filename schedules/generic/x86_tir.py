"""A decent CPU schedule for any legalised PrimFunc, by rules over its blocks.

Producers that cost nothing to repeat are inlined; element-wise blocks are spread over threads and
vectorised over their last axis; reductions are tiled in registers where a vector runs over an output axis
(matmul, convolution) and split into lanes where it must run over the reduced axis (sums, maxima). Each rule
works on a copy of the schedule and is dropped if TVM refuses any of its steps: what is left is serial, never
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mimo_compile._tvm import compiler
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.generic.blocks import BlockFacts, block_facts, extent, reads_per_element
from mimo_compile.schedules.generic.intrinsics import expand

tvm = compiler()

PARALLEL_WORK = 1 << 16
"""Below this many innermost iterations a loop takes less time than waking the threads does."""

REFUSED = (RuntimeError, ValueError, TypeError)
"""What a primitive raises that cannot be applied (TVM's own errors are RuntimeErrors)."""
ENOUGH_TASKS = 8
"""Outer iterations that keep threads evenly busy."""


@dataclass(frozen=True, slots=True)
class TirConfig:
    """Knobs of the rules."""

    parallel: bool = True
    """Spread the outer loops of blocks with enough work over threads."""
    vector: int = 16
    """Lanes; 1 leaves vectorisation to LLVM."""
    unroll: int = 4
    """Vectors of a register tile along the output axis."""
    tile: int = 4
    """Rows of a register tile."""


def default_config(func: Any) -> TirConfig:
    """Return the config that is used without tuning."""
    work = sum(f.work for f in block_facts(tvm.s_tir.Schedule(func)))
    return TirConfig(parallel=work >= PARALLEL_WORK)


def lower_tir(func: Any, name: str, config: TirConfig, hardware: Hardware) -> Kernel:
    """Schedule a legalised PrimFunc.

    Args:
        func: Static shapes; written parameters become the outputs.
        name: Symbol of the kernel.
        config: Knobs.
        hardware: Threads decide whether loops are parallel.

    Raises:
        ValueError: A shape is not static.
    """
    name = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    args, work, loaded = _describe(func)
    vector = expand(func).with_attr("global_symbol", name).with_attr("tirx.noalias", True)
    schedule = tvm.s_tir.Schedule(tvm.IRModule({"main": vector}))
    threads = config.parallel and hardware.threads > 1
    schedule = _inline(schedule)
    for facts in block_facts(schedule):
        wide = threads and facts.work >= PARALLEL_WORK
        reducing: list[Callable[..., Any]] = [_tiled, _lanes, _columns, _outer]
        if (
            len(facts.written) > 1
        ):  # an argmax: TVM splits its pair of results only in index types alike
            reducing = [_outer]
        for rule in reducing if facts.reduced else [_spatial, _outer]:
            done = _attempt(schedule, rule, facts, config, wide)
            if done is not None:
                schedule = done
                break
    scheduled = schedule.mod["main"].with_attr("global_symbol", name)
    if not _compiles(scheduled, hardware):
        scheduled = func.with_attr("global_symbol", name).with_attr("tirx.noalias", True)
    return Kernel(name, scheduled, args, Counts({"fma_f32": float(work)}, {"dram": float(loaded)}))


def _compiles(func: Any, hardware: Hardware) -> bool:
    """Say whether TVM's passes accept a scheduled function (some refuse what a primitive allowed)."""
    target = tvm.target.Target(hardware.tvm_target())
    pipeline = tvm.tirx.get_default_tir_pipeline(target)[0]
    module = tvm.IRModule({"main": func})
    try:
        pipeline(tvm.tirx.transform.BindTarget(target.with_host(target))(module))
    except REFUSED:
        return False
    return True


def _describe(func: Any) -> tuple[tuple[Arg, ...], int, int]:
    """Return the arguments, the innermost iterations of all blocks, and the bytes of all arguments."""
    facts = block_facts(tvm.s_tir.Schedule(func))
    written = {b.name for f in facts for b in f.written}
    args, size = [], 0
    for buffer in func.params:
        shape = tuple(extent(n) for n in buffer.shape)
        role = "output" if buffer.name in written else "input"
        args.append(Arg(buffer.name, role, shape, str(buffer.dtype)))  # type: ignore[arg-type]
        size += math.prod(shape) * tvm.DataType(str(buffer.dtype)).itemsize
    return tuple(args), sum(f.work for f in facts), size


def _attempt(
    schedule: Any, rule: Any, facts: BlockFacts, config: TirConfig, wide: bool
) -> Any | None:
    """Apply a rule to a copy; return it, or None if the rule does not fit."""
    copy = schedule.copy()
    try:
        return copy if rule(copy, facts, config, wide) else None
    except REFUSED:  # a refused primitive
        return None


def _inline(schedule: Any) -> Any:
    """Inline producers into their only consumer, or into all of them when they are cheap."""
    for facts in block_facts(schedule):
        if facts.reduced or facts.output:
            continue
        block = schedule.get_sblock(facts.name)
        consumers = [schedule.get(c).name_hint for c in schedule.get_consumers(block)]
        users = [f for f in block_facts(schedule) if f.name in consumers]
        # a reduction that reads an element many times would compute it many times
        once = all(not u.reduced or reads_per_element(u, facts) <= 1 for u in users)
        if once and (len(users) == 1 or facts.cheap):
            copy = schedule.copy()
            try:
                copy.compute_inline(copy.get_sblock(facts.name))
            except REFUSED:
                continue
            schedule = copy
    return schedule


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


def _outer(schedule: Any, facts: BlockFacts, config: TirConfig, wide: bool) -> bool:
    """Only threads: over the leading spatial loops."""
    loops = schedule.get_loops(schedule.get_sblock(facts.name))
    leading = []
    for loop, kind in zip(loops, facts.kinds, strict=True):
        if kind != "S":
            break
        leading.append(loop)
    _spread(schedule, leading, wide)
    return True


def _spatial(schedule: Any, facts: BlockFacts, config: TirConfig, wide: bool) -> bool:
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


def _tiled(schedule: Any, facts: BlockFacts, config: TirConfig, wide: bool) -> bool:
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
        if ragged or chunks // vectors >= ENOUGH_TASKS:
            outer.append(column)
            last.append(part)
        else:
            outer += [part, column]
        if ragged:  # whole tiles without the test for the end, then the last one
            schedule.annotate(part, "pragma_loop_partition_hint", 1)
    reduced = [loops[i] for i, k in enumerate(facts.kinds) if k == "R"]
    schedule.reorder(*outer, *last, *reduced, *inner, column_in, lane)
    schedule.reverse_compute_at(cached, (outer + last)[-1])
    for loop in (*inner, column_in):
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


def _columns(schedule: Any, facts: BlockFacts, config: TirConfig, wide: bool) -> bool:
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


def _lanes(schedule: Any, facts: BlockFacts, config: TirConfig, wide: bool) -> bool:
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
