"""Codebook weights with columns in lanes: each group of a row has a table of its own, scales multiplied in.

Two-sided formats (AFPQ) then cost what one-sided ones do: 16 products make a group's table. Codes of a row
lie in lines of 64 bytes: bits ``4 p`` to ``4 p + 3`` of 32-bit lane l are column ``128 b + 16 p + l`` of line
b, which ``vpermps`` turns into 16 weights. Scales stay ``[N, G]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    prefetch,
    splat,
    store,
    workspace,
)
from mimo_compile.schedules.emit.decode import DECODERS, sides
from mimo_compile.schedules.emit.layout import pack_scales, unpack_rows
from mimo_compile.schedules.emit.matrix import Matrix
from mimo_compile.schedules.emit.quantize import Activations, quantize_row, workspace_bytes
from mimo_compile.schedules.mpgemm.gemm import X86Gemm
from mimo_compile.schedules.mpgemm.integer import QUANTIZE_ALONE
from mimo_compile.schedules.mpgemm.loops import tiles
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem

LINE, LANES, PARTS = 128, 16, 8
"""Columns of a line, of a vector, vectors in a line."""


def pack_columns(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pack codes ``[N, K]`` to ``[N, lines, 64]``."""
    n, k = codes.shape
    lines = -(-k // LINE)
    padded = np.zeros((n, lines * LINE), np.uint8)
    padded[:, :k] = codes
    parts = padded.reshape(n, lines, PARTS, LANES).astype(np.uint32)
    words = parts << (4 * np.arange(PARTS, dtype=np.uint32)[:, None])
    joined: npt.NDArray[np.uint32] = np.bitwise_or.reduce(words, axis=2)
    return joined.view(np.uint8).reshape(n, lines, 64)


def unpack_columns(packed: npt.NDArray[np.uint8], k: int) -> npt.NDArray[np.uint8]:
    """Return codes ``[N, K]`` from `pack_columns`."""
    words = packed.view(np.uint32)[:, :, None]
    codes = (words >> (4 * np.arange(PARTS, dtype=np.uint32)[:, None])) & np.uint32(15)
    return np.ascontiguousarray(codes.astype(np.uint8).reshape(packed.shape[0], -1)[:, :k])


class ColumnsMatrix(Matrix):
    """A matrix by rows."""

    @property
    def layout(self) -> str:
        """See `Matrix.layout`."""
        return "columns16.k8"

    @property
    def row_blocks(self) -> int:
        """Rows: a block is one."""
        return self.n

    @property
    def lines(self) -> int:
        """Lines of a row."""
        return -(-self.k // LINE)

    @property
    def useful(self) -> float:
        """See `Matrix.useful`."""
        return self.k / (self.lines * LINE)

    def args(self) -> list[Arg]:
        """Return codes and scale."""
        dtype = "float16" if self.scale_dtype == "f16" else "float32"
        return [
            Arg("codes", "weight", (self.n, self.lines, 64), "uint8"),
            Arg("scale", "weight", self.fmt.scale_shape(self.n, self.k), dtype),
        ]

    def pack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Pack those of codes and scale that are given."""
        out: dict[str, Array] = {}
        if "codes" in arrays:
            out["codes"] = pack_columns(arrays["codes"])
        if "scale" in arrays:
            exact = pack_scales(arrays["scale"], self.scale_dtype, "scale")
            out["scale"] = unpack_rows(exact, self.n)
        return out


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
        ahead = min(config.prefetch, 64)
        wide = (replace(config, rows=r, unroll=1, prefetch=ahead) for r in (8, 4, 2))
        return next((c for c in wide if problem.m == 1 and legal(c)), config)

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

            def tile(blocks: list[tuple[Any, ...]], tokens: list[Any]) -> None:
                sums = _tile(problem, config, codes, scale, rows, [b for (b,) in blocks], tokens)
                for (r, m), register in sums.items():
                    row, value = blocks[r][0], _sum(register.get())
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


def _tile(
    problem: Problem, config: GemmConfig, codes: Any, scale: Any, x: Any, rows: list[Any],
    tokens: list[Any],
) -> dict[tuple[int, int], Register]:  # fmt: skip
    """Emit the sums of a tile, lanes not yet added up."""
    fmt, size = problem.fmt, problem.fmt.group_size(problem.k)
    decoder = DECODERS["vpermps512"](fmt)
    books = [decoder.prepare(side) for side in sides(fmt)]
    zero = splat(T.float32(0), LANES)
    total = {
        (r, m): Register("float32", LANES, zero)
        for r in range(len(rows)) for m in range(len(tokens))
    }  # fmt: skip
    last = fmt.groups(problem.k) - 1

    def table(row: Any, g: Any) -> Any:
        at = T.min(g, last) if last else 0  # columns behind K have no group
        places = (at * len(books) + side for side in range(len(books)))
        scales = [splat(T.cast(scale[row, place], "float32"), LANES) for place in places]
        product = books[0] * scales[0]
        return bind(product + books[1] * scales[1] if len(books) == 2 else product)

    with loop(-(-problem.k // LINE)) as b:
        values = [
            [bind(load(x, t, b * LINE + p * LANES, lanes=LANES)) for p in range(PARTS)]
            for t in tokens
        ]
        for r, row in enumerate(rows):
            if config.prefetch:
                prefetch(codes, row, b + config.prefetch, 0)
            words = bind(T.reinterpret("int32x16", load(codes, row, b, 0, lanes=64)))
            own: Any = None
            for p in range(PARTS):
                if size >= LINE:
                    own = table(row, T.floordiv(b * LINE, size)) if p == 0 else own
                elif p * LANES % size == 0:
                    own = table(row, b * (LINE // size) + p * LANES // size)
                w = decoder.value(own, (words, 4 * p))
                for m in range(len(tokens)):
                    register = total[r, m]
                    register.set(register.get() + w * values[m][p])
    return total


def _sum(vector: Any) -> Any:
    """Return the sum of 16 lanes, halves first."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low, high = (T.Shuffle([vector], list(range(at, at + lanes))) for at in (0, lanes))
        vector = bind(low + high)
    return vector
