"""Complex weights as bit planes: signs and axes choose what is added, nothing is multiplied.

Planes ``int32 [terms, N/64, C, 2]`` hold, for 32 complex rows and one column, the bits "imaginary axis"
and "negative". Bit i stands for row 2 i, bit 16 + i for row 2 i + 1: a word in all 32-bit lanes, seen as
16-bit ones, meets the bits of its rows in their order. C is padded to a cache line of 8 columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, prefetch, splat, store
from mimo_compile.schedules.emit.complex import ComplexMatrix, ComplexWay, Sums
from mimo_compile.schedules.emit.dot import MAX_ACTIVATION
from mimo_compile.schedules.emit.layout import ROWS, pack_scales, unpack_rows
from mimo_compile.schedules.emit.quantize import Activations
from mimo_compile.schedules.emit.tile import TileKnobs, Weights

LANES = 32
"""Rows of a block: 16-bit sums in a vector."""
LINE = 8
"""Columns of a block in a cache line."""
FLUSH = (2**15 - 1) // MAX_ACTIVATION // LINE * LINE
"""Columns that 16 bits sum exactly."""
_BIT = np.array([lane // 2 + 16 * (lane % 2) for lane in range(LANES)], np.uint32)
"""Bit of each row."""


def pack_planes(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Pack codes ``[terms, N/2, K/2]`` to planes ``[terms, N/64, C, 2]``."""
    terms, n, k = codes.shape
    blocks, lines = -(-n // LANES), -(-k // LINE)
    padded = np.zeros((terms, blocks * LANES, lines * LINE), np.uint8)
    padded[:, :n, :k] = codes
    rows = padded.reshape(terms, blocks, LANES, lines * LINE)
    out = np.empty((terms, blocks, lines * LINE, 2), np.uint32)
    for plane in (0, 1):
        bits = ((rows >> plane) & 1).astype(np.uint32) << _BIT[:, None]
        out[..., plane] = np.bitwise_or.reduce(bits, axis=2)
    return out.view(np.int32)


def unpack_planes(packed: npt.NDArray[np.int32], n: int, k: int) -> npt.NDArray[np.uint8]:
    """Return codes ``[terms, N/2, K/2]`` from `pack_planes`, for ``n = N/2`` and ``k = K/2``."""
    words = packed.view(np.uint32)[:, :, None]
    bits = (words >> _BIT[:, None, None]) & np.uint32(1)
    codes = (bits[..., 0] | bits[..., 1] << np.uint32(1)).astype(np.uint8)
    return np.ascontiguousarray(codes.reshape(packed.shape[0], -1, packed.shape[2])[:, :n, :k])


class MaskMatrix(ComplexMatrix):
    """Complex matrices as planes."""

    @property
    def layout(self) -> str:
        """See `Matrix.layout`."""
        return "rows32.planes"

    @property
    def row_blocks(self) -> int:
        """Blocks of 32 complex rows."""
        return -(-self.codes.n // LANES)

    @property
    def useful(self) -> float:
        """See `Matrix.useful`."""
        codes = self.codes
        return codes.n * codes.k / (self.row_blocks * LANES * -(-codes.k // LINE) * LINE)

    def args(self) -> list[Arg]:
        """Return planes and scale ``[terms, N/64, 2, 32]``."""
        terms, columns = self.fmt.terms, -(-self.codes.k // LINE) * LINE
        dtype = "float16" if self.scale_dtype == "f16" else "float32"
        shape = (terms, self.row_blocks, 2, LANES)
        return [
            Arg("codes", "weight", (terms, self.row_blocks, columns, 2), "int32"),
            Arg("scale", "weight", shape, dtype),
        ]

    def pack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Pack those of codes and scale that are given."""
        out: dict[str, Array] = {}
        stacked = self.stacked(arrays)
        if "codes" in stacked:
            out["codes"] = pack_planes(stacked["codes"])
        if "scale" in stacked:
            sixteen = pack_scales(stacked["scale"], self.scale_dtype, "scale")
            out["scale"] = blocks_of_32(unpack_rows(sixteen, self.codes.n))
        return out

    def unpack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """See `ComplexMatrix.unpack`."""
        n, k, out = self.codes.n, self.codes.k, {}
        if "codes" in arrays:
            out["codes"] = unpack_planes(arrays["codes"], n, k).reshape(-1, k)
        if "scale" in arrays:
            rows = arrays["scale"].swapaxes(-1, -2).reshape(self.fmt.terms, -1, 2)[:, :n]
            out["scale"] = rows.reshape(-1, 2).astype(np.float32)
        return out


def blocks_of_32(values: Array) -> Array:
    """Pack ``[A, rows, B]`` to ``[A, rows / 32, B, 32]``, zeros behind the rows."""
    count, n, width = values.shape
    padded = np.zeros((count, -(-n // LANES) * LANES, width), values.dtype)
    padded[:, :n] = values
    return np.ascontiguousarray(padded.reshape(count, -1, LANES, width).swapaxes(-1, -2))


class MaskedComplex(ComplexWay):
    """Add ``x`` or ``-x`` to the sum of the weight's axis, zero to the other."""

    @property
    def lanes(self) -> int:
        """See `ComplexWay.lanes`."""
        return ROWS

    @property
    def rows(self) -> int:
        """See `ComplexWay.rows`."""
        return LANES

    @property
    def activation(self) -> str:
        """See `ComplexWay.activation`."""
        return "int16"

    @property
    def cost(self) -> int:
        """Two additions for each half of x and column of a line."""
        return 4 * LINE

    @property
    def work(self) -> dict[str, float]:
        """Of a line of columns of 32 rows: a choice by sign and two masked additions for each half of x."""
        return {"int_op": 6.0 * LANES * LINE}

    @property
    def unpack_work(self) -> dict[str, float]:
        """Of a line of columns of 32 rows: two tests."""
        return {"int_op": 2.0 * LANES * LINE}

    def sums(
        self, weights: Weights, x: Activations, blocks: Sequence[tuple[Any, ...]],
        rows: Sequence[Any], knobs: TileKnobs,
    ) -> Sums:  # fmt: skip
        """See `ComplexWay.sums`."""
        columns = int(weights.codes.shape[-2])
        bits = _bits()
        none = splat(T.int16(0), LANES)
        keys = [
            (r, i, axis) for r in range(len(blocks)) for i in range(len(rows)) for axis in (0, 1)
        ]
        whole_sums = {key: Register("int32", LANES, splat(T.int32(0), LANES)) for key in keys}

        def chosen(word: Any) -> Any:
            lanes = T.reinterpret(f"int16x{LANES}", splat(word, LANES // 2))
            return T.bitwise_and(lanes, bits) != none

        def run(first: Any, count: int) -> None:
            acc = {key: Register("int16", LANES, none) for key in keys}
            with loop(count // LINE) as line:
                start = (
                    bind(first + line * LINE) if not isinstance(first, int) else first + line * LINE
                )
                for block in blocks if knobs.prefetch else ():
                    prefetch(weights.codes, *block, start + knobs.prefetch * LINE, 0)
                for c in range(LINE):
                    column(start + c, acc)
            for key, register in acc.items():
                wide = T.cast(register.get(), f"int32x{LANES}")
                whole_sums[key].set(whole_sums[key].get() + wide)

        def column(c: Any, acc: dict[tuple[int, int, int], Register]) -> None:
            values = [bind(x.codes[row, c]) for row in rows]
            for r, block in enumerate(blocks):
                imaginary = bind(weights.codes[(*block, c, 0)])
                negative = bind(weights.codes[(*block, c, 1)])
                for i, value in enumerate(values):
                    minus = splat(T.int16(0) - value, LANES)
                    signed = bind(T.Select(chosen(negative), minus, splat(value, LANES)))
                    real, other = acc[r, i, 0], acc[r, i, 1]
                    real.set(real.get() + T.Select(chosen(imaginary), none, signed))
                    other.set(other.get() + T.Select(chosen(imaginary), signed, none))

        whole, rest = divmod(columns, FLUSH)
        if whole:
            with loop(whole) as part:
                run(part * FLUSH, FLUSH)
        if rest:
            run(whole * FLUSH, rest)
        return {
            (r, h, i, axis): load(register.buffer, h * ROWS, lanes=ROWS)
            for (r, i, axis), register in whole_sums.items()
            for h in (0, 1)
        }


def _bits() -> Any:
    """Return the bit of each 16-bit lane, bound."""
    register = Register("int32", LANES // 2)
    for i in range(LANES // 2):
        word = (1 << i) * 0x10001
        store(register.buffer, T.int32(word - (1 << 32) if word >= 1 << 31 else word), i)
    return bind(T.reinterpret(f"int16x{LANES}", register.get()))
