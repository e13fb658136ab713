"""Routed experts with bfloat16 activations: dots of pairs by ``vdpbf16ps``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Schedule
from mimo_compile.schedules.emit.bf16 import (
    NEEDS,
    Rows,
    bf16_rows,
    code_values,
    codes_tile,
    float_pairs_tile,
    imported,
    pairs_work,
    rounding_work,
    workspace_bytes,
)
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout
from mimo_compile.schedules.emit.matrix import Matrix
from mimo_compile.schedules.emit.pairs import PairsMatrix
from mimo_compile.schedules.emit.tile import Out, TileKnobs, Weights
from mimo_compile.schedules.moe.experts import Experts
from mimo_compile.schedules.moe.multiply import Blocks, Multiply
from mimo_compile.schedules.moe.problem import MoeConfig, Problem


class Pairs(Multiply):
    """bfloat16 on both sides: rows are rounded, weights lie in pairs of columns or become bfloat16."""

    def frame(self) -> AbstractContextManager[Any]:
        """See `Multiply.frame`."""
        frame: AbstractContextManager[Any] = imported()
        return frame

    @property
    def cost(self) -> int:
        """Count dots of a block."""
        codes = self.codes(self.problem.w13)
        return 1 if codes is None else 2 * codes.quads

    @staticmethod
    def columns(matrix: Matrix) -> int:
        """Return the columns of a row with padding."""
        return matrix.columns if isinstance(matrix, PairsMatrix) else matrix.codes.k_padded

    @staticmethod
    def codes(matrix: Matrix) -> CodeLayout | None:
        """Return the layout of codes, if the weights are any."""
        return None if matrix.fmt.is_float else matrix.codes

    def prepared(self, matrix: Matrix, x: Any, rows: Any, size: int) -> Rows:
        """See `Multiply.prepared`."""
        return bf16_rows(
            self.codes(matrix), x, int(x.shape[0]), matrix.k, self.columns(matrix),
            parallel=self.shared(size), rows=rows,
        )  # fmt: skip

    def scratch_bytes(self, matrix: Matrix, rows: int) -> int:
        """See `Multiply.scratch_bytes`."""
        return workspace_bytes(self.codes(matrix), rows, self.columns(matrix))

    def row_bytes(self, matrix: Matrix) -> float:
        """Return the bytes of a rounded row."""
        return 2.0 * self.columns(matrix)

    def tile(
        self, matrix: Matrix, weights: Weights, x: Rows, blocks: Blocks, tokens: Sequence[Any],
        out: Out, knobs: TileKnobs,
    ) -> None:  # fmt: skip
        """See `Multiply.tile`."""
        codes = self.codes(matrix)
        if codes is None:
            float_pairs_tile(self.columns(matrix), weights, x, blocks, tokens, out, knobs)
        else:
            codes_tile(codes, weights, x, blocks, tokens, out, knobs)

    def making(self, matrix: Matrix, rows: float) -> dict[str, float]:
        """Return the operations that round rows."""
        return rounding_work(rows, matrix.k)

    def work(self, matrix: Matrix, slots: float, visits: float) -> dict[str, float]:
        """See `Multiply.work`."""
        rows, columns = matrix.row_blocks * ROWS, self.columns(matrix)
        return pairs_work(self.codes(matrix), rows, columns, slots, visits)


class X86MoeBf16(Experts):
    """For CPUs with AVX512-BF16: bfloat16 weights, integer codes, FP3 and FP4."""

    name = "moe.x86_bf16"
    version = 1
    order = Schedule.order
    """Nothing is promised: where a register tile has few sums, each of them is made of several."""

    def problem(self, workload: Workload) -> Problem:
        """Return the workload; bfloat16 weights lie in pairs of columns."""
        fmt = parse_weight_format(get_op("moe").full(workload)["w"])
        return Problem.of(workload, "", PairsMatrix if fmt.name == "bf16" else Matrix)

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """bfloat16 activations, and weights that bfloat16 holds exactly."""
        problem = self.problem(workload)
        if problem.act != "abf16" or not hardware.features >= NEEDS or problem.fmt.dense:
            return False
        if problem.fmt.is_float:
            return problem.fmt.name == "bf16"
        whole = problem.layout13.whole_groups and problem.layout2.whole_groups
        return code_values(problem.fmt) is not None and whole

    def streams(self, problem: Problem) -> bool:
        """All formats do."""
        return True

    def multiply(self, problem: Problem, config: MoeConfig) -> Multiply:
        """Dots of pairs."""
        return Pairs(problem, config)
