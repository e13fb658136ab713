"""Attention over a bfloat16 KV cache on x86: `x86_flash` with pairs in each 32-bit lane of the caches."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.flash import Tile, largest_part
from mimo_compile.schedules.attention.pairs import EXACT, TILES, chains_of, imported
from mimo_compile.schedules.attention.x86_flash import FlashConfig, X86Flash
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.emit.bf16 import NEEDS


@dataclass(frozen=True, slots=True)
class PairsConfig(FlashConfig):
    """Knobs of flash attention over bfloat16 caches."""

    arith: str = "widen"
    """``widen``: float32 after a shift or a mask; ``dot``: bfloat16 dots with rounded q and weights;
    ``dot2``: with q as the sum of two bfloat16 numbers."""


class X86FlashPairs(X86Flash):
    """The same tiles, parts and masks; caches of half the bytes."""

    name = "cached_attention.x86_flash_pairs"
    version = 5
    config = PairsConfig
    stored = "bf16"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return the float32 kernel's space, and how pairs are multiplied."""
        base = super().space(workload, hardware)
        dots = hardware.features >= NEEDS
        kinds = tuple(TILES) if dots else ("widen",)
        default = PairsConfig(**self.config_to_json(base.default), arith="widen")
        return Space(PairsConfig, {**base.knobs, "arith": kinds}, default, base.legal)

    def registers(self, config: FlashConfig, hardware: Hardware) -> int:
        """Return the accumulators in flight: both halves of the pairs need registers beside them."""
        if self._arith(config) != "widen":
            return 24
        return 16 if hardware.has_avx512 else 4

    def tile(self, config: FlashConfig) -> tuple[type[Tile], AbstractContextManager[Any] | None]:
        """Return the arithmetic of a config, and the frame that its instructions need."""
        arith = self._arith(config)
        return TILES[arith], None if arith == "widen" else imported()

    def exact(self, config: FlashConfig) -> bool:
        """Pairs made float32 are."""
        return self._arith(config) in EXACT

    def order(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> str | None:
        """Register tiles of few sums add up each half of the pairs by itself; all rows must do alike."""
        order = super().order(workload, config, hardware)
        if order is None or self._arith(config) != "widen":
            return order
        s = self.tiling(get_op(self.op).full(workload), config, hardware)
        streams = s.ahead > 0 and s.height <= s.rows
        most = {rows: 1 if streams else max(s.registers // rows, 1) for rows, _ in s.row_tiles()}
        chains = {chains_of(r * largest_part(s.blocks, n)) for r, n in most.items()}
        return f"{order} chains={chains.pop()}" if len(chains) == 1 else None

    def features(self, config: FlashConfig) -> frozenset[str]:
        """Return the features that a config's instructions need."""
        return frozenset() if self._arith(config) == "widen" else NEEDS

    def arithmetic(self, config: FlashConfig) -> str:
        """Return how `flash_work` counts."""
        return self._arith(config)

    @staticmethod
    def _arith(config: FlashConfig) -> str:
        assert isinstance(config, PairsConfig)
        return config.arith
