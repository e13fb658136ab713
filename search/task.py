"""One workload under search: its candidates, what is known of them, and how they score."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from mimo_compile.search.budget import Share
from mimo_compile.search.joules import Joules, Knob
from mimo_compile.search.lookup import Result, summarise
from mimo_compile.search.objective import BEHIND, Objective
from mimo_compile.search.records import NODES_VANISHED, Record, Verdict
from mimo_compile.search.space import Candidate, JointSpace
from mimo_compile.search.strategies import Observation, Strategy
from mimo_compile.search.strategies.base import NEAR

CONFIRM = 4
"""Candidates of each workload compared against each other at the end, the default among them."""
_FATAL = (Verdict.CRASH, Verdict.TIMEOUT, Verdict.OOM)
_FATALITIES = 3
"""Crashes and the like after which a schedule without a correct candidate is left alone."""


@dataclass(slots=True)
class Task:
    """One workload under search."""

    space: JointSpace
    strategy: Strategy
    share: Share
    objective: Objective
    joules: Joules
    rng: np.random.Generator
    records: dict[str, list[Record]] = field(default_factory=dict)
    """Records by key, of this run and earlier ones."""
    candidates: dict[str, Candidate] = field(default_factory=dict)
    new: int = 0
    fatal: Counter[str] = field(default_factory=Counter)
    """Crashes and the like by schedule, while it has no correct candidate."""
    told: dict[str, float] = field(default_factory=dict)
    """Scores that the strategy knows."""
    default_key: str = ""
    best_us: float = math.inf
    """Of the correct candidates; between two rounds without what a comparison says of single readings."""
    default_us: float | None = None
    _results: list[Result] | None = None

    @property
    def trials(self) -> int:
        """Candidates measured, in earlier runs too."""
        return len(self.records)

    @property
    def cost(self) -> float:
        """Microseconds that the best candidate takes in one run of the model; 0 while there is none."""
        best = self.share.best_us
        return self.share.weight * best if math.isfinite(best) else 0.0

    def results(self) -> list[Result]:
        """Return the correct candidates."""
        if self._results is None:
            self._results = summarise(r for rows in self.records.values() for r in rows)
        return list(self._results)

    def learn(self, record: Record) -> Candidate | None:
        """Take in a record and tell the strategy; None if its candidate does not belong here."""
        candidate = self.space.adopt(record.schedule, record.config)
        if candidate is None:
            return None
        self.candidates[record.key] = candidate
        self.records.setdefault(record.key, []).append(record)
        self._results = None
        if record.ok and record.latency_us is not None:
            self.best_us = min(self.best_us, record.latency_us)
            if record.key == self.default_key:
                self.default_us = record.latency_us
        # the first joules: scores told so far stood on modelled ones, which no longer count
        self.tell(self.records if self.joules.learn(record) else [record.key], again=record.key)
        if record.ok:
            self.fatal[record.schedule] = -(10**6)
        elif record.verdict in _FATAL and NODES_VANISHED not in record.message:
            self.fatal[record.schedule] += 1
            if self.fatal[record.schedule] >= _FATALITIES:
                self.strategy.ban(record.schedule)
        return candidate

    def tell(self, keys: Iterable[str], *, again: str = "") -> None:
        """Tell the strategy scores that changed, and that of ``again`` in any case."""
        news = {k: self.score(self.records[k][-1]) for k in keys}
        news = {k: s for k, s in news.items() if k == again or self.told.get(k) != s}
        self.told.update(news)
        self.strategy.tell([Observation(self.candidates[k], s) for k, s in news.items()])

    def score(self, record: Record) -> float:
        """Score a record; a workload's scores rest on joules of one source, measured or modelled."""
        if not record.ok or record.latency_us is None:
            return math.inf
        return self._score(record, record.latency_us, record.modelled_mj, self.share.best_us)

    def _score(self, record: Record, us: float, modelled_mj: float | None, best_us: float) -> float:
        if not self.objective.needs_energy:
            return us
        key = record.twin if self.doubled(record) else record.key  # whose joules are read
        return self.joules.score(key, us, modelled_mj, best_us)

    def scores(self, results: Iterable[Result]) -> dict[str, float]:
        """Return the scores of results by key, at the times that count now."""
        rows = list(results)
        best = min((r.latency_us for r in rows), default=math.inf)
        return {
            r.record.key: self._score(r.record, r.latency_us, r.modelled_mj, best) for r in rows
        }

    def knobs(self) -> dict[str, list[Knob]]:
        """Return what each candidate is made of, by key."""
        return {
            key: [(c.schedule, name, value) for name, value in c.knobs]
            for key, c in self.candidates.items()
        }

    def close_round(self, trials: int) -> None:
        """Tell the split of the budget what a round brought."""
        results = self.results()
        self.best_us = best = min((r.latency_us for r in results), default=math.inf)
        default = [r.latency_us for r in results if r.record.key == self.default_key]
        self.default_us = default[0] if default else None
        goal = None
        if self.objective.needs_energy:
            good = [s for s in self.scores(results).values() if s < BEHIND]
            goal = min(good, default=math.inf)
        self.share.learn(trials, best, goal)

    def doubled(self, record: Record) -> bool:
        """Say whether a record only repeats another one here, whose code it is."""
        return record.twin in self.records

    def leaders(self, done: set[str], failed: set[str]) -> list[str]:
        """Return the keys of candidates to compare, the best first; none if the leader was compared.

        Args:
            done: Keys of those that were compared.
            failed: Keys of those that failed when they were to be.

        The best of each algorithm that came near takes part as well, the default, and where joules decide
        the fastest one, from which limits are counted. What is the same code takes part once. After a
        comparison it is the turn of those that it left in front, and of `_unseen` algorithms.
        """
        results = [r for r in self.results() if not self.doubled(r.record)]
        scores = self.scores(results)
        keys = sorted((k for k in scores if k not in failed), key=lambda k: (scores[k], k))
        if not keys:
            return []
        if compared := [k for k in keys if k in done]:
            times = {r.record.key: r.latency_us for r in results}
            new = self._unseen(keys, done, NEAR * times[compared[0]])
            if keys[0] not in done:
                new += [k for k in keys if k not in done and k not in new][: CONFIRM - 1]
            return [*new, compared[0]] if new else []
        best: dict[str, str] = {}
        for key in keys:
            best.setdefault(self.candidates[key].schedule, key)
        near = {k for k in best.values() if scores[k] <= NEAR * scores[keys[0]]}
        near.add(self.default_key)
        near.update(r.twin for r in self.records.get(self.default_key, ()))
        if self.objective.needs_energy:
            near.add(min(results, key=lambda r: (r.latency_us, r.record.key)).record.key)
        return keys[: CONFIRM - 1] + [k for k in keys[CONFIRM - 1 :] if k in near]

    def _unseen(self, keys: list[str], done: set[str], limit_us: float) -> list[str]:
        """Return the best of each algorithm that was never compared, though it was read below a limit.

        A machine that is slower in one minute than in the next makes whole algorithms look hopeless.
        """
        seen = {self.candidates[k].schedule for k in done}
        read: dict[str, tuple[float, str]] = {}
        for key in keys:
            name = self.candidates[key].schedule
            if name not in seen:
                us = min(
                    r.latency_us for r in self.records[key] if r.ok and r.latency_us is not None
                )
                read[name] = min((us, key), read.get(name, (limit_us, "")))
        return [key for _, key in sorted(read.values()) if key]
