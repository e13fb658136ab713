"""Integer codes packed without waste, times int8 activations: fewer bytes for more unpacking."""

from __future__ import annotations

from abc import abstractmethod

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.dense import worth_packing
from mimo_compile.schedules.emit.dot import byte_ways, exact
from mimo_compile.schedules.mpgemm.integer import IntegerGemm
from mimo_compile.schedules.mpgemm.problem import Problem


class _Dense(IntegerGemm):
    """Base: a layout of `emit.dense` and any exact integer dot."""

    @abstractmethod
    def fits(self, problem: Problem) -> bool:
        """Say whether the format has this layout."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """int8 activations, sums within 32 bits, and an instruction to multiply bytes with."""
        problem = self.problem(workload)
        if not problem.acts.is_int8 or hardware.kind != "cpu" or not self.fits(problem):
            return False
        return problem.steps.fits and exact(problem.layout) and bool(self.dots(problem, hardware))

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the integer dots that the CPU has, the fastest first."""
        return byte_ways([problem.layout], hardware)

    def unrolls(self, problem: Problem) -> tuple[int, ...]:
        """A block unpacks to 5 operands or more already."""
        return (1, 2)


class X86Planes(_Dense):
    """3, 5, 6 and 7 bits as fields of 4, 2 and 1 bits."""

    name = "mpgemm.x86_planes"
    packing = "planes"

    def fits(self, problem: Problem) -> bool:
        """Widths that divide no byte."""
        return problem.fmt.family == "int" and problem.fmt.bits in (3, 5, 6, 7)


class X86Trits(_Dense):
    """Five ternary codes a byte, by arithmetic."""

    name = "mpgemm.x86_trits"
    packing = "trits"

    def fits(self, problem: Problem) -> bool:
        """Ternary codes whose groups fill blocks of 20 columns nearly, or that have to be this dense."""
        return problem.fmt.family == "ternary" and worth_packing(problem.layout)

    def streams(self, problem: Problem) -> tuple[tuple[int, int, int], ...]:
        """Unpacking is what takes long here, and several rows share what it needs."""
        return ()


class X86SignedTrits(X86Trits):
    """Five ternary codes a byte, by permutations of bytes."""

    name = "mpgemm.x86_strits"
    packing = "strits"

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """512-bit dots, on CPUs that permute bytes."""
        if "avx512vbmi" not in hardware.features:
            return ()
        return tuple(n for n in super().dots(problem, hardware) if n in ("vnni512", "madd512"))
