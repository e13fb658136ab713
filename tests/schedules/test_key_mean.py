"""Means of keys on x86: every size and format; slots behind the last key are not looked at."""

from __future__ import annotations

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule

CPU = local_cpu()
MEAN = get_schedule("key_mean.x86")
OP = get_op("key_mean")


@settings(max_examples=3)
@given(
    st.integers(1, 9), st.integers(1, 3), st.integers(1, 20), st.integers(0, 90),
    st.sampled_from(["f32", "bf16"]), st.integers(0, 99),
)  # fmt: skip
def test_any_shape_position_and_format(t, kv, d, more, c, seed):
    workload = parse_workload(f"key_mean:t={t},kv={kv},d={d},cap={t + more},c={c}")
    rng = np.random.default_rng(seed)
    inputs = OP.make_inputs(workload, rng)
    start = int(rng.integers(0, more + 1))
    keys = parse_cache_format(c).decode(inputs["k_cache"]).copy()
    keys[start + t :] = np.nan
    given_ = {"k_cache": parse_cache_format(c).encode(keys), "pos": np.array([start, t], np.int32)}
    check(MEAN, workload, sample_config(MEAN, workload, CPU, seed), seed, inputs=given_)


def test_a_mean_of_many_equal_keys_is_that_key():
    text = "key_mean:t=256,kv=2,d=5,cap=5000,len=4999"
    keys = np.full((5000, 2, 5), np.nan, np.float32)
    keys[:4999] = np.arange(10, dtype=np.float32).reshape(2, 5)
    got = check(MEAN, text, inputs={"k_cache": keys}).outputs["mean"]
    np.testing.assert_allclose(got, np.arange(10).reshape(2, 5), rtol=1e-5)


def test_a_key_that_is_left_out_shows():
    workload = parse_workload("key_mean:t=2,kv=1,d=6,cap=300,len=300")
    inputs = OP.make_inputs(workload, np.random.default_rng(0))
    want = OP.reference(workload, inputs)
    bound = OP.bound(workload, inputs, want)["mean"]
    less = OP.reference(workload, inputs | {"pos": np.array([297, 2], np.int32)})["mean"]
    assert (np.abs(less - want["mean"]) > bound).all()


@pytest.mark.parametrize("length", [16, 40, 16384, 65536])
@pytest.mark.parametrize("c", ["f32", "bf16"])
def test_a_key_left_out_or_taken_twice_shows_at_any_length(length, c):
    """At both ends, in the middle and at the seams of vectors."""
    workload = parse_workload(f"key_mean:t=2,kv=2,d=3,cap={length + 5},len={length},c={c}")
    inputs = OP.make_inputs(workload, np.random.default_rng(0))
    want = OP.reference(workload, inputs)
    bound = OP.bound(workload, inputs, want)["mean"]
    keys = parse_cache_format(c).decode(inputs["k_cache"]).astype(np.float64)
    last = length // 16 * 16 - 1
    for slot in {
        0,
        15,
        min(16, length - 1),
        length // 2,
        last,
        min(last + 1, length - 1),
        length - 1,
    }:
        assert (np.abs(keys[slot] / length) > bound).all(), slot
    assert np.isnan(keys[length:]).all()


def test_lengths_beyond_the_cache_are_refused():
    with pytest.raises(UsageError, match="between t and cap"):
        parse_workload("key_mean:t=3,kv=1,d=8,cap=8,len=9")
