"""DSA (DeepSeek-V3.2): single tokens by a small indexer with a key of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mimo_compile.ir.policies.base import AttentionPolicy, Score, Select, arg


@dataclass(frozen=True, slots=True, kw_only=True)
class Dsa(AttentionPolicy):
    """A token and the ``k - 1`` best others by ``sum_h w_h relu(q_h . key)``, one list for all heads.

    The indexer has ``heads`` queries and weights of its own for each token, and one key. DeepSeek's own lists
    need not hold the token itself; here they do.
    """

    name: ClassVar[str] = "dsa"
    needs: ClassVar[tuple[str, ...]] = ("an indexer",)
    trained: ClassVar[tuple[str, ...]] = ("k", "heads", "width")

    k: int = arg(2048, "tokens that are attended to, the token itself included", low=1)
    heads: int = arg(64, "heads of the indexer", low=1)
    width: int = arg(128, "width of an indexer's head", low=1)

    @property
    def score(self) -> Score:
        """The indexer."""
        options = (("h", self.heads), ("kv", 1), ("d", self.width))
        return Score("score_blocks", "indexer", "all", "sum", options)

    @property
    def select(self) -> Select:
        """The best tokens and the token itself."""
        return Select(k=self.k)
