"""Layouts that waste no bits: planes for widths that divide no byte, five ternary digits a byte.

Like `layout.CodeLayout`, a block's unpacked operands are "16 rows x 4 columns" in bytes, columns in order.

* `Planes` (3, 5, 6 and 7 bits): a code is cut into fields of 4, 2 and 1 bits, each field packed in lines
  of its own: 3 bits are two lines of 2-bit fields and one of 1-bit fields for 32 columns.
* `Trits`: five digits of base 3 in a byte whose products with 3**n, modulo 256, have the digits on top:
  ``byte = ceil(256 v / 243)`` as in llama.cpp's TQ1_0, but 1 for 0. Digits come out times 64.
* `SignedTrits`: the sign and the magnitude of the balanced number of five digits; two byte permutations
  turn 7-bit magnitudes into digits (AVX-512 VBMI).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mimo_compile.schedules.emit.layout import CodeLayout
from mimo_compile.schedules.emit.nibbles import BitPlanes, BitPlanesApart, Pairs, Triples

Words = npt.NDArray[np.uint32]
_LOSS = 0.15
"""Padding of rows above which a denser packing is none."""


class Planes(CodeLayout):
    """Fields of 4, 2 and 1 bits apart."""

    name: ClassVar[str] = "rows16.planes"
    dense: ClassVar[bool] = True

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of the fields of a code, from its lowest bit on."""
        return tuple(w for w in (1, 2, 4) if self.fmt.bits & w)[::-1]

    @property
    def quads(self) -> int:
        """As many as fill a line of the narrowest fields."""
        return 8 // self.widths[-1]

    @property
    def lines(self) -> int:
        """Runs of 64 bytes in a block."""
        return self.fmt.bits * self.quads // 8

    @property
    def unpack_ops(self) -> int:
        """Shift and mask each field, then join them."""
        return self.quads * (3 * len(self.widths) - 1)

    def place(self, quad: int) -> list[tuple[int, int, int, int]]:
        """Return (line, bit in the byte, width, bit in the code) of the fields of an operand."""
        out, line, low = [], 0, 0
        for width in self.widths:
            each = 8 // width
            out.append((line + quad // each, quad % each * width, width, low))
            line += self.quads // each
            low += width
        return out

    def _pack_words(self, words: Words) -> Words:
        out = np.zeros((*words.shape[:-1], self.lines), np.uint32)
        for quad in range(self.quads):
            for line, bit, width, low in self.place(quad):
                mask = np.uint32(((1 << width) - 1) * 0x01010101)
                out[..., line] |= ((words[..., quad] >> np.uint32(low)) & mask) << np.uint32(bit)
        return out

    def _unpack_words(self, words: Words) -> Words:
        out = np.zeros((*words.shape[:-1], self.quads), np.uint32)
        for quad in range(self.quads):
            for line, bit, width, low in self.place(quad):
                mask = np.uint32(((1 << width) - 1) * 0x01010101)
                out[..., quad] |= ((words[..., line] >> np.uint32(bit)) & mask) << np.uint32(low)
        return out


class Trits(CodeLayout):
    """Five digits a byte, to be taken out by multiplying with 3."""

    name: ClassVar[str] = "rows16.trits"
    dense: ClassVar[bool] = True
    unit: ClassVar[int] = 64

    @property
    def quads(self) -> int:
        """One for each digit."""
        return 5

    @property
    def unpack_ops(self) -> int:
        """Times 3 less 1, two averages and a mask a digit."""
        return 27

    def encode(self, value: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
        """Return the bytes of numbers 0 to 242."""
        return np.maximum(-(-value * 256 // 243), 1).astype(np.uint8)

    def _pack_words(self, words: Words) -> Words:
        digits = words.view(np.uint8).reshape(*words.shape, 4)
        value = np.zeros((*words.shape[:-1], 4), np.intp)
        for digit in range(5):
            value = value * 3 + digits[..., digit, :]
        return np.ascontiguousarray(self.encode(value)).view("<u4").reshape(*words.shape[:-1], 1)

    def _unpack_words(self, words: Words) -> Words:
        codes = np.zeros(256, np.intp)
        codes[self.encode(np.arange(243))] = np.arange(243)
        value = codes[np.ascontiguousarray(words).view(np.uint8)]
        digits = [value // 3 ** (4 - digit) % 3 for digit in range(5)]
        return np.stack(digits, -2).astype(np.uint8).reshape(*words.shape[:-1], 20).view("<u4")


class SignedTrits(Trits):
    """Five digits a byte, to be looked up."""

    name: ClassVar[str] = "rows16.strits"
    unit: ClassVar[int] = 1

    @property
    def unpack_ops(self) -> int:
        """The signs, two permutations and subtractions, and fields of two bits."""
        return 12

    def encode(self, value: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
        """Return magnitude and, in the top bit, sign of ``value - 121``."""
        balanced = value - 121
        return np.where(balanced < 0, 128 - balanced, balanced).astype(np.uint8)

    def tables(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Return, for magnitudes 0 to 127, the first four codes in fields of 2 bits, and the fifth."""
        value = np.minimum(np.arange(128), 121) + 121
        digits = [value // 3 ** (4 - digit) % 3 for digit in range(5)]
        four = sum(d << (2 * i) for i, d in enumerate(digits[:4]))
        return np.asarray(four, np.uint8), np.asarray(digits[4], np.uint8)


def worth_packing(layout: CodeLayout) -> bool:
    """Say whether a denser layout saves bytes in spite of its padding, or is the only one for its format."""
    return layout.fmt.dense or layout.k_padded <= layout.k * (1 + _LOSS)


PACKINGS: dict[str, type[CodeLayout]] = {
    "": CodeLayout,
    "planes": Planes,
    "trits": Trits,
    "strits": SignedTrits,
    "bits4": BitPlanes,
    "bits4.apart": BitPlanesApart,
    "pairs": Pairs,
    "triples": Triples,
}
"""Layouts of integer codes by the name that schedules choose them with."""
