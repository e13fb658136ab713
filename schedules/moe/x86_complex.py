"""Routed experts with complex weights (Fairy): a tile gives gate (real) and up (imaginary) together."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.build import Register, bind
from mimo_compile.schedules.emit.complex import (
    ComplexMatrix,
    complex_ways,
    halves,
)
from mimo_compile.schedules.emit.tile import Share, Weights, store_rows
from mimo_compile.schedules.emit.vector import sigmoid
from mimo_compile.schedules.moe.experts import Experts
from mimo_compile.schedules.moe.kernel import ExpertKernel
from mimo_compile.schedules.moe.multiply import Multiply, QuantisedValues, Values
from mimo_compile.schedules.moe.problem import MoeConfig, Problem
from mimo_compile.schedules.moe.slots import Slots


class ComplexProblem(Problem):
    """Gate and up are one complex matrix of F rows; a token is a row of real and one of imaginary parts."""

    halves: ClassVar[int] = 1
    parts: ClassVar[int] = 2

    @staticmethod
    @lru_cache(maxsize=256)
    def of(workload: Workload) -> ComplexProblem:
        """Read a workload of the op ``moe``."""
        p = get_op("moe").full(workload)
        fmt, e, d, f = parse_weight_format(p["w"]), p["e"], p["d"], p["f"]
        w13 = ComplexMatrix(fmt, 2 * f, d, p["s"], "w13_", (e,))
        w2 = ComplexMatrix(fmt, d, f, p["s"], "w2_", (e,))
        return ComplexProblem(p["t"], e, p["k"], w13, w2, p["a"])

    @property
    def hidden_width(self) -> int:
        """Not padded: the imaginary parts follow the real ones."""
        return self.f


class ComplexKernel(ExpertKernel):
    """Rows ``2 s`` and ``2 s + 1`` are those of slot s."""

    def view(self, buffer: Any) -> Any:
        """Return real and imaginary halves as rows."""
        return halves(buffer)

    def gate_up(self, w13: Weights, x: Any, slots: Slots, hidden: Any, task: Any) -> None:
        """Compute ``silu(gate) * up`` of some rows for all slots."""
        p, split, width = self.problem, self.split13, self.multiply.lanes
        rows = split.rows

        def emit(expert: Any, places: list[Any], tile: Any, share: Share | None) -> None:
            start = split.first(task, tile)
            blocks: list[tuple[Any, ...]] = [(expert, start + r) for r in range(rows)]
            gates: dict[tuple[int, int, int], Register] = {}

            def out(r: int, row: int, lane: int, value: Any) -> None:
                if row % 2 == 0:  # real parts come first
                    gates[r, row, lane] = Register("float32", width, value)
                    return
                gate = bind(gates[r, row - 1, lane].get())
                result = bind(gate * sigmoid(gate, width) * value)  # stored at two places
                store_rows(
                    hidden, places[row // 2], start + r, lane, width, result, p.f,
                    last=r + 1 == rows,
                )  # fmt: skip

            tokens = [bind(slots.token[place]) for place in places]
            self.tile(p.w13, w13, x, blocks, tokens, out, split.next_tile, share)

        self.over_experts(slots, task, split, emit)


class X86MoeComplex(Experts):
    """Any x86-64; the tiles of ``mpgemm.x86_complex``."""

    name = "moe.x86_complex"
    version = 5

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Complex weights, any activations."""
        p = get_op("moe").full(workload)
        return hardware.kind == "cpu" and parse_weight_format(p["w"]).family == "complex"

    def problem(self, workload: Workload) -> Problem:
        """Return the workload in complex rows and columns."""
        return ComplexProblem.of(workload)

    def multiply(self, problem: Problem, config: MoeConfig) -> Multiply:
        """Rows are quantised, rounded or as they are."""
        return (QuantisedValues if problem.act == "a8" else Values)(problem, config)

    def kernel(self, problem: Problem, config: MoeConfig) -> ExpertKernel:
        """Return the emitter of the kernel."""
        return ComplexKernel(self.multiply(problem, config))

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the ways that both matmuls can take, the fastest first."""
        second = complex_ways(problem.layout2, problem.act, hardware)
        first = complex_ways(problem.layout13, problem.act, hardware)
        return tuple(n for n in first if n in second)
