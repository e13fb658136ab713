"""Codes with columns in lanes: how they are packed, and tiles whose tables have the scales in them.

Codes of a row lie in lines of 64 bytes: bits ``4 p`` to ``4 p + 3`` of 32-bit lane l are column
``128 b + 16 p + l`` of line b, which ``vpermps`` turns into 16 weights. Scales stay ``[N, G]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, prefetch, splat
from mimo_compile.schedules.emit.decode import DECODERS, sides
from mimo_compile.schedules.emit.layout import pack_scales, unpack_rows
from mimo_compile.schedules.emit.matrix import Matrix

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

    def unpack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """See `Matrix.unpack`."""
        out: dict[str, Array] = {}
        if "codes" in arrays:
            out["codes"] = unpack_columns(arrays["codes"], self.k)
        if "scale" in arrays:
            out["scale"] = arrays["scale"].astype(np.float32)
        return out


def columns_tile(
    matrix: ColumnsMatrix, ahead: int, codes: Any, scale: Any, x: Any, rows: list[Any],
    tokens: list[Any],
) -> dict[tuple[int, int], Register]:  # fmt: skip
    """Emit the sums of a tile, by row and token, lanes not yet added up.

    Args:
        matrix: Its layout.
        ahead: Lines to ask for in advance; 0: none.
        codes: Packed codes.
        scale: Scales.
        x: ``[M, lines * 128]`` float32, zeros behind column K (or exactly K columns).
        rows: Rows of the weights.
        tokens: Rows of ``x``.
    """
    fmt, size = matrix.fmt, matrix.fmt.group_size(matrix.k)
    decoder = DECODERS["vpermps512"](fmt)
    books = [decoder.prepare(side) for side in sides(fmt)]
    zero = splat(T.float32(0), LANES)
    total = {
        (r, m): Register("float32", LANES, zero)
        for r in range(len(rows)) for m in range(len(tokens))
    }  # fmt: skip
    last = fmt.groups(matrix.k) - 1

    def table(row: Any, g: Any) -> Any:
        at = T.min(g, last) if last else 0  # columns behind K have no group
        places = (at * len(books) + side for side in range(len(books)))
        scales = [splat(T.cast(scale[row, place], "float32"), LANES) for place in places]
        product = books[0] * scales[0]
        return bind(product + books[1] * scales[1] if len(books) == 2 else product)

    with loop(-(-matrix.k // LINE)) as b:
        values = [
            [bind(load(x, t, b * LINE + p * LANES, lanes=LANES)) for p in range(PARTS)]
            for t in tokens
        ]
        for r, row in enumerate(rows):
            if ahead:
                prefetch(codes, row, b + ahead, 0)
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


def sum_of_lanes(vector: Any) -> Any:
    """Return the sum of 16 lanes, halves first."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low, high = (T.Shuffle([vector], list(range(at, at + lanes))) for at in (0, lanes))
        vector = bind(low + high)
    return vector
