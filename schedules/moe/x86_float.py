"""Routed experts on any x86-64: float weights, dequantised codes, or codes with int8 activations."""

from __future__ import annotations

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.dot import DOTS, float_ways
from mimo_compile.schedules.moe.experts import Experts
from mimo_compile.schedules.moe.multiply import Dots, Floats, Multiply
from mimo_compile.schedules.moe.problem import MoeConfig, Problem


class X86MoeFloat(Experts):
    """float32 FMA where activations are floats, else what the CPU has for integers."""

    name = "moe.x86_float"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """f32 and bf16 weights, and integer or ternary codes with any activations."""
        problem = Problem.of(workload)
        return hardware.kind == "cpu" and (problem.fmt.name in ("f32", "bf16") or problem.exact)

    def multiply(self, problem: Problem, config: MoeConfig) -> Multiply:
        """Exact dots where the way is one, else multiply-adds."""
        return (Dots if config.dot in DOTS else Floats)(problem, config)

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Integer ways without 512-bit VNNI, widest first; ``""`` is the float kernel."""
        if problem.fmt.is_float:
            return ("",)
        if not problem.acts.is_int8:
            return float_ways(problem.layout13, hardware)
        usable = (n for n, d in DOTS.items() if d.fits(problem.layout13, hardware))
        return tuple(n for n in usable if n != "vnni512")
