"""How low-rank adapters are packed for kernels.

Both are packed in units of 16 lanes, which kernels read from front to end: A ``[L, R, K]`` has neighbouring
columns in lanes, ``[L, K/16S, R, 16 S]``, B ``[L, N, r]`` neighbouring rows, ``[L, N/16, r/S, 16 S]``. A lane
of a unit of 16 or 8 bits holds S = 2 elements (of columns 16 apart in A, of one row in B), which a shift and
a mask take apart; float32 has S = 1. R is r for each of the matrices that W is made of (`parts`). Where these
do not begin at blocks of 16 rows, B gets all R columns, with zeros in those of other parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import E4M3_NAN
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.lora_mpgemm import ADAPTER_DTYPES, part_rows
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.layout import ROWS, pack_rows, unpack_rows

FP8_UNIT = 2.0**8
"""E4M3 bits, moved into float16, are the value over this (another exponent bias)."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """Extents of all adapters of one matmul."""

    m: int
    n: int
    k: int
    r: int
    count: int
    dtype: str
    """``f32``, ``bf16`` or ``fp8``."""
    rows: tuple[int, ...]
    """Rows of W of each part."""

    @staticmethod
    def of(workload: Workload) -> Adapters:
        """Read a workload of the op ``lora_mpgemm``."""
        p = get_op("lora_mpgemm").full(workload)
        rows = tuple(part_rows(p["parts"], p["n"]))
        return Adapters(p["m"], p["n"], p["k"], p["r"], p["l"], p["d"], rows)

    @property
    def total(self) -> int:
        """Rows of A (R)."""
        return self.r * len(self.rows)

    @property
    def starts(self) -> list[int]:
        """First row of each part but the first."""
        return [sum(self.rows[:i]) for i in range(1, len(self.rows))]

    @property
    def columns(self) -> int:
        """Columns of B as it is packed."""
        return self.r if all(s % ROWS == 0 for s in self.starts) else self.total

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 rows of W."""
        return -(-self.n // ROWS)

    @property
    def share(self) -> int:
        """Elements in a lane of a unit (S)."""
        return 1 if self.dtype == "f32" else 2

    @property
    def span(self) -> int:
        """Columns of a unit of A."""
        return ROWS * self.share

    def args(self) -> list[Arg]:
        """Return the packed arguments: lora_a, lora_b, gain."""
        kind = ADAPTER_DTYPES[self.dtype]
        a = (self.count, -(-self.k // self.span), self.total, self.span)
        b = (self.count, self.row_blocks, -(-self.columns // self.share), self.span)
        return [
            Arg("lora_a", "weight", a, kind),
            Arg("lora_b", "weight", b, kind),
            Arg("gain", "weight", (self.count, self.total), "float32"),
        ]

    def pack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Pack those of lora_a, lora_b and gain that are given."""
        out: dict[str, Array] = {}
        for name in ("lora_a", "lora_b"):
            if name in arrays and self.dtype == "fp8" and np.isin(arrays[name], E4M3_NAN).any():
                raise UsageError(f"{name} holds codes that are no number")
        if "lora_a" in arrays:
            a = _padded(arrays["lora_a"], -(-self.k // self.span) * self.span)
            a = a.reshape(self.count, self.total, -1, self.share, ROWS)
            out["lora_a"] = self._units(a.transpose(0, 2, 1, 4, 3))
        if "lora_b" in arrays:
            b = arrays["lora_b"]
            if self.columns != self.r:
                b = self._spread(b)
            b = _padded(b, -(-self.columns // self.share) * self.share)
            b = pack_rows(b).reshape(self.count, self.row_blocks, -1, self.share, ROWS)
            out["lora_b"] = self._units(b.transpose(0, 1, 2, 4, 3))
        if "gain" in arrays:
            # the units of A and B are powers of two: the product is exact
            unit = FP8_UNIT**2 if self.dtype == "fp8" else 1.0
            out["gain"] = np.repeat(arrays["gain"], self.r, -1) * np.float32(unit)
        return out

    def unpack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return the canonical arrays of those that `pack` gave."""
        out: dict[str, Array] = {}
        if "lora_a" in arrays:
            a = arrays["lora_a"].reshape(self.count, -1, self.total, ROWS, self.share)
            flat = a.transpose(0, 2, 1, 4, 3).reshape(self.count, self.total, -1)
            out["lora_a"] = np.ascontiguousarray(flat[..., : self.k])
        if "lora_b" in arrays:
            b = arrays["lora_b"].reshape(self.count, self.row_blocks, -1, ROWS, self.share)
            lanes = b.transpose(0, 1, 2, 4, 3).reshape(self.count, self.row_blocks, -1, ROWS)
            rows = unpack_rows(lanes, self.n)[..., : self.columns]
            out["lora_b"] = rows if self.columns == self.r else self._gathered(rows)
        if "gain" in arrays:
            unit = FP8_UNIT**2 if self.dtype == "fp8" else 1.0
            out["gain"] = np.ascontiguousarray(arrays["gain"][:, :: self.r]) / np.float32(unit)
        return out

    def _units(self, lanes: Array) -> Array:
        return np.ascontiguousarray(lanes).reshape(*lanes.shape[:3], self.span)

    def _spread(self, b: Array) -> Array:
        out = np.zeros((self.count, self.n, self.columns), b.dtype)
        edges = [0, *self.starts, self.n]
        for part, (start, end) in enumerate(pairwise(edges)):
            out[:, start:end, part * self.r : (part + 1) * self.r] = b[:, start:end]
        return out

    def _gathered(self, b: Array) -> Array:
        edges = [0, *self.starts, self.n]
        parts = [
            b[:, start:end, part * self.r : (part + 1) * self.r]
            for part, (start, end) in enumerate(pairwise(edges))
        ]
        return np.concatenate(parts, axis=1)


def _padded(values: Array, columns: int) -> Array:
    """Return ``values`` with zeros up to ``columns`` in the last axis."""
    missing = columns - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)]) if missing else values
