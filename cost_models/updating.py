"""When is one more energy measurement worth its seconds? Quality of predictions, and the rule for k.

Raw SNR (signal-to-noise ratio) flatters: a constant prediction of energies with 10 % spread scores 20 dB. So
decisions use the *centred* SNR.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CAP_DB = 60.0
"""What perfect predictions score; without a cap they would be infinite."""


def _pair(
    measured: Sequence[float] | npt.NDArray[Any], predicted: Sequence[float] | npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    e, p = np.asarray(measured, np.float64), np.asarray(predicted, np.float64)
    if e.shape != p.shape or e.ndim != 1:
        raise ValueError(f"{e.shape} measured against {p.shape} predicted values")
    if not (np.isfinite(e).all() and np.isfinite(p).all()):
        raise ValueError("values must be finite")
    return e, p


def _db(signal: float, noise: float) -> float:
    if noise <= signal * 10 ** (-CAP_DB / 10):
        return CAP_DB
    return max(-CAP_DB, 10 * math.log10(signal / noise)) if signal > 0 else -CAP_DB


def centred_snr_db(measured: Sequence[float], predicted: Sequence[float]) -> float | None:
    """Return ``10 log10(sum (E - mean E)^2 / sum (E - P)^2)``: 0 dB for the best constant.

    None when it is undefined: fewer than two values, or all measured values equal.
    """
    e, p = _pair(measured, predicted)
    if e.size < 2 or float(np.ptp(e)) <= 1e-12 * float(np.abs(e).max()):
        return None
    return _db(float(((e - e.mean()) ** 2).sum()), float(((e - p) ** 2).sum()))


def pairwise_accuracy(measured: Sequence[float], predicted: Sequence[float]) -> float | None:
    """Return the share of pairs predicted in the right order (ties count half); None without pairs."""
    e, p = _pair(measured, predicted)
    i, j = np.triu_indices(e.size, 1)
    true, guess = np.sign(e[i] - e[j]), np.sign(p[i] - p[j])
    keep = true != 0
    if not keep.any():
        return None
    return float(np.where(guess == 0, 0.5, guess == true)[keep].mean())


@dataclass(slots=True)
class DynamicShare:
    """The share k of latency survivors whose energy is measured in each round.

    Predictions for the very candidates that are measured anyway are compared *before* retraining: bad ones
    raise k by ``step``, good ones lower it, within ``[least, 1]``.
    """

    k: float = 1.0
    least: float = 0.05
    step: float = 0.1
    threshold: float = 1.0
    """Decibels of centred SNR."""
    explore: float = 0.2
    """Share of the measured ones that is drawn at random rather than predicted best."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not (0 < self.least <= 1 and 0 < self.step <= 1 and 0 <= self.explore <= 1):
            raise ValueError("least and step must be in (0, 1], explore in [0, 1]")
        self.k = min(1.0, max(self.least, self.k))

    def count(self, survivors: int) -> int:
        """Return how many of the survivors to measure (at least 1 when there are any)."""
        return min(survivors, math.ceil(self.k * survivors - 1e-9))

    def choose(
        self, predicted: Sequence[float], rng: np.random.Generator, count: int | None = None
    ) -> list[int]:
        """Return the indices to measure: the best predicted, and a random share of the rest.

        ``count``: how many in all (None: what `count` says).
        """
        total = self.count(len(predicted)) if count is None else min(count, len(predicted))
        lucky = math.floor(total * self.explore)
        order = sorted(range(len(predicted)), key=lambda i: (predicted[i], i))
        rest = order[total - lucky :]
        drawn = rng.permutation(len(rest))[:lucky]
        return order[: total - lucky] + [rest[int(i)] for i in drawn]

    def update(self, measured: Sequence[float], predicted: Sequence[float]) -> bool:
        """Adapt k to held-out predictions; return True when the model should be retrained now.

        Where quality is undefined (one value, equal energies) k stays.
        """
        quality = centred_snr_db(measured, predicted)
        if quality is None:
            return False
        poor = quality < self.threshold
        self.k = min(1.0, self.k + self.step) if poor else max(self.least, self.k - self.step)
        return poor
