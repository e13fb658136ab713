"""Forecasts of expert load: the mean share of each expert over the next steps, from the shares so far.

Three predictors, as "Prediction Is All MoE Needs" (arXiv 2404.16914) has them, behind one interface: the
average of a sliding window, ARIMA for each expert, an LSTM for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.experts.trace import Floats

WINDOW = 100
"""Steps that the average is over unless asked otherwise."""


@dataclass(frozen=True)
class Forecast:
    """Mean shares over the next steps."""

    shares: dict[int, Floats]
    """Horizon (steps) -> ``[L, E]``, not negative; each layer's sum is 1."""
    notes: tuple[str, ...] = field(default=())
    """What a predictor did in place of what its name says."""


class Predictor(Protocol):
    """What makes forecasts."""

    @property
    def name(self) -> str:
        """As it is asked for."""

    def forecast(self, history: Floats, horizons: Sequence[int]) -> Forecast:
        """Forecast means over the next steps, of so many for each horizon.

        Args:
            history: Shares ``[t, L, E]`` so far; steps without tokens are NaN and count for nothing.
            horizons: Numbers of steps.
        """


def normalised(shares: Floats) -> Floats:
    """Return shares ``[..., E]`` that are not negative and sum to 1; uniform where nothing is left."""
    kept = np.maximum(np.nan_to_num(shares, nan=0.0), 0.0)
    total = kept.sum(-1, keepdims=True)
    uniform = np.full_like(kept, 1 / kept.shape[-1])
    return np.where(total > 0, kept / np.where(total > 0, total, 1.0), uniform)


def average(history: Floats, window: int) -> Floats:
    """Return the mean ``[L, E]`` of the last steps of ``[t, L, E]`` that have tokens, layer by layer."""
    layers = [history[~np.isnan(history[:, i, 0]), i][-window:] for i in range(history.shape[1])]
    means = [rows.mean(0) if len(rows) else np.zeros(history.shape[2]) for rows in layers]
    return normalised(np.stack(means))


@dataclass(frozen=True)
class SlidingAverage:
    """SW_Avg: the mean of the last steps, whatever the horizon. No training."""

    window: int = WINDOW
    name: str = "average"

    def forecast(self, history: Floats, horizons: Sequence[int]) -> Forecast:
        """Forecast; see `Predictor`."""
        notes: tuple[str, ...] = ()
        if len(history) < self.window:
            notes = (f"the average is over {len(history)} steps, not {self.window}",)
        mean = average(history, self.window)
        return Forecast(dict.fromkeys(horizons, mean), notes)


def get_predictor(name: str, window: int = WINDOW, seed: int = 0) -> Predictor:
    """Return a predictor by name.

    Args:
        name: ``average``, ``arima`` or ``lstm``.
        window: Steps that the average is over, that others fall back to as well.
        seed: Of the LSTM's weights.

    Raises:
        UsageError: There is none of this name.
        MissingExtra: ``arima`` without statsmodels.
    """
    if name == "average":
        return SlidingAverage(window)
    if name == "arima":
        from mimo_compile.experts.arima import Arima

        return Arima(window=window)
    if name == "lstm":
        from mimo_compile.experts.lstm import Lstm

        return Lstm(window=window, seed=seed)
    raise UsageError(
        f"there is no predictor {name!r}", remedy="Predictors are average, arima and lstm."
    )
