"""NSA (arXiv 2502.11089): compressed, selected and window attention side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mimo_compile.ir.policies.base import AttentionPolicy, Score, Select, arg


@dataclass(frozen=True, slots=True, kw_only=True)
class Nsa(AttentionPolicy):
    """``n`` blocks by the compressed branch's probabilities; three branches, each with a sigmoid gate.

    Of the blocks, the ``initial`` first, the token's own and those up to ``local`` at the end are forced.
    """

    name: ClassVar[str] = "nsa"
    needs: ClassVar[tuple[str, ...]] = ("trained branches", "branch gates", "compression weights")
    branches: ClassVar[tuple[str, ...]] = ("compressed", "listed", "window")

    block: int = arg(64, "tokens of a block", low=1)
    n: int = arg(16, "blocks that are attended to, forced ones included", low=1)
    initial: int = arg(1, "first blocks that are always attended to")
    local: int = arg(2, "last blocks that are always attended to, the token's own included", low=1)
    window: int = arg(512, "positions of the window branch", low=1)
    compress: int = arg(32, "tokens of a compressed key", low=1)
    stride: int = arg(16, "tokens from one compressed key to the next", low=1)

    def problem(self) -> str:
        """Compressed keys tile blocks."""
        if self.compress % self.stride or self.block % self.stride:
            return f"stride={self.stride} divides neither compress={self.compress} nor block={self.block}"
        return ""

    @property
    def branch_window(self) -> int:
        """The window branch."""
        return self.window

    @property
    def score(self) -> Score:
        """The compressed branch's probabilities, summed over the group and over overlapping keys."""
        sizes = (("size", self.compress), ("stride", self.stride))
        return Score("score_blocks", "compressed", "group", "sum", sizes)

    @property
    def select(self) -> Select:
        """The best blocks, with those at both ends."""
        return Select(k=self.n, first=self.initial, last=self.local)
