"""Codebook weights with columns in lanes: each group of a row has a table of its own, scales multiplied in.

Two-sided formats (AFPQ) then take one permutation a code, as one-sided ones do, and 16 products a group:
worth it for groups of 256 and more (`emit.columns` has the layout).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.build import (
    T,
    load,
    loop,
    store,
    workspace,
)
from mimo_compile.schedules.emit.columns import (
    LANES,
    LINE,
    PARTS,
    ColumnsMatrix,
    columns_tile,
    sum_of_lanes,
)
from mimo_compile.schedules.emit.quantize import Activations, quantize_row, workspace_bytes
from mimo_compile.schedules.mpgemm.gemm import X86Gemm
from mimo_compile.schedules.mpgemm.integer import QUANTIZE_ALONE
from mimo_compile.schedules.mpgemm.loops import tiles
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem


class ColumnsProblem(Problem):
    """Row blocks are rows."""

    def args(self) -> tuple[Arg, ...]:
        """Return x, codes, scale, bias ``[N]``, y."""
        args = super().args()
        return tuple(
            Arg(a.name, a.role, (self.n,), a.dtype) if a.name == "bias" else a for a in args
        )

    @staticmethod
    @lru_cache(maxsize=256)
    def of(workload: Workload, packing: str = "") -> ColumnsProblem:
        """Read a workload of the op ``mpgemm``."""
        p = get_op("mpgemm").full(workload)
        weight = ColumnsMatrix(parse_weight_format(p["w"]), p["n"], p["k"], p["s"])
        return ColumnsProblem(p["m"], weight, p["a"], bool(p["bias"]))


class X86CodebookColumns(X86Gemm):
    """AVX-512."""

    name = "mpgemm.x86_codebook_columns"

    def problem(self, workload: Workload) -> Problem:
        """Return the workload by rows."""
        return ColumnsProblem.of(workload)

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Codebooks whose groups are whole vectors."""
        p = get_op("mpgemm").full(workload)
        fmt = parse_weight_format(p["w"])
        return fmt.family == "codebook" and hardware.kind == "cpu" and hardware.has_avx512

    def unrolls(self, problem: Problem) -> tuple[int, ...]:
        """A line is 128 columns."""
        return (1,)

    def tiles(self, problem: Problem) -> tuple[tuple[int, int, int], ...]:
        """Rows share the vectors of x."""
        if problem.m > 1:
            return ((4, 4, 1), (4, 2, 1), (2, 2, 1), (1, 2, 1))
        return ((8, 1, 1), (4, 1, 1), (2, 1, 1), (1, 1, 1))

    def default(
        self,
        problem: Problem,
        sizes: tuple[int, ...],
        hardware: Hardware,
        legal: Callable[[GemmConfig], bool],
    ) -> GemmConfig:
        """Rows share vectors of x, also where memory is slow."""
        config = super().default(problem, sizes, hardware, legal)
        return config if problem.m > 1 else self.sharing(config, legal, (8, 4, 2), 64)

    def tile_cost(self, problem: Problem, config: GemmConfig) -> int:
        """Count multiply-adds in the body."""
        return config.rows * config.tokens * PARTS

    def scratch_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Rows of x in whole lines."""
        columns = 4 * problem.m * LINE * -(-problem.k // LINE)
        return columns + workspace_bytes(problem.layout, problem.m, "int8")

    def body(self, problem: Problem, config: GemmConfig, hardware: Hardware) -> Callable[..., None]:
        """Return the emitter."""

        def emit(x: Any, codes: Any, scale: Any, *rest: Any) -> None:
            bias, y = rest if problem.bias else (None, *rest)
            rows, factors = _rows(problem, config, x)
            weight = problem.weight
            assert isinstance(weight, ColumnsMatrix)

            def tile(blocks: list[tuple[Any, ...]], tokens: list[Any]) -> None:
                sums = columns_tile(
                    weight, config.prefetch, codes, scale, rows, [b for (b,) in blocks], tokens
                )
                for (r, m), register in sums.items():
                    row, value = blocks[r][0], sum_of_lanes(register.get())
                    if factors is not None:
                        value = value * factors[tokens[m]]
                    store(y, value if bias is None else value + bias[row], tokens[m], row)

            tiles(problem, config, tile)

        return emit

    def arithmetic(self, problem: Problem, config: GemmConfig) -> dict[str, float]:
        """Return multiply-adds over whole lines; tables and permutations once a tile of tokens."""
        n, m, fmt = problem.n, problem.m, problem.fmt
        codes = float(n * LINE * -(-problem.k // LINE))
        passes, per_table = -(-m // config.tokens), min(LINE, max(LANES, fmt.group_size(problem.k)))
        tables = codes / per_table * LANES * passes * fmt.scales_per_group
        return {
            "fma_f32": codes * m + tables,
            "shuffle_u8": 4.0 * codes * passes,
            "int_op": codes * passes + (3.0 * m * problem.k if problem.act == "a8" else 0.0),
            "add_f32": float(n * m * LANES),
        }

    def row_bytes(self, problem: Problem, config: GemmConfig) -> float:
        """Return the bytes of a row of x in whole lines."""
        return 4.0 * LINE * -(-problem.k // LINE)

    def prepares(self, problem: Problem, config: GemmConfig) -> bool:
        """Say whether rows of x are quantised or filled up."""
        return problem.act == "a8" or problem.k % LINE != 0

    def pack(
        self, workload: Workload, config: GemmConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Pack codes and scale; bias is as it is."""
        out = self.problem(workload).weight.pack(arrays)
        if "bias" in arrays:
            out["bias"] = np.ascontiguousarray(arrays["bias"])
        return out


def _rows(problem: Problem, config: GemmConfig, x: Any) -> tuple[Any, Any]:
    """Emit what makes rows of x ready: whole lines of floats, and a factor for each (a8)."""
    m, k, columns = problem.m, problem.k, LINE * -(-problem.k // LINE)
    shared = config.parallel and m * k > QUANTIZE_ALONE
    if problem.act == "a8":
        sums = workspace((m, problem.layout.groups), "int32")
        rows = Activations(
            workspace((m, columns), "float32"), sums, workspace((m,), "float32"), columns=columns
        )
        with loop(m, parallel=shared) as row:
            quantize_row(problem.layout, x, (row,), rows, row, offset=0)
        return rows.codes, rows.scale
    if columns == k:
        return x, None
    copy = workspace((m, columns), "float32")
    whole = k // LANES * LANES
    with loop(m, parallel=shared) as row:
        if whole:
            with loop(whole // LANES) as i:
                store(copy, load(x, row, i * LANES, lanes=LANES), row, i * LANES, lanes=LANES)
        for c in range(whole, columns):
            store(copy, x[row, c] if c < k else T.float32(0), row, c)
    return copy, None
