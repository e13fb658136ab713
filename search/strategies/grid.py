"""All candidates in the order of their definition."""

from __future__ import annotations

from mimo_compile.search.space import Candidate
from mimo_compile.search.strategies.base import Known


class GridSearch(Known):
    """Seeds first, then the whole space."""

    def ask(self, count: int) -> list[Candidate]:
        """Propose up to ``count`` new candidates."""
        out = self.seeds(count)
        return out + self.rest(count - len(out))
