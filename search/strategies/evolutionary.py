"""Evolution with models in front: many candidates are made, few are measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mimo_compile.search.objective import BEHIND
from mimo_compile.search.space import Candidate
from mimo_compile.search.strategies.base import NEAR, Known, Observation, Setting
from mimo_compile.search.strategies.surrogate import (
    Array,
    Encoder,
    Surrogate,
    expected_gain,
    flattened,
    one_thread,
    pressed,
)

_STOCK = 768
"""Random candidates that are kept for ranking, from the first round on."""
_FRESH = 48
"""Random candidates added each round; as many of the oldest leave."""
_LEADERS = 4
"""Candidates all of whose neighbours are ranked."""
_FEW = 192
"""Observations that the surrogate rests on at most: the best ones and the latest."""
_PART = 1 / 8
"""Part of the trials that each algorithm near the best gets, whatever the models say."""


class EvolutionarySearch(Known):
    """Seeds first, then what promises the largest gain, in small batches.

    Each round ranks a stock of random candidates, offspring of the best (mutations of one or two knobs,
    crossover), and all neighbours of the leaders. A Gaussian process over the knobs drafts; the learned
    model of the search, if there is one, then looks at the most promising. The two are mixed by how well each
    foretold what was measured last. The first candidate of a batch has the largest expected improvement;
    further ones are chosen as if those before had come out as expected, so that a batch is diverse. Each
    algorithm within 25 % of the leader's that got less than an eighth of the trials gets a place in it (but
    for the last place, if there are more of them than places).

    Sources: the loop of Ansor and of MetaSchedule's evolutionary search; expected improvement and the
    believer's batch from Bayesian optimisation (Jones 1998; Ginsbourger 2010).
    """

    def __init__(self, setting: Setting) -> None:
        """Start with an empty population."""
        super().__init__(setting)
        self._scores: dict[int, Observation] = {}
        self._encoder = Encoder(self.grid)
        self._surrogate = Surrogate(self._encoder.tables)
        self._stock: list[int] = []
        self._whole = self.grid.legal(setting.options.enumerate_below)
        self._trust = _Trust()
        self._foretold: dict[int, float] = {}
        """Logarithms of scores by what was known before."""
        self._least = math.inf

    def tell(self, observations: Sequence[Observation]) -> None:
        """Remember scores; what was measured again is taken at its newest value."""
        super().tell(observations)
        for o in observations:
            number = self.grid.number(o.candidate)
            self._scores[number] = o
            self._trust.tell(number, o.score)

    def ask(self, count: int) -> list[Candidate]:
        """Propose up to ``count`` new candidates, fewer while little is known."""
        out = self.seeds(count)
        if out:
            return out
        options, rng = self.setting.options, self.setting.rng
        good = sum(1 for o in self._scores.values() if o.ok)
        want = min(count, max(options.first_batch, good // 12))
        if good < options.warm_up:
            out = self.random(min(want, options.warm_up - good))
        else:
            lucky = sum(rng.random() < options.epsilon * 32 / (32 + good) for _ in range(want))
            out = self.random(lucky)
            with one_thread():
                out += self._promising(want - len(out))
        if len(out) < want:
            out += self.random(want - len(out))
        return out + self.rest(want - len(out)) if len(out) < want else out

    # -- what is ranked -------------------------------------------------------------------------

    def _open(self, numbers: Sequence[int]) -> list[int]:
        """Return those that may be proposed."""
        seen, out = self.seen, self.banned
        if not out:
            return [n for n in numbers if n not in seen]
        return [n for n in numbers if n not in seen and self.grid.part(n).name not in out]

    def _rivals(self) -> list[str]:
        """Return the algorithms near the best that got less than their part, the least tried first.

        Offspring of the leader alone would leave the others as they began, at their defaults.
        """
        best: dict[str, float] = {}
        tried: Counter[str] = Counter()
        for o in self._scores.values():
            name = o.candidate.schedule
            tried[name] += 1
            best[name] = min(o.score, best.get(name, math.inf))
        low = min(best.values(), default=math.inf)
        leader = min(best, key=lambda n: (best[n], n), default=None)
        part = _PART * sum(tried.values())
        near = [
            n
            for n, score in best.items()
            if math.isfinite(score) and score <= NEAR * low and n != leader and n not in self.banned
        ]
        return sorted((n for n in near if tried[n] < part), key=lambda n: (tried[n], n))

    def _parents(self) -> list[int]:
        good = [
            (o.score, n)
            for n, o in self._scores.items()
            if o.ok and o.candidate.schedule not in self.banned
        ]
        good.sort()
        return [n for _, n in good[: self.setting.options.population]]

    def _pool(self) -> list[int]:
        """Return distinct new candidates to be ranked (not yet marked as proposed)."""
        if self._whole is not None:
            return self._open(self._whole)
        stock = self._open(self._stock)
        wanted = _STOCK - len(stock) if len(stock) < _STOCK else _FRESH
        drawn = self._open(self.grid.sample(self.setting.rng, wanted))
        stock = list(dict.fromkeys(stock + drawn))
        self._stock = stock[max(0, len(stock) - _STOCK) :]
        parents = self._parents()
        near = [n for p in parents[:_LEADERS] for n in self.grid.neighbours(p)]
        for _ in range(self.setting.options.pool if parents else 0):
            if (child := self._child(parents)) is not None:
                near.append(child)
        return list(dict.fromkeys(self._stock + self._open(near)))

    def _child(self, parents: Sequence[int]) -> int | None:
        rng, grid = self.setting.rng, self.grid

        def pick() -> int:  # a tournament of two; parents are sorted
            return parents[int(min(rng.random(), rng.random()) * len(parents))]

        if len(parents) > 1 and rng.random() < self.setting.options.crossover:
            return grid.crossover(pick(), pick(), rng)
        child = grid.mutate(pick(), rng)
        if child is not None and rng.random() < 0.5:
            child = grid.mutate(child, rng)
        return child

    # -- how it is ranked -----------------------------------------------------------------------

    def _observed(self) -> tuple[list[int], list[float], int]:
        """Return what the surrogate rests on: numbers, scores, and how many there are in all."""
        seen = [(n, o.score) for n, o in self._scores.items() if o.ok]
        told = len(seen)
        if told > _FEW:
            best = sorted(seen, key=lambda s: (s[1], s[0]))[: _FEW // 2]
            kept = {n for n, _ in best}
            seen = best + [s for s in seen if s[0] not in kept][-(_FEW - len(best)) :]
        return [n for n, _ in seen], [score for _, score in seen], told

    def _promising(self, want: int) -> list[Candidate]:
        """Choose up to ``want`` of the pool, and mark them as proposed."""
        pool = self._pool() if want > 0 else []
        if not pool:
            return []
        numbers, scores, told = self._observed()
        self._trust.begin(min(scores))
        s = self._surrogate
        observed, drift = self._drift(numbers), self._drift(pool)
        s.fit(self._encoder.rows(numbers), flattened(scores), observed, told)
        rows = self._encoder.rows(pool)
        drafted = s.predict(rows, drift)
        draft = expected_gain(drafted.mean, np.sqrt(drafted.variance), 0.0)
        order = np.argsort(-draft, kind="stable").tolist()
        mean, variance = self._verified(pool, order, drafted.mean, drafted.variance)
        out: list[Candidate] = []
        taken = np.zeros(len(pool), bool)
        names = {p.name: i for i, p in enumerate(self.grid.parts)}
        rivals = self._rivals()[: max(1, want - 1)]
        while len(out) < want and not taken.all():
            gain = np.where(taken, -1.0, expected_gain(mean, np.sqrt(variance), 0.0))
            rival = rivals.pop(0) if rivals else None
            own = np.flatnonzero((rows[:, -1] == names.get(rival or "", -1)) & ~taken)
            at = int(own[gain[own].argmax()]) if len(own) else int(gain.argmax())
            taken[at] = True
            if self.fresh(chosen := self.grid.known(pool[at])):
                out.append(chosen)
                self._trust.said(pool[at], "surrogate", float(drafted.mean[at]))
            if len(out) < want:
                shared = drafted.shared(at)
                less = shared**2 / (shared[at] + s.noise)
                variance = np.maximum(variance - less, 1e-9)
        return out

    def _drift(self, numbers: Sequence[int]) -> Array | None:
        """Return what was foretold of candidates, on the scale of `flattened` scores."""
        foretell = self.setting.foretell
        if foretell is None:
            return None
        if new := [n for n in numbers if n not in self._foretold]:
            found = foretell([self.grid.known(n) for n in new])
            if found is None:
                return None
            self._foretold.update(zip(new, np.log(found).tolist(), strict=True))
        logs = np.array([self._foretold[n] for n in numbers])
        self._least = min(self._least, float(logs.min()))
        return pressed(logs - self._least)

    def _verified(
        self, pool: Sequence[int], order: Sequence[int], mean: Array, variance: Array
    ) -> tuple[Array, Array]:
        """Mix in what the learned model says of the most promising; the others fall behind."""
        predict, spread = self.setting.predict, self.setting.spread
        top = order[: self.setting.options.verified]
        chosen = [self.grid.known(pool[i]) for i in top]
        scores = predict(chosen) if predict is not None else None
        if scores is None:
            return mean, variance
        best = self._trust.base
        said = np.minimum(np.log(np.maximum(np.asarray(scores), 1e-30) / best), 2.0)
        own = spread(chosen) if spread is not None else None
        for i, value in zip(top, said.tolist(), strict=True):
            self._trust.said(pool[i], "model", value)
        w = self._trust.of_surrogate()
        deviation = np.zeros(len(top)) if own is None else np.nan_to_num(np.asarray(own))
        mixed, wide = mean.copy(), variance.copy()
        mixed[:] += 10.0
        gap = mean[top] - said
        mixed[top] = w * mean[top] + (1 - w) * said
        wide[top] = w * variance[top] + (1 - w) * deviation**2 + w * (1 - w) * gap**2
        return mixed, wide


class _Trust:
    """How well the surrogate and the learned model foretold what was then measured."""

    def __init__(self) -> None:
        self.base = 1.0
        """Score that predictions are logarithms over."""
        self._said: dict[int, dict[str, tuple[float, float]]] = {}
        self._errors: dict[str, list[float]] = {"surrogate": [], "model": []}

    def begin(self, base: float) -> None:
        """Start a round at its best score; what was said of candidates that nobody proposed is forgotten."""
        self.base = base
        self._said = {n: said for n, said in self._said.items() if len(said) == 2}

    def said(self, number: int, who: str, value: float) -> None:
        """Note a prediction of a candidate that may be measured next."""
        self._said.setdefault(number, {})[who] = (value, self.base)

    def tell(self, number: int, score: float) -> None:
        """Compare with what was said, once there is a score to compare with.

        One from `BEHIND` on stands for a candidate beyond a limit, or whose joules are still to be read.
        """
        if BEHIND <= score < math.inf:
            return
        said = self._said.pop(number, {})
        if not math.isfinite(score):
            return
        if len(said) == 2:
            for who, (value, base) in said.items():
                error = min(max(value - math.log(score / base), -1.0), 1.0)
                self._errors[who].append(error * error)

    def of_surrogate(self) -> float:
        """Return the surrogate's weight in the mix, by the squared errors of late."""
        ours, theirs = (
            (2 * start + sum(self._errors[who][-24:])) / (2 + len(self._errors[who][-24:]))
            for who, start in (
                ("surrogate", 0.01),
                ("model", 0.1),
            )  # which may be a bare roofline yet
        )
        return theirs / (ours + theirs)
