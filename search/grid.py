"""The candidates of a joint space by number: a strategy looks at hundreds for each one that is measured.

A number stands for a schedule and a value of each of its knobs, in the order in which the space enumerates
them. Objects are made only of numbers that somebody looks at, and once. Candidates outside the knobs' values
(a schedule's default may be) get numbers behind all others.

A schedule may settle knobs that others make meaningless, so that many numbers give the same config. The first
that is looked at stands for all of them: draws and moves lead to it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.schedules.base import KnobValue, Space
from mimo_compile.search.space import Candidate, JointSpace


class Part:
    """One schedule's share of the numbers."""

    def __init__(self, name: str, space: Space, fixed: Mapping[str, KnobValue], start: int) -> None:
        """Lay out; ``fixed``: what configs hold besides knobs."""
        self.name = name
        self.space = space
        self.fixed = fixed
        self.start = start
        self.knobs = list(space.knobs)
        self.values = list(space.knobs.values())
        sizes = [len(v) for v in self.values]
        self.strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        """Numbers between two values of each knob; the last knob changes fastest."""
        self.open = [i for i, n in enumerate(sizes) if n > 1]
        """Knobs that have a choice."""
        self._steps = list(zip(self.strides, sizes, strict=True))
        self._offers = list(zip(self.knobs, self.values, self._steps, strict=True))
        self._at = [{(type(x), x): i for i, x in enumerate(v)} for v in self.values]
        self.standing: dict[Any, int] = {}
        """The number that stands for each config that was looked at."""

    def digits(self, number: int) -> list[int]:
        """Return the place of each knob's value."""
        rest = number - self.start
        return [rest // stride % size for stride, size in self._steps]

    def digit(self, number: int, knob: int) -> int:
        """Return the place of one knob's value."""
        stride, size = self._steps[knob]
        return (number - self.start) // stride % size

    def config(self, number: int) -> Any:
        """Return the config of a number, None where it is illegal."""
        rest = number - self.start
        try:
            made = self.space.make(
                **{k: v[rest // stride % size] for k, v, (stride, size) in self._offers}
            )
        except ValueError:
            return None
        return made if self.space.legal(made) else None

    def places(self, config: Mapping[str, KnobValue]) -> list[int | None]:
        """Return the place of each knob's value in a config; None where the knob does not offer it."""
        return [
            at.get((type(config[k]), config[k])) if k in config else None
            for k, at in zip(self.knobs, self._at, strict=True)
        ]

    def number(self, digits: Sequence[int]) -> int:
        """Return the number of values by their places."""
        return self.start + sum(d * s for d, s in zip(digits, self.strides, strict=True))


class Grid:
    """All candidates of a joint space by number, and moves between them."""

    def __init__(self, space: JointSpace) -> None:
        """Count; nothing is enumerated."""
        self.space = space
        self.parts: list[Part] = []
        self.size = 0
        """Numbers before the schedules' constraints; those from here on are outside the knobs' values."""
        for name, own in space.spaces.items():
            default = space.schedules[name].config_to_json(own.default)
            fixed = {k: v for k, v in default.items() if k not in own.knobs}
            self.parts.append(Part(name, own, fixed, self.size))
            self.size += own.size
        self._starts = [p.start for p in self.parts]
        self._parts = {p.name: p for p in self.parts}
        self._shares = np.cumsum([1.0 + math.log2(max(1, p.space.size)) for p in self.parts])
        self._configs: dict[int, Any] = {}
        """Of numbers whose candidates nobody has asked for yet."""
        self._stands: dict[int, int | None] = {}
        self._made: dict[int, Candidate] = {}
        self._numbers: dict[tuple[str, tuple[tuple[str, KnobValue], ...]], int] = {}
        self._outside: list[Candidate] = []
        self._near: dict[int, list[int]] = {}

    # -- numbers and candidates ----------------------------------------------------------------

    def candidate(self, number: int) -> Candidate | None:
        """Return the candidate of a number, None where it is not legal."""
        if number >= self.size:
            return self._outside[number - self.size]
        if number not in self._made:
            if not self.is_legal(number):
                return None
            made = self.space.candidate(self.part(number).name, self._configs.pop(number))
            self._made[number] = made
            self._numbers.setdefault((made.schedule, made.knobs), number)
        return self._made[number]

    def is_legal(self, number: int) -> bool:
        """Say whether a number stands for a candidate, which one number does of those that mean the same."""
        return self.standing(number) == number

    def standing(self, number: int) -> int | None:
        """Return the number that stands for what a number means, None where that is illegal."""
        if number >= self.size or number in self._made:
            return number
        if number not in self._stands:
            part = self.part(number)
            config = part.config(number)
            found = None if config is None else part.standing.setdefault(config, number)
            self._stands[number] = found
            if found == number:
                self._configs[number] = config
        return self._stands[number]

    def number(self, candidate: Candidate) -> int:
        """Return the number of a candidate."""
        name = candidate.schedule, candidate.knobs
        if name not in self._numbers:
            part = self._parts.get(candidate.schedule)
            if part is not None:
                places = part.places(candidate.config)
                known = [p for p in places if p is not None]
                if len(known) == len(places):
                    self.standing(part.number(known))
                found = part.standing.setdefault(
                    self.space.config(candidate), self.size + len(self._outside)
                )
                self._numbers[name] = found
            else:
                self._numbers[name] = self.size + len(self._outside)
            if self._numbers[name] == self.size + len(self._outside):
                self._outside.append(candidate)
        return self._numbers[name]

    def known(self, number: int) -> Candidate:
        """Return the candidate of a legal number."""
        found = self.candidate(number)
        assert found is not None, number
        return found

    def part(self, number: int) -> Part:
        """Return the schedule's part that a number within the knobs' values belongs to."""
        return self.parts[bisect_right(self._starts, number) - 1]

    def parts_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
        """Return the index of each number's part; of those outside, one behind the last."""
        at = np.searchsorted(self._starts, numbers, side="right") - 1
        return np.where(numbers < self.size, at, len(self.parts))

    def legal(self, limit: int) -> list[int] | None:
        """Return all legal numbers, or None when there may be more than ``limit``."""
        if self.size > limit:
            return None
        return [n for n in range(self.size) if self.is_legal(n)]

    # -- moves ---------------------------------------------------------------------------------

    def sample(self, rng: np.random.Generator, count: int, tries: int = 64) -> list[int]:
        """Draw ``count`` legal numbers, repeated ones too; fewer where ``tries`` draws each do not suffice.

        A schedule is drawn by the logarithm of its size, then each knob uniformly.
        """
        out: list[int] = []
        left = tries * count
        while len(out) < count and left > 0:
            several = min(left, count - len(out))
            left -= several
            which, where = rng.random((2, several))
            at = self._shares.searchsorted(which * self._shares[-1], side="right")
            for i, x in zip(at.tolist(), where.tolist(), strict=True):
                number = self._starts[i] + int(x * self.parts[i].space.size)
                if (found := self.standing(number)) is not None:
                    out.append(found)
        return out

    def neighbours(self, number: int) -> list[int]:
        """Return the numbers of the legal candidates that differ in one knob."""
        if number not in self._near:
            base = number if number < self.size else self._inside(number)
            part = self.part(base)
            digits = part.digits(base)
            near = [
                base + (v - digits[i]) * part.strides[i]
                for i in part.open
                for v in range(len(part.values[i]))
                if v != digits[i]
            ]
            found = dict.fromkeys(self.standing(n) for n in near)
            self._near[number] = [n for n in found if n is not None and n != number]
        return self._near[number]

    def mutate(self, number: int, rng: np.random.Generator) -> int | None:
        """Change one knob; values next to the old one in the knob's order are twice as likely.

        None where that gives nothing legal or nothing new.
        """
        if number >= self.size:
            number = self._inside(number)
        part = self.part(number)
        if not part.open:
            return None
        i = part.open[int(rng.random() * len(part.open))]
        old = part.digit(number, i)
        others, shares = _others(len(part.values[i]), old)
        child = number + (others[bisect_right(shares, rng.random())] - old) * part.strides[i]
        found = self.standing(child)
        return found if found != number else None

    def crossover(self, a: int, b: int, rng: np.random.Generator) -> int | None:
        """Take each knob from one of two candidates of the same schedule."""
        a, b = (n if n < self.size else self._inside(n) for n in (a, b))
        part = self.part(a)
        if part is not self.part(b):
            return None
        child, draws = b, rng.random(len(part.strides)).tolist()
        for x, y, stride, draw in zip(
            part.digits(a), part.digits(b), part.strides, draws, strict=True
        ):
            if draw < 0.5:
                child += (x - y) * stride
        return self.standing(child)

    def _inside(self, number: int) -> int:
        """Return the number nearest to one outside the knobs' values; it may be illegal."""
        candidate = self._outside[number - self.size]
        part, config = self._parts[candidate.schedule], candidate.config
        places = zip(part.knobs, part.values, part.places(config), strict=True)
        return part.number(
            [_nearest(v, config.get(knob)) if at is None else at for knob, v, at in places]
        )


def _nearest(values: Sequence[KnobValue], wanted: KnobValue | None) -> int:
    """Return the place of the nearest number, the first place for anything else."""
    if isinstance(wanted, str) or wanted is None:
        return 0
    away = [math.inf if isinstance(v, str) else abs(float(v) - float(wanted)) for v in values]
    return away.index(min(away))


@lru_cache(maxsize=4096)
def _others(size: int, old: int) -> tuple[list[int], list[float]]:
    """Return the other places of a knob with the running sum of their shares, without the last."""
    others = [i for i in range(size) if i != old]
    weights = [2.0 if abs(i - old) == 1 else 1.0 for i in others]
    return others, [s / sum(weights) for s in accumulate(weights)][:-1]
