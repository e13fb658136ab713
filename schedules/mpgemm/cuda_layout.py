"""How CUDA kernels lay out constant matrices: row after row, as the canonical arrays, without waste.

* Integer codes ``[N, K]`` -> ``[N, K * bits / 8]`` bytes of two's complement (code less the fixed zero point,
  also where groups have their own): 2, 4 or 8 bits, the next of these where a format has others. Byte b of
  each four holds the columns b, b + 4, b + 8, ... of the 32 / bits that the four bytes have, the first in its
  lowest bits, so that one field of all four bytes is four neighbouring columns. 8 bits are plain int8.
* Codes of codebooks: four bits, two neighbouring columns in a byte, the first in its lower half. E4M3: bytes.
* Scales and zero points ``[N, G]``, float weights ``[N, K]`` and the bias as they are.

Rows are padded to 8 (the most that a warp of `cuda_gemv` has), columns to 16 bytes. Pads are zeros; beside
padded columns activations are zeros, and results of padded rows are not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mimo_compile.ir.formats import ActFormat, WeightFormat
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.schedules.cuda.template import Constant
from mimo_compile.schedules.emit.matrix import arg_bytes
from mimo_compile.schedules.mpgemm.cuda_books import Book, book_of, takes_int8

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
    def takes(fmt: WeightFormat, acts: ActFormat) -> bool:
        """Say whether weights of a format have this layout, and its kernels such activations."""
        if fmt.is_float:
            return True
        if fmt.is_integer:
            return fmt.bits >= 2 and not fmt.dense
        if fmt.family == "codebook":
            return not fmt.two_sided and (takes_int8(fmt) or not acts.is_int8)
        return fmt.family == "fp8" and not acts.is_int8

    @property
    def bits(self) -> int:
        """Bits of a weight as it is stored."""
        if self.is_book:
            return 4
        return (
            self.fmt.bits if self.fmt.is_float else next(b for b in (2, 4, 8) if b >= self.fmt.bits)
        )

    @property
    def is_book(self) -> bool:
        """True for codes of a codebook."""
        return self.fmt.family == "codebook"

    @property
    def middle(self) -> int:
        """What stored codes are less than those of the canonical array."""
        return int(self.fmt.fixed_zero) if self.fmt.is_integer else 0

    @property
    def layout(self) -> str:
        """Name of the layout, for `Schedule.layouts`."""
        return f"cuda.rows{ROWS}.b{self.bits}" + ".book" * self.is_book

    def book(self, kind: str) -> Book | None:
        """Return the codebook as it is multiplied (`book_of`), None for other formats."""
        return book_of(self.fmt, kind) if self.is_book else None

    def constants(self, kind: str) -> dict[str, Constant]:
        """Return the constants that `device/codes.cuh` and `scales.cuh` read."""
        out: dict[str, Constant] = {
            "BITS": self.bits,
            "W_E4M3": self.fmt.family == "fp8",
            "W_BOOK": self.is_book,
            "ZEROS": self.fmt.has_zero,
        }
        if book := self.book(kind):
            out |= {"LOOKUP": book.words, "PLANES": book.planes}
        elif not self.fmt.is_float:
            out["MIDDLE"] = self.middle if self.fmt.has_zero else 0
        return out

    def factor(self, kind: str) -> float:
        """Return what a sum of products counts, a power of two."""
        if book := self.book(kind):
            return book.unit
        return 2.0 ** (self.bits - 8) if kind == "int8" and self.fmt.is_integer else 1.0

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
        out = [Arg("codes", "weight", (self.n_padded, self.row_bytes), "uint8")]
        for name in ("scale", "zero")[: 1 + self.fmt.has_zero]:
            out.append(Arg(name, "weight", (self.n_padded, self.groups), dtype))
        return out

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
        for name in ("w", "codes", "scale", "zero"):
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
        wide = np.zeros((codes.shape[0], self.k_padded), np.uint8)
        wide[:, : self.k] = (codes - np.uint8(self.middle)) & np.uint8((1 << self.bits) - 1)
        fields = self._fields(wide)
        out = np.zeros((fields.shape[0], fields.shape[1], 4), np.uint8)
        for i in range(fields.shape[2]):
            out |= fields[:, :, i] << np.uint8(self.bits * i)
        return out.reshape(codes.shape[0], self.row_bytes)

    def _unpacked(self, packed: Array) -> Array:
        """Return the codes ``[n, k]`` of bytes ``[n, row_bytes]``."""
        mask = np.uint8((1 << self.bits) - 1)
        words = packed.reshape(packed.shape[0], -1, 4)
        codes = np.empty((packed.shape[0], self.k_padded), np.uint8)
        fields = self._fields(codes)
        for i in range(fields.shape[2]):
            fields[:, :, i] = ((words >> np.uint8(self.bits * i)) + np.uint8(self.middle)) & mask
        return np.ascontiguousarray(codes[:, : self.k])

    def _fields(self, codes: Array) -> Array:
        """Return codes ``[n, k_padded]`` as ``[n, words, fields, bytes]``, a view."""
        per = 8 // self.bits
        if self.is_book:
            return codes.reshape(codes.shape[0], -1, 4, per).swapaxes(2, 3)
        return codes.reshape(codes.shape[0], -1, per, 4)
