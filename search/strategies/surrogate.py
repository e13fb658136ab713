"""A Gaussian process over the knobs of a joint space: what few trials say of the rest, and how surely.

Distances are per knob: numbers by their logarithm, scaled to the range that the space offers; names, and
knobs that only one of two algorithms has, are equal or not. With ``d_j`` these distances the covariance is

    a * exp(-sum_j w_j d_j)  +  b / J * sum_j exp(-2 d_j)  +  noise

the first term for what knobs do together, the second for what each does by itself, whatever the others are,
so that one algorithm learns from another. Weights are fitted to the marginal likelihood with a prior
(Rasmussen and Williams 2006, chapter 5).

What a model of other shapes foretells is an external drift (kriging's term; Goovaerts 1997, section 6.1): a
linear trend under the process, with a slope that is nearly one and not known for sure.

A knob has few values, so a candidate is a row of marks, one for each knob, and the sums over knobs are matrix
products with these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.schedules.base import KnobValue
from mimo_compile.search.grid import Grid, Part

Array = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.intp]
_CLIP = 0.5
"""Logarithms above the best from where on scores count as equally bad, nearly."""
_REFIT = 1.25
"""Growth of the number of observations after which weights are fitted again."""
_SLOPE, _SLOPE_VARIANCE = 0.8, 0.1
"""Of the drift, before anything is known."""
_DECAY = 2.0
"""How fast what a knob does by itself changes over its range."""


class Encoder:
    """Turns candidates into rows of small integers: a column for each knob, one for the schedule."""

    def __init__(self, grid: Grid) -> None:
        """Read the values that the space offers."""
        self.grid = grid
        # by type too: False of one algorithm is not 0 of another
        values: dict[str, dict[tuple[type, KnobValue], KnobValue]] = {}
        for part in grid.parts:
            for name, offered in zip(part.knobs, part.values, strict=True):
                values.setdefault(name, {}).update({(type(v), v): v for v in offered})
        self.names = [n for n, v in values.items() if len(v) > 1]
        self._codes: list[dict[Any, int]] = []
        self.tables: list[Array] = []
        """Of each column, the distances ``[codes, codes]``; the last code stands for absent."""
        for name in self.names:
            known = sorted(values[name].values(), key=lambda v: (str(type(v)), v))
            self._codes.append({(type(v), v): i for i, v in enumerate(known)})
            self.tables.append(_distances(known))
        self.tables.append(1.0 - np.eye(len(grid.parts) + 1))
        self._of_parts = [self._columns(p) for p in grid.parts]

    def _columns(self, part: Part) -> list[tuple[int, int, Rows]]:
        """Return (numbers between two values, values, code of each value) for each knob's column."""
        out = []
        for name, codes in zip(self.names, self._codes, strict=True):
            if name in part.knobs:
                i = part.knobs.index(name)
                stride, values = part.strides[i], part.values[i]
            else:  # the same for all
                stride, values = 1, tuple(part.fixed[name] for _ in range(name in part.fixed))
            found = [codes.get((type(v), v), len(codes)) for v in values] or [len(codes)]
            out.append((stride, len(found), np.array(found, dtype=np.intp)))
        return out

    def rows(self, numbers: Sequence[int]) -> Rows:
        """Return ``[numbers, columns]``."""
        known = np.array(numbers, dtype=np.int64)
        out = np.empty((len(known), len(self.tables)), dtype=np.intp)
        out[:, -1] = part_of = self.grid.parts_of(known)
        for i, (part, columns) in enumerate(zip(self.grid.parts, self._of_parts, strict=True)):
            mine = np.flatnonzero(part_of == i)
            if len(mine):
                rest = known[mine] - part.start
                for j, (stride, count, codes) in enumerate(columns):
                    out[mine, j] = codes[rest // stride % count] if count > 1 else codes[0]
        names = [p.name for p in self.grid.parts]
        for i in np.flatnonzero(part_of == len(names)).tolist():
            outside = self.grid.known(int(known[i]))
            out[i, :-1] = self._row(outside.config)
            if outside.schedule in names:
                out[i, -1] = names.index(outside.schedule)
        return out

    def _row(self, config: Mapping[str, KnobValue]) -> list[int]:
        return [
            codes.get((type(config[n]), config[n]), len(codes)) if n in config else len(codes)
            for n, codes in zip(self.names, self._codes, strict=True)
        ]


def _distances(values: Sequence[KnobValue]) -> Array:
    """Return distances of a knob's values, in order, and of its absence."""
    out = 1.0 - np.eye(len(values) + 1)
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        logs = np.array([math.copysign(math.log2(1.0 + abs(float(v))), float(v)) for v in values])
        if (span := np.ptp(logs)) > 0:
            out[:-1, :-1] = np.abs(logs[:, None] - logs[None, :]) / span
    return out


@dataclass(frozen=True, slots=True)
class Posterior:
    """What a process says of ``m`` candidates, given ``n`` observations."""

    mean: Array
    variance: Array
    _half: Array
    """``[n, m]``"""
    _marks: Array
    _rows: Rows
    _drift: Array
    _process: Surrogate

    def shared(self, at: int) -> Array:
        """Return the posterior covariance ``[m]`` of all with the one at ``at``."""
        k = self._process.covariance(self._rows[at : at + 1], self._marks)[0]
        k += _SLOPE_VARIANCE * self._drift[at] * self._drift
        return np.asarray(k - self._half[:, at] @ self._half)


class Surrogate:
    """The process; `fit`, then `predict`."""

    def __init__(self, tables: Sequence[Array]) -> None:
        """Start with the prior's weights; ``tables``: distances of each column's codes."""
        self.tables = tables
        self._alone = [np.exp(-_DECAY * t) / len(tables) for t in tables]
        self._first = np.cumsum([0] + [len(t) for t in tables])
        """Where each column's marks begin."""
        columns = len(tables)
        self._start = np.concatenate([np.zeros(columns), np.log([0.15, 0.15, 0.003])])
        self._spread = np.concatenate([np.full(columns, 1.2), [1.0, 1.0, 1.0]])
        self.theta = self._start.copy()
        self._fitted = 0

    @property
    def noise(self) -> float:
        """Variance of a measurement."""
        return math.exp(self.theta[-1]) + 1e-6

    def fit(
        self, rows: Rows, y: Array, drift: Array | None = None, told: int | None = None
    ) -> None:
        """Condition on ``y [n]`` at ``rows [n, columns]``.

        Args:
            rows: Candidates.
            y: Their scores, flattened.
            drift: ``[n]``, what was foretold of them on y's scale; None: nothing was.
            told: Observations that there are in all, of which these are some (None: these are all).
                Weights are fitted again as their number grows.
        """
        told = len(y) if told is None else told
        self._rows, self._mean = rows, float(np.median(y))
        drift = np.zeros(len(y)) if drift is None else drift
        self._middle = float(np.median(drift))
        self._drift = drift - self._middle
        target = y - self._mean - _SLOPE * self._drift
        if told >= max(6, _REFIT * self._fitted):
            self._tune(target)
            self._fitted = told
        k = self.covariance(rows, self.marks(rows)) + self._trend(self._drift)
        k[np.diag_indices(len(y))] += self.noise
        self._low = np.linalg.cholesky(k)
        self._alpha = _solve(self._low, target)

    def marks(self, rows: Rows) -> Array:
        """Return ``[codes of all columns, rows]``: 1 for the codes of each row."""
        out = np.zeros((int(self._first[-1]), len(rows)))
        out[rows + self._first[:-1], np.arange(len(rows))[:, None]] = 1.0
        return out

    def covariance(self, rows: Rows, marks: Array) -> Array:
        """Return the covariance ``[rows, rows of the marks]``."""
        w, (together, alone, _) = self._weights(self.theta)
        n = len(rows)
        left = np.empty((2 * n, int(self._first[-1])))
        for j, (t, e) in enumerate(zip(self.tables, self._alone, strict=True)):
            here = slice(self._first[j], self._first[j + 1])
            left[:n, here] = (-w[j] * t)[rows[:, j]]
            left[n:, here] = (alone * e)[rows[:, j]]
        out = left @ marks
        far, each = out[:n], out[n:]
        np.exp(far, out=far)
        far *= together
        far += each
        return np.asarray(far)

    def _trend(self, drift: Array) -> Array:
        """Return the covariance ``[n, m]`` with the observed that the slope's uncertainty adds."""
        return _SLOPE_VARIANCE * np.outer(self._drift, drift)

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
        """Return the negative log posterior density of the weights, with its gradient, as a function.

        Matrices are symmetric: only pairs below the diagonal are computed, where no distance is 0 by itself.
        """
        from scipy.linalg import lapack

        rows, n = self._rows, len(target)
        down, across = np.tril_indices(n, -1)
        gaps = np.array([t[rows[down, j], rows[across, j]] for j, t in enumerate(self.tables)])
        shape = np.zeros(len(down))
        for j, e in enumerate(self._alone):
            shape += e[rows[down, j], rows[across, j]]
        diagonal = np.diag_indices(n)
        trend = self._trend(self._drift)

        def loss(theta: Array) -> tuple[float, Array]:
            w, (a, b, noise) = self._weights(theta)
            together = a * np.exp(-(w @ gaps))
            k = np.zeros((n, n), order="F")
            k[down, across] = together + b * shape + trend[down, across]
            k[diagonal] = a + b + noise + 1e-6 + trend[diagonal]
            low, failed = lapack.dpotrf(k, lower=1, clean=0, overwrite_a=1)
            if failed:
                return 1e10, np.zeros_like(theta)
            half = float(np.log(np.diag(low)).sum())
            inverse, _ = lapack.dpotri(low, lower=1, overwrite_c=1)
            below, own = inverse[down, across], np.diag(inverse)
            alpha = own * target
            alpha += np.bincount(down, below * target[across], n)
            alpha += np.bincount(across, below * target[down], n)
            pull = (theta - self._start) / self._spread
            g = below - alpha[down] * alpha[across]
            gt = g * together
            trace = 0.5 * float((own - alpha * alpha).sum())
            rest = [gt.sum() + a * trace, b * (g @ shape + trace), noise * trace]
            grad = np.concatenate([-w * (gaps @ gt), rest])
            value = 0.5 * float(target @ alpha) + half + 0.5 * float(pull @ pull)
            return value, grad + pull / self._spread

        return loss

    def predict(self, rows: Rows, drift: Array | None = None) -> Posterior:
        """Return what is known of ``[m]`` candidates; ``drift [m]`` as in `fit`."""
        marks = self.marks(rows)
        drift = np.zeros(len(rows)) if drift is None else drift - self._middle
        k = self.covariance(self._rows, marks) + self._trend(drift)
        half = _half(self._low, k)
        a, b, _ = np.exp(self.theta[len(self.tables) :])
        own = a + b + _SLOPE_VARIANCE * drift * drift
        variance = np.maximum(own - np.einsum("ij,ij->j", half, half), 1e-9)
        mean = self._mean + _SLOPE * drift + self._alpha @ k
        return Posterior(mean, variance, half, marks, rows, drift, self)


class _OneThread:
    """Limits the threads of linear algebra from the first that enters to the last that leaves.

    The limit is the process's: searches in several threads share it, and only the last to leave may lift it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._limit: Any = None
        self._pools: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                if self._pools is None:
                    import scipy.linalg  # noqa: F401  (what is not loaded yet cannot be limited)
                    from threadpoolctl import ThreadpoolController

                    self._pools = ThreadpoolController()
                self._limit = self._pools.limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limit.restore_original_limits()


_ONE_THREAD = _OneThread()


def one_thread() -> AbstractContextManager[None]:
    """Keep linear algebra on its caller's thread for a while: such matrices are too small for several.

    Beside other load threads that wait for each other cost several times what they save.
    """
    return _ONE_THREAD


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
    return pressed(np.log(np.asarray(scores) / min(scores)))


def pressed(y: Array) -> Array:
    """Press together what is far above zero."""
    far = np.maximum(y - _CLIP, 0.0)
    return np.asarray(np.minimum(y, _CLIP) + 0.25 * np.log1p(far))


def expected_gain(mean: Array, deviation: Array, best: float) -> Array:
    """Return the expected improvement on ``best`` (smaller is better)."""
    from scipy.special import ndtr

    z = (best - mean) / deviation
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return np.asarray(deviation * (z * ndtr(z) + density))
