"""Attention over KV caches of 8-bit floats on x86: `x86_flash` whose codes become float32 in registers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.attention.flash import Tile
from mimo_compile.schedules.attention.float8_tile import Float8
from mimo_compile.schedules.attention.x86_flash import FlashConfig, X86Flash


class X86FlashFloat8(X86Flash):
    """The same tiles and parts over bytes."""

    name = "cached_attention.x86_flash_float8"
    stored = "e4m3"
    streamed = 128

    def registers(self, config: FlashConfig, hardware: Hardware) -> int:
        """Return how many accumulator vectors are in flight: codes need registers beside them."""
        return 18 if hardware.has_avx512 else 4

    def tile(self, config: FlashConfig) -> tuple[type[Tile], AbstractContextManager[Any] | None]:
        """Return the arithmetic, which needs no frame."""
        return Float8, None

    def arithmetic(self, config: FlashConfig) -> str:
        """Return how `flash_work` counts."""
        return "float8"
