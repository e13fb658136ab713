"""Complex weights (Fairy): four exact sums by lookups and dots, or float32 multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.build import load, loop
from mimo_compile.schedules.emit.complex import (
    ComplexMatrix,
    ComplexWay,
    complex_way,
    complex_ways,
    halves,
)
from mimo_compile.schedules.emit.layout import ROWS, pack_rows
from mimo_compile.schedules.emit.lookup import LOOKUPS
from mimo_compile.schedules.emit.quantize import alloc_activations, quantize_row, workspace_bytes
from mimo_compile.schedules.emit.tile import Out, TileKnobs, Weights, store_rows
from mimo_compile.schedules.mpgemm.gemm import X86Gemm
from mimo_compile.schedules.mpgemm.integer import QUANTIZE_ALONE
from mimo_compile.schedules.mpgemm.loops import tiles
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem


class ComplexProblem(Problem):
    """Rows, and blocks of rows, are complex ones."""

    def args(self) -> tuple[Arg, ...]:
        """Return x, packed weights, bias ``[2, N/32, 16]`` (real parts first), y."""
        x, *rest = super().args()
        shape = (2, self.row_blocks, ROWS)
        return (x, *(Arg(a.name, a.role, shape, a.dtype) if a.name == "bias" else a for a in rest))

    @staticmethod
    @lru_cache(maxsize=256)
    def of(workload: Workload, packing: str = "") -> ComplexProblem:
        """Read a workload of the op ``mpgemm``."""
        p = get_op("mpgemm").full(workload)
        weight = ComplexMatrix(parse_weight_format(p["w"]), p["n"], p["k"], p["s"], packing=packing)
        return ComplexProblem(p["m"], weight, p["a"], bool(p["bias"]))


def complex_writer(
    problem: Problem,
    y: Any,
    bias: Any,
    blocks: list[tuple[Any, ...]],
    tokens: list[Any],
    lanes: int,
) -> Out:
    """Return the ``out`` of a complex tile, for y seen as `halves`; see `loops.writer`."""

    def out(r: int, row: int, lane: int, value: Any) -> None:
        (block,) = blocks[r]
        if bias is not None:
            value = value + load(bias, row % 2, block, lane, lanes=lanes)
        place = 2 * tokens[row // 2] + row % 2
        last = r + 1 == len(blocks)
        store_rows(y, place, block, lane, lanes, value, problem.n // 2, last=last)

    return out


def quantize_halves(problem: Problem, config: GemmConfig, x: Any, dtype: str, offset: int) -> Any:
    """Emit the quantisation of the real and of the imaginary half of each row, apart."""
    rows = alloc_activations(problem.layout, 2 * problem.m, dtype)
    shared = config.parallel and problem.m * problem.k > QUANTIZE_ALONE
    with loop(2 * problem.m, parallel=shared) as row:
        quantize_row(problem.layout, x, (row,), rows, row, offset=offset)
    return rows


class ComplexGemm(X86Gemm):
    """Base of the schedules of complex weights."""

    def problem(self, workload: Workload) -> Problem:
        """Return the workload in complex rows and columns."""
        return ComplexProblem.of(workload, self.packing)

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Complex weights."""
        p = get_op("mpgemm").full(workload)
        return hardware.kind == "cpu" and parse_weight_format(p["w"]).family == "complex"

    def tiles(self, problem: Problem) -> tuple[tuple[int, int, int], ...]:
        """Four sums for each block and token."""
        if problem.m > 1:
            return ((2, 2, 1), (1, 2, 1), (1, 1, 1))
        return ((4, 1, 1), (2, 1, 1), (1, 1, 1))

    def default(
        self,
        problem: Problem,
        sizes: tuple[int, ...],
        hardware: Hardware,
        legal: Callable[[GemmConfig], bool],
    ) -> GemmConfig:
        """Share x, which each weight meets twice, between row blocks also where one would do."""
        config = super().default(problem, sizes, hardware, legal)
        return config if problem.m > 1 else self.sharing(config, legal, (4, 3, 2), 32)

    def pack(
        self, workload: Workload, config: GemmConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Pack codes, scale and both halves of bias (those given)."""
        problem = self.problem(workload)
        out = problem.weight.pack(arrays)
        if "bias" in arrays:
            parts = arrays["bias"].reshape(2, -1, 1)
            out["bias"] = pack_rows(parts).reshape(2, problem.row_blocks, ROWS)
        return out

    def unpack_weights(
        self, workload: Workload, config: GemmConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Undo `pack`."""
        out = super().unpack_weights(workload, config, arrays)
        if "bias" in arrays:
            halves = arrays["bias"].reshape(2, -1)[:, : self.problem(workload).n // 2]
            out["bias"] = halves.reshape(-1)
        return out


class X86Complex(ComplexGemm):
    """Any x86-64."""

    name = "mpgemm.x86_complex"

    def way(self, problem: Problem, config: GemmConfig) -> ComplexWay:
        """Return the chosen way to look up and multiply."""
        return complex_way(config.dot, problem.layout, problem.act)

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the ways that the CPU has, the fastest first."""
        return complex_ways(problem.layout, problem.act, hardware)

    def unrolls(self, problem: Problem) -> tuple[int, ...]:
        """A block is 16 complex columns already."""
        return (1, 2) if problem.act == "a8" else (1,)

    def tile_cost(self, problem: Problem, config: GemmConfig) -> int:
        """Count multiply-adds in the body; float ways unroll nothing."""
        if config.dot not in LOOKUPS and config.unroll > 1:
            return 1 << 20
        return config.rows * config.tokens * config.unroll * self.way(problem, config).cost

    def scratch_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Quantised halves, their sums and scales."""
        if problem.act != "a8":
            return 0
        dtype = self.way(problem, config).activation
        return workspace_bytes(problem.layout, 2 * problem.m, dtype)

    def body(self, problem: Problem, config: GemmConfig, hardware: Hardware) -> Callable[..., None]:
        """Return the emitter."""
        chosen = self.way(problem, config)
        knobs = TileKnobs(config.prefetch, config.unroll)

        def emit(x: Any, codes: Any, scale: Any, *rest: Any) -> None:
            bias, y = rest if problem.bias else (None, *rest)
            weights, x2, y2 = Weights(codes, scale), halves(x), halves(y)
            rows = x2
            if chosen.quantised:
                rows = quantize_halves(problem, config, x2, chosen.activation, 1)

            def tile(blocks: list[tuple[Any, ...]], tokens: list[Any]) -> None:
                out = complex_writer(problem, y2, bias, blocks, tokens, chosen.lanes)
                chosen.tile(weights, rows, blocks, tokens, out, knobs)

            tiles(problem, config, tile)

        return emit

    def arithmetic(self, problem: Problem, config: GemmConfig) -> dict[str, float]:
        """Return products over padded extents; lookups once for each tile of tokens."""
        chosen, layout, m = self.way(problem, config), problem.layout, problem.m
        columns = layout.blocks if config.dot in LOOKUPS else layout.k / layout.block
        blocks = float(problem.fmt.terms * layout.row_blocks) * columns
        ops = {kind: n * blocks * m for kind, n in chosen.work.items()}
        for kind, n in chosen.unpack_work.items():
            ops[kind] = ops.get(kind, 0.0) + n * blocks * -(-m // config.tokens)
        scaled = 4.0 * ROWS * layout.row_blocks * problem.fmt.terms * m
        ops["fma_f32"] = ops.get("fma_f32", 0.0) + scaled
        if chosen.quantised:
            ops["int_op"] = ops.get("int_op", 0.0) + 3.0 * m * problem.k
        return ops

    def row_bytes(self, problem: Problem, config: GemmConfig) -> float:
        """Return the bytes of both halves of a row as tiles read them."""
        chosen = self.way(problem, config)
        if not chosen.quantised:
            return 4.0 * problem.k
        return 2 * problem.layout.k_padded * (1.0 if chosen.activation == "int8" else 4.0)

    def prepares(self, problem: Problem, config: GemmConfig) -> bool:
        """Say whether rows are quantised first."""
        return problem.act == "a8"

    def lanes(self, config: GemmConfig) -> int:
        """Return the rows in a vector."""
        if "256" in config.dot:
            return ROWS // 2
        return ROWS // 4 if "128" in config.dot else ROWS
