"""Generic functions by decisions: what to inline, and for each block its rule, vectors, tile and order.

Every decision is one knob, named by the block's place in the function (``b2.tile``), so that search changes,
crosses and learns from decisions block by block, and a config replays exactly. Without a record the decisions
are those of the rules (`x86_tir`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mimo_compile._tvm import compiler
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, KnobValue, Space, kernel_name
from mimo_compile.schedules.generic.block_work import joined, part
from mimo_compile.schedules.generic.blocks import BlockFacts, block_facts
from mimo_compile.schedules.generic.decisions import (
    SERIAL,
    USED,
    Decisions,
    DecisionSchedule,
    all_knobs,
    default_values,
    fits,
    settled,
    supported,
)
from mimo_compile.schedules.generic.intrinsics import widen_inside
from mimo_compile.schedules.generic.outline import Outline, bounded, outline_of
from mimo_compile.schedules.generic.row_chain import row_chain
from mimo_compile.schedules.generic.rules import (
    Knobs,
    columns_rule,
    lanes_rule,
    outer_rule,
    power,
    spatial_rule,
    tiled_rule,
)
from mimo_compile.schedules.generic.x86_tir import REFUSED, pass_error, reason_of

tvm = compiler()

RULES = {
    "tiled": tiled_rule, "lanes": lanes_rule, "columns": columns_rule, "outer": outer_rule,
    "spatial": spatial_rule,
}  # fmt: skip


class X86Trace(DecisionSchedule):
    """Any generic function, decision by decision."""

    name = "tir.x86_trace"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Functions that are known here and whose loops are of static extent."""
        return supported(workload, hardware)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """All decisions; those that others make meaningless have one value only."""
        outline = outline_of(workload)
        knobs = all_knobs(outline, hardware)
        usual = default_values(outline, knobs)
        knobs = bounded(knobs, usual)

        def make(**values: KnobValue) -> Decisions:
            return settled(outline, knobs, values)

        def legal(config: Decisions) -> bool:
            return {n for n, _ in config.made} == set(knobs) and fits(outline, config)

        default = make(**usual)
        return Space(make, knobs, default, legal)

    def lower(self, workload: Workload, config: Decisions, hardware: Hardware) -> Kernel:
        """Apply the decisions.

        Raises:
            ValueError: TVM refuses one of them.
        """
        outline = outline_of(workload)
        name = kernel_name(self, workload, config, hardware)
        func = widen_inside(applied(outline, config, hardware)).with_attr("global_symbol", name)
        if refused := pass_error(func, hardware):
            raise ValueError(f"passes refuse the decisions: {refused}")
        args = get_op(self.op).args(workload)
        return Kernel(name, func, args, self.work(workload, config, hardware), compact=True)

    def work(self, workload: Workload, config: Decisions, hardware: Hardware) -> Counts:
        """Return the work of each block, and their sum."""
        outline = outline_of(workload)
        arranged = outline.arranged(config.inlined())
        if arranged is None:
            raise ValueError("these blocks cannot be inlined together")
        parts = []
        for index, facts in enumerate(arranged.facts):
            if facts is None:
                continue
            told = block_told(config, index, facts)
            wide = config.of("parallel") != SERIAL and facts.work >> config.of("parallel") > 0
            parts.append(part(facts, arranged.operations[index], told, wide, hardware, index))
        return joined(parts)


def block_told(config: Decisions, index: int, facts: BlockFacts) -> dict[str, Any]:
    """Return what is decided about a block, a chain's blocks included."""
    if not config.of("chain"):
        return config.block(index)
    vector = power(facts.extents[-1], config.of("chain_vector")) if facts.extents else 1
    return {"rule": "chain", "vector": vector if facts.vectorisable else 1}


def applied(outline: Outline, config: Decisions, hardware: Hardware) -> Any:
    """Return the scheduled function.

    Raises:
        ValueError: a decision does not fit, or TVM refuses it.
    """
    schedule = outline.schedule(config.inlined())
    level = config.of("parallel") if hardware.threads > 1 else SERIAL
    arranged = outline.arranged(config.inlined())
    assert arranged is not None
    try:
        if config.of("chain"):
            wide = level != SERIAL and arranged.work >> level > 0
            blocks = block_facts(schedule)
            if not row_chain(schedule, blocks, config.of("chain_vector"), wide):
                raise ValueError("the function does not run row by row with so many lanes")
            return schedule.mod["main"]
        for index, facts in enumerate(arranged.facts):
            if facts is None:
                continue
            told = config.block(index)
            rule = told.pop("rule")
            told.pop("at", None)
            wide = level != SERIAL and facts.work >> level > 0
            if not RULES[rule](schedule, facts, _knobs(told, rule), wide):
                raise ValueError(f"block {index} does not take the rule {rule}")
    except REFUSED as error:
        raise ValueError(f"TVM refuses the decisions: {reason_of(error)}") from error
    return schedule.mod["main"]


def _knobs(told: Mapping[str, Any], rule: str) -> Knobs:
    return replace(Knobs(vector=1), **{n: v for n, v in told.items() if n in USED[rule]})
