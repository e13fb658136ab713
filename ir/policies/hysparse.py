"""HySparse (arXiv 2602.03560): a full layer is the oracle of sparse ones behind it and lends its cache."""

from __future__ import annotations

from collections.abc import Sequence
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
class HySparse(AttentionPolicy):
    """Every ``every``-th layer and the last are full; the others follow the full layer before them.

    A full layer's blocks are scored by the largest exact probability in each, maximum over the group after
    normalising. A sparse layer reads the full layer's keys and values by that list, adds a window branch with
    its own cache, each with its own softmax and sink, and weighs both by sigmoid gates.
    """

    name: ClassVar[str] = "hysparse"
    needs: ClassVar[tuple[str, ...]] = ("trained sparse layers", "branch gates")
    branches: ClassVar[tuple[str, ...]] = ("listed", "window")
    alone: ClassVar[bool] = False

    every: int = arg(12, "one layer in so many is full, unless the checkpoint says which", low=1)
    block: int = arg(64, "tokens of a block", low=1)
    budget: int = arg(1024, "tokens of the chosen blocks", low=1)
    window: int = arg(128, "positions of the window branch, the token's own included", low=1)
    gate: str = arg("element", "width of the branch gates", choices=("element", "head"))

    @property
    def branch_window(self) -> int:
        """The window branch."""
        return self.window

    @property
    def score(self) -> Score:
        """The oracle."""
        return Score("score_keys", "oracle", "group", "max")

    @property
    def select(self) -> Select:
        """The best blocks that got anything; nothing is forced, near tokens are the window's business."""
        return Select(k=max(1, self.budget // self.block), last=0, positive=True)

    def roles(self, layers: int) -> tuple[LayerRole, ...]:
        """One layer in ``every`` is full, and so is the last."""
        return self.following([i % self.every != 0 and i != layers - 1 for i in range(layers)])

    def following(self, sparse: Sequence[bool]) -> tuple[LayerRole, ...]:
        """Return the roles of layers some of which (not the first) are sparse and follow a full one."""
        roles, source = [], 0
        for i, follows in enumerate(sparse):
            if follows:
                roles.append(LayerRole("reuse", False, source, source, self.window))
            else:
                source = i
                roles.append(LayerRole("select", True, i, i))
        return tuple(roles)
