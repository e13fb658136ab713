"""All candidates in the order of their definition."""

from __future__ import annotations

from collections.abc import Iterator

from mimo_compile.search.space import Candidate
from mimo_compile.search.strategies.base import Known, Setting


class GridSearch(Known):
    """Seeds first, then the whole space."""

    def __init__(self, setting: Setting) -> None:
        """Start at the beginning."""
        super().__init__(setting)
        self._cursor: Iterator[Candidate] = iter(setting.space)

    def ask(self, count: int) -> list[Candidate]:
        """Propose up to ``count`` new candidates."""
        out = self.seeds(count)
        while len(out) < count and (candidate := next(self._cursor, None)) is not None:
            if self.fresh(candidate):
                out.append(candidate)
        return out
