"""How good forecasts would have been: made at several steps of a trace, judged by what followed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.experts.forecast import WINDOW, Predictor
from mimo_compile.experts.noise import Error, error, floor, mean_shares
from mimo_compile.experts.trace import LoadTrace


@dataclass(frozen=True)
class Row:
    """One predictor at one horizon."""

    predictor: str
    horizon: int
    error: Error
    """Mean over the origins that have tokens behind them; ``dead`` is the sum over all."""
    worst: float
    """Largest relative error of an origin."""
    floor: Error
    """Of whoever knows the probabilities, if tokens choose independently."""
    window_floor: Error
    """Likewise, of the mean of a window of `WINDOW` steps."""
    seconds: float
    """CPU time of one forecast of all horizons."""
    notes: tuple[str, ...]


def origins_of(steps: int, horizon: int, first: int, count: int) -> list[int]:
    """Return the steps at which forecasts are made: from ``first`` to the last that the horizon allows.

    They lie evenly between; a single one is made at ``first``, or earlier where the horizon wants it.

    Raises:
        UsageError: The trace is too short for one.
    """
    last = steps - horizon
    if last < 1 or horizon < 1:
        raise UsageError(
            f"a trace of {steps} steps cannot be forecast {horizon} steps ahead",
            remedy="Record more, or give a smaller --horizon.",
        )
    return sorted({int(t) for t in np.linspace(min(first, last), last, max(1, count))})


def backtest(
    trace: LoadTrace,
    predictors: Sequence[Predictor],
    horizons: Sequence[int],
    *,
    origins: Sequence[int],
    window: int = WINDOW,
) -> list[Row]:
    """Judge predictors on one trace.

    Args:
        trace: What happened.
        predictors: Which.
        horizons: Steps that are forecast.
        origins: Steps at which forecasts are made, from those before alone; all horizons must fit behind.
        window: Steps of the average that a floor is given for.
    """
    shares, draws = trace.shares(), trace.counts.sum(-1).astype(np.float64)
    if max(origins) + max(horizons) > len(shares) or min(origins) < 1:
        raise UsageError(f"origins {list(origins)} leave no room for {max(horizons)} steps")
    rows = []
    for predictor in predictors:
        begin = time.process_time()
        made = [predictor.forecast(shares[:at], horizons) for at in origins]
        seconds = (time.process_time() - begin) / len(origins)
        notes = tuple(dict.fromkeys(note for forecast in made for note in forecast.notes))
        for h in horizons:
            judged = []
            for at, forecast in zip(origins, made, strict=True):
                actual = mean_shares(shares[at : at + h])
                after = draws[at : at + h]
                judged.append(
                    (
                        error(forecast.shares[h], actual),
                        floor(actual, after, h, trace.distinct),
                        floor(actual, after, h, trace.distinct, min(window, at)),
                    )
                )
            errors, floors, windows = (list(part) for part in zip(*judged, strict=True))
            relative = [e.relative for e in errors if not math.isnan(e.relative)]
            worst = max(relative, default=math.nan)
            rows.append(
                Row(
                    predictor.name, h, _mean(errors), worst,
                    _mean(floors), _mean(windows), seconds, notes,
                )
            )  # fmt: skip
    return rows


def _mean(errors: Sequence[Error]) -> Error:
    judged = [e for e in errors if not math.isnan(e.relative)]
    if not judged:
        return Error(math.nan, math.nan, sum(e.dead for e in errors))
    return Error(
        float(np.mean([e.relative for e in judged])), float(np.mean([e.mass for e in judged])),
        sum(e.dead for e in errors),
    )  # fmt: skip
