"""Generic functions by the rules of `x86_tir`, with one set of knobs for all blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mimo_compile.ir import functions
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.generic.block_work import joined, part
from mimo_compile.schedules.generic.blocks import BlockFacts
from mimo_compile.schedules.generic.decisions import supported
from mimo_compile.schedules.generic.outline import lanes_for, outline_of, rows_for, rules_for
from mimo_compile.schedules.generic.rules import divisor
from mimo_compile.schedules.generic.x86_tir import (
    PARALLEL_WORK,
    TirConfig,
    default_config,
    lower_tir,
)


class X86Rules(Schedule):
    """Any generic function: for each block the first rule that fits it."""

    name = "tir.x86_rules"
    op = functions.OP
    config = TirConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Functions that are known here and whose loops are of static extent."""
        return supported(workload, hardware)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Threads, lanes, and the register tile of what reduces."""
        default = default_config(functions.function_of(workload))
        arranged = outline_of(workload).arranged(outline_of(workload).rule)
        assert arranged is not None
        blocks = [f for f in arranged.facts if f is not None]
        may = hardware.threads > 1 and any(f.work >= PARALLEL_WORK for f in blocks)
        tiled = any(rules_for(f)[0] == "tiled" for f in blocks)
        return Space(
            TirConfig,
            {
                "parallel": (False, True) if may else (default.parallel,),
                "vector": (1, 8, 16, 32),
                "unroll": (1, 2, 4, 6, 8) if tiled else (default.unroll,),
                "tile": (1, 2, 4, 6, 8, 12) if tiled else (default.tile,),
            },
            default,
            lambda c: c.unroll * c.tile * max(1, c.vector // 16) <= 32,
        )

    def lower(self, workload: Workload, config: TirConfig, hardware: Hardware) -> Kernel:
        """Schedule the function; what TVM refuses is left out, and noted."""
        name = kernel_name(self, workload, config, hardware)
        kernel = lower_tir(functions.function_of(workload), name, config, hardware)
        counts = self.work(workload, config, hardware)
        return replace(kernel, args=get_op(self.op).args(workload), counts=counts)

    def work(self, workload: Workload, config: TirConfig, hardware: Hardware) -> Counts:
        """Return the work of each block, and their sum."""
        outline = outline_of(workload)
        arranged = outline.arranged(outline.rule)
        assert arranged is not None
        parts = []
        for index, facts in enumerate(arranged.facts):
            if facts is not None:
                wide = config.parallel and hardware.threads > 1 and facts.work >= PARALLEL_WORK
                told = _told(facts, config)
                operations = arranged.operations[index]
                parts.append(part(facts, operations, told, wide, hardware, index))
        return joined(parts)


def _told(facts: BlockFacts, config: TirConfig) -> dict[str, Any]:
    """Return what the rules make of the knobs for one block."""
    rule = rules_for(facts)[0]
    widths = [v for v in lanes_for(facts, rule) if v <= config.vector]
    if rule in ("tiled", "lanes") and (not widths or config.vector == 1):
        return {"rule": "columns" if facts.vector_axis is not None else "outer"}
    lanes = max(widths, default=1)
    out: dict[str, Any] = {"rule": rule, "vector": lanes}
    if rule == "tiled":
        chunks = facts.extents[facts.vector_axis or 0] // lanes
        out["unroll"] = divisor(chunks, config.unroll)
        out["tile"] = max(r for r in rows_for(facts) if r <= config.tile)
    return out
