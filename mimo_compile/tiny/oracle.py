"""The choice by exact probabilities: what selectors of blocks are measured against, and no system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mimo_compile.ir.policies import AttentionPolicy, Score, Select
from mimo_compile.ir.policies.base import arg


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle(AttentionPolicy):
    """The blocks with the largest exact probability: no selector of blocks can do much better."""

    name: ClassVar[str] = "oracle"
    phases: ClassVar[tuple[str, ...]] = ("decode",)

    budget: int = arg(1024, "tokens that are attended to", low=1)
    block: int = arg(16, "tokens of a block", low=1)

    @property
    def score(self) -> Score:
        """Exact probabilities."""
        return Score("score_keys", "oracle", "group", "max")

    @property
    def select(self) -> Select:
        """The best blocks and the token's own."""
        return Select(k=max(1, self.budget // self.block))
