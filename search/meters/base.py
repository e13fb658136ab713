"""What a joules meter is, and how energy of one kernel call is taken with it.

A meter is a counter that only grows. A kernel is called for a window of seconds; the counter's difference
over the calls is its energy. Windows shorter than 20 steps of the counter are refused (of a meter that is
watched: stretched), and so are counters that stand still or run backwards: energy is then absent, never 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

MIN_STEPS = 20
"""A window must span this many refreshes of the counter."""


class Meter(Protocol):
    """A cumulative energy counter.

    A class that is found by its name, in `meters.METERS` or through an entry point, is made without
    arguments (OSError says why it cannot be used here) and has two members more: ``measures``, a tuple of
    hardware kinds (``cpu``, ``cuda``), and ``reads``, which says in words what it reads.
    """

    name: str
    """Stored with each reading, and what ``--meter`` calls it: ``nvml``, ``rapl``, ``replay``."""
    step_s: float
    """Seconds between refreshes of the counter."""

    def read_mj(self) -> float:
        """Return millijoules since some fixed moment. Raises OSError when the counter cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class Available:
    """A meter that may be used here, or why it may not."""

    name: str
    usable: bool
    reason: str
    """What it reads, or why it cannot."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Energy of one call; ``energy_mj`` is None with a reason when it could not be taken."""

    energy_mj: float | None
    spread_mj: float | None
    window_s: float
    reason: str = ""


def measure_energy(
    meter: Meter, spin: Callable[[float], tuple[int, float]], window_s: float, repeats: int = 3
) -> Reading:
    """Measure millijoules of one call.

    Args:
        meter: The counter.
        spin: Calls the kernel for that many seconds; returns calls and exact seconds (0 calls: it failed).
        window_s: Seconds in all, divided among the repeats; at least `MIN_STEPS` counter steps for each.
        repeats: Windows; their standard deviation is the spread.

    Meters with coarse steps are read while the kernel runs (`watched.Watched`), and longer if they need it;
    the reading's ``window_s`` says how long.
    """
    from mimo_compile.search.meters.watched import measure_watched, watched

    if (one := watched(meter)) is not None:
        return measure_watched(one, spin, window_s, repeats)
    least = MIN_STEPS * meter.step_s
    repeats = max(1, min(repeats, math.floor(window_s / least + 1e-9)))
    if window_s + 1e-9 < least:
        text = f"a window of {window_s:g} s is below {MIN_STEPS} counter steps of {meter.name} ({least:g} s)"
        return Reading(None, None, window_s, text)
    values = []
    for _ in range(repeats):
        try:
            before = meter.read_mj()
            calls, _ = spin(window_s / repeats)
            after = meter.read_mj()
        except OSError as error:
            return Reading(
                None, None, window_s, f"the {meter.name} counter cannot be read: {error}"
            )
        if calls < 1:
            return Reading(None, None, window_s, "the kernel did not run")
        if not (math.isfinite(after - before) and after > before):
            return Reading(None, None, window_s, f"the {meter.name} counter did not advance")
        values.append((after - before) / calls)
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Reading(statistics.median(values), spread, window_s)
