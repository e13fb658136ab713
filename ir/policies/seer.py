"""SeerAttention-R: blocks by gates that were distilled from the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mimo_compile.ir.policies.base import (
    AttentionPolicy,
    LayerRole,
    Score,
    Select,
    arg,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seer(AttentionPolicy):
    """``budget`` tokens of the blocks with the highest gate; with ``threshold`` every block at or above it.

    Gates are a softmax over blocks, so a threshold means less the longer the context is. The running block
    has no compressed key yet and is always attended to. Blocks and width are those of the gates' training.
    """

    name: ClassVar[str] = "seer"
    phases: ClassVar[tuple[str, ...]] = ("decode",)
    needs: ClassVar[tuple[str, ...]] = ("gates",)
    trained: ClassVar[tuple[str, ...]] = ("block", "gate")

    budget: int = arg(4096, "tokens that are attended to", low=1)
    block: int = arg(64, "tokens of a block", low=1)
    threshold: float = arg(0.0, "threshold on the gate; 0: the budget decides", high=1)
    gate: int = arg(128, "width of a gate's head", low=1)
    sink: int = arg(0, "first blocks that are always attended to")
    start: int = arg(0, "first layers that see everything")
    block_pos: str = arg(
        "first", "token whose position rotates a block's key", choices=("first", "last")
    )

    @property
    def score(self) -> Score:
        """The gate's logits (their order is the softmax's), or its softmax for a threshold."""
        options = (("d", self.gate), ("soft", int(self.threshold > 0)))
        return Score("score_blocks", "gate", "group", options=options)

    @property
    def select(self) -> Select:
        """The best blocks, the running one among them."""
        if self.threshold:
            return Select(rule="threshold", value=self.threshold, first=self.sink)
        return Select(k=max(1, self.budget // self.block), first=self.sink)

    def role_alone(self, layer: int) -> LayerRole:
        """The first layers are dense."""
        if layer < self.start:
            return LayerRole("full", True, None, layer)
        return LayerRole("select", False, layer, layer)
