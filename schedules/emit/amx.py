"""Matrix tiles of 16 x 16 sums: AMX instructions on eight tile registers.

A tile register holds up to 16 rows of 64 bytes. ``dot_bf16`` adds products of pairs of bfloat16: a line of
`pairs` is a row of the second tile. ``dot`` adds, for tokens i and weight rows n, the products
of ``a[i, 4 q + b]`` (int8) and ``b[q, 4 n + b]`` (signed or not): a line of unpacked codes ("16 rows x 4
columns", see `layout`) is a row of such a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mimo_compile.schedules.emit.build import Register, T, store

TILES = 8
"""Tile registers."""
SIDE = 16
"""Rows of a tile, and its columns of 32 bits."""
NEEDS = frozenset({"amx-tile", "amx-int8", "avx512f", "avx512bw"})
NEEDS_BF16 = frozenset({"amx-tile", "amx-bf16", "avx512f", "avx512bw"})

Row = Callable[[Any], tuple[Any, tuple[Any, ...]]]
"""Gives the buffer, and the index of the first element, of a row of a tile in memory."""


class Tiles(Protocol):
    """What a kernel asks of tile registers; each thread has its own."""

    def begin(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Say how many rows, and bytes of a row, each tile has."""

    def zero(self, tile: int) -> None:
        """Clear a tile."""

    def load(self, tile: int, row: Row, stride: int) -> None:
        """Fill a tile from rows ``stride`` bytes apart."""

    def store(self, tile: int, row: Row, stride: int) -> None:
        """Write a tile of int32 sums to rows ``stride`` bytes apart."""

    def dot(self, sums: int, a: int, b: int, *, signed: bool) -> None:
        """Add the products of int8 ``a`` and ``b``, int8 if ``signed`` and uint8 if not, to ``sums``."""

    def zero_f32(self, tile: int) -> None:
        """Clear a tile of float32 sums."""

    def dot_bf16(self, sums: int, a: int, b: int) -> None:
        """Add the products of pairs of bfloat16 in ``a`` and ``b`` to float32 ``sums``."""

    def end(self) -> None:
        """Give the registers back."""


class AmxTiles:
    """The instructions; the process must have asked its operating system for tile registers."""

    def begin(self, shapes: Sequence[tuple[int, int]]) -> None:
        """See `Tiles`."""
        words = [0] * SIDE
        words[0] = 1  # the palette
        for tile, (rows, width) in enumerate(shapes):
            words[4 + tile // 2] |= width << (16 * (tile % 2))
            words[12 + tile // 4] |= rows << (8 * (tile % 4))
        config = Register("int32", SIDE)
        for i, word in enumerate(words):
            store(config.buffer, T.int32(word), i)
        T.evaluate(T.call_llvm_intrin("void", "llvm.x86.ldtilecfg", T.address_of(config.buffer[0])))

    def zero(self, tile: int) -> None:
        """See `Tiles`."""
        T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilezero", T.int8(tile)))

    def load(self, tile: int, row: Row, stride: int) -> None:
        """See `Tiles`."""
        self._move("llvm.x86.tileloadd64", tile, row, stride)

    def store(self, tile: int, row: Row, stride: int) -> None:
        """See `Tiles`."""
        self._move("llvm.x86.tilestored64", tile, row, stride)

    @staticmethod
    def _move(name: str, tile: int, row: Row, stride: int) -> None:
        buffer, index = row(0)
        address = T.address_of(buffer[index])
        T.evaluate(T.call_llvm_intrin("void", name, T.int8(tile), address, T.int64(stride)))

    def dot(self, sums: int, a: int, b: int, *, signed: bool) -> None:
        """See `Tiles`."""
        name = "llvm.x86.tdpbssd" if signed else "llvm.x86.tdpbsud"
        T.evaluate(T.call_llvm_intrin("void", name, T.int8(sums), T.int8(a), T.int8(b)))

    def zero_f32(self, tile: int) -> None:
        """See `Tiles`."""
        self.zero(tile)

    def dot_bf16(self, sums: int, a: int, b: int) -> None:
        """See `Tiles`."""
        T.evaluate(
            T.call_llvm_intrin("void", "llvm.x86.tdpbf16ps", T.int8(sums), T.int8(a), T.int8(b))
        )

    def end(self) -> None:
        """See `Tiles`."""
        T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilerelease"))
