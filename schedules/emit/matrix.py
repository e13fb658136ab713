"""A constant matrix as kernels keep it: its format, its packed arguments, its bytes, how it is packed.

Every schedule that reads the layouts of `layout` describes its weights with it, so that plain matmuls
and stacks of experts say the same about the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mimo_compile.ir.formats import WeightFormat
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.schedules.emit.dense import PACKINGS
from mimo_compile.schedules.emit.layout import (
    LAYOUT_FLOAT,
    ROWS,
    CodeLayout,
    pack_quantised,
    pack_rows,
    unpack_rows,
)

PARALLEL_BYTES = 320 << 10
"""Weights below this are read before a second thread has woken up."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix ``[*lead, n, k]`` of one format, or a stack of them."""

    fmt: WeightFormat
    n: int
    k: int
    scale_dtype: str
    """``f16`` or ``f32``: how scales and zero points are stored."""
    prefix: str = ""
    """Of its arguments' names."""
    lead: tuple[int, ...] = ()
    packing: str = ""
    """Layout of integer codes (`dense.PACKINGS`)."""

    @property
    def codes(self) -> CodeLayout:
        """Layout of integer codes."""
        return PACKINGS[self.packing](self.fmt, self.n, self.k)

    @property
    def layout(self) -> str:
        """Name of the layout, for `Schedule.layouts`."""
        return LAYOUT_FLOAT if self.fmt.is_float else self.codes.name

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 rows of one matrix."""
        return -(-self.n // ROWS)

    @property
    def useful(self) -> float:
        """Part of the padded elements that are the matrix's."""
        k_padded = self.k if self.fmt.is_float else self.codes.k_padded
        return self.n * self.k / (self.row_blocks * ROWS * k_padded)

    def args(self) -> list[Arg]:
        """Return the packed arguments: floats, or codes, scale and, where the format has one, zero."""
        if not self.fmt.is_float:
            return self.codes.args(self.prefix, self.lead, self.scale_dtype)
        dtype = "uint16" if self.fmt.bits == 16 else "float32"
        shape = (*self.lead, self.row_blocks, self.k, ROWS)
        return [Arg(f"{self.prefix}w", "weight", shape, dtype)]

    @property
    def bytes(self) -> int:
        """Packed bytes of all of it."""
        return sum(arg_bytes(a) for a in self.args())

    @property
    def block_bytes(self) -> float:
        """Packed bytes of a block of 16 rows."""
        return self.bytes / (math.prod(self.lead) * self.row_blocks)

    def pack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Pack those of the matrix's canonical arrays that are given."""
        if not self.fmt.is_float:
            return pack_quantised(self.codes, self.prefix, arrays, self.scale_dtype)
        name = f"{self.prefix}w"
        return {name: pack_rows(arrays[name])} if name in arrays else {}

    def unpack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return the canonical arrays of those that `pack` gave."""
        out: dict[str, Array] = {}
        for name in ("w", "codes", "scale", "zero"):
            if (full := f"{self.prefix}{name}") not in arrays:
                continue
            if name == "codes":
                out[full] = self.codes.unpack(arrays[full])
                continue
            values = unpack_rows(arrays[full], self.codes.n)
            out[full] = values if name == "w" else values.astype(np.float32)
        return out


def arg_bytes(arg: Arg) -> int:
    """Return the size of an argument."""
    return math.prod(arg.shape) * np.dtype(arg.dtype).itemsize
