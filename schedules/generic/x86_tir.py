"""A decent CPU schedule for any legalised PrimFunc, by rules over its blocks.

Producers that cost nothing to repeat are inlined; element-wise blocks are spread over threads and
vectorised over their last axis; reductions are tiled in registers where a vector runs over an output axis
(matmul, convolution) and split into lanes where it must run over the reduced axis (sums, maxima). Each rule
works on a copy of the schedule and is dropped if TVM refuses any of its steps: what is left is serial, never
wrong, and the kernel's notes say what was refused. A chain over rows, as a softmax is, runs row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mimo_compile._tvm import compiler
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.generic.blocks import (
    block_facts,
    extent,
    holds,
    reads_per_element,
)
from mimo_compile.schedules.generic.intrinsics import expand, widen_inside
from mimo_compile.schedules.generic.row_chain import row_chain
from mimo_compile.schedules.generic.rules import (
    Knobs,
    columns_rule,
    lanes_rule,
    outer_rule,
    spatial_rule,
    tiled_rule,
)

tvm = compiler()
from tvm.error import InternalError

PARALLEL_WORK = 1 << 16
"""Below this many innermost iterations a loop takes less time than waking the threads does."""

REFUSED = (tvm.s_tir.schedule.ScheduleError, InternalError)
"""What a primitive raises that cannot be applied: its own refusal, or a check inside TVM that failed."""
_PASSES_RAISE = (RuntimeError, ValueError, TypeError)
"""What a pass raises: checks inside TVM arrive as any of the standard errors."""


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
    notes: list[str] = []
    schedule = inlined(schedule, notes)
    blocks = block_facts(schedule)
    wide = threads and sum(f.work for f in blocks) >= PARALLEL_WORK
    chained = _attempt(
        schedule, "row_chain", notes, lambda s: row_chain(s, blocks, config.vector, wide)
    )
    schedule = chained or _block_by_block(schedule, config, threads, notes)
    scheduled = widen_inside(schedule.mod["main"]).with_attr("global_symbol", name)
    if refused := pass_error(scheduled, hardware):
        notes.append(f"{name}: passes refused the schedule, so it runs as it came: {refused}")
        scheduled = func.with_attr("global_symbol", name).with_attr("tirx.noalias", True)
    counts = Counts({"fma_f32": float(work)}, {"dram": float(loaded)})
    return Kernel(name, scheduled, args, counts, notes=tuple(notes), compact=True)


def _block_by_block(schedule: Any, config: TirConfig, threads: bool, notes: list[str]) -> Any:
    """Apply to each block the first rule that fits it."""
    knobs = Knobs(config.vector, config.unroll, config.tile)
    for facts in block_facts(schedule):
        wide = threads and facts.work >= PARALLEL_WORK
        reducing: list[Callable[..., Any]] = [tiled_rule, lanes_rule, columns_rule, outer_rule]
        if len(facts.written) > 1:
            # an argmax: TVM splits its pair of results only in index types alike
            reducing = [outer_rule]
        for rule in reducing if facts.reduced else [spatial_rule, outer_rule]:
            label = f"{facts.name}: {getattr(rule, '__name__', 'rule')}"
            done = _attempt(
                schedule, label, notes, partial(rule, facts=facts, config=knobs, wide=wide)
            )
            if done is not None:
                schedule = done
                break
    return schedule


def pass_error(func: Any, hardware: Hardware) -> str:
    """Return why TVM's passes refuse what its primitives allowed; empty if they do not."""
    target = tvm.target.Target(hardware.tvm_target())
    pipeline = tvm.tirx.get_default_tir_pipeline(target)[0]
    module = tvm.IRModule({"main": func})
    try:
        pipeline(tvm.tirx.transform.BindTarget(target.with_host(target))(module))
    except _PASSES_RAISE as error:
        return reason_of(error)
    return ""


def reason_of(error: Exception) -> str:
    """Return the line of an error that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((x for x in lines if x.startswith("Error message:")), lines[-1] if lines else "")
    return said.removeprefix("Error message:").strip()[:200] or type(error).__name__


def _describe(func: Any) -> tuple[tuple[Arg, ...], int, int]:
    """Return the arguments, the innermost iterations of all blocks, and the bytes of all arguments."""
    facts = block_facts(tvm.s_tir.Schedule(func))
    written = [b for f in facts for b in f.written]
    args, size = [], 0
    for buffer in func.params:
        shape = tuple(extent(n) for n in buffer.shape)
        role = "output" if holds(written, buffer) else "input"
        args.append(Arg(buffer.name, role, shape, str(buffer.dtype)))  # type: ignore[arg-type]
        size += math.prod(shape) * tvm.DataType(str(buffer.dtype)).itemsize
    return tuple(args), sum(f.work for f in facts), size


def _attempt(schedule: Any, what: str, notes: list[str], rule: Callable[[Any], bool]) -> Any | None:
    """Apply a rule to a copy; return it, or None if the rule does not fit or a primitive is refused."""
    copy = schedule.copy()
    try:
        return copy if rule(copy) else None
    except REFUSED as error:
        notes.append(f"{what}: {reason_of(error)}")
        return None


def inlined_by_rule(schedule: Any) -> list[str]:
    """Return the names of the blocks that are inlined, in order."""
    names: list[str] = []
    inlined(schedule, [], names)
    return names


def inlined(schedule: Any, notes: list[str], names: list[str] | None = None) -> Any:
    """Inline producers into their only consumer, or into all of them when they are cheap.

    ``names`` takes the names of those that were inlined.
    """
    for facts in block_facts(schedule):
        if facts.reduced or facts.output:
            continue
        block = schedule.get_sblock(facts.name)
        try:
            consumers = [schedule.get(c).name_hint for c in schedule.get_consumers(block)]
        except REFUSED:  # blocks that write where the data says (a scatter)
            continue
        users = [f for f in block_facts(schedule) if f.name in consumers]
        # a reduction that reads an element many times would compute it many times
        once = all(not u.reduced or reads_per_element(u, facts) <= 1 for u in users)
        if once and (len(users) == 1 or facts.cheap):
            copy = schedule.copy()
            try:
                copy.compute_inline(copy.get_sblock(facts.name))
            except REFUSED as error:
                notes.append(f"{facts.name}: inline: {reason_of(error)}")
                continue
            schedule = copy
            if names is not None:
                names.append(facts.name)
    return schedule
