"""float32 or bfloat16 weights times float32 activations: 16 rows a vector, one FMA a column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.float_tile import float_tile, float_units
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.tile import Out, Piece, TileKnobs, Weights
from mimo_compile.schedules.mpgemm.gemm import X86Gemm
from mimo_compile.schedules.mpgemm.loops import Blocks, Results, all_tiles
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem


class X86Float(X86Gemm):
    """Any x86-64; LLVM splits the 16 lanes where registers are narrower."""

    name = "mpgemm.x86_float"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """f32 and bf16 weights with float activations."""
        problem = self.problem(workload)
        return hardware.kind == "cpu" and problem.fmt.name in ("f32", "bf16")

    def tiles(self, problem: Problem) -> tuple[tuple[int, int, int], ...]:
        """Enough sums in flight for two multiply-adds a cycle, all of them in 32 registers."""
        if problem.m == 1:
            return ((4, 1, 1), (2, 1, 1), (1, 1, 1))
        return ((3, 6, 1), (2, 6, 1), (1, 6, 1))

    def units(self, problem: Problem) -> int:
        """Turns of the widest body."""
        return float_units(None, problem.k, max(self.unrolls(problem)))

    def body(self, problem: Problem, config: GemmConfig, hardware: Hardware) -> Callable[..., None]:
        """Return the emitter."""

        def emit(x: Any, w: Any, *rest: Any) -> None:
            bias, y = rest if problem.bias else (None, *rest)

            def tile(
                blocks: Blocks, tokens: list[Any], out: Out, knobs: TileKnobs, piece: Piece | None
            ) -> None:
                float_tile(None, problem.k, Weights(w), x, blocks, tokens, out, knobs, piece)

            all_tiles(problem, config, Results(y, bias), tile)

        return emit

    def arithmetic(self, problem: Problem, config: GemmConfig) -> dict[str, float]:
        """Return one multiply-add for each padded weight and token; bfloat16 widens once a tile."""
        m, rows = problem.m, problem.row_blocks * ROWS
        ops = {"fma_f32": float(m) * rows * problem.k}
        if problem.fmt.bits == 16:
            ops["int_op"] = 2.0 * rows * problem.k * -(-m // config.tokens)
        return ops
