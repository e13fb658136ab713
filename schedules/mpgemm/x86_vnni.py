"""Integer codes times int8 activations with 512-bit ``vpdpbusd``: unpack in registers, dot, scale."""

from __future__ import annotations

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.dot import exact
from mimo_compile.schedules.mpgemm.integer import IntegerGemm
from mimo_compile.schedules.mpgemm.problem import Problem


class X86Vnni(IntegerGemm):
    """For CPUs with AVX-512 VNNI."""

    name = "mpgemm.x86_vnni"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Integer or ternary weights with int8 activations, sums within 32 bits."""
        problem = self.problem(workload)
        return hardware.has_vnni and problem.acts.is_int8 and exact(problem.layout)

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """There is one way."""
        return ("vnni512",)
