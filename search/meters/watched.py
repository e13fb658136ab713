"""Energy from a counter with coarse steps, which is watched while the kernel runs.

A GPU refreshes its counter some ten or fifty times a second. The difference of two readings is off by up to
a step at each end, so the counter is read again and again, and what counts is the time between its first and
its last step: power is their difference over that time, energy of a call is power times the time of a call.

::

    prepare (step, idle power) | warm up | window | phase | window | phase | window
                                          ^ states are looked at while the kernel runs

No number comes of windows with too few steps, of a clock that moves, of a device that throttles, warms up
fast or computes for others, of windows that differ, or of a power reading that contradicts the counter.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mimo_compile.search.meters.base import MIN_STEPS, Meter, Reading

MAX_CLOCK = 0.01
"""How far the clock may move in a window, of its value."""
MAX_WARMING_C = 5.0
"""How far the temperature may rise in a window."""
MAX_DISAGREEMENT = 0.1
"""How far the device's own power reading may lie from the counter's."""
STRETCH = 10
"""Times the seconds asked for that windows may take, so that there are two of them with enough steps."""
_SLACK = 1.1
"""Times the seconds of the least steps that a window takes: the step's length was measured, too."""
_SETTLE = 0.1
"""Part at the start of a window that does not count: power rises for a while."""
_STATES = 8
"""States looked at in a window."""

Sample = tuple[float, float]
"""Seconds, millijoules."""


@dataclass(frozen=True, slots=True)
class State:
    """What tells whether a device measures what is asked; None: it does not say."""

    temperature_c: float | None = None
    clock_mhz: float | None = None
    power_w: float | None = None
    processes: int | None = None
    """Processes that compute on the device."""
    throttled: tuple[str, ...] = ()
    """Reasons why it is slower than it would be."""


@runtime_checkable
class Watched(Protocol):
    """A meter that wants to be read while the kernel runs."""

    name: str
    step_s: float
    poll_s: float
    """Seconds between two readings."""
    warm_s: float
    """Seconds that the kernel runs before the first window."""
    max_spread: float
    """Largest standard deviation of windows over their median."""
    idle_w: float | None
    """Power without a kernel, once `prepare` measured it."""

    def prepare(self) -> None:
        """Measure step and idle power, once, while nothing runs. Raises OSError."""
        ...

    def read_mj(self) -> float:
        """Return millijoules since some fixed moment. Raises OSError."""
        ...

    def state(self) -> State:
        """Return the device's state now."""
        ...


def steps(samples: Sequence[Sample]) -> list[Sample]:
    """Return where a counter moved: between which readings, and what it showed then."""
    out = []
    for (t0, before), (t1, after) in itertools.pairwise(samples):
        if after != before:
            out.append(((t0 + t1) / 2, after))
    return out


def step_and_watts(samples: Sequence[Sample]) -> tuple[float, float, int]:
    """Return seconds between steps (median), watts from the first to the last step, and their number.

    Raises:
        ValueError: the counter ran backwards, or moved less than twice.
    """
    if any(not math.isfinite(mj) for _, mj in samples):
        raise ValueError("gives no number")
    moved = steps(samples)
    if any(b < a for (_, a), (_, b) in itertools.pairwise(samples)):
        raise ValueError("ran backwards")
    if len(moved) < 3:
        raise ValueError(f"moved {len(moved)} times only")
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(moved)]
    seconds = moved[-1][0] - moved[0][0]
    return statistics.median(gaps), (moved[-1][1] - moved[0][1]) / seconds / 1e3, len(moved)


def unsound(states: Sequence[State], watts: float) -> str:
    """Say why a window measured something else than one kernel on a steady device ("": it did not)."""
    reasons = sorted({r for s in states for r in s.throttled})
    if reasons:
        return f"the device throttles: {', '.join(reasons)}"
    if any((s.processes or 0) > 1 for s in states):
        return "another process computes on the device"
    clocks = [s.clock_mhz for s in states if s.clock_mhz is not None]
    if clocks and max(clocks) - min(clocks) > MAX_CLOCK * max(clocks):
        return f"the clock moved from {clocks[0]:g} to {clocks[-1]:g} MHz"
    heat = [s.temperature_c for s in states if s.temperature_c is not None]
    if heat and max(heat) - heat[0] > MAX_WARMING_C:
        return f"the temperature rose from {heat[0]:g} to {max(heat):g} °C"
    powers = [s.power_w for s in states if s.power_w is not None]
    if powers and abs(statistics.median(powers) - watts) > MAX_DISAGREEMENT * watts:
        return (
            f"the counter says {watts:.4g} W, the power reading {statistics.median(powers):.4g} W"
        )
    return ""


