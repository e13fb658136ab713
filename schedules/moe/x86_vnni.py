"""Routed experts with integer codes and int8 activations by 512-bit ``vpdpbusd``."""

from __future__ import annotations

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.moe.experts import Experts
from mimo_compile.schedules.moe.multiply import Dots, Multiply
from mimo_compile.schedules.moe.problem import MoeConfig, Problem


class X86MoeVnni(Experts):
    """For CPUs with AVX-512 VNNI."""

    name = "moe.x86_vnni"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Integer or ternary weights with int8 activations."""
        problem = Problem.of(workload)
        return hardware.has_vnni and problem.acts.is_int8 and problem.exact

    def multiply(self, problem: Problem, config: MoeConfig) -> Multiply:
        """Exact dots."""
        return Dots(problem, config)

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """There is one way."""
        return ("vnni512",)
