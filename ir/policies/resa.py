"""ReSA (arXiv 2506.04108): sparse decoding whose cache is made exact again every few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mimo_compile.ir.policies.base import AttentionPolicy, Score, Select, arg


@dataclass(frozen=True, slots=True, kw_only=True)
class Resa(AttentionPolicy):
    """The best ``max(ceil(p * blocks), least)`` blocks by Quest's bound, the last ``local`` among them.

    After every ``f`` tokens these run once more, densely, and overwrite their keys and values in all layers;
    the descriptors of the blocks they touch are then made anew, since a minimum cannot be taken back.
    With ``heads=mean`` the bound is that of the group's mean query, as published: it bounds that query's
    logits only. ``heads=max`` bounds every head's.
    """

    name: ClassVar[str] = "resa"
    phases: ClassVar[tuple[str, ...]] = ("decode",)

    p: float = arg(0.1, "share of the blocks that is attended to")
    block: int = arg(16, "tokens of a block", low=1)
    local: int = arg(1, "last blocks that are always attended to, the running one included", low=1)
    least: int = arg(16, "blocks that are attended to at least")
    f: int = arg(32, "tokens after which the cache is made exact; 0: never")
    heads: str = arg("mean", "how a group's heads are brought together", choices=("mean", "max"))

    def problem(self) -> str:
        """A share is at most 1."""
        return f"p={self.p:g} is above 1" if self.p > 1 else ""

    @property
    def score(self) -> Score:
        """Quest's bound, of the mean query or of every head."""
        agg = "query" if self.heads == "mean" else "max"
        return Score("score_blocks", "quest", "group", agg)

    @property
    def select(self) -> Select:
        """A share of the blocks, but not fewer than ``least``."""
        return Select(k=self.least, share=self.p, last=self.local)

    def rectified(self, steps: int, start: int) -> tuple[int, int] | None:
        """Return the positions that must run again after a step, or None.

        Args:
            steps: Tokens whose keys and values were written since the prompt, this step's included.
            start: Length of the prompt.

        Returns:
            First position and the one behind the last, all of whose keys and values are approximate. A
            token that was sampled in this step has none yet and is not among them.
        """
        if not self.f or steps <= 0 or steps % self.f:
            return None
        return start + steps - self.f, start + steps

    @property
    def rerun(self) -> int:
        """After every ``f`` tokens."""
        return self.f
