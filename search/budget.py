"""How long to search, and which workload gets the next round."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mimo_compile.errors import UsageError
from mimo_compile.search.meters.base import Meter

RECENT = 16
"""Candidates by whose joules those of the next are judged."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of a search; None means no such limit. The first that is reached ends it.

    Raises:
        UsageError: a limit is not positive.
    """

    trials: int | None = None
    """Measured candidates over all workloads, records of earlier runs included."""
    seconds: float | None = None
    joules: float | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("trials", "seconds", "joules"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"a budget of {value} {name} is not positive")


class Clock:
    """Tells which limit of a budget is reached; monotonic time, joules by the meter."""

    def __init__(
        self, budget: Budget, meter: Meter | None, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Start counting.

        Raises:
            UsageError: a budget in joules without a meter.
        """
        if budget.joules is not None and meter is None:
            raise UsageError(
                "a budget in joules needs a meter, and none works here",
                remedy="give --trials or --time; `mimo-compile targets` says which meters work and why not",
            )
        self.budget = budget
        self._now = now
        self._meter = meter
        self._start = now()
        self._first_mj = self._read()
        self._last = 0.0
        self._first_step: float | None = None
        """Joules of the very first candidate, with which children started."""
        self._steps: deque[float] = deque(maxlen=RECENT)

    def _read(self) -> float | None:
        if self._meter is None:
            return None
        try:
            return self._meter.read_mj()
        except OSError:
            return None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._now() - self._start

    @property
    def joules(self) -> float | None:
        """Joules the device used since the start, None without a meter."""
        last = self._read()
        return None if last is None or self._first_mj is None else (last - self._first_mj) / 1000

    @property
    def _step(self) -> float:
        """Joules that a candidate may cost: as the very first one only as long as there is no other."""
        return max(self._steps, default=self._first_step or 0.0)

    def note(self, count: int = 1) -> None:
        """Take in that candidates were measured: the costliest lately says what the next may cost.

        ``count``: how many since the last time, where they were measured in turns.
        """
        if self.budget.joules is not None and (joules := self.joules) is not None:
            step, self._last = (joules - self._last) / count, joules
            if self._first_step is None:
                self._first_step = step
            else:
                self._steps.append(step)

    def affords(self, count: int = 1) -> bool:
        """Say whether so many further candidates fit the limits of time and joules.

        Joules as if each cost what the costliest one lately did. Time is over when it is over: a candidate
        takes little of it.
        """
        b = self.budget
        if b.seconds is not None and self.seconds > b.seconds:
            return False
        if b.joules is None or (joules := self.joules) is None:
            return True
        return joules + count * self._step <= b.joules

    def reached(self, trials: int, reserve_s: float = 0.0) -> str:
        """Return the name of the limit that is reached, or "".

        ``reserve_s`` of the time limit are kept for later, at most a quarter of it, and likewise of joules
        what was used in as much time. Joules are reached where the next candidate may pass them.
        """
        b = self.budget
        if b.trials is not None and trials >= b.trials:
            return "trials"
        if b.seconds is not None and self.seconds >= b.seconds - min(reserve_s, b.seconds / 4):
            return "seconds"
        if b.joules is not None and (joules := self.joules) is not None:
            kept = min(reserve_s * joules / max(self.seconds, 1e-3), b.joules / 4)
            if joules + max(kept, self._step) >= b.joules:
                return "joules"
        return ""


@dataclass(slots=True)
class Share:
    """What the split of the budget knows of one workload."""

    weight: float
    """Calls of the kernel in one run of the model."""
    floor_us: float
    """What no kernel can beat (roofline of the necessary work); 0 when unknown."""
    best_us: float = math.inf
    best_score: float = math.inf
    """By the objective, where that is not the time."""
    trials: int = 0
    rounds: int = 0
    recent: float = 0.0
    """Smoothed relative improvement of its last rounds."""
    heavy: bool = False
    """True when it matters enough to be looked at before any other gets a second round."""
    stale: int = 0
    """Rounds in a row that improved it by less than 1 %."""
    exhausted: bool = False
    history: list[tuple[int, float]] = field(default_factory=list)
    """(trials, best microseconds) after each round."""

    def learn(self, trials: int, best_us: float, best_score: float | None = None) -> None:
        """Take in a round of ``trials`` that ended with ``best_us``.

        ``best_score``: the best by an objective that is not the time; then it says what was gained. One that
        is worse than before (joules were modelled until a meter gave some) starts anew.
        """
        then, now = (self.best_us, best_us) if best_score is None else (self.best_score, best_score)
        gain = max(0.0, 1 - now / then) if math.isfinite(now) and math.isfinite(then) else 0.0
        first = not math.isfinite(then) or (best_score is not None and now > then)
        if best_score is not None:
            self.best_score = best_score
        self.stale = 0 if gain >= 0.01 or first else self.stale + 1
        self.recent = gain if self.rounds < 2 else 0.5 * self.recent + 0.5 * gain
        self.best_us = min(self.best_us, best_us)
        self.trials += trials
        self.rounds += 1
        self.history.append((self.trials, self.best_us))

    def expected_gain_us(self) -> float:
        """Return microseconds of one model run that the next round may save.

        Before the first round it is infinite for a heavy workload; for others the default is taken to
        be three times the roofline.

        Half from what its last rounds brought, half from its distance to the roofline, which each
        further round makes less believable (the idea of Ansor's gradient task scheduler).
        """
        if self.exhausted:
            return -1.0
        if not math.isfinite(self.best_us):
            if self.heavy and self.rounds == 0:
                return math.inf
            guess = 3.0 * max(self.floor_us, 1.0)
            return self.weight * guess * 0.9 / (1 + self.rounds) ** 2
        room = min(0.9, max(0.05, 1 - self.floor_us / self.best_us))
        return self.weight * self.best_us * (0.5 * self.recent + 0.5 * room / (1 + self.rounds))


def patience(space_size: int, batch: int) -> int:
    """Return the rounds without an improvement of 1 % after which a workload counts as done.

    As many as cover a twentieth of the space, at least 32 and at most 128 candidates: in a large space a few
    rounds without luck say little.
    """
    return math.ceil(max(32.0, min(128.0, 0.05 * space_size)) / batch)


def mark_heavy(shares: Sequence[Share], part: float = 0.01) -> None:
    """Mark the workloads that hold at least ``part`` of all roofline time."""
    times = [s.weight * max(s.floor_us, 1.0) for s in shares]
    for share, time_us in zip(shares, times, strict=True):
        share.heavy = time_us >= part * sum(times)


def next_share(shares: Sequence[Share]) -> int | None:
    """Return the index of the workload that gets the next round, None when all are exhausted."""
    open_ones = [i for i, s in enumerate(shares) if not s.exhausted]
    if not open_ones:
        return None
    return max(
        open_ones,
        key=lambda i: (shares[i].expected_gain_us(), shares[i].weight * shares[i].floor_us, -i),
    )
