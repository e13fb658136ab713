"""Routed experts by table lookup: T-MAC's bit planes, TL1 and TL2, the tiles of ``mpgemm.x86_lut``.

A token's tables serve gate and up of all its experts; the down projection has some for each slot.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.lut import Lookup, TableRows, groups_fill_blocks
from mimo_compile.schedules.emit.lut_x86 import LOOKUPS, Permute
from mimo_compile.schedules.emit.matrix import Matrix
from mimo_compile.schedules.emit.nibbles import NibbleLayout
from mimo_compile.schedules.emit.tile import Out, TileKnobs, Weights
from mimo_compile.schedules.moe.experts import Experts
from mimo_compile.schedules.moe.multiply import Blocks, Multiply
from mimo_compile.schedules.moe.problem import MoeConfig, Problem

_ALONE = 8 << 10
"""Numbers of rows whose tables one thread makes before others would have woken up."""


class LookedUp(Multiply):
    """Sums of neighbouring int8 codes looked up in tables, which are made of each row once."""

    def lookup(self, matrix: Matrix) -> Lookup:
        """Return the way to look up."""
        codes = matrix.codes
        assert isinstance(codes, NibbleLayout)
        return LOOKUPS[self.config.dot](codes)

    @property
    def lanes(self) -> int:
        """See `Multiply.lanes`."""
        return LOOKUPS[self.config.dot].lanes

    @property
    def cost(self) -> int:
        """Count lookups of a block."""
        return 2 * self.lookup(self.problem.w13).codes.index_lines

    def prepared(self, matrix: Matrix, x: Any, rows: Any, size: int) -> TableRows:
        """See `Multiply.prepared`."""
        parallel = self.shared(size, _ALONE)
        return TableRows.made(self.lookup(matrix), x, int(x.shape[0]), parallel=parallel, rows=rows)

    def scratch_bytes(self, matrix: Matrix, rows: int) -> int:
        """See `Multiply.scratch_bytes`."""
        return TableRows.bytes(self.lookup(matrix), rows)

    def row_bytes(self, matrix: Matrix) -> float:
        """Return the bytes of a row's tables."""
        return 16.0 * self.lookup(matrix).runs

    def tile(
        self, matrix: Matrix, weights: Weights, x: TableRows, blocks: Blocks,
        tokens: Sequence[Any], out: Out, knobs: TileKnobs,
    ) -> None:  # fmt: skip
        """See `Multiply.tile`."""
        x.tile(weights, blocks, tokens, out, knobs)

    def making(self, matrix: Matrix, rows: float) -> dict[str, float]:
        """Return the operations that make tables."""
        return self.lookup(matrix).making(rows)

    def work(self, matrix: Matrix, slots: float, visits: float) -> dict[str, float]:
        """See `Multiply.work`."""
        return self.lookup(matrix).work(slots, visits)


class _Lookups(Experts):
    """Base: subclasses choose the layout."""

    version = 1

    @abstractmethod
    def fits(self, problem: Problem) -> bool:
        """Say whether the format has this layout."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """int8 activations, groups that fill blocks, sums within 32 bits, a permutation of bytes."""
        problem = self.problem(workload)
        if problem.act != "a8" or hardware.kind != "cpu" or not problem.fmt.is_integer:
            return False
        if not self.fits(problem) or not problem.exact:
            return False
        filled = groups_fill_blocks(problem.layout13) and groups_fill_blocks(problem.layout2)
        return filled and bool(self.dots(problem, hardware))

    def multiply(self, problem: Problem, config: MoeConfig) -> Multiply:
        """Sums from tables."""
        return LookedUp(problem, config)

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the ways that the CPU has."""
        codes = problem.layout13
        assert isinstance(codes, NibbleLayout)
        return tuple(name for name, way in LOOKUPS.items() if way.fits(codes, hardware))

    def streams(self, problem: Problem) -> bool:
        """One token's kernel does; of more it was not measured."""
        return problem.t == 1 and super().streams(problem)

    def unrolls(self, problem: Problem) -> tuple[int, ...]:
        """LLVM unrolls spans itself."""
        return (1,)


class X86MoeLut(_Lookups):
    """1 and 3 bits, one lookup for each bit of four columns."""

    name = "moe.x86_lut"
    packing = "bits4"

    def fits(self, problem: Problem) -> bool:
        """Codes of 1 and 3 bits."""
        return problem.fmt.bits in (1, 3)


class X86MoeLut2(X86MoeLut):
    """Codes of 2 bits, ternary ones too: faster than dots in cache, from memory dots keep up."""

    name = "moe.x86_lut2"

    def fits(self, problem: Problem) -> bool:
        """Codes of 2 bits."""
        return problem.fmt.bits == 2


class X86MoeLutShuffle(_Lookups):
    """1 to 4 bits on CPUs with AVX2 whose permutations stay in 128 bits."""

    name = "moe.x86_lut_shuffle"
    packing = "bits4.apart"

    def fits(self, problem: Problem) -> bool:
        """Codes of up to 4 bits."""
        return problem.fmt.bits <= 4

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Where `X86MoeLut` has nothing better."""
        return not Permute.needs <= hardware.features and super().supports(workload, hardware)


class X86MoePairs(_Lookups):
    """Two ternary codes in 4 bits: less padding than `X86MoeTriples`, no signs."""

    name = "moe.x86_tl1"
    packing = "pairs"

    def fits(self, problem: Problem) -> bool:
        """Ternary codes that may be stored so wide."""
        return problem.fmt.family == "ternary"


class X86MoeTriples(_Lookups):
    """Three ternary codes in 4 bits and a sign: 1.67 bits a weight, in groups that blocks fill."""

    name = "moe.x86_tl2"
    packing = "triples"

    def fits(self, problem: Problem) -> bool:
        """Ternary codes."""
        return problem.fmt.family == "ternary"
