"""Sketches of generic functions by MetaSchedule's rules, and what they leave open.

A sketch is a list of scheduling instructions in which factors of tiles, depths of unrolling and places to
compute at are left open; with a decision for each it replays exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mimo_compile._tvm import compiler
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import KnobValue
from mimo_compile.schedules.generic.decisions import Decisions
from mimo_compile.schedules.generic.outline import Values, outline_of
from mimo_compile.schedules.generic.x86_tir import REFUSED, reason_of

tvm = compiler()

INNERMOST = 64
"""Largest innermost tile."""
SEED = 1
"""Of what the sketches are first sampled with: the same sketches on any machine."""
SKETCHES = 12
"""Most sketches of a function."""
PLACES = 8
"""Loops that a block may be computed at."""
CORES = 16
"""What the rules are told of, whatever the machine has: sketches, and so configs, mean the same on all."""


@dataclass(frozen=True, slots=True)
class Opening:
    """A decision that a sketch leaves open."""

    index: int
    """Place of the instruction in the sketch."""
    kind: str
    """``tile`` (factors of a loop), ``pick`` (one of several values) or ``place`` (where to compute)."""
    sampled: tuple[int, ...]
    """What it was first sampled with; of a tile all factors."""
    limit: int
    """Largest innermost factor of a tile; number of values; number of places."""


@dataclass(frozen=True, slots=True)
class Sketches:
    """The sketches of one function."""

    module: Any
    traces: tuple[Any, ...]
    openings: tuple[tuple[Opening, ...], ...]
    processors: tuple[Any, ...]


def rules() -> list[Any]:
    """Return MetaSchedule's rules for CPUs, without those that need tensor intrinsics."""
    from tvm.s_tir.meta_schedule import schedule_rule as rule
    from tvm.s_tir.meta_schedule.schedule_rule.multi_level_tiling import ReuseType

    return [
        rule.InlineConstantScalars(),
        rule.AutoInline(
            into_producer=False, into_consumer=True, inline_const_tensor=True,
            disallow_if_then_else=True, require_injective=True, require_ordered=True,
            disallow_op=["tirx.exp"],
        ),
        rule.AddRFactor(max_jobs_per_core=16, max_innermost_factor=INNERMOST),
        rule.MultiLevelTiling(
            structure="SSRSRS", max_innermost_factor=INNERMOST,
            reuse_write=ReuseType(req="may", levels=[1, 2], scope="global"),
        ),
        rule.ParallelizeVectorizeUnroll(
            max_jobs_per_core=16, max_vectorize_extent=64, unroll_max_steps=[0, 16, 64, 512],
            unroll_explicit=True,
        ),
        rule.RandomComputeLocation(),
    ]  # fmt: skip


@lru_cache(maxsize=64)
def sketches_of(workload: Workload) -> Sketches:
    """Return the sketches that MetaSchedule's rules make of a function.

    Raises:
        ValueError: they make none.
    """
    from tvm.s_tir import meta_schedule as ms
    from tvm.s_tir.meta_schedule import postproc
    from tvm.s_tir.meta_schedule.space_generator import PostOrderApply

    module = tvm.IRModule({"main": outline_of(workload).func.with_attr("global_symbol", "main")})
    space = PostOrderApply(
        sch_rules=rules(),
        postprocs=[
            postproc.DisallowDynamicLoop(), postproc.RewriteParallelVectorizeUnroll(),
            postproc.RewriteReductionBlock(),
        ],
        mutator_probs={},
    )  # fmt: skip
    context = ms.TuneContext(
        mod=module, target=tvm.target.Target({"kind": "llvm", "num-cores": CORES}),
        space_generator=space, num_threads=1, rand_state=SEED, logger=_silent(),
    )  # fmt: skip
    try:
        made = context.generate_design_space()
    except REFUSED as error:
        raise ValueError(f"MetaSchedule's rules fail: {reason_of(error)}") from error
    traces = [s.trace.simplified(True) for s in made][:SKETCHES]
    openings = tuple(_openings(module, t) for t in traces)
    if not traces:
        raise ValueError("MetaSchedule's rules make no sketch")
    return Sketches(module, tuple(traces), openings, tuple(space.postprocs))


def _silent() -> Any:
    import logging

    return logging.getLogger(f"{__name__}.rules")


