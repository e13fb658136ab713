"""Sliding windows between global layers (MiMo-V2-Flash: 39 of 48 layers see 128 positions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mimo_compile.ir.policies.base import AttentionPolicy, LayerRole, arg


@dataclass(frozen=True, slots=True, kw_only=True)
class Window(AttentionPolicy):
    """The first layer and the last of each ``every`` are global, the others see ``size`` positions.

    Positions count the token's own. ``every=0`` leaves no global layer. A model trained otherwise gets worse.
    """

    name: ClassVar[str] = "window"
    needs: ClassVar[tuple[str, ...]] = ("window-trained layers",)
    alone: ClassVar[bool] = False

    size: int = arg(128, "positions that a window layer sees, its own included", low=1)
    every: int = arg(6, "one layer in so many is global; 0: none is")

    @property
    def kept_window(self) -> int:
        """The window's positions."""
        return self.size

    def roles(self, layers: int) -> tuple[LayerRole, ...]:
        """Layer 0 and every ``every``-th one are global."""
        return tuple(
            LayerRole("full", True, None, i)
            if self.every and (i == 0 or (i + 1) % self.every == 0)
            else LayerRole("window", False, None, i, self.size)
            for i in range(layers)
        )
