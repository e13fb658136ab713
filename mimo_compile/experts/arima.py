"""ARIMA(p, d, q) of each expert's share, fitted by statsmodels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile.errors import MissingExtra
from mimo_compile.experts.forecast import WINDOW, Forecast, average, normalised
from mimo_compile.experts.trace import Floats


@dataclass(frozen=True)
class Arima:
    """One model for each layer and expert, by maximum likelihood on the last steps.

    With d = 1 and no trend the forecast is a level, which is what a random walk seen through noise asks for;
    ``trend="t"`` lets it drift on. Series that cannot be fitted, or whose roots are not stationary, get the
    average of the window.
    """

    order: tuple[int, int, int] = (1, 1, 1)
    trend: str = "n"
    history: int = 400
    """Steps that are fitted."""
    window: int = WINDOW
    """Of the average that is used instead."""
    name: str = "arima"

    def __post_init__(self) -> None:
        """Find statsmodels.

        Raises:
            MissingExtra: It is not installed.
        """
        _model()

    def forecast(self, history: Floats, horizons: Sequence[int]) -> Forecast:
        """Forecast; see `Predictor`."""
        from threadpoolctl import threadpool_limits

        layers, experts = history.shape[1:]
        instead = average(history, self.window)
        out = {h: instead.copy() for h in horizons}
        failed = 0
        with threadpool_limits(1):  # matrices are tiny: waiting for other threads takes longer
            for layer, expert in np.ndindex(layers, experts):
                seen = history[~np.isnan(history[:, layer, 0]), layer, expert][-self.history :]
                ahead = self._ahead(seen, max(horizons))
                failed += ahead is None
                if ahead is not None:
                    for h in horizons:
                        out[h][layer, expert] = ahead[:h].mean()
        notes = (f"{failed} of {layers * experts} series took the average",) if failed else ()
        return Forecast({h: normalised(shares) for h, shares in out.items()}, notes)

    def _ahead(self, series: Floats, steps: int) -> Floats | None:
        """Return the next values of a series, None where no model fits it."""
        if len(series) and series.min() == series.max():
            return np.full(steps, series[0])
        p, d, q = self.order
        if len(series) < 4 * (p + d + q + 2):
            return None
        # shares vary by a few thousandths: the optimiser gets numbers of the size of 1
        level, spread = series.mean(), series.std()
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                model = _model()((series - level) / spread, order=self.order, trend=self._trend())
                fitted = model.fit(low_memory=True, cov_type="none")
                ahead = np.asarray(fitted.forecast(steps), np.float64) * spread + level
        except (ValueError, IndexError, np.linalg.LinAlgError):
            return None
        return ahead if np.isfinite(ahead).all() else None

    def _trend(self) -> str:
        return self.trend if self.order[1] or self.trend != "n" else "c"


def _model() -> Any:
    """Return statsmodels' class.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        from statsmodels.tsa.arima.model import ARIMA
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "the predictor arima", extra="predict", missing=error.name or ""
        ) from error
    return ARIMA
