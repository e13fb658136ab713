"""bfloat16 weights in pairs of columns, as dots of bfloat16 read them.

``[N, K]`` -> ``[N/16, P, 32]``: element ``2 n + j`` of line p is row n, column ``2 p + j``; rows are filled
up to 16, columns to 32 (a matrix tile's depth) by zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.matrix import Matrix

DEPTH = 32
"""Columns of a matrix tile."""


class PairsMatrix(Matrix):
    """A bfloat16 matrix, or a stack of them, in pairs of columns."""

    @property
    def layout(self) -> str:
        """See `Matrix.layout`."""
        return "rows16.k2"

    @property
    def columns(self) -> int:
        """Columns with padding."""
        return -(-self.k // DEPTH) * DEPTH

    @property
    def useful(self) -> float:
        """See `Matrix.useful`."""
        return self.n * self.k / (self.row_blocks * ROWS * self.columns)

    def args(self) -> list[Arg]:
        """Return the packed numbers."""
        shape = (*self.lead, self.row_blocks, self.columns // 2, 2 * ROWS)
        return [Arg(f"{self.prefix}w", "weight", shape, "uint16")]

    def pack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Pack the matrix if it is given."""
        name = f"{self.prefix}w"
        if name not in arrays:
            return {}
        values = arrays[name]
        lead = values.shape[:-2]
        out = np.zeros((*lead, self.row_blocks, self.columns // 2, 2 * ROWS), np.uint16)
        for index in np.ndindex(lead):
            for block in range(self.row_blocks):
                part = np.zeros((ROWS, self.columns), np.uint16)
                rows = values[index][block * ROWS : (block + 1) * ROWS]
                part[: rows.shape[0], : self.k] = rows
                pairs = part.view("<u4").T  # [P, 16]: a pair of columns is one word
                out[index][block] = np.ascontiguousarray(pairs).view(np.uint16)
        return {name: out}

    def unpack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """See `Matrix.unpack`."""
        name = f"{self.prefix}w"
        if name not in arrays:
            return {}
        words = np.ascontiguousarray(arrays[name]).view("<u4")  # [..., blocks, P, 16]
        rows = np.ascontiguousarray(np.moveaxis(words, -1, -2)).view(np.uint16)
        flat = rows.reshape(*words.shape[:-3], self.row_blocks * ROWS, self.columns)
        return {name: np.ascontiguousarray(flat[..., : self.n, : self.k])}
