"""How CUDA kernels lay out constant matrices: row after row, as the canonical arrays, without waste.

* Codes of 2, 4 or 8 bits ``[N, K]`` -> ``[N, K * bits / 8]`` bytes of two's complement (code less the fixed
  zero point). Byte b of each four holds the columns b, b + 4, b + 8, ... of the 32 / bits that the four bytes
  have, the first in its lowest bits, so that one field of all four bytes is four neighbouring columns. 8 bits
  are plain int8.
* Scales ``[N, G]``, float weights ``[N, K]`` and the bias as they are.

Rows are padded to 8 (the most that a warp of `cuda_gemv` has), columns to 16 bytes. Pads are zeros and mean
zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mimo_compile.ir.formats import WeightFormat
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.schedules.emit.matrix import arg_bytes

ROWS = 8
"""Rows are padded to a multiple of these."""
PIECE = 16
"""Bytes that one instruction loads; rows are padded to a multiple of them."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A matrix ``[n, k]`` of a format in device memory."""

    fmt: WeightFormat
    n: int
    k: int
    scale_dtype: str
    """``f16`` or ``f32``: how scales are stored."""

    @staticmethod
    def takes(fmt: WeightFormat) -> bool:
        """Say whether weights of a format have this layout."""
        if fmt.is_float:
            return True
        return fmt.is_integer and fmt.bits in (2, 4, 8) and not fmt.has_zero and not fmt.dense

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return self.fmt.bits

    @property
    def layout(self) -> str:
        """Name of the layout, for `Schedule.layouts`."""
        return f"cuda.rows{ROWS}.b{self.bits}"

    @property
    def n_padded(self) -> int:
        """Rows with padding."""
        return -(-self.n // ROWS) * ROWS

    @property
    def k_padded(self) -> int:
        """Columns with padding."""
        columns = 8 * PIECE // self.bits
        return -(-self.k // columns) * columns

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.k_padded * self.bits // 8

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.fmt.groups(self.k)

    def args(self) -> list[Arg]:
        """Return the packed arguments."""
        if self.fmt.is_float:
            dtype = {"f32": "float32", "bf16": "uint16", "f16": "float16"}[self.fmt.name]
            return [Arg("w", "weight", (self.n_padded, self.k_padded), dtype)]
        dtype = "float16" if self.scale_dtype == "f16" else "float32"
        return [
            Arg("codes", "weight", (self.n_padded, self.row_bytes), "uint8"),
            Arg("scale", "weight", (self.n_padded, self.groups), dtype),
        ]

    @property
    def bytes(self) -> float:
        """Packed bytes of all of it."""
        return float(sum(arg_bytes(a) for a in self.args()))

    def pack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Pack those of the matrix's canonical arrays that are given."""
        out: dict[str, Array] = {}
        for arg in self.args():
            if arg.name not in arrays:
                continue
            values = arrays[arg.name]
            if arg.name == "codes":
                values = self._packed(values)
            out[arg.name] = np.zeros(arg.shape, arg.dtype)
            out[arg.name][: self.n, : values.shape[1]] = values
        return out

    def unpack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return the canonical arrays of those that `pack` gave."""
        out: dict[str, Array] = {}
        for name in ("w", "codes", "scale"):
            if name in arrays:
                values = arrays[name][: self.n]
                if name == "w":
                    out[name] = np.ascontiguousarray(values[:, : self.k])
                elif name == "codes":
                    out[name] = self._unpacked(values)
                else:
                    out[name] = values.astype(np.float32)
        return out

    def _packed(self, codes: Array) -> Array:
        """Return the bytes ``[n, row_bytes]`` of codes ``[n, k]``."""
        per, zero = 8 // self.bits, int(self.fmt.fixed_zero)
        wide = np.zeros((codes.shape[0], self.k_padded), np.uint8)
        wide[:, : self.k] = (codes - np.uint8(zero)) & np.uint8((1 << self.bits) - 1)
        fields = wide.reshape(codes.shape[0], -1, per, 4)  # [n, words, fields, bytes]
        out = np.zeros((*fields.shape[:2], 4), np.uint8)
        for i in range(per):
            out |= fields[:, :, i] << np.uint8(self.bits * i)
        return out.reshape(codes.shape[0], self.row_bytes)

    def _unpacked(self, packed: Array) -> Array:
        """Return the codes ``[n, k]`` of bytes ``[n, row_bytes]``."""
        per, mask = 8 // self.bits, np.uint8((1 << self.bits) - 1)
        words = packed.reshape(packed.shape[0], -1, 1, 4)
        shifts = np.arange(per, dtype=np.uint8).reshape(1, 1, per, 1) * np.uint8(self.bits)
        codes = ((words >> shifts) + np.uint8(int(self.fmt.fixed_zero))) & mask
        return np.ascontiguousarray(codes.reshape(packed.shape[0], -1)[:, : self.k])
