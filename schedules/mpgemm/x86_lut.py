"""Integer codes times int8 activations by table lookup: T-MAC's bit planes, exact."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.dot import exact
from mimo_compile.schedules.emit.lut import Lookup, TableRows, groups_fill_blocks
from mimo_compile.schedules.emit.lut_x86 import LOOKUPS, SPAN, Permute
from mimo_compile.schedules.emit.nibbles import NibbleLayout
from mimo_compile.schedules.emit.tile import Out, Piece, TileKnobs, Weights
from mimo_compile.schedules.mpgemm.gemm import X86Gemm
from mimo_compile.schedules.mpgemm.integer import int_results
from mimo_compile.schedules.mpgemm.loops import Blocks, all_tiles
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem


class LookupGemm(X86Gemm):
    """Base of the schedules that look sums up; subclasses choose the layout."""

    @abstractmethod
    def fits(self, problem: Problem) -> bool:
        """Say whether the format has this layout."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """int8 activations, groups that fill blocks, sums within 32 bits, a permutation of bytes."""
        problem = self.problem(workload)
        if problem.act != "a8" or hardware.kind != "cpu" or not problem.fmt.is_integer:
            return False
        if not self.fits(problem):
            return False
        filled = groups_fill_blocks(problem.layout) and exact(problem.layout)
        return filled and bool(self.dots(problem, hardware))

    def codes(self, problem: Problem) -> NibbleLayout:
        """Return the layout of indices."""
        assert isinstance(problem.layout, NibbleLayout)
        return problem.layout

    def lookup(self, problem: Problem, config: GemmConfig) -> Lookup:
        """Return the chosen way to look up."""
        return LOOKUPS[config.dot](self.codes(problem))

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the ways that the CPU has."""
        codes = self.codes(problem)
        return tuple(name for name, way in LOOKUPS.items() if way.fits(codes, hardware))

    def unrolls(self, problem: Problem) -> tuple[int, ...]:
        """LLVM unrolls spans itself."""
        return (1,)

    def units(self, problem: Problem) -> int:
        """Groups, or the largest runs of blocks that are looked up together."""
        codes = self.codes(problem)
        return codes.groups if codes.groups > 1 else codes.blocks // (SPAN if codes.apart else 2)

    def tiles(self, problem: Problem) -> tuple[tuple[int, int, int], ...]:
        """Tables share the registers with sums."""
        if problem.m == 1:
            return ((1, 1, 1),)
        return ((2, 4, 1), (1, 4, 1), (2, 2, 1), (1, 2, 1), (1, 1, 1))

    def tile_cost(self, problem: Problem, config: GemmConfig) -> int:
        """Count lookups of a block."""
        codes = self.codes(problem)
        return config.rows * config.tokens * codes.index_lines * 2

    def scratch_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Quantised rows, group sums, scales, tables."""
        return TableRows.bytes(self.lookup(problem, config), problem.m)

    def body(self, problem: Problem, config: GemmConfig, hardware: Hardware) -> Callable[..., None]:
        """Return the emitter."""
        lookup = self.lookup(problem, config)

        def emit(x: Any, *rest: Any) -> None:
            *packed, y = rest
            bias = packed.pop() if problem.bias else None
            weights = Weights(*packed)
            parallel = config.parallel and problem.m > 1
            rows = TableRows.made(lookup, x, problem.m, parallel=parallel)

            def tile(
                blocks: Blocks, tokens: list[Any], out: Out, knobs: TileKnobs, piece: Piece | None
            ) -> None:
                rows.tile(weights, blocks, tokens, out, knobs, piece)

            all_tiles(problem, config, int_results(lookup, weights, rows.rows, y, bias), tile)

        return emit

    def arithmetic(self, problem: Problem, config: GemmConfig) -> dict[str, float]:
        """Return lookups and their additions of spans that need one table; making the tables."""
        lookup, m = self.lookup(problem, config), problem.m
        ops = lookup.work(m, -(-m // config.tokens))
        for kind, count in lookup.making(m).items():
            ops[kind] = ops.get(kind, 0.0) + count
        return ops

    def row_bytes(self, problem: Problem, config: GemmConfig) -> float:
        """Return the bytes of a row's tables."""
        return 16.0 * self.lookup(problem, config).runs

    def prepares(self, problem: Problem, config: GemmConfig) -> bool:
        """Say that tables are made first."""
        return True

    def lanes(self, config: GemmConfig) -> int:
        """Return the rows of one vector of sums."""
        return LOOKUPS[config.dot].lanes


class X86Lut(LookupGemm):
    """1 to 3 bits, one lookup for each bit of four columns."""

    name = "mpgemm.x86_lut"
    packing = "bits4"

    def fits(self, problem: Problem) -> bool:
        """Codes of up to 3 bits."""
        return problem.fmt.bits <= 3


class X86Lut4(X86Lut):
    """Codes of 4 bits: a vector of them takes two lookups and two sums where unpacking takes two dots."""

    name = "mpgemm.x86_lut4"

    def fits(self, problem: Problem) -> bool:
        """Codes of 4 bits."""
        return problem.fmt.bits == 4


class X86LutShuffle(X86Lut):
    """1 to 4 bits on CPUs with AVX2 whose permutations stay in 128 bits: others need half the time."""

    name = "mpgemm.x86_lut_shuffle"
    packing = "bits4.apart"

    def fits(self, problem: Problem) -> bool:
        """Codes of up to 4 bits."""
        return problem.fmt.bits <= 4

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """See `LookupGemm`."""
        wide = Permute.needs <= hardware.features
        return not wide and super().supports(workload, hardware)
