"""Integer matmul kernels: quantise the rows of x into workspace, then tiles of exact dots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.build import loop
from mimo_compile.schedules.emit.dot import DOTS, Dot
from mimo_compile.schedules.emit.int_tile import Way, finished, int_tile, is_whole
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.quantize import (
    Activations,
    alloc_activations,
    quantize_row,
    workspace_bytes,
)
from mimo_compile.schedules.emit.tile import Out, Piece, TileKnobs, Weights
from mimo_compile.schedules.mpgemm.gemm import X86Gemm
from mimo_compile.schedules.mpgemm.loops import Blocks, Results, all_tiles
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem

QUANTIZE_ALONE = 64 << 10
"""Elements of x that one thread quantises before others would have woken up."""


def int_results(dot: Dot | Way, weights: Weights, rows: Activations, y: Any, bias: Any) -> Results:
    """Return what becomes of the sums of `int_tile`."""

    def finish(block: tuple[Any, ...], token: Any, lane: int, value: Any) -> Any:
        return finished(dot, weights, rows, block, token, lane, value)

    dtype = "int32" if is_whole(rows.steps(dot.codes)) else "float32"
    return Results(y, bias, dot.lanes, dtype, finish)


class IntegerGemm(X86Gemm):
    """Base of the schedules that quantise activations."""

    def dot(self, problem: Problem, config: GemmConfig) -> Dot:
        """Return the chosen way to multiply."""
        return DOTS[config.dot](problem.layout)

    def order(self, workload: Workload, config: GemmConfig, hardware: Hardware) -> str | None:
        """Sums of integers are exact; those of groups are added in their order, piece by piece."""
        dot = DOTS.get(config.dot)
        if dot is None or dot.activation != "int8":
            return super().order(workload, config, hardware)
        whole = is_whole(self.problem(workload).steps)
        return "exact" if whole else f"groups split={config.split}"

    def tile_cost(self, problem: Problem, config: GemmConfig) -> int:
        """Count dots (and multiply-adds of the float way) in the body."""
        dot = self.dot(problem, config)
        steps = problem.layout.block if dot.activation == "float32" else problem.layout.quads
        return config.rows * (ROWS // dot.lanes) * config.tokens * config.unroll * steps

    def units(self, problem: Problem) -> int:
        """Steps, or turns of the widest body where a row is one step."""
        steps = problem.steps
        return steps.blocks // max(self.unrolls(problem)) if is_whole(steps) else steps.count

    def scratch_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Quantised rows, their group sums and scales."""
        dtype = self.dot(problem, config).activation
        return workspace_bytes(problem.layout, problem.m, dtype, problem.steps.group)

    def body(self, problem: Problem, config: GemmConfig, hardware: Hardware) -> Callable[..., None]:
        """Return the emitter."""
        dot = self.dot(problem, config)
        layout = problem.layout

        def emit(x: Any, *rest: Any) -> None:
            *packed, y = rest
            bias = packed.pop() if problem.bias else None
            weights = Weights(*packed)
            rows = alloc_activations(layout, problem.m, dot.activation, problem.steps.group)
            shared = config.parallel and problem.m * problem.k > QUANTIZE_ALONE
            with loop(problem.m, parallel=shared) as m:
                quantize_row(layout, x, (m,), rows, m)

            def tile(
                blocks: Blocks, tokens: list[Any], out: Out, knobs: TileKnobs, piece: Piece | None
            ) -> None:
                int_tile(dot, weights, rows, blocks, tokens, out, knobs, piece=piece)

            all_tiles(problem, config, int_results(dot, weights, rows, y, bias), tile)

        return emit

    def arithmetic(self, problem: Problem, config: GemmConfig) -> dict[str, float]:
        """Return dots over padded extents; unpacking once for each tile of tokens; quantising x."""
        dot, layout, m = self.dot(problem, config), problem.layout, problem.m
        passes = -(-m // config.tokens)
        steps = float(layout.row_blocks * ROWS // dot.lanes * layout.blocks)
        ops = {kind: count * steps * m for kind, count in dot.work.items()}
        for kind, count in dot.unpack_work.items():
            ops[kind] = ops.get(kind, 0.0) + count * steps * passes
        scaled = float(layout.row_blocks * ROWS * problem.steps.count * m)
        each = 1 + layout.fmt.has_zero + (problem.steps.group > 0 and layout.groups > 1)
        ops["fma_f32"] = ops.get("fma_f32", 0.0) + scaled * each
        ops["int_op"] = ops.get("int_op", 0.0) + 3.0 * m * problem.k  # quantise: scale, round, add
        return ops

    def row_bytes(self, problem: Problem, config: GemmConfig) -> float:
        """Return the bytes of a quantised row."""
        width = 1.0 if self.dot(problem, config).activation == "int8" else 4.0
        return problem.layout.k_padded * width

    def prepares(self, problem: Problem, config: GemmConfig) -> bool:
        """Say that rows are quantised first."""
        return True

    def lanes(self, config: GemmConfig) -> int:
        """Return the rows of one dot."""
        return DOTS[config.dot].lanes
