"""Whose energy is worth a measurement: time first, for all; joules then, for few of the near-fastest.

A trustworthy reading of joules takes seconds, one of time milliseconds. So after each round those within the
objective's window of the best time are looked at, two models say what they need and how sure that is, and
`DynamicShare` says how many of those that may turn out to be the best are measured: fewer, the better
held-out predictions were. A candidate that was passed over is looked at again only while it is predicted to
beat the best measured one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from mimo_compile.cost_models.overlap import OverlapModel
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
LEAST = 4
"""Readings from which candidates are told by what they have in common with those that were read."""
GAIN = 0.005
"""Part of the best score that a reading must promise, at best, to be worth its seconds."""
STRETCH = 3.0
"""Most by which doubts are enlarged when held-out errors exceed them."""


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
    doubt: dict[str, float] = field(default_factory=dict)
    """Standard deviations of the logarithm of predicted joules, where they are known."""
    rivals: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Logarithms predicted from common knobs and from features, and of the two together."""
    errors: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=HELD))
    """Held out: of the first and the second, and of both together over the doubt."""
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

    def refine(
        self,
        results: Mapping[str, Result],
        energies: Mapping[str, float],
        knobs: Mapping[str, Collection[Knob]],
    ) -> dict[str, float]:
        """Return predicted millijoules that also follow what candidates have in common with those read.

        A model over features needs many readings for what one value of a knob does; one over the knobs
        themselves needs few, and knows how little it knows. Each counts as far as it was right before.

        Args:
            results: Correct candidates.
            energies: Millijoules of those without measured ones, predicted from features.
            knobs: What each candidate is made of.
        """
        known = self.known()
        read = [k for k in known if k in results and k in knobs]
        keys = [k for k in energies if k in results and k in knobs]
        self.doubt, self.rivals = {}, {}
        if len(read) < LEAST or not keys:
            return dict(energies)
        model = OverlapModel()
        model.fit(
            [knobs[k] for k in read], [math.log(known[k] / results[k].latency_us) for k in read]
        )
        means, deviations = model.predict([knobs[k] for k in keys])
        trust, stretch = self._trust()
        out = dict(energies)
        for key, mean, deviation in zip(keys, means, deviations, strict=True):
            first = float(mean) + math.log(results[key].latency_us)
            second = math.log(energies[key])
            both = trust * first + (1 - trust) * second
            self.rivals[key] = (first, second, both)
            self.doubt[key] = stretch * float(deviation)
            out[key] = math.exp(both)
        return out

    def _trust(self) -> tuple[float, float]:
        """Return the weight of the model over knobs, and by what its doubts are to be enlarged."""
        if len(self.errors) < LEAST:
            return 1.0, 1.0
        first, second, ratio = (
            statistics.fmean(e[i] ** 2 for e in self.errors) + 1e-12 for i in range(3)
        )
        return second / (first + second), min(STRETCH, max(1.0, math.sqrt(ratio)))

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
        margin = self._margin()
        at_best = {
            k: self.objective.score((near[k], energies[k] / self._factor(k, margin)), best_us)
            for k in fresh
        }
        hope = [k for k in fresh if at_best[k] <= (1 - GAIN) * least]
        self.owed += self.share.k * len(hope)
        count = math.floor(self.owed + 1e-9)
        self.owed -= count
        if not self.measured:
            count = max(count, 1)
        chosen = [hope[i] for i in self.share.choose([at_best[k] for k in hope], rng, count)]
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

    def _factor(self, key: str, margin: float) -> float:
        """Return by what a candidate's joules may be overestimated."""
        if key not in self.doubt or self.objective.kind == "pareto":
            return margin
        return math.exp(SURE * self.doubt[key])

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
        for key, (measured, _) in pairs.items():
            if key in self.rivals:
                first, second, both = (math.log(measured) - p for p in self.rivals[key])
                self.errors.append((first, second, both / self.doubt[key] * self._trust()[1]))
        return self.share.update([m for m, _ in self.held], [p for _, p in self.held])
