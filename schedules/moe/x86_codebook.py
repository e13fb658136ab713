"""Routed experts with codebook or fp8 weights: looked up, then multiplied as integers or floats."""

from __future__ import annotations

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.book import ways
from mimo_compile.schedules.moe.experts import Experts
from mimo_compile.schedules.moe.multiply import Multiply, QuantisedValues, Values
from mimo_compile.schedules.moe.problem import MoeConfig, Problem


class X86MoeCodebook(Experts):
    """Any x86-64; reads the layouts of ``mpgemm.x86_codebook``."""

    name = "moe.x86_codebook"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Codebook and fp8 weights, any activations."""
        return hardware.kind == "cpu" and Problem.of(workload).fmt.family in ("codebook", "fp8")

    def multiply(self, problem: Problem, config: MoeConfig) -> Multiply:
        """Rows are quantised, rounded or as they are."""
        return (QuantisedValues if problem.act == "a8" else Values)(problem, config)

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the ways that both matmuls can take, the fastest first."""
        second = ways(problem.layout2, problem.act, hardware)
        return tuple(n for n in ways(problem.layout13, problem.act, hardware) if n in second)
