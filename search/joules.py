"""Whose energy is worth a measurement: time first, for all; joules then, for few of the near-fastest.

A trustworthy reading of joules takes seconds, one of time milliseconds. So after each round those within the
objective's window of the best time are looked at, a model says what they need, and `DynamicShare` says how
many of them are measured: fewer, the better held-out predictions were. A candidate that was passed over is
looked at again only while it is predicted to beat the best measured one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from mimo_compile.cost_models.updating import DynamicShare
from mimo_compile.search.lookup import Result
from mimo_compile.search.objective import Objective
from mimo_compile.search.records import Record

Knob = tuple[str, str, object]
"""An algorithm, a name and a value."""

PENALTY = 1.02
"""Factor on predicted joules: of two equal candidates the measured one leads."""
WORTH = 0.99
"""One that was passed over is measured later if its score is predicted below this part of the best."""
SURE = 2.0
"""Standard errors by which a prediction must miss the best measured score to be left alone."""
HELD = 16
"""Latest readings by which predictions are judged: those of one round are too few."""
GIVE_UP = 4
"""Readings that may fail before one succeeds."""


@dataclass(slots=True)
class Joules:
    """What is known of one workload's energies; candidates are named by their records' keys.

    All energies are by the meter of this run. Until it gave the first one, modelled energies guide the
    search; from then on they count no more (see `energy_of`).
    """

    objective: Objective
    meter: str
    staged: bool
    """True when joules are read apart from times, for chosen candidates."""
    share: DynamicShare = field(default_factory=DynamicShare)
    values: dict[str, list[float]] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)
    """Candidates that were asked for, with or without success."""
    predicted: dict[str, float] = field(default_factory=dict)
    """Of those passed over, by a model of the same meter."""
    held: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=HELD))
    """(measured, predicted before it was learned)."""
    seen: set[str] = field(default_factory=set)
    """Candidates that had their chance."""
    owed: float = 0.0
    """Part of a reading that the share left over."""

    @property
    def measured(self) -> bool:
        """True once the meter gave joules: from then on only they count."""
        return bool(self.values)

    def learn(self, record: Record) -> bool:
        """Take in a record; return True when all scores change because it is the first with joules."""
        if not record.ok or not self.objective.needs_energy:
            return False
        ours = record.energy_source == self.meter and record.energy_mj is not None
        if not self.staged or ours or record.phase == "energy":
            self.tried.add(record.key)
        if not ours or record.energy_mj is None:
            return False
        first = not self.values
        self.values.setdefault(record.key, []).append(record.energy_mj)
        self.predicted.pop(record.key, None)
        return first

    def known(self) -> dict[str, float]:
        """Return millijoules by the meter."""
        return {key: statistics.median(values) for key, values in self.values.items()}

    def energy_of(self, key: str, modelled_mj: float | None) -> float | None:
        """Return the millijoules that a candidate is ranked by, None where there are none to rank by."""
        if not self.measured:
            return modelled_mj
        if key in self.values:
            return statistics.median(self.values[key])
        found = None if key in self.tried else self.predicted.get(key)
        return None if found is None else found * PENALTY

    def score(
        self, key: str, latency_us: float, modelled_mj: float | None, best_us: float
    ) -> float:
        """Score a candidate; one too slow for a reading ranks behind, one whose reading failed last."""
        energy = self.energy_of(key, modelled_mj)
        best_us = min(best_us, latency_us)
        if energy is None and self.staged and key not in self.tried:
            return self.objective.behind(latency_us / best_us)
        return self.objective.score((latency_us, energy), best_us)

    def choose(
        self,
        results: Mapping[str, Result],
        energies: Mapping[str, float],
        knobs: Mapping[str, Collection[Knob]],
        rng: np.random.Generator,
    ) -> list[str]:
        """Return the candidates to measure now, the most promising first.

        Args:
            results: Correct candidates.
            energies: Predicted millijoules of those without measured ones.
            knobs: What each candidate is made of. One with a value that was never read is read whatever is
                predicted of it: no model knows what it does to energy.
            rng: Draws the share that does not follow the predictions.
        """
        if not self.measured and len(self.tried) >= GIVE_UP:
            return []
        best_us = min((r.latency_us for r in results.values()), default=math.inf)
        near = {
            k: r.latency_us
            for k, r in results.items()
            if k not in self.tried and r.latency_us <= self.objective.window * best_us
        }
        scores = {
            k: self.objective.score((us, energies[k]), best_us)
            for k, us in near.items()
            if k in energies
        }
        known = self.known()
        least = min(
            (
                self.objective.score((results[k].latency_us, mj), best_us)
                for k, mj in known.items()
                if k in results
            ),
            default=math.inf,
        )
        fresh = [k for k in scores if k not in self.seen or scores[k] < WORTH * least]
        self.seen.update(results)
        self.predicted = {k: energies[k] for k in near if k in energies} if self.measured else {}
        fresh.sort(key=lambda k: (scores[k], k))
        hope = [k for k in fresh if scores[k] <= self._margin() * least]
        self.owed += self.share.k * len(hope)
        count = math.floor(self.owed + 1e-9)
        self.owed -= count
        if not self.measured:
            count = max(count, 1)
        chosen = [hope[i] for i in self.share.choose([scores[k] for k in hope], rng, count)]
        covered = {v for k in (*self.tried, *chosen) for v in knobs.get(k, ())}
        for key in sorted(scores, key=lambda k: (scores[k], k)):
            if not covered.issuperset(knobs.get(key, ())):
                covered.update(knobs[key])
                chosen += [key] if key not in chosen else []
        poor = [k for k in fresh if k not in hope and k not in chosen]
        if (
            poor and rng.random() < self.share.explore
        ):  # lest the model's disdain is never put to the test
            chosen.append(poor[int(rng.integers(len(poor)))])
        return chosen

    def _margin(self) -> float:
        """Return the times the best score up to which a prediction may still turn out to be the best.

        Twice the error that predictions had so far, measured ones against held-out ones. A Pareto search
        keeps more than one best.
        """
        if self.objective.kind == "pareto" or len(self.held) < HELD // 2:
            return math.inf
        errors = [math.log(m / p) for m, p in self.held]
        return math.exp(SURE * math.sqrt(statistics.fmean(e * e for e in errors)))

    def judge(self, pairs: Mapping[str, tuple[float, float]]) -> bool:
        """Adapt the share to (measured, predicted) values; return True when the model should learn now."""
        if not pairs:
            return False
        self.held.extend(pairs.values())
        return self.share.update([m for m, _ in self.held], [p for _, p in self.held])
