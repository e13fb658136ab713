"""LessIsMore (arXiv 2508.07101): one list of tokens for all heads, followed by many layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mimo_compile.ir.policies.base import AttentionPolicy, LayerRole, Score, Select, arg


@dataclass(frozen=True, slots=True, kw_only=True)
class LessIsMore(AttentionPolicy):
    """Layers 0 and 1 are dense, layers 2 and ``correct`` choose, the others follow the list before them.

    Of ``budget`` tokens a share ``recent`` is the first ``sink`` and the last ones; the rest is merged from
    the heads' rankings, best ranks first. A choosing layer itself sees everything.
    """

    name: ClassVar[str] = "lessismore"
    phases: ClassVar[tuple[str, ...]] = ("decode",)
    alone: ClassVar[bool] = False

    budget: int = arg(2048, "tokens that are attended to", low=1)
    recent: float = arg(0.25, "share of the budget for sinks and the last tokens")
    sink: int = arg(4, "first tokens that are always attended to")
    correct: int = arg(12, "layer that chooses anew", low=3)

    def problem(self) -> str:
        """A share is at most 1."""
        return f"recent={self.recent:g} is above 1" if self.recent > 1 else ""

    @property
    def score(self) -> Score:
        """Each head's logits; only their order counts, so nothing is normalised."""
        return Score("score_keys", "logits", "all", "none")

    @property
    def select(self) -> Select:
        """Sinks are given up where the recent part cannot hold them; the token itself is always seen."""
        kept = int(self.budget * self.recent)
        sink = self.sink if kept > self.sink else 0
        return Select(k=self.budget, first=sink, last=max(1, kept - sink), merge="rank")

    def roles(self, layers: int) -> tuple[LayerRole, ...]:
        """Full, full, select, reuse ..., select at ``correct``, reuse ..."""
        roles, source = [], 0
        for i in range(layers):
            if i < 2:
                roles.append(LayerRole("full", True, None, i))
            elif i in (2, self.correct):
                source = i
                roles.append(LayerRole("select", True, i, i))
            else:
                roles.append(LayerRole("reuse", False, source, i))
        return tuple(roles)
