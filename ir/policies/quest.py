"""Quest (arXiv 2406.10774): pages by an upper bound of their logits."""

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
class Quest(AttentionPolicy):
    """As many pages as hold ``budget`` tokens, those of the highest ``sum_c max(q_c lo_c, q_c hi_c)``.

    The page of the token itself is always among them; the first ``dense`` layers see everything.
    """

    name: ClassVar[str] = "quest"
    phases: ClassVar[tuple[str, ...]] = ("decode",)

    budget: int = arg(1024, "tokens that are attended to", low=1)
    page: int = arg(16, "tokens of a page", low=1)
    least: int = arg(3, "pages that are attended to at least", low=1)
    dense: int = arg(2, "first layers that see everything")
    per: str = arg(
        "group", "lists for each query head, or the group's maximum", choices=("group", "head")
    )

    @property
    def block(self) -> int:
        """A page."""
        return self.page

    @property
    def score(self) -> Score:
        """The bound of each page."""
        if self.per == "head":
            return Score("score_blocks", "quest", "head")
        return Score("score_blocks", "quest", "group", "max")

    @property
    def select(self) -> Select:
        """The best pages and the token's own."""
        return Select(k=max(self.least, -(-self.budget // self.page)))

    def role_alone(self, layer: int) -> LayerRole:
        """The first layers are dense."""
        if layer < self.dense:
            return LayerRole("full", True, None, layer)
        return LayerRole("select", False, layer, layer)
