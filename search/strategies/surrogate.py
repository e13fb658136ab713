"""A Gaussian process over the knobs of a joint space: what few trials say of the rest, and how surely.

Distances are per knob: numbers by their logarithm, scaled to the range that the space offers; names, and
knobs that only one of two algorithms has, are equal or not. With ``d_j`` these distances the covariance is

    a * exp(-sum_j w_j d_j)  +  b / J * sum_j exp(-2 d_j)  +  noise

the first term for what knobs do together, the second for what each does by itself, whatever the others are,
so that one algorithm learns from another. Weights are fitted to the marginal likelihood with a prior
(Rasmussen and Williams 2006, chapter 5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.schedules.base import KnobValue
from mimo_compile.search.space import Candidate, JointSpace

Array = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.intp]
_CLIP = 0.5
"""Logarithms above the best from where on scores count as equally bad, nearly."""
_REFIT = 1.25
"""Growth of the number of observations after which weights are fitted again."""
_DECAY = 2.0
"""How fast what a knob does by itself changes over its range."""


class Encoder:
    """Turns candidates into rows of small integers: a column for each knob, one for the schedule."""

    def __init__(self, space: JointSpace) -> None:
        """Read the values that the space offers."""
        values: dict[str, set[KnobValue]] = {}
        for knobs in (s.knobs for s in space.spaces.values()):
            for name, offered in knobs.items():
                values.setdefault(name, set()).update(offered)
        self.names = [n for n, v in values.items() if len(v) > 1]
        self._codes: list[dict[Any, int]] = []
        self.tables: list[Array] = []
        """Of each column, the distances ``[codes, codes]``; the last code stands for absent."""
        for name in self.names:
            known = sorted(values[name], key=lambda v: (str(type(v)), v))
            self._codes.append({(type(v), v): i for i, v in enumerate(known)})
            self.tables.append(_distances(known))
        self._schedules = {n: i for i, n in enumerate(space.spaces)}
        self.tables.append(1.0 - np.eye(len(self._schedules) + 1))
        self._rows: dict[str, list[int]] = {}

    def rows(self, candidates: Sequence[Candidate]) -> Rows:
        """Return ``[candidates, columns]``; rows once made are kept."""
        known = self._rows
        for c in candidates:
            if c.key not in known:
                config = c.config
                known[c.key] = [
                    codes.get((type(config[n]), config[n]), len(codes))
                    if n in config
                    else len(codes)
                    for n, codes in zip(self.names, self._codes, strict=True)
                ] + [self._schedules.get(c.schedule, len(self._schedules))]
        out: Rows = np.array([known[c.key] for c in candidates], dtype=np.intp)
        return out.reshape(len(candidates), len(self.tables))


def _distances(values: Sequence[KnobValue]) -> Array:
    """Return distances of a knob's values, in order, and of its absence."""
    out = 1.0 - np.eye(len(values) + 1)
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        logs = np.array([math.copysign(math.log2(1.0 + abs(float(v))), float(v)) for v in values])
        out[:-1, :-1] = np.abs(logs[:, None] - logs[None, :]) / np.ptp(logs)
    return out


