"""Evolution with a model in front: offspring of the best, ranked before any is measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from mimo_compile.search.space import Candidate
from mimo_compile.search.strategies.base import NEAR, Known, Observation, Setting


class EvolutionarySearch(Known):
    """Seeds first; then a random share, and offspring of the best so far in the model's order.

    A quarter is kept for the algorithm that was tried least among those near the best. Small spaces are
    ranked as a whole instead. Source: the loop of Ansor and of MetaSchedule's evolutionary search, with
    algorithm choice as one more decision.
    """

    def __init__(self, setting: Setting) -> None:
        """Start with an empty population."""
        super().__init__(setting)
        self._scores: dict[str, Observation] = {}
        small = setting.space.enumerate(setting.options.enumerate_below)
        self._all = small

    def tell(self, observations: Sequence[Observation]) -> None:
        """Remember scores; what was measured again is taken at its newest value."""
        super().tell(observations)
        self._scores.update((o.candidate.key, o) for o in observations)

    def ask(self, count: int) -> list[Candidate]:
        """Propose up to ``count`` new candidates."""
        out = self.seeds(count)
        want = count - len(out)
        if want <= 0:
            return out
        options, rng = self.setting.options, self.setting.rng
        lucky = min(want, math.floor(options.epsilon * want + rng.random()))
        out += self.random(lucky)
        ranked = self._rank(self._pool(max(options.pool, 2 * want)))
        if rival := self._rival():
            own = [c for c in ranked if c.schedule == rival][: want // 4]
            ranked = own + [c for c in ranked if c not in own]
        for candidate in ranked:
            if len(out) < count and self.fresh(candidate):
                out.append(candidate)
        if len(out) < count:
            out += self.random(count - len(out))
        return out + self.rest(count - len(out)) if len(out) < count else out

    def _rival(self) -> str | None:
        """Return the algorithm that was tried least among those near the best, but for the leader's.

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
        near = [
            n
            for n, score in best.items()
            if math.isfinite(score) and score <= NEAR * low and n != leader and n not in self.banned
        ]
        return min(near, key=lambda n: (tried[n], n), default=None)

    def _parents(self) -> list[Candidate]:
        good = [
            o for o in self._scores.values() if o.ok and o.candidate.schedule not in self.banned
        ]
        good.sort(key=lambda o: (o.score, o.candidate.key))
        return [o.candidate for o in good[: self.setting.options.population]]

    def _pool(self, size: int) -> list[Candidate]:
        """Return distinct new candidates to be ranked (not yet marked as proposed)."""

        def is_open(c: Candidate) -> bool:
            return c.key not in self.seen and c.schedule not in self.banned

        if self._all is not None:
            rest = [c for c in self._all if is_open(c)]
            order = self.setting.rng.permutation(len(rest))[:size]
            return [rest[int(i)] for i in sorted(order)]
        parents, rng, space = self._parents(), self.setting.rng, self.setting.space
        found: dict[str, Candidate] = {}
        for _ in range(8 * size if parents else 0):
            if len(found) >= size:
                break
            child = self._child(parents)
            if child is not None and is_open(child):
                found.setdefault(child.key, child)
        for _ in range(4 * size):
            if len(found) >= size:
                break
            child = space.sample(rng)
            if child is not None and is_open(child):
                found.setdefault(child.key, child)
        return list(found.values())

    def _child(self, parents: Sequence[Candidate]) -> Candidate | None:
        rng, space = self.setting.rng, self.setting.space

        def pick() -> Candidate:  # a tournament of two; parents are sorted
            return parents[int(min(rng.integers(len(parents), size=2)))]

        if len(parents) > 1 and rng.random() < self.setting.options.crossover:
            return space.crossover(pick(), pick(), rng)
        child = space.mutate(pick(), rng)
        if child is not None and rng.random() < 0.3:
            child = space.mutate(child, rng)
        return child

    def _rank(self, pool: list[Candidate]) -> list[Candidate]:
        predict = self.setting.predict
        scores = predict(pool) if predict is not None and pool else None
        if scores is None:
            order = self.setting.rng.permutation(len(pool))
            return [pool[int(i)] for i in order]
        pairs = sorted(zip(scores, (c.key for c in pool), pool, strict=True), key=lambda p: p[:2])
        return [c for _, _, c in pairs]
