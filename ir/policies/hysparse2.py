"""HySparse2 (arXiv 2609.26368): single tokens, one softmax, and a second half that reads the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mimo_compile.ir.policies.base import AttentionPolicy, LayerRole, Score, Select, arg


@dataclass(frozen=True, slots=True, kw_only=True)
class HySparse2(AttentionPolicy):
    """``tokens`` best tokens outside of the last ``window``, which are always seen, in one softmax.

    With ``bridge=1`` the first half of the layers is a hybrid of full and window layers, and the full layers
    of the second half project keys and values from the input of the first half's last full layer, so that a
    prompt need not run through the second half. Without, the layers alternate as in HySparse.
    """

    name: ClassVar[str] = "hysparse2"
    needs: ClassVar[tuple[str, ...]] = ("trained sparse layers", "output gates")
    alone: ClassVar[bool] = False

    every: int = arg(12, "one layer in so many is full", low=1)
    tokens: int = arg(1024, "tokens that are attended to besides the window", low=1)
    window: int = arg(128, "last positions that are always attended to", low=1)
    bridge: int = arg(1, "1: the second half reads the first half's hidden states", high=1)

    @property
    def score(self) -> Score:
        """The oracle of single tokens."""
        return Score("score_keys", "oracle", "group", "max")

    @property
    def select(self) -> Select:
        """Forced last tokens, then the best others."""
        return Select(k=self.tokens + self.window, last=self.window)

    def roles(self, layers: int) -> tuple[LayerRole, ...]:
        """Self-decoder (full and window layers), then full layers that select and sparse ones."""
        first = (layers + 1) // 2 if self.bridge else 0
        roles: list[LayerRole] = []
        lender, source = None, first
        for i in range(first):
            if i % self.every == 0:
                lender = i
                roles.append(LayerRole("full", True, None, i))
            else:
                roles.append(LayerRole("window", False, None, i, self.window))
        for i in range(first, layers):
            if (i - first) % self.every == 0 or i == layers - 1:
                source = i
                roles.append(LayerRole("select", True, i, i, hidden_of=lender))
            else:
                roles.append(LayerRole("reuse", False, source, source))
        return tuple(roles)
