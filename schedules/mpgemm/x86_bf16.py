"""bfloat16 activations: dots of pairs by ``vdpbf16ps``, twice the products of a float32 multiply-add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Schedule
from mimo_compile.schedules.emit.bf16 import (
    NEEDS,
    bf16_rows,
    code_values,
    codes_tile,
    float_pairs_tile,
    imported,
    pairs_work,
    rounding_work,
    units,
    workspace_bytes,
)
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.pairs import PairsMatrix
from mimo_compile.schedules.emit.tile import Out, Piece, TileKnobs, Weights
from mimo_compile.schedules.mpgemm.gemm import X86Gemm
from mimo_compile.schedules.mpgemm.loops import Blocks, Results, all_tiles
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem


class X86Bf16(X86Gemm):
    """For CPUs with AVX512-BF16: bfloat16 weights, integer codes, FP3 and FP4."""

    name = "mpgemm.x86_bf16"
    version = 2
    order = Schedule.order
    """Nothing is promised: where a register tile has few sums, each of them is made of several."""

    def problem(self, workload: Workload) -> Problem:
        """Return the workload; bfloat16 weights lie in pairs of columns."""
        problem = Problem.of(workload)
        if problem.fmt.name != "bf16":
            return problem
        p = get_op("mpgemm").full(workload)
        weight = PairsMatrix(problem.fmt, problem.n, problem.k, p["s"])
        return Problem(problem.m, weight, problem.act, problem.bias)

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """bfloat16 activations, and weights that bfloat16 holds exactly."""
        problem = self.problem(workload)
        if problem.act != "abf16" or not hardware.features >= NEEDS:
            return False
        if problem.fmt.is_float:
            return problem.fmt.name == "bf16"
        return code_values(problem.fmt) is not None and problem.layout.whole_groups

    def rounds(self, problem: Problem) -> bool:
        """Rows become bfloat16 themselves."""
        return False

    def prepares(self, problem: Problem, config: GemmConfig) -> bool:
        """Say that rows are rounded first."""
        return True

    def columns(self, problem: Problem) -> int:
        """Return the columns of a row with padding."""
        weight = problem.weight
        return weight.columns if isinstance(weight, PairsMatrix) else problem.layout.k_padded

    def tiles(self, problem: Problem) -> tuple[tuple[int, int, int], ...]:
        """Sums in flight for two dots a cycle; unpacked codes are shared by many tokens."""
        if problem.m == 1:
            return ((4, 1, 4), (2, 1, 4), (1, 1, 4), (4, 1, 1), (2, 1, 1))
        if problem.fmt.is_float:
            return ((4, 6, 1), (3, 6, 1), (2, 6, 1), (1, 6, 1), (1, 4, 1))
        if problem.layout.lane_bits == 8:  # whose conversion takes many registers
            return ((2, 8, 1), (1, 8, 1), (2, 4, 1), (1, 4, 1), (1, 2, 1))
        return ((4, 4, 1), (3, 4, 1), (2, 4, 1), (1, 4, 1), (1, 2, 1))

    def tile_cost(self, problem: Problem, config: GemmConfig) -> int:
        """Count dots in the body."""
        pairs = 1 if problem.fmt.is_float else 2 * problem.layout.quads
        return config.rows * config.tokens * config.unroll * pairs

    def units(self, problem: Problem) -> int:
        """Groups, or turns of the widest body."""
        layout = None if problem.fmt.is_float else problem.layout
        return units(layout, self.columns(problem), max(self.unrolls(problem)))

    def scratch_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Rounded rows, and their sums where zero points ask for them."""
        layout = None if problem.fmt.is_float else problem.layout
        return workspace_bytes(layout, problem.m, self.columns(problem))

    def body(self, problem: Problem, config: GemmConfig, hardware: Hardware) -> Callable[..., None]:
        """Return the emitter."""
        columns, m, k = self.columns(problem), problem.m, problem.k
        layout = None if problem.fmt.is_float else problem.layout
        knobs = TileKnobs(config.prefetch, config.unroll)

        def emit(x: Any, *rest: Any) -> None:
            *packed, y = rest
            bias = packed.pop() if problem.bias else None
            weights = Weights(*packed)
            rows = bf16_rows(layout, x, m, k, columns, parallel=config.parallel)

            def tile(
                blocks: Blocks, tokens: list[Any], out: Out, _: TileKnobs, piece: Piece | None
            ) -> None:
                if layout is None:
                    float_pairs_tile(columns, weights, rows, blocks, tokens, out, knobs, piece)
                else:
                    codes_tile(layout, weights, rows, blocks, tokens, out, knobs, piece)

            with imported():
                all_tiles(problem, config, Results(y, bias), tile)

        return emit

    def arithmetic(self, problem: Problem, config: GemmConfig) -> dict[str, float]:
        """Return products over padded extents; codes become bfloat16 once for each tile of tokens."""
        m, rows, columns = problem.m, problem.row_blocks * ROWS, self.columns(problem)
        layout = None if problem.fmt.is_float else problem.layout
        ops = pairs_work(layout, rows, columns, m, -(-m // config.tokens))
        for kind, count in rounding_work(m, problem.k).items():
            ops[kind] = ops.get(kind, 0.0) + count
        return ops

    def row_bytes(self, problem: Problem, config: GemmConfig) -> float:
        """Return the bytes of a rounded row."""
        return 2.0 * self.columns(problem)
