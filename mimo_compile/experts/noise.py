"""How wrong a forecast is, and how wrong the best one must be: tokens are drawn, and draws vary.

The share of an expert in one step of N tokens with k experts each varies around its probability p with
variance ``p (1 - p) / (N k)`` if each choice is a draw by itself (a multinomial), and ``p (1 - k p) / (N k)``
where the k experts of a token are different ones: then N tokens choose it with probability k p each, and its
share is their number over N k. The mean over H steps has 1/H of it, and a forecast that is the mean of w
steps adds 1/w. The mean of |x| of a normal x is ``sqrt(2/pi)`` of its standard deviation. All of this holds
for tokens that choose independently; those of one text do not, and vary more (`Wander.dispersion`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mimo_compile.experts.trace import Floats, LoadTrace

MEAN_ABSOLUTE = math.sqrt(2 / math.pi)
"""Of a normal variable, in standard deviations."""


class Error(NamedTuple):
    """Of a forecast of shares, over all layers."""

    relative: float
    """Mean over layers and experts of |forecast - actual| / actual."""
    mass: float
    """Mean over layers with tokens of half the sum of |forecast - actual|: the share of tokens on a wrong
    expert."""
    dead: int
    """Experts of layers that got no token, which have no relative error and are left out of it."""


def error(forecast: Floats, actual: Floats) -> Error:
    """Compare shares ``[L, E]``."""
    off = np.abs(forecast - actual)
    alive = actual > 0
    relative = float((off[alive] / actual[alive]).mean()) if alive.any() else math.nan
    return Error(relative, _mass(off, alive), int((~alive).sum()))


def _mass(off: Floats, alive: npt.NDArray[np.bool_]) -> float:
    """Return half the sum of differences ``[L, E]``, mean over layers with tokens; NaN: there are none."""
    live = alive.any(-1)
    return float(off[live].sum(-1).mean() / 2) if live.any() else math.nan


def mean_shares(shares: Floats) -> Floats:
    """Return the mean ``[L, E]`` of shares ``[T, L, E]`` over steps with tokens; 0 in layers without any."""
    there = ~np.isnan(shares)
    return np.asarray(np.nansum(shares, axis=0) / np.maximum(there.sum(0), 1))


def step_variance(shares: Floats, draws: Floats, distinct: int = 0) -> Floats:
    """Return the variance ``[L, E]`` of shares in one step.

    Args:
        shares: Probabilities ``[L, E]``, which sum to 1.
        draws: Choices of each step ``[T, L]``; steps without any are left out, and the variance of a layer
            without any in all steps is NaN.
        distinct: Experts of a token, all of them different; 0: draws are independent.
    """
    there = draws > 0
    total = np.where(there, 1.0 / np.where(there, draws, 1), 0).sum(0)
    mean = np.where(there.any(0), total / np.maximum(there.sum(0), 1), np.nan)
    return np.asarray(shares * np.maximum(1 - max(distinct, 1) * shares, 0) * mean[:, None])


def floor(actual: Floats, draws: Floats, horizon: int, distinct: int = 0, window: int = 0) -> Error:
    """Return the expected error of the best forecast of a mean over some steps.

    Args:
        actual: Shares ``[L, E]``.
        draws: Choices of each step ``[T, L]``.
        horizon: Steps that the mean is over, as great a part of them with tokens as of those of ``draws``.
        distinct: As in `step_variance`.
        window: The forecast is the mean of so many steps with tokens before; 0: it knows the probabilities.
    """
    spread = np.sqrt(step_variance(actual, draws, distinct))
    steps = horizon * np.maximum((draws > 0).sum(0), 1) / max(1, len(draws))
    spread *= np.sqrt(1 / steps + (1 / window if window else 0))[:, None] * MEAN_ABSOLUTE
    alive = actual > 0
    relative = float((spread[alive] / actual[alive]).mean()) if alive.any() else math.nan
    return Error(relative, _mass(spread, alive), int((~alive).sum()))


@dataclass(frozen=True)
class Wander:
    """How the load of each layer moves, over windows of steps."""

    window: int
    excess: Floats
    """``[windows, L]``: median over experts of the range of their shares over the mean share, less what
    independent draws alone give."""
    stable: npt.NDArray[np.bool_]
    """``[windows, L]``."""
    dispersion: Floats
    """``[L]``: variance of shares from step to step over that of independent draws; 1: no more than that."""


def wander(trace: LoadTrace, window: int = 100, theta: float = 0.1, patience: int = 3) -> Wander:
    """Tell stable from transient layers.

    A layer becomes stable after ``patience`` windows whose excess is below ``theta``, and transient in the
    first one above 1.5 ``theta``. What draws alone give is their standard deviation times the expected
    range of so many normal numbers: without it, small steps would never look stable.
    """
    shares, draws = trace.shares(), trace.counts.sum(-1).astype(np.float64)
    windows, layers = len(shares) // window, len(trace.layers)
    excess = np.full((windows, layers), np.nan)
    stable = np.zeros((windows, layers), np.bool_)
    calm = np.zeros(layers, np.int64)
    now = np.zeros(layers, np.bool_)
    for at in range(windows):
        part = slice(at * window, (at + 1) * window)
        some = shares[part]
        for layer in range(layers):
            seen = some[:, layer][draws[part, layer] > 0]
            if len(seen):
                excess[at, layer] = _excess(seen, draws[part, layer], trace.distinct)
        calm = np.where(excess[at] < theta, calm + 1, 0)
        now = np.where(now, ~(excess[at] > 1.5 * theta), calm >= patience)
        stable[at] = now
    return Wander(window, excess, stable, _dispersion(trace, shares, draws))


def _excess(seen: Floats, draws: Floats, distinct: int) -> float:
    mean = seen.mean(0)
    alive = mean > 0
    noise = np.sqrt(step_variance(mean[None], draws[:, None], distinct)[0]) * normal_range(
        len(seen)
    )
    return float(np.median(((seen.max(0) - seen.min(0) - noise) / np.where(alive, mean, 1))[alive]))


def _dispersion(trace: LoadTrace, shares: Floats, draws: Floats) -> Floats:
    """Of neighbouring steps, so that slow drift does not count."""
    out = np.full(len(trace.layers), np.nan)
    for layer in range(len(out)):
        seen = shares[:, layer][draws[:, layer] > 0]
        if len(seen) > 1:
            wanted = step_variance(seen.mean(0)[None], draws[:, layer, None], trace.distinct)[0]
            found = (np.diff(seen, axis=0) ** 2).mean(0) / 2
            if wanted.sum() > 0:
                out[layer] = found.sum() / wanted.sum()
    return out


def normal_range(count: int) -> float:
    """Return the expected difference of the greatest and least of so many standard normal numbers.

    ``integral of 1 - F(x)^n - (1 - F(x))^n``, by the trapezoidal rule.
    """
    x = np.linspace(-9, 9, 3601)
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    return float(np.trapezoid(1 - below**count - (1 - below) ** count, x))
