"""What a search learns while it runs, and what it predicts of candidates from that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.cost_models.features import ANALYTIC, Extractor, Features, with_energy
from mimo_compile.cost_models.learned import (
    PRIOR,
    Blocks,
    EnergyModel,
    LatencyModel,
    Prediction,
    Sample,
)
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.measure.base import Measures, Predicts
from mimo_compile.search.objective import Objective
from mimo_compile.search.records import Record
from mimo_compile.search.space import Candidate, JointSpace

RANKED = 4096
"""Features of ranked candidates that are kept for the next time (some kilobytes each)."""
UNLOWERED = 1e30
"""Score of what cannot be lowered: it comes last."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """A candidate as models see it."""

    row: Features
    counts: Counts
    blocks: Blocks = ()
    """Rows of its blocks, if there are several: their times add up."""

    @property
    def rows(self) -> Blocks:
        """What models of time see."""
        return self.blocks or (self.row,)


@dataclass(frozen=True, slots=True)
class Prior:
    """A latency model of other shapes or machines, for rows by guessed rates of the hardware."""

    model: LatencyModel
    schedules: frozenset[str]
    """Algorithms it has seen."""
    origin: str
    """Where it comes from, for people."""

    def knows(self, space: JointSpace) -> bool:
        """Say whether it has seen any of a space's algorithms; else it has nothing to say there."""
        return not self.schedules.isdisjoint(space.schedules)


@dataclass(frozen=True, slots=True)
class Predicted:
    """Of candidates that can be lowered."""

    latency_us: Floats
    energy_mj: Floats | None
    """By the meter's model where it was read, else modelled; None when the objective needs none."""
    spread: Floats
    """Standard deviation of the logarithm of the score; NaN where it is unknown."""


