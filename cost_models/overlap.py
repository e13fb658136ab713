"""Energy by what a candidate is made of: a Gaussian process over words that candidates have in common.

A word is an algorithm, a knob and its value. The kernel is ``a + b c + d (exp(3 (c - 1)) - exp(-3))`` with
the share c of common words: a mean, effects of single values, and of values together. Tens of readings
suffice, where trees need hundreds; and unlike trees it says how little it knows of a value that was hardly
ever read.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]

MEAN = 1.0
"""Variance of the mean: nothing is assumed of it."""
SINGLE = (0.003, 0.03, 0.3)
"""Variances tried of the effects of single values, all knobs together."""
JOINT = (0.0, 0.003, 0.03)
"""Of the effects of values together."""
NOISE = (0.002, 0.008, 0.03)
"""Standard deviations tried of a reading, as parts of it."""
MOST = 256
"""Latest readings that are used."""


class OverlapModel:
    """Predicts a logarithm from sets of words; variances are chosen by the likelihood of the readings."""

    def __init__(self) -> None:
        """Start with nothing known."""
        self._columns: dict[Hashable, int] = {}
        self._train: Floats = np.zeros((0, 0))
        self._sizes: Floats = np.zeros(0)
        self._chosen = (SINGLE[1], JOINT[1], NOISE[1])
        self._alpha: Floats = np.zeros(0)
        self._lower: Floats = np.zeros((0, 0))
        self._centre = 0.0

    def _rows(self, words: Sequence[Collection[Hashable]]) -> Floats:
        rows = np.zeros((len(words), len(self._columns)))
        for i, some in enumerate(words):
            for word in some:
                if (at := self._columns.get(word)) is not None:
                    rows[i, at] = 1.0
        return rows

    def _common(self, rows: Floats, sizes: Floats) -> Floats:
        """Return the share of common words: ``[rows] x [readings]``."""
        largest = np.maximum(sizes[:, None], self._sizes[None, :])
        return (rows @ self._train.T) / np.maximum(largest, 1.0)

    @staticmethod
    def _kernel(common: Floats, single: float, joint: float) -> Floats:
        together: Floats = np.exp(3.0 * (common - 1.0)) - np.exp(-3.0)
        return MEAN + single * common + joint * together

    def fit(self, words: Sequence[Collection[Hashable]], values: Sequence[float]) -> None:
        """Learn ``values[i]`` of the candidate made of ``words[i]``; the latest come last."""
        words, values = words[-MOST:], values[-MOST:]
        every = sorted({w for some in words for w in some}, key=repr)
        self._columns = {w: i for i, w in enumerate(every)}
        self._train = self._rows(words)
        self._sizes = np.array([len(some) for some in words], float)
        self._centre = float(np.median(values))
        y = np.asarray(values, float) - self._centre
        common = self._common(self._train, self._sizes)
        best = -np.inf
        for single, joint, noise in itertools.product(SINGLE, JOINT, NOISE):
            k = self._kernel(common, single, joint) + noise**2 * np.eye(len(y))
            lower = np.linalg.cholesky(k)
            half = np.linalg.solve(lower, y)
            likelihood = -0.5 * float(half @ half) - float(np.log(np.diag(lower)).sum())
            if likelihood > best:
                best, self._chosen, self._lower = likelihood, (single, joint, noise), lower
                self._alpha = np.linalg.solve(lower.T, half)

    def predict(self, words: Sequence[Collection[Hashable]]) -> tuple[Floats, Floats]:
        """Return the mean, and the standard deviation of a reading, of each candidate."""
        single, joint, noise = self._chosen
        sizes = np.array([len(some) for some in words], float)
        k = self._kernel(self._common(self._rows(words), sizes), single, joint)
        alone = MEAN + single + joint * (1.0 - np.exp(-3.0)) + noise**2
        half = np.linalg.solve(self._lower, k.T)
        variance = np.maximum(alone - (half**2).sum(0), noise**2)
        return self._centre + k @ self._alpha, np.sqrt(variance)
