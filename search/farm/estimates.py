"""How long actions take, learned from those that have ended: by kind and label, and by units.

The time on u units is taken as T(u) = T(1) * (1 - p + p / u): a part p of the work is shared (Amdahl). Where
times on two or more numbers of units are known, p is fitted to them; else it is what the action says.
"""

from __future__ import annotations

from collections.abc import Mapping

UNKNOWN_S = 1.0
"""Seconds of an action of a kind that never ran."""


class Estimates:
    """Smoothed durations; see the module."""

    def __init__(self, rate: float = 0.3) -> None:
        """Start with nothing known; ``rate`` is the weight of the newest observation."""
        self._rate = rate
        self._times: dict[tuple[str, str], dict[int, float]] = {}
        """By kind and label, seconds by units; label ``""`` stands for all of a kind."""

    def learn(self, kind: str, label: str, parallel: float, units: int, seconds: float) -> None:
        """Take in a duration. Unit: seconds."""
        self._note((kind, label), units, seconds)
        if label:
            self._note((kind, ""), 1, seconds / _share(parallel, units))

    def _note(self, key: tuple[str, str], units: int, seconds: float) -> None:
        times = self._times.setdefault(key, {})
        old = times.get(units)
        times[units] = seconds if old is None else old + self._rate * (seconds - old)

    def known(self, kind: str, label: str) -> bool:
        """Say whether an action of this kind and label has ended before."""
        return (kind, label) in self._times

    def seconds(self, kind: str, label: str, parallel: float, units: int) -> float:
        """Return the estimated seconds on so many units."""
        times = self._times.get((kind, label)) or self._times.get((kind, ""))
        if times is None:
            return UNKNOWN_S * _share(parallel, units)
        whole, part = _fit(times, parallel)
        return whole * _share(part, units)

    def gain(self, kind: str, label: str, parallel: float, units: int) -> float:
        """Return the seconds that one more unit saves; 0 for what never ran."""
        if not self.known(kind, label):
            return 0.0
        now = self.seconds(kind, label, parallel, units)
        return now - self.seconds(kind, label, parallel, units + 1)


def _share(parallel: float, units: int) -> float:
    return 1.0 - parallel + parallel / units


def _fit(times: Mapping[int, float], parallel: float) -> tuple[float, float]:
    """Return the seconds on one unit and the part that is shared."""
    n = len(times)
    if n > 1:  # least squares of a + b / u
        xs, ys = [1.0 / u for u in times], list(times.values())
        mx, my = sum(xs) / n, sum(ys) / n
        spread = sum((x - mx) ** 2 for x in xs)
        b = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / spread
        whole = my + b * (1.0 - mx)
        if whole > 0:
            part = min(1.0, max(0.0, b / whole))
            scale = sum(ys) / sum(whole * _share(part, u) for u in times)
            return whole * scale, part
    at, seconds = next(iter(times.items()))
    return seconds / _share(parallel, at), parallel