class Learner:
    """Latency and energy models of one search, with the features of all its candidates.

    Joules are those of one meter: modelled ones teach nothing.
    """

    def __init__(
        self, hardware: Hardware, device: DeviceModel, measurer: Measures, objective: Objective, *,
        seed: int, meter: str, prior: Prior | None = None,
    ) -> None:  # fmt: skip
        """Start with what is known from elsewhere."""
        self.hardware = hardware
        self.device = device
        self.measurer = measurer
        self.objective = objective
        self.latency = LatencyModel(seed=seed)
        self.energy = EnergyModel(meter, seed=seed)
        self.prior = prior
        self._guess = DeviceModel.guess(hardware)
        self._known: dict[str, Work] = {}
        """Of measured candidates, by their records' keys."""
        self._noted: dict[str, tuple[JointSpace, Candidate, Counts]] = {}
        """Measured candidates whose features nobody needed yet."""
        self._ranked: dict[str, Work] = {}
        """Of candidates that were ranked lately, by their keys."""
        self._extractors: dict[tuple[Workload, bool], Extractor] = {}
        self._joules = 0
        """Samples that the energy model was last fitted to."""
        self._last: tuple[list[str], list[int], Predicted] | None = None

    # -- features ------------------------------------------------------------------------------

    def _extractor(self, workload: Workload, *, guessed: bool = False) -> Extractor:
        key = (workload, guessed)
        if key not in self._extractors:
            device = self._guess if guessed else self.device
            self._extractors[key] = Extractor(workload, self.hardware, device)
        return self._extractors[key]

    def _described(
        self, space: JointSpace, pairs: Sequence[tuple[Candidate, Counts]]
    ) -> list[Work]:
        """Return what models see, with the prior's opinion."""
        extract = self._extractor(space.workload)
        works = [
            Work(
                extract(w, c.schedule, c.config), w,
                extract.blocks(w, c.schedule, c.config) if w.parts else (),
            )
            for c, w in pairs
        ]  # fmt: skip
        prior = self.prior
        if works and prior is not None and prior.knows(space):
            guess = self._extractor(space.workload, guessed=True)
            rows = [
                tuple(map(guess.retold, work.rows, work.counts.parts or (work.counts,)))
                for work in works
            ]
            found = prior.model.predict(rows)
            for work, value in zip(works, found.value, strict=True):
                total = math.log(sum(math.exp(row[ANALYTIC]) for row in work.rows))
                for row in work.rows:  # of all blocks alike, so that their sum is what it says
                    row[PRIOR] = math.log(float(value)) - total
        return works

    def note(self, space: JointSpace, candidate: Candidate, record: Record) -> None:
        """Remember a correct candidate for training; its work as ranking sees it: records keep no traits."""
        if record.key not in self._known and record.key not in self._noted:
            self._noted[record.key] = space, candidate, Counts(record.ops, record.bytes)

    @property
    def _works(self) -> dict[str, Work]:
        """All measured candidates; features of what was noted are made now, those of a space together."""
        groups: dict[Workload, dict[str, tuple[JointSpace, Candidate, Counts]]] = {}
        for key, noted in self._noted.items():
            groups.setdefault(noted[0].workload, {})[key] = noted
        self._noted.clear()
        for group in groups.values():
            pairs, keys = [], []
            for key, (space, candidate, recorded) in group.items():
                counts = recorded
                schedule = space.schedules[candidate.schedule]
                if type(schedule).work is not Schedule.work:
                    if (ranked := self._ranked.get(candidate.key)) is not None:
                        self._known[key] = ranked
                        continue
                    counts = schedule.told(space.workload, space.config(candidate), self.hardware)
                pairs.append((candidate, counts))
                keys.append(key)
            if pairs:
                self._known.update(zip(keys, self._described(space, pairs), strict=True))
        return self._known

    def _ranking(
        self, space: JointSpace, candidates: Sequence[Candidate]
    ) -> tuple[list[int], list[Work]]:
        """Return what models see of candidates, with the indices of those that can be lowered."""
        keys = [c.key for c in candidates]
        if len(self._ranked) > RANKED:
            self._ranked.clear()
        new = [c for c, k in zip(candidates, keys, strict=True) if k not in self._ranked]
        counts = self.measurer.describe(space, new)
        pairs = [(c, n) for c, n in zip(new, counts, strict=True) if n is not None]
        for (c, _), work in zip(pairs, self._described(space, pairs), strict=True):
            self._ranked[c.key] = work
        known = [i for i, k in enumerate(keys) if k in self._ranked]
        return known, [self._ranked[keys[i]] for i in known]

    # -- learning ------------------------------------------------------------------------------

    def due(self, times: int, joules: int, *, now: bool = False) -> bool:
        """Say whether `train` has something to do, from the numbers of values known."""
        had = self.latency.samples
        least = max(self.latency.min_samples, had + max(4, had // 8))
        return times >= least or joules >= self._joules + (
            1 if now or not self.energy.trained else 4
        )

    def train(
        self,
        times: Mapping[Workload, Mapping[str, float]],
        joules: Mapping[Workload, Mapping[str, float]],
        *,
        now: bool = False,
    ) -> None:
        """Fit the models anew where enough was measured since.

        Args:
            times: Microseconds of correct candidates by their records' keys, by workload.
            joules: Millijoules by the meter, likewise.
            now: Fit the energy model to even one new value: its predictions were poor.
        """
        works = self._works
        samples = [
            Sample(works[key].rows, us, str(workload))
            for workload, values in times.items()
            for key, us in values.items()
            if key in works
        ]
        had = self.latency.samples
        if len(samples) >= max(self.latency.min_samples, had + max(4, had // 8)):
            self.latency.fit(samples)
            self._last = None
        known = sum(len(values) for values in joules.values())
        if known >= self._joules + (1 if now or not self.energy.trained else 4):
            self.energy.fit(
                [
                    Sample((self._with_energy(key, times[w][key]),), mj, str(w), self.energy.source)
                    for w, values in joules.items()
                    for key, mj in values.items()
                    if key in works and key in times[w]
                ]
            )
            self._joules = known
            self._last = None

    def _with_energy(self, key: str, latency_us: float) -> Features:
        work = self._works[key]
        return with_energy(work.row, work.counts, self.device, latency_us)

    # -- predicting ----------------------------------------------------------------------------

    def expected_us(self, key: str) -> float | None:
        """Return what is predicted of a candidate that was measured since the last training."""
        work = self._works.get(key)
        return None if work is None else float(self.latency.predict([work.rows]).value[0])

    def energies(self, workload: Workload, times: Mapping[str, float]) -> dict[str, float]:
        """Predict millijoules of candidates whose microseconds are measured, by their records' keys."""
        works = self._works
        keys = [k for k in times if k in works]
        rows = [(self._with_energy(k, times[k]),) for k in keys]
        found = self.energy.predict_mj(rows, str(workload)).value
        return {k: float(v) for k, v in zip(keys, found, strict=True)}

    def _predicted(
        self, space: JointSpace, candidates: Sequence[Candidate]
    ) -> tuple[list[int], Predicted] | None:
        """Predict candidates; None where the roofline alone tells too little to generate code for it."""
        keys = [c.key for c in candidates]
        if self._last is not None and self._last[0] == keys:  # scores and spreads are asked in turn
            return self._last[1:]
        hopeful = self.prior is not None and self.prior.knows(space)
        if space.costly and not (self.latency.trained or hopeful):
            return None
        indices, works = self._ranking(space, candidates)
        times = self.latency.predict([w.rows for w in works])
        energy = self._energy_at(space, works, times) if self.objective.needs_energy else None
        spread = self._spread(times.spread, None if energy is None else energy.spread)
        out = Predicted(times.value, None if energy is None else energy.value, spread)
        self._last = (keys, indices, out)
        return indices, out

    def _energy_at(self, space: JointSpace, works: Sequence[Work], times: Prediction) -> Prediction:
        rows = [
            (with_energy(w.row, w.counts, self.device, float(us)),)
            for w, us in zip(works, times.value, strict=True)
        ]
        return self.energy.predict_mj(rows, str(space.workload))

    def _spread(self, time: Floats, energy: Floats | None) -> Floats:
        """Return the deviation of the score's logarithm; errors of time and energy are independent."""
        if energy is None:
            return time
        factor = self.objective.exponent
        return np.sqrt((factor * time) ** 2 + np.nan_to_num(energy) ** 2)

    def predict(
        self, space: JointSpace, candidates: Sequence[Candidate], best_us: float
    ) -> list[float] | None:
        """Predict scores of candidates that were not measured; ``best_us``: the best time measured."""
        if isinstance(self.measurer, Predicts):
            return self.measurer.predict_us(space, candidates)
        found = self._predicted(space, candidates)
        if found is None:
            return None
        indices, p = found
        best = min([best_us, *p.latency_us.tolist()])
        out = [UNLOWERED] * len(candidates)
        for at, i in enumerate(indices):
            energy = None if p.energy_mj is None else float(p.energy_mj[at])
            out[i] = self.objective.score((float(p.latency_us[at]), energy), best)
        return out

    def foretell(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[float] | None:
        """Return scores by the prior alone, with modelled joules; None where it has nothing to say.

        They stay the same for the whole search, so that their errors can be learned. A limit relative to the
        best would move.
        """
        if self.prior is None or not self.prior.knows(space) or self.objective.limit is not None:
            return None
        if space.costly:  # strategies ask of hundreds
            return None
        indices, works = self._ranking(space, candidates)
        times = [sum(math.exp(r[ANALYTIC] + r[PRIOR]) for r in w.rows) for w in works]
        out = [UNLOWERED] * len(candidates)
        for i, w, us in zip(indices, works, times, strict=True):
            energy = self.device.energy_mj(w.counts, us) if self.objective.needs_energy else None
            out[i] = self.objective.score((us, energy), us)
        return out

    def spread(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[float] | None:
        """Return the standard deviation of each predicted score's logarithm; None when it is unknown."""
        if isinstance(self.measurer, Predicts) or not self.latency.trained:
            return None
        found = self._predicted(space, candidates)
        if found is None:
            return None
        indices, p = found
        out = [0.0] * len(candidates)
        for i, value in zip(indices, p.spread.tolist(), strict=True):
            out[i] = value
        return out