def _openings(module: Any, trace: Any) -> tuple[Opening, ...]:
    out = []
    for index, inst in enumerate(trace.insts):
        kind, decision = str(inst.kind.name), trace.get_decision(inst)
        if kind == "SamplePerfectTile":
            out.append(Opening(index, "tile", tuple(int(x) for x in decision), int(inst.attrs[1])))
        elif kind == "SampleCategorical":
            out.append(Opening(index, "pick", (int(decision),), len(inst.attrs[0])))
        elif kind == "SampleComputeLocation":
            out.append(Opening(index, "place", (int(decision),), PLACES))
    return tuple(out)


def divisors(n: int, most: int) -> tuple[int, ...]:
    """Return the divisors of ``n`` up to ``most``."""
    return tuple(d for d in range(1, min(n, most) + 1) if n % d == 0)


def named(openings: tuple[Opening, ...]) -> dict[str, tuple[int, ...]]:
    """Return the knobs of a sketch with their values.

    Outermost factors follow from the others and are none.
    """
    out: dict[str, tuple[int, ...]] = {}
    for name, o in numbered(openings):
        if o.kind == "tile":
            extent = math.prod(o.sampled)
            for level in range(1, len(o.sampled)):
                last = level == len(o.sampled) - 1
                out[f"{name}.{level}"] = divisors(extent, o.limit if last else extent)
        elif o.kind == "pick":
            out[name] = tuple(range(o.limit))
        else:
            out[name] = tuple(range(-2, o.limit))
    return out


def numbered(openings: tuple[Opening, ...]) -> list[tuple[str, Opening]]:
    """Name openings by their kind and their place among those of that kind, in any sketch alike."""
    seen = {"tile": 0, "pick": 0, "place": 0}
    out = []
    for o in openings:
        out.append((f"{o.kind[0] if o.kind != 'place' else 'at'}{seen[o.kind]}", o))
        seen[o.kind] += 1
    return out


def sampled(openings: tuple[Opening, ...]) -> dict[str, KnobValue]:
    """Return what a sketch was first sampled with, as knobs."""
    out: dict[str, KnobValue] = {}
    for name, o in numbered(openings):
        if o.kind == "tile":
            out |= {f"{name}.{level}": o.sampled[level] for level in range(1, len(o.sampled))}
        else:
            out[name] = o.sampled[0]
    return out


def adapted(
    openings: tuple[Opening, ...], values: Mapping[str, KnobValue], knobs: Values
) -> dict[str, KnobValue]:
    """Return the knobs of one sketch, of values that are offered.

    Factors that do not divide are the next lower that do, from the innermost on.
    """
    out: dict[str, KnobValue] = {}
    for name, o in numbered(openings):
        if o.kind != "tile":
            offered = range(o.limit) if o.kind == "pick" else range(-2, o.limit)
            value = values.get(name, o.sampled[0])
            out[name] = value if value in offered else knobs[name][0]
            continue
        left = math.prod(o.sampled)
        for level in reversed(range(1, len(o.sampled))):
            inner = f"{name}.{level}"
            most = int(values.get(inner, 1))
            if level == len(o.sampled) - 1:
                most = min(most, o.limit)
            fit = [int(v) for v in knobs[inner] if left % int(v) == 0]
            out[inner] = factor = max((f for f in fit if f <= most), default=min(fit))
            left //= factor
    return out


def replayed(sketches: Sketches, config: Decisions) -> Any:
    """Return the function scheduled by a sketch with decisions.

    Raises:
        ValueError: a postprocessor refuses it.
    """
    at = int(config.of("sketch"))
    trace, values = sketches.traces[at], dict(config.made)
    decisions: dict[int, Any] = {}
    for name, o in numbered(sketches.openings[at]):
        if o.kind == "tile":
            inner = [int(values[f"{name}.{level}"]) for level in range(1, len(o.sampled))]
            outer = math.prod(o.sampled) // math.prod(inner)
            decisions[o.index] = [outer, *inner]
        else:
            decisions[o.index] = int(values[name])
    insts = list(trace.insts)
    full = tvm.s_tir.Trace(insts, {insts[i]: d for i, d in decisions.items()})
    schedule = tvm.s_tir.Schedule(sketches.module, seed=SEED)
    full.apply_to_schedule(schedule, remove_postproc=True)
    if not config.of("parallel"):
        root = schedule.get_sblock("root")
        if "meta_schedule.parallel" in schedule.get(root).annotations:
            schedule.unannotate(root, "meta_schedule.parallel")
    for step in sketches.processors:
        if not step.apply(schedule):
            raise ValueError(f"{type(step).__name__} refuses the decisions")
    return schedule.mod["main"]
