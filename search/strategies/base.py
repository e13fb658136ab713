"""The ask/tell protocol between a tuner and a strategy.

A strategy proposes (`ask`) candidates that were neither proposed nor reported before and learns
(`tell`) how they did. It never measures and never reads clocks: the same seed and the same answers
give the same proposals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mimo_compile.search.grid import Grid
from mimo_compile.search.space import Candidate, JointSpace

Predict = Callable[[Sequence[Candidate]], Sequence[float] | None]
"""Predicted scores (smaller is better) of candidates, or None when nothing is known."""


NEAR = 1.25
"""Times the best score that another algorithm's best may have to be searched, and compared, with it."""


@dataclass(frozen=True, slots=True)
class Options:
    """What strategies can be told; each uses what concerns it."""

    population: int = 16
    """Best candidates that offspring come from."""
    pool: int = 96
    """Offspring made for each ask."""
    verified: int = 64
    """Candidates that the learned model looks at for each ask, after the surrogate has (some 0.2 ms each)."""
    costly_pool: int = 16
    """Both of these where a candidate's work is known only after generating its code."""
    epsilon: float = 0.05
    """Share of candidates that are drawn at random; it falls as more is known."""
    crossover: float = 0.3
    """Share of offspring that joins two parents."""
    warm_up: int = 1
    """Candidates that must have run before the models choose; defaults count."""
    first_batch: int = 4
    """Candidates of an ask at the start; it grows with what is known."""
    enumerate_below: int = 192
    """Spaces up to this size are ranked as a whole instead of by offspring."""


@dataclass(frozen=True, slots=True)
class Observation:
    """How a candidate did: its score (smaller is better; infinite when it failed)."""

    candidate: Candidate
    score: float

    @property
    def ok(self) -> bool:
        """True when it ran and was right."""
        return math.isfinite(self.score)


class Strategy(Protocol):
    """A search strategy for one workload."""

    def ask(self, count: int) -> list[Candidate]:
        """Propose up to ``count`` new candidates; an empty list says that nothing is left."""
        ...

    def tell(self, observations: Sequence[Observation]) -> None:
        """Learn results; those of candidates never asked for count as well (resume, transfer)."""
        ...

    def ban(self, schedule: str) -> None:
        """Propose no more candidates of a schedule (it keeps crashing)."""
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """What a strategy is made from."""

    space: JointSpace
    rng: np.random.Generator
    seeds: Sequence[Candidate] = ()
    """Proposed first, in order: schedule defaults and the best records of similar shapes."""
    predict: Predict | None = None
    options: Options = Options()
    spread: Predict | None = None
    """Standard deviations of the predicted scores' logarithms, or None where they are unknown."""
    foretell: Predict | None = None
    """Scores by what was known before the search, for one and the same scale; None where that is nothing."""


class Known:
    """Bookkeeping that strategies share: what was proposed or reported, and which schedules are out."""

    def __init__(self, setting: Setting) -> None:
        """Start with nothing known."""
        self.setting = setting
        self.grid = Grid(setting.space)
        self.seen: set[int] = set()
        """Numbers of what was proposed or reported."""
        self.banned: set[str] = set()
        self._seeds = list(setting.seeds)
        self._all = iter(setting.space)

    def fresh(self, candidate: Candidate | None) -> bool:
        """True for a candidate that may be proposed; marks it as proposed."""
        if candidate is None or candidate.schedule in self.banned:
            return False
        number = self.grid.number(candidate)
        new = number not in self.seen
        self.seen.add(number)
        return new

    def seeds(self, count: int) -> list[Candidate]:
        """Return up to ``count`` seeds that are still new."""
        out: list[Candidate] = []
        while self._seeds and len(out) < count:
            if self.fresh(seed := self._seeds.pop(0)):
                out.append(seed)
        return out

    def random(self, count: int) -> list[Candidate]:
        """Draw up to ``count`` new candidates (fewer when almost all are known)."""
        out: list[Candidate] = []
        for _ in range(32):
            if len(out) == count:
                break
            for number in self.grid.sample(self.setting.rng, count - len(out)):
                if self.fresh(draw := self.grid.known(number)):
                    out.append(draw)
        return out

    def rest(self, limit: int) -> list[Candidate]:
        """Return new candidates by enumeration, for spaces in which sampling no longer finds any."""
        out: list[Candidate] = []
        while len(out) < limit and (candidate := next(self._all, None)) is not None:
            if self.fresh(candidate):
                out.append(candidate)
        return out

    def tell(self, observations: Sequence[Observation]) -> None:
        """Remember what was reported."""
        self.seen.update(self.grid.number(o.candidate) for o in observations)

    def ban(self, schedule: str) -> None:
        """Propose no more candidates of a schedule."""
        self.banned.add(schedule)
