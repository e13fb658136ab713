"""Forecasts of expert load: exact where they must be, near the noise where nothing else moves."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import MissingExtra, UsageError
from mimo_compile.experts.arima import Arima
from mimo_compile.experts.backtest import backtest, origins_of
from mimo_compile.experts.forecast import SlidingAverage, get_predictor, normalised
from mimo_compile.experts.lstm import Lstm
from mimo_compile.experts.noise import error
from mimo_compile.experts.synthetic import drifting, steady
from mimo_compile.experts.trace import LoadTrace

FAST = (SlidingAverage(), Arima(history=120), Lstm(rounds=15, most=48))


@pytest.mark.parametrize("predictor", FAST, ids=lambda p: p.name)
def test_constant_traces_are_forecast_exactly(predictor):
    share = np.array([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]])
    made = predictor.forecast(np.tile(share, (200, 1, 1)), (10, 60))
    for found in made.shares.values():
        np.testing.assert_allclose(found, share, rtol=1e-9)
    assert made.notes == ()


@settings(max_examples=8)
@given(
    st.integers(0, 2**20), st.integers(0, 130), st.integers(1, 3), st.integers(1, 6),
    st.sampled_from(FAST),
)  # fmt: skip
def test_shares_are_shares(seed, steps, layers, experts, predictor):
    """However short the history is, with steps without tokens and experts without any."""
    draw = np.random.default_rng(seed)
    counts = draw.poisson(draw.choice([0, 0.3, 5], (layers, experts)), (steps, layers, experts))
    trace = LoadTrace(counts.astype(np.int64), tuple("abcdefgh"[:layers]))
    if isinstance(predictor, Arima):
        predictor = Arima(order=(1, 0, 0), history=40)
    made = predictor.forecast(trace.shares(), (1, 30))
    assert set(made.shares) == {1, 30}
    for found in made.shares.values():
        assert found.shape == (layers, experts) and (found >= 0).all()
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)
    if steps < 100 and predictor.name != "arima":
        assert made.notes


def test_what_is_no_share_is_made_one():
    found = normalised(np.array([[2.0, -1.0, 2.0], [0.0, 0.0, -3.0], [np.nan, 1.0, 0.0]]))
    np.testing.assert_allclose(found, [[0.5, 0, 0.5], [1 / 3, 1 / 3, 1 / 3], [0, 1, 0]])


def test_the_average_of_pure_noise_is_as_good_as_it_can_be():
    trace = steady(2400, 4, 16, 8192, seed=5)
    (row,) = backtest(trace, [SlidingAverage()], (1000,), origins=range(100, 1400, 100))
    assert row.error.relative == pytest.approx(row.window_floor.relative, rel=0.2)
    assert row.error.mass == pytest.approx(row.window_floor.mass, rel=0.2)
    assert row.floor.relative < row.window_floor.relative and row.notes == ()


def test_a_model_of_differences_follows_a_drift_that_the_average_misses():
    slope = np.linspace(-1, 1, 3)[None, None] * np.linspace(0, 1.2, 500)[:, None, None]
    share = np.exp(slope) / np.exp(slope).sum(-1, keepdims=True)
    counts = np.random.default_rng(0).multinomial(65536, share[:, 0])[:, None]
    trace = LoadTrace(counts.astype(np.int64), ("layers.0",))
    actual = trace.shares()[400:].mean(0)
    history = trace.shares()[:400]
    errors = {
        one.name: error(one.forecast(history, (100,)).shares[100], actual).relative
        for one in (
            SlidingAverage(),
            Arima((0, 1, 1), trend="t", history=200),
            Lstm(rounds=20, most=32),
        )
    }
    assert errors["arima"] < 0.35 * errors["average"]
    assert errors["lstm"] <= errors["average"] * 1.001


def test_coefficients_of_a_process_are_found():
    draw, series = np.random.default_rng(1), [0.0, 0.0]
    for noise in draw.standard_normal(1200):
        series.append(0.6 * series[-1] - 0.3 * series[-2] + noise)
    values = np.array(series[200:])
    ahead = Arima((2, 0, 0))._ahead(values + 50, 3) - 50
    one = 0.6 * values[-1] - 0.3 * values[-2]
    two = 0.6 * one - 0.3 * values[-1]
    np.testing.assert_allclose(ahead, [one, two, 0.6 * two - 0.3 * one], atol=0.15)


def test_equal_traces_get_equal_forecasts():
    shares = drifting(260, 1, 4, 512, seed=3).shares()
    first, second = (Lstm(rounds=10, seed=7).forecast(shares, (40,)).shares[40] for _ in range(2))
    assert (first == second).all()


def test_forecasts_see_nothing_of_what_follows():
    trace = drifting(400, 1, 4, 512, seed=3)
    seen = []

    class Spy(SlidingAverage):
        def forecast(self, history, horizons):
            seen.append(len(history))
            return super().forecast(history, horizons)

    backtest(trace, [Spy()], (50, 100), origins=origins_of(400, 100, 100, 3))
    assert seen == [100, 200, 300]
    with pytest.raises(UsageError, match="cannot be forecast 400 steps"):
        origins_of(400, 400, 100, 3)


def test_predictors_by_name(monkeypatch):
    assert [get_predictor(n).name for n in ("average", "arima", "lstm")] == [
        "average",
        "arima",
        "lstm",
    ]
    with pytest.raises(UsageError, match="average, arima and lstm"):
        get_predictor("oracle")
    monkeypatch.setitem(sys.modules, "statsmodels.tsa.arima.model", None)
    with pytest.raises(MissingExtra, match=r"mimo-compile\[predict\]"):
        get_predictor("arima")
