"""Layouts of indices into tables of sums: 4 bits name one of 16 sums of neighbouring activations.

A line is 64 bytes that hold, for 16 rows, the indices of eight neighbouring runs of columns: byte
``4 n + j`` has run j of row n in its low and run ``4 + j`` in its high half. Tables of four runs fill
one vector, so that one byte permutation looks up four sums for each of 16 rows.

* `BitPlanes` (T-MAC): a run is 4 columns and a line is one bit of their codes.
* `Pairs` (TL1): a run is 2 ternary columns, whose digits of base 3 make the index.
* `Triples` (TL2): a run is 3 ternary columns; the index is the magnitude of the balanced number, and one
  more line for every four holds the signs.
* ``...Apart``: run j has bytes 16 j and following, for permutations that cannot leave 128 bits; rows 0
  and 8, 1 and 9 ... take turns there, so that sums of 16 bits come in order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mimo_compile.schedules.emit.layout import CodeLayout

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]


_EVEN_ODD = np.arange(16).reshape(2, 8).T.reshape(-1)
"""Rows by their place among the 16 bytes of a run."""


class NibbleLayout(CodeLayout, ABC):
    """Base: what the tables of a block are."""

    run: ClassVar[int]
    """Columns that an index names."""
    apart: ClassVar[bool] = False
    """True if the rows of a run are neighbours."""

    @property
    def index_lines(self) -> int:
        """Lines of indices in a block."""
        return self.lines

    @property
    def planes(self) -> int:
        """Indices of a run, each with twice the weight of the one before."""
        return 1

    @property
    def vectors(self) -> int:
        """Vectors of tables that a block looks up in: four runs in each."""
        return self.block // (4 * self.run)

    @property
    @abstractmethod
    def digits(self) -> Bytes:
        """Return ``[16, 4]``: what an index multiplies the columns of its run by, plus `bias`."""

    @property
    def bias(self) -> int:
        """What `digits` are too large by."""
        return 0

    @property
    def unpack_ops(self) -> int:
        """Mask and set the table's number, after a shift for every other vector."""
        return 5 * self.index_lines

    def pack(self, codes: Bytes) -> Bytes:
        """See `CodeLayout.pack`."""
        packed = CodeLayout.pack(self, codes)
        if not self.apart:
            return packed
        lines = packed.reshape(*packed.shape[:-1], 16, 4).swapaxes(-1, -2)
        return np.ascontiguousarray(lines[..., _EVEN_ODD]).reshape(packed.shape)

    def unpack(self, packed: Bytes) -> Bytes:
        """See `CodeLayout.unpack`."""
        if self.apart:
            lines = packed.reshape(*packed.shape[:-1], 4, 16)[..., np.argsort(_EVEN_ODD)]
            packed = np.ascontiguousarray(lines.swapaxes(-1, -2)).reshape(packed.shape)
        return CodeLayout.unpack(self, packed)


class BitPlanes(NibbleLayout):
    """One line for each bit of the codes of 32 columns."""

    name: ClassVar[str] = "rows16.bits4"
    run: ClassVar[int] = 4

    @property
    def quads(self) -> int:
        """A word of four columns for each index."""
        return 8

    @property
    def lines(self) -> int:
        """One for each bit."""
        return self.fmt.bits

    @property
    def planes(self) -> int:
        """The bits."""
        return self.fmt.bits

    @property
    def digits(self) -> Bytes:
        """The bits of the index."""
        return (np.arange(16)[:, None] >> np.arange(4) & 1).astype(np.uint8)

    def _pack_words(self, words: Words) -> Words:
        planes = []
        for bit in range(self.fmt.bits):
            one = (words >> np.uint32(bit)) & np.uint32(0x01010101)
            nibble = (one | one >> np.uint32(7) | one >> np.uint32(14) | one >> np.uint32(21)) & 15
            planes.append(_joined(nibble.astype(np.uint8)))
        return np.concatenate(planes, -1)

    def _unpack_words(self, words: Words) -> Words:
        out = np.zeros((*words.shape[:-1], 8), np.uint32)
        for bit in range(self.fmt.bits):
            nibble = _parted(words[..., bit : bit + 1]).astype(np.uint32)
            for column in range(4):
                out |= (nibble >> np.uint32(column) & 1) << np.uint32(8 * column + bit)
        return out


