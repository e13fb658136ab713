"""Traces of expert load: counted from logs, and what their noise is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import InputError, UsageError
from mimo_compile.experts.backtest import backtest
from mimo_compile.experts.forecast import get_predictor
from mimo_compile.experts.noise import error, floor, normal_range, step_variance, wander
from mimo_compile.experts.synthetic import drifting, steady
from mimo_compile.experts.trace import LoadTrace
from mimo_compile.runtime.routing import RoutingLog


def log_of(lengths, layers=2, experts=8, k=2, seed=0) -> RoutingLog:
    """Texts of these lengths, one after the other, each token a step."""
    draw = np.random.default_rng(seed)
    count = sum(lengths)
    ids = draw.random((count, layers, experts)).argsort(-1)[..., :k].astype(np.int16)
    sequence = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    position = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    names = tuple(f"layers.{i}" for i in range(layers))
    return RoutingLog(ids, sequence, position, np.arange(count, dtype=np.int32), names, experts)


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 6), st.integers(1, 3),
    st.integers(1, 3),
)  # fmt: skip
def test_counts_are_those_of_the_choices(lengths, tokens, texts, k):
    log = log_of(lengths, k=k)
    if sum(lengths) < tokens:
        with pytest.raises(UsageError, match="too few"):
            LoadTrace.of_log(log, tokens, texts)
        return
    trace = LoadTrace.of_log(log, tokens, texts)
    assert trace.left_out + len(trace.ids) == sum(lengths)
    assert (trace.counts.sum(-1) % k == 0).all() and trace.counts.sum() == trace.ids.size
    if tokens:
        assert (trace.counts.sum(-1) == tokens * k).all()
    half = len(trace.counts) // 2
    parts = trace.part(0, half), trace.part(half, len(trace.counts))
    assert (np.concatenate([p.counts for p in parts]) == trace.counts).all()
    for part in parts:  # counts and choices are of the same tokens
        for layer in range(2):
            found = np.bincount(part.ids[:, layer].ravel(), minlength=8)
            assert (found == part.counts[:, layer].sum(0)).all()


def test_texts_side_by_side_take_turns():
    log = log_of([3, 2, 2])
    trace = LoadTrace.of_log(log, texts=2)
    assert (trace.ids == log.ids[[0, 3, 1, 4, 2, 5, 6]]).all()
    assert trace.counts[:, 0].sum(-1).tolist() == [4, 4, 2, 2, 2]


def test_files_of_either_kind_are_read(tmp_path):
    log = log_of([8])
    log.save(tmp_path / "log.safetensors")
    trace = LoadTrace.load(tmp_path / "log.safetensors", 2)
    assert (trace.counts == LoadTrace.of_log(log, 2).counts).all()
    trace.save(tmp_path / "load.safetensors")
    again = LoadTrace.load(tmp_path / "load.safetensors")
    assert (again.counts == trace.counts).all() and again.ids is None
    assert (again.layers, again.distinct) == (trace.layers, 2)
    with pytest.raises(UsageError, match="cannot be divided"):
        LoadTrace.load(tmp_path / "load.safetensors", 2)
    LoadTrace(np.zeros((2, 1, 4), np.int64), ("a,b",)).save(tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="damaged"):
        LoadTrace.load(tmp_path / "odd.safetensors")


@settings(max_examples=12)
@given(st.integers(2, 24), st.sampled_from([64, 1000]), st.integers(0, 4), st.integers(0, 2**20))
def test_variance_of_a_step_is_that_of_the_draws(experts, tokens, k, seed):
    """Against drawn choices: independent ones, or different ones for each token."""
    k = min(k, experts - 1)
    draw = np.random.default_rng(seed)
    p = draw.dirichlet(np.full(experts, 8.0))
    steps = 600
    if k:  # every expert alike, as without replacement others are no simple function of weights
        p = np.full(experts, 1 / experts)
        ids = draw.random((steps, tokens, experts)).argsort(-1)[..., :k] if tokens < 100 else None
        if ids is None:
            return
        counts = np.stack([np.bincount(row.ravel(), minlength=experts) for row in ids])
    else:
        counts = draw.multinomial(tokens, p, steps)
    draws = counts.sum(-1, keepdims=True).astype(float)
    found = (counts / draws).var(0).mean()
    wanted = step_variance(p[None], draws, k)[0].mean()
    # of a mean over experts of variances of so many steps
    assert found == pytest.approx(wanted, rel=6 * math.sqrt(2 / steps), abs=1e-12)


def test_the_floor_is_the_error_of_whoever_knows_the_probabilities():
    trace = steady(5000, 3, 16, 2048, seed=4)
    shares, draws = trace.shares(), trace.counts.sum(-1).astype(float)
    p = shares.mean(0)
    found = [error(p, shares[t : t + 50].mean(0)) for t in range(0, 5000, 50)]
    wanted = floor(p, draws, 50)
    assert np.mean([e.relative for e in found]) == pytest.approx(wanted.relative, rel=0.05)
    assert np.mean([e.mass for e in found]) == pytest.approx(wanted.mass, rel=0.05)


def test_experts_without_tokens_have_no_relative_error():
    found = error(np.array([[0.5, 0.5, 0.0]]), np.array([[0.25, 0.75, 0.0]]))
    assert found == (pytest.approx((1 + 1 / 3) / 2), 0.25, 1)
    assert math.isnan(error(np.zeros((1, 2)), np.zeros((1, 2))).relative)


@pytest.mark.filterwarnings("error")
def test_layers_without_tokens_count_for_nothing():
    forecast = np.array([[0.5, 0.5], [0.25, 0.75]])
    actual = np.array([[0.0, 0.0], [0.5, 0.5]])
    draws = np.array([[0.0, 8.0], [0.0, 8.0]])
    assert error(forecast, actual) == (0.5, 0.25, 2)
    assert floor(actual, draws, 2)[:2] == floor(actual[1:], draws[:, 1:], 2)[:2]
    counts = steady(40, 2, 4, 64).counts.copy()
    counts[20:, 0] = 0
    rows = backtest(
        LoadTrace(counts, ("a", "b")), [get_predictor("average", 5, 0)], [10], origins=[10, 30]
    )
    assert rows[0].error.dead == 4 and 0 < rows[0].error.mass < 0.5
    counts[20:] = 0
    rows = backtest(
        LoadTrace(counts, ("a", "b")), [get_predictor("average", 5, 0)], [10], origins=[10, 30]
    )
    assert rows[0].error.dead == 8 and rows[0].worst == rows[0].error.relative > 0


@pytest.mark.parametrize(
    ("counts", "layers", "message"),
    [
        (np.full((2, 1, 2), 1 << 62), ("a",), "more than"),
        (np.ones((2, 2, 2), np.int64), ("a", "a"), "one name"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts, layers, message):
    with pytest.raises(UsageError, match=message):
        LoadTrace(counts, layers)


def test_range_of_normal_numbers():
    assert normal_range(1) == pytest.approx(0, abs=1e-9)
    assert normal_range(2) == pytest.approx(2 / math.sqrt(math.pi), rel=1e-6)
    draw = np.random.default_rng(0).standard_normal((20000, 100))
    assert normal_range(100) == pytest.approx(float(np.ptp(draw, 1).mean()), rel=0.01)


@pytest.mark.parametrize("draws", [256, 65536])
def test_noise_alone_is_stable_and_drift_is_not(draws):
    calm = wander(steady(1000, 2, 16, draws, seed=1))
    assert calm.stable[2:].all() and not calm.stable[:2].any()
    assert calm.dispersion == pytest.approx(1, abs=0.1)
    wild = wander(drifting(1000, 2, 16, draws, begin=0.3, end=0.3, seed=1))
    assert not wild.stable.any()


def test_a_jump_ends_the_stable_state_once():
    found = wander(drifting(2000, 2, 16, 8192, begin=0.0, end=0.0, jump=1050, seed=2))
    changes = np.diff(found.stable.astype(int), axis=0)
    assert (
        np.abs(changes).sum(0) == 3
    ).all()  # stable, transient in the jump's window, stable again
    assert not found.stable[10].any() and found.stable[9].all() and found.stable[13].all()


def test_steps_without_tokens_count_for_nothing():
    trace = steady(300, 1, 4, 512)
    holes = trace.counts.copy()
    holes[::3] = 0
    full = LoadTrace(trace.counts[np.arange(300) % 3 != 0], trace.layers)
    draws = holes.sum(-1).astype(float)
    p = full.shares().mean(0)
    some = floor(p, draws, 15, window=20)  # of 15 steps 10 have tokens
    assert some == pytest.approx(floor(p, full.counts.sum(-1).astype(float), 10, window=20))
    assert wander(LoadTrace(holes, trace.layers), 90).dispersion == pytest.approx(
        wander(full, 60).dispersion
    )
