"""Batches that are asked for before their turn, so that they are built while another is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mimo_compile.search.measure.base import Ahead
from mimo_compile.search.space import Candidate
from mimo_compile.search.task import Task

FIRST = 4
"""Size of a workload's first round: defaults, and the best of similar shapes."""


class LookAhead:
    """Asks strategies for batches; one batch early where the measurer can make use of that.

    The early batch is another workload's, the one that promises most, where there is one: what it was asked
    without knowing is then little. Otherwise it is the same workload's, and one round less informed.
    """

    def __init__(self, measurer: Any) -> None:
        """Take what measures; only one that is `base.Ahead` gets early batches."""
        self._measurer = measurer
        self._early: dict[int, list[Candidate]] = {}

    def batch(self, tasks: Sequence[Task], task: Task, count: int) -> list[Candidate]:
        """Return up to ``count`` candidates of a task; none when nothing is left."""
        early = self._early.pop(id(task), None)
        batch = self._ask(task, count) if early is None else early[:count]
        if batch and isinstance(self._measurer, Ahead) and self._measurer.overlaps:
            self._prepare(tasks, task, count)
        return batch

    @staticmethod
    def _ask(task: Task, count: int) -> list[Candidate]:
        return task.strategy.ask(count if task.share.rounds else min(count, FIRST))

    def _prepare(self, tasks: Sequence[Task], task: Task, count: int) -> None:
        others = [t for t in tasks if t is not task and not t.share.exhausted]
        coming = max(others, key=lambda t: t.share.expected_gain_us(), default=task)
        if id(coming) in self._early:
            return
        if early := self._ask(coming, count):
            self._early[id(coming)] = early
            self._measurer.prepare(coming.space, early)
