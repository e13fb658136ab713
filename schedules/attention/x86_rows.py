"""Attention to listed keys, one by one, or to all, over caches that keep each key by itself: ``lay=rows``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.flash import Tile
from mimo_compile.schedules.attention.lists import ListTiling
from mimo_compile.schedules.attention.rows import EXACT_ROWS, ROWS
from mimo_compile.schedules.attention.tokens import following
from mimo_compile.schedules.attention.x86_flash import FlashConfig, X86Flash
from mimo_compile.schedules.attention.x86_flash_pairs import PairsConfig
from mimo_compile.schedules.attention.x86_lists import X86Lists, short_step
from mimo_compile.schedules.base import Schedule, Space
from mimo_compile.schedules.emit.bf16 import NEEDS, imported


class X86Rows(X86Lists):
    """Listed keys in float32 caches."""

    name = "sparse_attention.x86_rows"
    lay = "rows"

    def tiles(self, p: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the tokens that a tile may have; a window is that of one query alone."""
        return (1,) if p["window"] else super().tiles(p)

    def visit(self, s: ListTiling, buffers: Mapping[str, Any]) -> Callable[..., Any]:
        """Return what a tile visits."""
        return following(s, buffers)

    def tile(self, config: FlashConfig) -> tuple[type[Tile], AbstractContextManager[Any] | None]:
        """Return the arithmetic of a config, and the frame that its instructions need."""
        return ROWS["f32"], None


class X86FlashRows(X86Flash):
    """Attention to all keys, over the same float32 caches."""

    name = "cached_attention.x86_flash_rows"
    lay = "rows"
    streamed = 128
    order = Schedule.order  # nothing is promised

    def tile(self, config: FlashConfig) -> tuple[type[Tile], AbstractContextManager[Any] | None]:
        """Return the arithmetic of a config, and the frame that its instructions need."""
        return ROWS["f32"], None


class Half(X86Flash):
    """bfloat16 caches: how keys are multiplied is a knob."""

    config = PairsConfig
    stored = "bf16"
    streamed = 32

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return the space over float32 caches, and how keys are multiplied."""
        base = super().space(workload, hardware)
        kinds = ("widen", "dot") if hardware.features >= NEEDS else ("widen",)
        default = PairsConfig(**self.config_to_json(base.default), arith="widen")
        if default.ahead:
            step = short_step(get_op(self.op).full(workload), default.block)
            default = replace(default, block=step)
        return Space(PairsConfig, {**base.knobs, "arith": kinds}, default, base.legal)

    def tile(self, config: FlashConfig) -> tuple[type[Tile], AbstractContextManager[Any] | None]:
        """Return the arithmetic of a config, and the frame that its instructions need."""
        arith = self.arithmetic(config)
        return ROWS[arith], imported() if arith == "dot" else None

    def exact(self, config: FlashConfig) -> bool:
        """Keys and values made float32 are."""
        return self.arithmetic(config) in EXACT_ROWS

    def features(self, config: FlashConfig) -> frozenset[str]:
        """Return the features that a config's instructions need."""
        return NEEDS if self.arithmetic(config) == "dot" else frozenset()

    def arithmetic(self, config: FlashConfig) -> str:
        """Return how work is counted."""
        assert isinstance(config, PairsConfig)
        return config.arith


class X86RowsHalf(Half, X86Rows):
    """Listed keys in bfloat16 caches."""

    name = "sparse_attention.x86_rows_half"


class X86FlashRowsHalf(Half, X86FlashRows):
    """All keys in bfloat16 caches."""

    name = "cached_attention.x86_flash_rows_half"
