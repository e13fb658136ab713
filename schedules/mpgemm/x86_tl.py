"""Ternary codes times int8 activations by lookup of pairs (TL1) or triples (TL2), exact."""

from __future__ import annotations

from mimo_compile.schedules.mpgemm.problem import Problem
from mimo_compile.schedules.mpgemm.x86_lut import LookupGemm


class X86Pairs(LookupGemm):
    """Two ternary codes in 4 bits: less padding than `X86Triples`, no signs."""

    name = "mpgemm.x86_tl1"
    packing = "pairs"

    def fits(self, problem: Problem) -> bool:
        """Ternary codes."""
        return problem.fmt.family == "ternary"


class X86Triples(LookupGemm):
    """Three ternary codes in 4 bits and a sign: 1.67 bits a weight, in groups that blocks fill."""

    name = "mpgemm.x86_tl2"
    packing = "triples"

    def fits(self, problem: Problem) -> bool:
        """Ternary codes."""
        return problem.fmt.family == "ternary"
