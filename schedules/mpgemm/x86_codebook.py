"""Codebook (NF, FP, two-sided AFPQ) and fp8 weights: looked up, then multiplied as integers or floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.book import Way, sums_of, way, ways
from mimo_compile.schedules.emit.build import loop
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.lookup import LOOKUPS
from mimo_compile.schedules.emit.quantize import alloc_activations, quantize_row, workspace_bytes
from mimo_compile.schedules.emit.tile import Out, Piece, TileKnobs, Weights
from mimo_compile.schedules.mpgemm.gemm import AHEAD, X86Gemm
from mimo_compile.schedules.mpgemm.integer import QUANTIZE_ALONE
from mimo_compile.schedules.mpgemm.loops import Blocks, Results, all_tiles
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem


class X86Codebook(X86Gemm):
    """FP3 and FP4 with int8 activations are exact integers; all else is float32."""

    name = "mpgemm.x86_codebook"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Codebook and fp8 weights, any activations."""
        problem = self.problem(workload)
        if hardware.kind != "cpu" or problem.fmt.family not in ("codebook", "fp8"):
            return False
        return problem.layout.whole_groups

    def way(self, problem: Problem, config: GemmConfig) -> Way:
        """Return the chosen way to look up and multiply."""
        return way(config.dot, problem.layout, problem.act)

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the ways that the CPU has, the fastest first."""
        return ways(problem.layout, problem.act, hardware)

    def unrolls(self, problem: Problem) -> tuple[int, ...]:
        """A block of the float ways is 4 or 8 columns already."""
        return super().unrolls(problem) if problem.act == "a8" else (1,)

    def tiles(self, problem: Problem) -> tuple[tuple[int, int, int], ...]:
        """Enough sums in flight; formats have one to six of them for each row and token."""
        if problem.m > 1:
            small = ((1, 4, 1), (2, 2, 1), (1, 2, 1))
            if problem.act != "a8" or problem.fmt.family != "codebook":
                return ((2, 4, 1), *small)
            sums = sums_of(problem.fmt)
            wide = ((4, 4, 1), (3, 4, 1)) if sums == 1 else ()
            return (*wide, *(((2, 4, 1),) if sums < 4 else ()), *small)
        unroll = ((4, 1, 2),) if problem.act == "a8" else ()
        return (*unroll, (4, 1, 1), (2, 1, 1), (1, 1, 1))

    def default(
        self,
        problem: Problem,
        sizes: tuple[int, ...],
        hardware: Hardware,
        legal: Callable[[GemmConfig], bool],
    ) -> GemmConfig:
        """Where codes need several lookups, row blocks share x; float ways want more sums in flight."""
        config = super().default(problem, sizes, hardware, legal)
        if problem.m > 1:
            return config
        if config.dot in LOOKUPS:
            few = 1 < self.way(problem, config).cost // problem.layout.quads <= 3
            return self.sharing(config, legal, (4,), AHEAD) if few else config
        narrow = problem.fmt.two_sided or problem.fmt.family == "fp8"
        return self.sharing(config, legal, (4, 2, 1) if narrow else (8, 4, 2, 1), 16)

    def tile_cost(self, problem: Problem, config: GemmConfig) -> int:
        """Count multiply-adds in the body; float ways unroll nothing."""
        if config.dot not in LOOKUPS and config.unroll > 1:
            return 1 << 20
        cost = self.way(problem, config).cost
        return config.rows * config.tokens * config.unroll * cost

    def units(self, problem: Problem) -> int:
        """Groups."""
        return problem.layout.groups

    def scratch_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Quantised rows, their group sums and scales."""
        chosen = self.way(problem, config)
        if not chosen.quantised:
            return 0
        return workspace_bytes(problem.layout, problem.m, chosen.activation)

    def body(self, problem: Problem, config: GemmConfig, hardware: Hardware) -> Callable[..., None]:
        """Return the emitter."""
        chosen, layout = self.way(problem, config), problem.layout

        def emit(x: Any, *rest: Any) -> None:
            *packed, y = rest
            bias = packed.pop() if problem.bias else None
            weights, rows = Weights(*packed), x
            if chosen.quantised:
                rows = alloc_activations(layout, problem.m, chosen.activation)
                shared = config.parallel and problem.m * problem.k > QUANTIZE_ALONE
                with loop(problem.m, parallel=shared) as m:
                    quantize_row(layout, x, (m,), rows, m, offset=chosen.offset)

            def tile(
                blocks: Blocks, tokens: list[Any], out: Out, knobs: TileKnobs, piece: Piece | None
            ) -> None:
                chosen.tile(weights, rows, blocks, tokens, out, knobs, piece)

            def finish(_: Any, token: Any, lane: int, value: Any) -> Any:
                return chosen.finished(rows, token, value)

            results = Results(y, bias, chosen.lanes, finish=finish)
            all_tiles(problem, config, results, tile)

        return emit

    def arithmetic(self, problem: Problem, config: GemmConfig) -> dict[str, float]:
        """Return products and scaling over padded extents; lookups once for each tile of tokens."""
        chosen, layout, m = self.way(problem, config), problem.layout, problem.m
        blocks = float(layout.row_blocks) * self.blocks(problem, config)
        ops = {kind: n * blocks * m for kind, n in chosen.work.items()}
        for kind, n in chosen.unpack_work.items():
            ops[kind] = ops.get(kind, 0.0) + n * blocks * -(-m // config.tokens)
        scaled = chosen.scale_work * layout.row_blocks * layout.groups * m
        ops["fma_f32"] = ops.get("fma_f32", 0.0) + scaled
        if chosen.quantised:
            ops["int_op"] = ops.get("int_op", 0.0) + 3.0 * m * problem.k
        return ops

    def blocks(self, problem: Problem, config: GemmConfig) -> float:
        """Return the blocks of columns of a row: float ways leave out columns behind K."""
        layout = problem.layout
        return layout.blocks if config.dot in LOOKUPS else problem.k / layout.block

    def row_bytes(self, problem: Problem, config: GemmConfig) -> float:
        """Return the bytes of a row as tiles read it."""
        chosen = self.way(problem, config)
        if not chosen.quantised:
            return 4.0 * problem.k
        return problem.layout.k_padded * (1.0 if chosen.activation == "int8" else 4.0)

    def prepares(self, problem: Problem, config: GemmConfig) -> bool:
        """Say whether rows are quantised first."""
        return problem.act == "a8"

    def lanes(self, config: GemmConfig) -> int:
        """Return the rows in a vector."""
        if "256" in config.dot:
            return ROWS // 2
        return ROWS // 4 if "128" in config.dot else ROWS


class X86CodebookPlanes(X86Codebook):
    """Three bits packed as three bits."""

    name = "mpgemm.x86_codebook_planes"
    packing = "planes"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """NF3, FP3 and their two-sided forms."""
        return self.problem(workload).fmt.bits == 3 and super().supports(workload, hardware)