class _Watch(threading.Thread):
    """Reads a counter, and now and then the device's state, until told to stop."""

    def __init__(self, meter: Watched, seconds: float) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self.states: list[State] = []
        self.error: OSError | None = None
        self._meter = meter
        self._seconds = seconds
        self._stop_it = threading.Event()

    def run(self) -> None:
        begin = time.perf_counter()
        try:
            while not self._stop_it.is_set():
                self.samples.append((time.perf_counter(), self._meter.read_mj()))
                share = (time.perf_counter() - begin) / self._seconds
                if _SETTLE <= share < 1 and share * _STATES > len(self.states):
                    self.states.append(self._meter.state())
                self._stop_it.wait(self._meter.poll_s)
        except OSError as error:
            self.error = error

    def end(self) -> None:
        """Stop, and forget what was read before the power settled."""
        self._stop_it.set()
        self.join()
        if self.error is not None:
            raise self.error
        start = self.samples[0][0] + _SETTLE * self._seconds if self.samples else 0.0
        self.samples = [s for s in self.samples if s[0] >= start]


def _window(
    meter: Watched, spin: Callable[[float], tuple[int, float]], seconds: float
) -> float | str:
    """Return millijoules of a call in one window; a string says why there is no number."""
    watch = _Watch(meter, seconds)
    watch.start()
    try:
        calls, spent = spin(seconds)
    finally:
        watch.end()
    if calls < 1:
        return "the kernel did not run"
    try:
        _, watts, count = step_and_watts(watch.samples)
    except ValueError as error:
        return f"the {meter.name} counter {error}"
    if count < (1 - 2 * _SETTLE) * MIN_STEPS:
        return f"the {meter.name} counter moved {count} times only in a window of {seconds:g} s"
    if reason := unsound(watch.states, watts):
        return reason
    return watts * spent / calls * 1e3


def measure_watched(
    meter: Watched,
    spin: Callable[[float], tuple[int, float]],
    window_s: float,
    repeats: int = 3,
    rng: random.Random | None = None,
) -> Reading:
    """Measure millijoules of one call; arguments as in `measure_energy`.

    Where the steps turn out longer than ``window_s`` allows for, it is stretched to two windows with enough
    of them (one has no spread), up to `STRETCH` times.
    """
    try:
        meter.prepare()
        least = _SLACK * MIN_STEPS * meter.step_s
        asked, window_s = window_s, max(window_s, min(repeats, 2) * least)
        if window_s > STRETCH * asked:
            text = f"a window of {asked:g} s is below {MIN_STEPS} counter steps of {meter.name}"
            return Reading(None, None, asked, f"{text} ({MIN_STEPS * meter.step_s:g} s)")
        repeats = max(1, min(repeats, math.floor(window_s / least + 1e-9)))
        if spin(meter.warm_s)[0] < 1:
            return Reading(None, None, window_s, "the kernel did not run")
        return _windows(meter, spin, window_s, repeats, rng or random.Random())
    except OSError as error:
        text = f"the {meter.name} counter cannot be read: {error}"
        return Reading(None, None, window_s, text)


def _windows(
    meter: Watched,
    spin: Callable[[float], tuple[int, float]],
    window_s: float,
    repeats: int,
    rng: random.Random,
) -> Reading:
    energies: list[float] = []
    for attempt in range(2):  # windows that differ get as many more, once
        for _ in range(repeats):
            spin(rng.random() * meter.step_s)  # another phase of the sensor, without growing cold
            window = _window(meter, spin, window_s / repeats)
            if isinstance(window, str):
                return Reading(None, None, window_s, window)
            energies.append(window)
        energy = statistics.median(energies)
        spread = statistics.stdev(energies) if len(energies) > 1 else None
        if spread is None or spread <= meter.max_spread * energy:
            return Reading(energy, spread, window_s * (attempt + 1))
    text = f"its windows differ by {100 * (spread or 0.0) / energy:.2g} %"
    return Reading(None, None, 2 * window_s, f"{text}, more than {100 * meter.max_spread:g} %")


def watched(meter: Meter) -> Watched | None:
    """Return the meter if it wants to be watched."""
    return meter if isinstance(meter, Watched) else None
