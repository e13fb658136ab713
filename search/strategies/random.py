"""Uniform sampling without repetition."""

from __future__ import annotations

from mimo_compile.search.space import Candidate
from mimo_compile.search.strategies.base import Known


class RandomSearch(Known):
    """Seeds first, then random candidates; enumerates when sampling finds nothing new."""

    def ask(self, count: int) -> list[Candidate]:
        """Propose up to ``count`` new candidates."""
        out = self.seeds(count)
        out += self.random(count - len(out))
        return out + self.rest(count - len(out)) if len(out) < count else out
