"""Integer codes on any x86-64: 16-bit multiply-adds or exact float32 (int8 activations), else FMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.dot import DOTS, LOOKUP, exact, float_ways, float_work
from mimo_compile.schedules.emit.float_tile import float_tile, float_units
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.tile import Out, Piece, TileKnobs, Weights
from mimo_compile.schedules.mpgemm.integer import IntegerGemm
from mimo_compile.schedules.mpgemm.loops import Blocks, Results, all_tiles
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem


class X86Portable(IntegerGemm):
    """Reads the same packed weights as ``mpgemm.x86_vnni``."""

    name = "mpgemm.x86_portable"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Integer or ternary weights, any activations."""
        problem = self.problem(workload)
        return hardware.kind == "cpu" and exact(problem.layout)

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Without 512-bit VNNI: what the CPU has, widest first. Floats: see `float_ways`."""
        if not problem.acts.is_int8:
            return float_ways(problem.layout, hardware)
        usable = (n for n, d in DOTS.items() if d.fits(problem.layout, hardware))
        return tuple(n for n in usable if n != "vnni512")

    def unrolls(self, problem: Problem) -> tuple[int, ...]:
        """A block of the float kernel is 4 to 32 columns already."""
        return super().unrolls(problem) if problem.acts.is_int8 else (1,)

    def tiles(self, problem: Problem) -> tuple[tuple[int, int, int], ...]:
        """The float kernel needs more sums in flight."""
        if problem.acts.is_int8 or problem.m > 1:
            return super().tiles(problem)
        return ((8, 1, 1), (4, 1, 1), (2, 1, 1), (1, 1, 1))

    def tile_cost(self, problem: Problem, config: GemmConfig) -> int:
        """Count multiply-adds in the body."""
        if config.dot in DOTS:
            return super().tile_cost(problem, config)
        return config.rows * config.tokens * problem.layout.block

    def units(self, problem: Problem) -> int:
        """Those of the integer kernels; a16: groups, or blocks."""
        if problem.acts.is_int8:
            return super().units(problem)
        return float_units(problem.layout, problem.k, 1)

    def scratch_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Workspace for quantised rows, none for a16."""
        return super().scratch_bytes(problem, config) if config.dot in DOTS else 0

    def body(self, problem: Problem, config: GemmConfig, hardware: Hardware) -> Callable[..., None]:
        """Return the emitter."""
        if config.dot in DOTS:
            return super().body(problem, config, hardware)

        def emit(x: Any, *rest: Any) -> None:
            *packed, y = rest
            bias = packed.pop() if problem.bias else None
            weights = Weights(*packed)

            def tile(
                blocks: Blocks, tokens: list[Any], out: Out, knobs: TileKnobs, piece: Piece | None
            ) -> None:
                float_tile(problem.layout, problem.k, weights, x, blocks, tokens, out, knobs, piece)

            all_tiles(problem, config, Results(y, bias), tile, lookup=config.dot == LOOKUP)

        return emit

    def arithmetic(self, problem: Problem, config: GemmConfig) -> dict[str, float]:
        """Return those of the integer kernels; a16: FMAs, dequantisation once a tile of tokens."""
        if config.dot in DOTS:
            return super().arithmetic(problem, config)
        rows, m = problem.row_blocks * ROWS, problem.m
        passes = -(-m // config.tokens)
        ops = {"fma_f32": float(m) * rows * (problem.k + problem.layout.groups)}
        for kind, amount in float_work(problem.layout, config.dot).items():
            ops[kind] = amount * rows * problem.k * passes
        return ops

    def row_bytes(self, problem: Problem, config: GemmConfig) -> float:
        """Return the bytes of a row, quantised or as it is."""
        return super().row_bytes(problem, config) if config.dot in DOTS else 4.0 * problem.k

    def prepares(self, problem: Problem, config: GemmConfig) -> bool:
        """Say whether rows are quantised first."""
        return config.dot in DOTS

    def lanes(self, config: GemmConfig) -> int:
        """Return the rows in a vector."""
        return super().lanes(config) if config.dot in DOTS else ROWS