class Surrogate:
    """The process; `fit`, then `predict` and `shared`."""

    def __init__(self, tables: Sequence[Array]) -> None:
        """Start with the prior's weights; ``tables``: distances of each column's codes."""
        self.tables = tables
        self._alone = [np.exp(-_DECAY * t) / len(tables) for t in tables]
        columns = len(tables)
        self._start = np.concatenate([np.zeros(columns), np.log([0.15, 0.15, 0.003])])
        self._spread = np.concatenate([np.full(columns, 1.2), [1.0, 1.0, 1.0]])
        self.theta = self._start.copy()
        self._fitted = 0

    @property
    def noise(self) -> float:
        """Variance of a measurement."""
        return math.exp(self.theta[-1]) + 1e-6

    def fit(self, rows: Rows, y: Array, told: int | None = None) -> None:
        """Condition on ``y [n]`` at ``rows [n, columns]``.

        ``told``: observations that there are in all, of which these are some (None: these are all).
        Weights are fitted again as their number grows.
        """
        told = len(y) if told is None else told
        self._rows, self._mean = rows, float(np.median(y))
        target = y - self._mean
        if told >= max(6, _REFIT * self._fitted):
            self._tune(target)
            self._fitted = told
        k = self._covariance(rows, rows)
        k[np.diag_indices(len(y))] += self.noise
        self._low = np.linalg.cholesky(k)
        self._alpha = _solve(self._low, target)

    def _covariance(self, a: Rows, b: Rows) -> Array:
        """Return the covariance ``[rows of a, rows of b]``."""
        w, (together, alone, _) = self._weights(self.theta)
        far = np.zeros((len(a), len(b)))
        each = np.zeros((len(a), len(b)))
        for j, (t, e) in enumerate(zip(self.tables, self._alone, strict=True)):
            far += (-w[j] * t)[a[:, j]][:, b[:, j]]
            each += e[a[:, j]][:, b[:, j]]
        return np.asarray(together * np.exp(far) + alone * each)

    def _weights(self, theta: Array) -> tuple[Array, Array]:
        columns = len(self.tables)
        return np.exp(theta[:columns]), np.exp(theta[columns:])

    def _tune(self, target: Array) -> None:
        """Fit the weights from where they are."""
        from scipy.optimize import minimize

        found = minimize(
            self.loss_of(target), self.theta, jac=True, method="L-BFGS-B",
            bounds=[(s - 4, s + 4) for s in self._start], options={"maxiter": 12},
        )  # fmt: skip
        self.theta = np.asarray(found.x)

    def loss_of(self, target: Array) -> Any:
        """Return the negative log posterior density of the weights, with its gradient, as a function."""
        rows, n, columns = self._rows, len(target), len(self.tables)
        gaps = np.array([t[rows[:, j]][:, rows[:, j]] for j, t in enumerate(self.tables)])
        shape = sum(e[rows[:, j]][:, rows[:, j]] for j, e in enumerate(self._alone))
        flat = gaps.reshape(columns, -1)

        def loss(theta: Array) -> tuple[float, Array]:
            w, (a, b, noise) = self._weights(theta)
            together = a * np.exp(-(w @ flat)).reshape(n, n)
            k = together + b * shape
            k[np.diag_indices(n)] += noise + 1e-6
            try:
                low = np.linalg.cholesky(k)
            except np.linalg.LinAlgError:
                return 1e10, np.zeros_like(theta)
            inverse = _solve(low, np.eye(n))
            alpha = inverse @ target
            pull = (theta - self._start) / self._spread
            value = 0.5 * float(target @ alpha) + float(np.log(np.diag(low)).sum())
            g = 0.5 * (inverse - np.outer(alpha, alpha))
            gt = g * together
            own = [gt.sum(), b * (g * shape).sum(), noise * np.trace(g)]
            grad = np.concatenate([-w * (flat @ gt.reshape(-1)), own])
            return value + 0.5 * float(pull @ pull), grad + pull / self._spread

        return loss

    def predict(self, rows: Rows) -> tuple[Array, Array, Array]:
        """Return mean and variance of ``[m]`` candidates, and ``[n, m]`` for `shared`."""
        k = self._covariance(self._rows, rows)
        half = _half(self._low, k)
        a, b, _ = np.exp(self.theta[len(self.tables) :])
        variance = a + b - np.einsum("ij,ij->j", half, half)
        return self._mean + k.T @ self._alpha, np.maximum(variance, 1e-9), half

    def shared(self, rows: Rows, at: int, half: Array) -> Array:
        """Return the posterior covariance ``[m]`` of predicted candidates with the one at ``at``."""
        k = self._covariance(rows[at : at + 1], rows)[0]
        return np.asarray(k - half[:, at] @ half)


def _solve(low: Array, right: Array) -> Array:
    from scipy.linalg import cho_solve

    return np.asarray(cho_solve((low, True), right, check_finite=False))


def _half(low: Array, right: Array) -> Array:
    from scipy.linalg import solve_triangular

    return np.asarray(solve_triangular(low, right, lower=True, check_finite=False))


def flattened(scores: Sequence[float]) -> Array:
    """Return logarithms of scores over the least, those far above it pressed together.

    How slow a bad candidate is says nothing about the good ones.
    """
    y = np.log(np.asarray(scores) / min(scores))
    far = np.maximum(y - _CLIP, 0.0)
    return np.asarray(np.minimum(y, _CLIP) + 0.25 * np.log1p(far))


def expected_gain(mean: Array, deviation: Array, best: float) -> Array:
    """Return the expected improvement on ``best`` (smaller is better)."""
    from scipy.special import ndtr

    z = (best - mean) / deviation
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return np.asarray(deviation * (z * ndtr(z) + density))
