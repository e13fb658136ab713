"""MoBA (arXiv 2502.13189): blocks by the mean of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mimo_compile.ir.policies.base import AttentionPolicy, Score, Select, arg


@dataclass(frozen=True, slots=True, kw_only=True)
class Moba(AttentionPolicy):
    """The ``k`` blocks with the highest ``q . mean(keys)`` for each token and head, its own among them."""

    name: ClassVar[str] = "moba"
    needs: ClassVar[tuple[str, ...]] = ("training with block attention",)

    block: int = arg(512, "tokens of a block", low=1)
    k: int = arg(3, "blocks that are attended to, the token's own included", low=1)

    @property
    def score(self) -> Score:
        """The gate; a block scores only once it is complete."""
        return Score("score_blocks", "mean", "head")

    @property
    def select(self) -> Select:
        """The best blocks and the token's own."""
        return Select(k=self.k)
