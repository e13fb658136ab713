"""Complex weights (Fairy) without multiplications: masked additions of int8 activations in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.build import load, when
from mimo_compile.schedules.emit.complex import halves
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.masks import LANES, LINE, MaskedComplex, MaskMatrix, blocks_of_32
from mimo_compile.schedules.emit.quantize import workspace_bytes
from mimo_compile.schedules.emit.tile import Out, TileKnobs, Weights, store_rows
from mimo_compile.schedules.mpgemm.loops import tiles
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem
from mimo_compile.schedules.mpgemm.x86_complex import (
    ComplexGemm,
    ComplexProblem,
    quantize_halves,
)


class MaskProblem(ComplexProblem):
    """Blocks are of 32 complex rows."""

    def args(self) -> tuple[Arg, ...]:
        """Return x, planes, scale, bias ``[2, N/64, 32]`` (real parts first), y."""
        shape = (2, self.row_blocks, LANES)
        args = super().args()
        return tuple(Arg(a.name, a.role, shape, a.dtype) if a.name == "bias" else a for a in args)

    @staticmethod
    @lru_cache(maxsize=256)
    def of(workload: Workload, packing: str = "") -> MaskProblem:
        """Read a workload of the op ``mpgemm``."""
        p = get_op("mpgemm").full(workload)
        weight = MaskMatrix(parse_weight_format(p["w"]), p["n"], p["k"], p["s"])
        return MaskProblem(p["m"], weight, p["a"], bool(p["bias"]))


class X86FairyMasks(ComplexGemm):
    """Any x86-64; AVX-512 has mask registers for it."""

    name = "mpgemm.x86_fairy_masks"

    def problem(self, workload: Workload) -> Problem:
        """Return the workload in blocks of 32 complex rows."""
        return MaskProblem.of(workload)

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Complex weights with int8 activations."""
        return super().supports(workload, hardware) and self.problem(workload).act == "a8"

    def way(self, problem: Problem) -> MaskedComplex:
        """Return the emitter of tiles."""
        return MaskedComplex("masks", problem.layout, True)

    def unrolls(self, problem: Problem) -> tuple[int, ...]:
        """A line of the planes has 8 columns."""
        return (1,)

    def tile_cost(self, problem: Problem, config: GemmConfig) -> int:
        """Count additions in the body."""
        return config.rows * config.tokens * self.way(problem).cost

    def scratch_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Quantised halves, their sums and scales."""
        return workspace_bytes(problem.layout, 2 * problem.m, self.way(problem).activation)

    def body(self, problem: Problem, config: GemmConfig, hardware: Hardware) -> Callable[..., None]:
        """Return the emitter."""
        way, knobs = self.way(problem), TileKnobs(config.prefetch)

        def emit(x: Any, codes: Any, scale: Any, *rest: Any) -> None:
            bias, y = rest if problem.bias else (None, *rest)
            y2 = halves(y)
            rows = quantize_halves(problem, config, halves(x), way.activation, 0)

            def tile(blocks: list[tuple[Any, ...]], tokens: list[Any]) -> None:
                out = _writer(problem, y2, bias, blocks, tokens)
                way.tile(Weights(codes, scale), rows, blocks, tokens, out, knobs)

            tiles(problem, config, tile)

        return emit

    def arithmetic(self, problem: Problem, config: GemmConfig) -> dict[str, float]:
        """Return additions over padded extents; tests of bits once for each tile of tokens."""
        way, m = self.way(problem), problem.m
        blocks = float(problem.fmt.terms * problem.row_blocks * -(-problem.layout.k // LINE))
        shared = way.unpack_work["int_op"] * -(-m // config.tokens)
        scaled = 4.0 * LANES * problem.row_blocks * problem.fmt.terms * m
        return {
            "int_op": blocks * (way.work["int_op"] * m + shared) + 3.0 * m * problem.k,
            "fma_f32": scaled,
        }

    def row_bytes(self, problem: Problem, config: GemmConfig) -> float:
        """Return the bytes of both halves of a row."""
        return 4.0 * problem.layout.k_padded

    def prepares(self, problem: Problem, config: GemmConfig) -> bool:
        """Say that rows are quantised first."""
        return True

    def pack(
        self, workload: Workload, config: GemmConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Pack planes, scale and both halves of bias (those given)."""
        problem = self.problem(workload)
        out = problem.weight.pack(arrays)
        if "bias" in arrays:
            out["bias"] = blocks_of_32(arrays["bias"].reshape(2, -1, 1)).reshape(2, -1, LANES)
        return out


def _writer(
    problem: Problem, y: Any, bias: Any, blocks: list[tuple[Any, ...]], tokens: list[Any]
) -> Out:
    """Return the ``out`` of a tile: the halves of 16 rows of each block that exist."""
    n = problem.n // 2

    def out(r: int, row: int, lane: int, value: Any) -> None:
        (block,) = blocks[r]
        if bias is not None:
            value = value + load(bias, row % 2, block, lane, lanes=ROWS)
        sixteen = 2 * block + lane // ROWS
        place, last = 2 * tokens[row // 2] + row % 2, r + 1 == len(blocks)

        def write() -> None:
            store_rows(y, place, sixteen, 0, ROWS, value, n, last=last)

        if lane and last and (-(-n // ROWS)) % 2:  # the last block may have but one half
            with when(sixteen < -(-n // ROWS)):
                write()
        else:
            write()

    return out
