"""Routed experts with integer codes packed without waste, times int8 activations."""

from __future__ import annotations

from abc import abstractmethod

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.dense import worth_packing
from mimo_compile.schedules.emit.dot import byte_ways
from mimo_compile.schedules.moe.experts import Experts
from mimo_compile.schedules.moe.multiply import Dots, Multiply
from mimo_compile.schedules.moe.problem import MoeConfig, Problem


class _Dense(Experts):
    """Base: a layout of `emit.dense` and any exact integer dot."""

    version = 1

    @abstractmethod
    def fits(self, problem: Problem) -> bool:
        """Say whether the format has this layout."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """int8 activations, sums within 32 bits, and an instruction to multiply bytes with."""
        problem = self.problem(workload)
        if not problem.acts.is_int8 or hardware.kind != "cpu" or not self.fits(problem):
            return False
        return problem.exact and bool(self.dots(problem, hardware))

    def multiply(self, problem: Problem, config: MoeConfig) -> Multiply:
        """Exact dots."""
        return Dots(problem, config)

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the integer dots that the CPU has for both layouts, the fastest first."""
        return byte_ways([problem.layout13, problem.layout2], hardware)

    def unrolls(self, problem: Problem) -> tuple[int, ...]:
        """A block unpacks to 5 operands or more already."""
        return (1, 2)


class X86MoePlanes(_Dense):
    """3, 5, 6 and 7 bits as fields of 4, 2 and 1 bits."""

    name = "moe.x86_planes"
    packing = "planes"

    def fits(self, problem: Problem) -> bool:
        """Widths that divide no byte."""
        return problem.fmt.family == "int" and problem.fmt.bits in (3, 5, 6, 7)


class X86MoeTrits(_Dense):
    """Five ternary codes a byte, by arithmetic."""

    name = "moe.x86_trits"
    packing = "trits"

    def fits(self, problem: Problem) -> bool:
        """Ternary codes whose rows fill blocks of 20 columns nearly, or that have to be this dense."""
        worth = worth_packing(problem.layout13) and worth_packing(problem.layout2)
        return problem.fmt.family == "ternary" and worth


class X86MoeSignedTrits(X86MoeTrits):
    """Five ternary codes a byte, by permutations of bytes."""

    name = "moe.x86_strits"
    packing = "strits"

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """512-bit dots, on CPUs that permute bytes."""
        if "avx512vbmi" not in hardware.features:
            return ()
        return tuple(n for n in super().dots(problem, hardware) if n in ("vnni512", "madd512"))
