"""Routed experts: tokens do not depend on each other, and choose experts as the load says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.ops.moe import Moe

FORMATS = (
    "f32",
    "bf16,a=abf16",
    "w4g32,a=a8",
    "w4g32,a=a8g32",
    "w2zg32,a=abf16",
    "complex2wl,a=a8",
)


@given(st.sampled_from(FORMATS), st.integers(0, 99), st.sampled_from((1, 3)))
@settings(max_examples=8, deadline=None)
def test_results_and_bounds_of_a_token_are_those_of_the_token_alone(w, seed, k) -> None:
    text = "moe:t={},e=4,k={},d=32,f=32,w={}"
    op, workload = Moe(), parse_workload(text.format(4, k, w))
    inputs = op.make_inputs(workload, np.random.default_rng(seed))
    inputs["x"][1, 5] = 40  # one row's scale is no other's
    inputs["x"][2] = 0
    inputs["ids"][3] = (2**31 - 1, -1, 4)[:k]  # no experts
    expected = op.reference(workload, inputs)
    bound = op.bound(workload, inputs, expected)
    for t in range(4):
        one = {n: inputs[n][t : t + 1] for n in ("x", "ids", "weights")}
        alone = parse_workload(text.format(1, k, w))
        want = op.reference(alone, {**inputs, **one})
        near = op.bound(alone, {**inputs, **one}, want)
        np.testing.assert_allclose(expected["y"][t], want["y"][0], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(bound["y"][t], near["y"][0], rtol=1e-6)
    assert not expected["y"][3].any()


def test_drawn_experts_of_the_default_load_are_those_of_old_records() -> None:
    workload = parse_workload("moe:t=9,e=12,k=4,d=8,f=8")
    assert workload == parse_workload("moe:t=9,e=12,k=4,d=8,f=8,load=zipf")
    assert "load" not in str(workload)
    inputs = Moe().make_inputs(workload, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    rng.standard_normal((9, 8), dtype=np.float32)
    load = 1.0 / (1.0 + rng.permutation(12))
    for row in inputs["ids"]:
        assert np.array_equal(row, rng.choice(12, 4, replace=False, p=load / load.sum()))


def test_loads_are_even_skewed_or_all_the_same() -> None:
    rng, most = np.random.default_rng(0), {}
    for load in ("even", "zipf", "same"):
        ids = Moe().draw_ids(parse_workload(f"moe:t=2000,e=32,k=4,d=1,f=1,load={load}"), rng)
        assert ids.dtype == np.int32 and ids.shape == (2000, 4)
        assert all(len(set(row)) == 4 for row in ids.tolist())
        most[load] = np.bincount(ids.flatten(), minlength=32).max() / (2000 * 4 / 32)
    assert most["same"] == 8
    assert most["even"] < 1.3
    assert 3 < most["zipf"] < 8


def test_an_unknown_load_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no load 'odd'.*zipf, even, same"):
        parse_workload("moe:t=1,e=2,k=1,d=8,f=8,load=odd")