class Pairs(NibbleLayout):
    """One line for 16 ternary columns."""

    name: ClassVar[str] = "rows16.pairs"
    run: ClassVar[int] = 2

    @property
    def quads(self) -> int:
        """Two indices a word."""
        return 4

    @property
    def digits(self) -> Bytes:
        """The digits of base 3, the first column's on top."""
        index = np.minimum(np.arange(16), 8)[:, None]
        return np.pad(index // (3, 1) % 3, ((0, 0), (0, 2))).astype(np.uint8)

    def _pack_words(self, words: Words) -> Words:
        codes = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape[:-1], 8, 2)
        return _joined(codes[..., 0] * np.uint8(3) + codes[..., 1])

    def _unpack_words(self, words: Words) -> Words:
        index = _parted(words)
        codes = np.stack([index // 3, index % 3], -1).astype(np.uint8)
        return codes.reshape(*words.shape[:-1], 16).view("<u4")


class Triples(NibbleLayout):
    """Four lines of magnitudes and one of signs for 96 ternary columns: 1.67 bits a weight."""

    name: ClassVar[str] = "rows16.triples"
    dense: ClassVar[bool] = True
    run: ClassVar[int] = 3

    @property
    def quads(self) -> int:
        """Words of four columns in 32 runs."""
        return 24

    @property
    def lines(self) -> int:
        """The last one holds the signs: bit p of byte j those of run ``4 p + j``."""
        return 5

    @property
    def index_lines(self) -> int:
        """All but the signs."""
        return 4

    @property
    def digits(self) -> Bytes:
        """The digits of base 3 of 13 and more, which are too large by one."""
        value = 13 + np.minimum(np.arange(16), 13)[:, None]
        return np.pad(value // (9, 3, 1) % 3, ((0, 0), (0, 1)), constant_values=1).astype(np.uint8)

    @property
    def bias(self) -> int:
        """See `digits`."""
        return 1

    @property
    def unpack_ops(self) -> int:
        """Those of the indices, and a test and a subtraction a vector for the signs."""
        return 5 * 4 + 2 * 8

    def _pack_words(self, words: Words) -> Words:
        codes = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape[:-1], 32, 3)
        value = codes[..., 0] * np.uint8(9) + codes[..., 1] * np.uint8(3) + codes[..., 2]
        index = np.where(value < 13, np.uint8(13) - value, value - np.uint8(13))
        index = index.reshape(*words.shape[:-1], 4, 8)
        negative = (value < 13).view(np.uint8).reshape(*words.shape[:-1], 8, 4)
        signs = np.bitwise_or.reduce(negative << np.arange(8, dtype=np.uint8)[:, None], -2)
        lines = [_joined(index[..., i, :]) for i in range(4)]
        return np.concatenate([*lines, np.ascontiguousarray(signs).view("<u4")], -1)

    def _unpack_words(self, words: Words) -> Words:
        index = np.concatenate([_parted(words[..., i : i + 1]) for i in range(4)], -1)
        signs = np.ascontiguousarray(words[..., 4:]).view(np.uint8)[..., None, :]
        negative = (signs >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(index.shape)
        value = np.where(negative, -index.astype(np.int16), index) + 13
        codes = np.stack([value // 9, value // 3 % 3, value % 3], -1).astype(np.uint8)
        return codes.reshape(*words.shape[:-1], 96).view("<u4")


class BitPlanesApart(BitPlanes):
    """`BitPlanes` for permutations of 128 bits."""

    name: ClassVar[str] = "rows16.bits4.apart"
    apart: ClassVar[bool] = True


def _joined(index: Bytes) -> Words:
    """Return ``[..., 1]`` words of eight indices ``[..., 8]``."""
    return np.ascontiguousarray(index[..., :4] | index[..., 4:] << np.uint8(4)).view("<u4")


def _parted(words: Words) -> Bytes:
    """Return the eight indices of ``[..., 1]`` words."""
    bytes_ = np.ascontiguousarray(words).view(np.uint8)
    return np.concatenate([bytes_ & 15, bytes_ >> 4], -1)
