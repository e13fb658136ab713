"""How x86 kernels lay out constant matrices, and the numpy code that does it (and undoes it).

Rows go into vector lanes: a block of 16 rows is read together, so no kernel needs a horizontal sum.

* Integer codes ``[N, K]`` -> ``[N/16, B, 64]`` bytes, ``P = 8 / lane bits`` codes a byte. Byte
  ``4 * n + j`` of block ``b`` holds, from bit ``p * lane_bits`` on, the code of row ``n`` and column
  ``b * 4P + p * 4 + j``: one shift and one mask give the "16 rows x 4 columns" operand of a dot.
  `dense` has layouts with more columns in a byte.
* Scales and zero points ``[N, G]`` -> ``[N/16, G, 16]``.
* Floats ``[N, K]`` -> ``[N/16, K, 16]``.

N is padded to 16 rows; K to whole groups, or to whole blocks where a group is the row. Pads are
zeros: a padded column meets an activation of zero, a padded row a scale of zero and is never stored.
Leading axes (experts) stay in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import WeightFormat
from mimo_compile.ir.ops.base import Arg, Array

ROWS = 16
"""Rows of a block."""
LAYOUT_CODES, LAYOUT_FLOAT = "rows16.k4", "rows16.k1"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """Extents of one packed matrix of integer codes; see the module's text."""

    fmt: WeightFormat
    n: int
    k: int

    name: ClassVar[str] = LAYOUT_CODES
    """For `Schedule.layouts`."""
    dense: ClassVar[bool] = False
    """True for layouts of `dense`."""
    unit: ClassVar[int] = 1
    """What a code is multiplied by when it is unpacked."""

    @property
    def lane_bits(self) -> int:
        """Bits that a code occupies: the next of 1, 2, 4, 8."""
        return next(b for b in (1, 2, 4, 8) if b >= self.fmt.bits)

    @property
    def per_byte(self) -> int:
        """Codes in a byte (P)."""
        return 8 // self.lane_bits

    @property
    def quads(self) -> int:
        """Operands of a dot in a block: vectors of 4 columns."""
        return self.per_byte

    @property
    def block(self) -> int:
        """Columns in a block."""
        return 4 * self.quads

    @property
    def lines(self) -> int:
        """Runs of 64 bytes in a block."""
        return 1

    @property
    def unpack_ops(self) -> int:
        """Vector operations that unpack a block."""
        return 2 * self.quads if self.lane_bits < 8 else 0

    @property
    def max_value(self) -> int:
        """The largest unpacked code."""
        return self.fmt.max_code * self.unit

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.fmt.groups(self.k)

    @property
    def group_blocks(self) -> int:
        """Blocks that share a scale."""
        return -(-self.fmt.group_size(self.k) // self.block)

    @property
    def whole_groups(self) -> bool:
        """True if groups are whole blocks: codes are packed without gaps between groups."""
        return self.groups == 1 or self.fmt.group % self.block == 0

    @property
    def late_zero(self) -> bool:
        """True if the zero point leaves the sums in float32: it differs by group, or is no integer."""
        return self.fmt.has_zero or self.fmt.fixed_zero % 1 != 0

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.groups * self.group_blocks

    @property
    def k_padded(self) -> int:
        """Columns with padding."""
        return self.blocks * self.block

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 rows."""
        return -(-self.n // ROWS)

    def args(self, prefix: str, lead: tuple[int, ...], scale_dtype: str) -> list[Arg]:
        """Return the packed arguments: codes, scale and, where the format has one, zero."""
        lines = self.blocks * self.lines
        columns = self.groups * self.fmt.scales_per_group
        shape = (*lead, self.row_blocks, columns, ROWS)
        dtype = "float16" if scale_dtype == "f16" else "float32"
        out = [
            Arg(f"{prefix}codes", "weight", (*lead, self.row_blocks, lines, 64), "uint8"),
            Arg(f"{prefix}scale", "weight", shape, dtype),
        ]
        if self.fmt.has_zero:
            out.append(Arg(f"{prefix}zero", "weight", shape, dtype))
        return out

    def pack(self, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Pack codes ``[..., N, K]`` to ``[..., N/16, lines, 64]``."""
        lead = codes.shape[:-2]
        lines = self.blocks * self.lines
        out = np.empty((*lead, self.row_blocks, lines, 64), np.uint8)
        for index in np.ndindex(lead):
            for rows, chunk in _row_chunks(codes[index], self.k_padded):
                # [row blocks, 16 rows, blocks, quads] words of four neighbouring codes
                words = chunk.view("<u4").reshape(-1, ROWS, self.blocks, self.quads)
                packed = self._pack_words(words)  # [row blocks, 16 rows, blocks, lines]
                out[index][rows] = (
                    packed.transpose(0, 2, 3, 1).copy().view(np.uint8).reshape(-1, lines, 64)
                )
        return out

    def unpack(self, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return codes ``[..., N, K]`` from `pack`."""
        lead = packed.shape[:-3]
        words = packed.view("<u4").reshape(-1, self.blocks, self.lines, ROWS)
        quads = self._unpack_words(np.ascontiguousarray(words.transpose(0, 3, 1, 2)))
        codes = np.ascontiguousarray(quads, dtype="<u4").view(np.uint8)
        flat = codes.reshape(*lead, self.row_blocks * ROWS, self.k_padded)
        return np.ascontiguousarray(flat[..., : self.n, : self.k])

    def _pack_words(self, words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Return ``[..., lines]`` of ``[..., quads]``; every code is a byte of its word."""
        packed = words[..., :1].copy()
        for p in range(1, self.per_byte):  # a shifted code stays inside its byte
            packed |= words[..., p : p + 1] << np.uint32(p * self.lane_bits)
        return packed

    def _unpack_words(self, words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Undo `_pack_words`."""
        mask = np.uint32(((1 << self.lane_bits) - 1) * 0x01010101)
        parts = [(words >> np.uint32(p * self.lane_bits)) & mask for p in range(self.per_byte)]
        return np.concatenate(parts, axis=-1)


def pack_rows(values: Array, dtype: Any = None) -> Array:
    """Pack any matrix ``[..., N, C]`` to ``[..., N/16, C, 16]`` (scales, zero points, floats)."""
    *lead, n, c = values.shape
    dtype = values.dtype if dtype is None else np.dtype(dtype)
    out = np.empty((*lead, -(-n // ROWS), c, ROWS), dtype)
    for index in np.ndindex(*lead):
        for rows, chunk in _row_chunks(values[index], c):
            out[index][rows] = chunk.reshape(-1, ROWS, c).transpose(0, 2, 1)
    return out


def unpack_rows(packed: Array, n: int) -> Array:
    """Return ``[..., N, C]`` from `pack_rows`."""
    *lead, blocks, c, _ = packed.shape
    return np.ascontiguousarray(
        np.moveaxis(packed, -1, -2).reshape(*lead, blocks * ROWS, c)[..., :n, :]
    )


def pack_scales(values: Array, scale_dtype: str, what: str) -> Array:
    """Pack scales or zero points ``[..., N, G]`` as f16 or f32.

    Raises:
        UsageError: a value has no exact float16, so that the kernel would not compute the model.
    """
    if scale_dtype == "f16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            raise UsageError(
                f"{what} has values that float16 cannot hold exactly",
                remedy="round scales to float16 when quantising, or store them with s=f32",
            )
        values = half
    return pack_rows(values, np.float16 if scale_dtype == "f16" else np.float32)


def pack_quantised(
    layout: CodeLayout, prefix: str, arrays: Mapping[str, Array], scale_dtype: str
) -> dict[str, Array]:
    """Pack those of codes, scale and zero (under ``prefix``) that are given."""
    out: dict[str, Array] = {}
    if (name := f"{prefix}codes") in arrays:
        out[name] = layout.pack(np.ascontiguousarray(arrays[name]))
    for name in (f"{prefix}scale", f"{prefix}zero"):
        if name in arrays:
            out[name] = pack_scales(arrays[name], scale_dtype, name)
    return out


def _row_chunks(matrix: Array, columns: int) -> Iterator[tuple[slice, Array]]:
    """Yield slices of row blocks with their rows, contiguous, padded to 16 rows and ``columns``."""
    n, k = matrix.shape
    step = max(1, _CHUNK_BYTES // (ROWS * max(1, columns) * matrix.itemsize))
    for start in range(0, -(-n // ROWS), step):
        part = matrix[start * ROWS : (start + step) * ROWS]
        blocks = -(-part.shape[0] // ROWS)
        if part.shape[0] != blocks * ROWS or k != columns:
            padded = np.zeros((blocks * ROWS, columns), matrix.dtype)
            padded[: part.shape[0], :k] = part
            part = padded
        yield slice(start, start + blocks), np.ascontiguousarray(part)
