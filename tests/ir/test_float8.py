"""KV caches of 8-bit floats: what their codes stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir import float8
from mimo_compile.ir.caches import scheme_cache_format, window_cache_format
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.ops import get_op, load_all, parse_workload

load_all()
E4M3 = np.array(parse_weight_format("fp8b128").values)
"""The number of each code, written down by the formats of weights."""


@settings(max_examples=50)
@given(width=st.integers(1, 70), magnitude=st.floats(-36, 30), seed=st.integers(0, 99))
def test_numbers_are_the_nearest_under_the_least_power_of_two(width, magnitude, seed):
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((5, width)) * rng.standard_normal((5, 1)) * 10.0**magnitude).astype(
        np.float32
    )
    codes, byte = (t.numpy() for t in float8.encode(torch.from_numpy(rows)))
    power = 2.0 ** (byte.astype(np.float64) - 127)
    most = np.abs(rows).max(1, keepdims=True)
    assert (most <= 448 * power).all() and ((most > 224 * power) | (byte == 1)).all()
    exact = np.sort(E4M3[np.isfinite(E4M3)]) * power[..., None]
    nearest = np.abs(exact - rows[..., None].astype(np.float64)).min(-1)
    got = float8.decode(torch.from_numpy(codes), torch.from_numpy(byte)).numpy()
    assert np.array_equal(got, E4M3[codes] * power)
    assert (np.abs(got - rows.astype(np.float64)) == nearest).all()
    assert np.array_equal(float8.rounded_array(got), got)


def test_ties_go_to_even_codes():
    rows = torch.tensor([[448.0, 17.0, 19.0, 3 * 2.0**-10, 2.0**-10, -(2.0**-10), 0.0]])
    assert float8.rounded(rows).tolist() == [[448, 16, 20, 2.0**-8, 0, 0, 0]]


def test_rows_that_are_no_numbers_and_rows_beyond_the_range():
    rows = torch.tensor([[1.0, np.nan], [np.inf, 2.0], [-np.inf, 0.0], [3e38, 1.0], [0.0, 0.0]])
    got = float8.rounded(rows)
    assert got[:3].isnan().all() and not got[4].any()
    assert got[3].tolist() == [448 * 2.0**113, 0]


def test_the_append_allows_one_rounding_and_no_more():
    w = parse_workload("kv_append:t=9,h=2,kv=2,d=16,dv=24,cap=32,c=e4m3")
    op = get_op("kv_append")
    given_ = op.make_inputs(w, np.random.default_rng(0))
    want = op.reference(w, given_)
    bound = op.bound(w, given_, want)
    for name in ("k_cache", "v_cache"):
        got = float8.rounded_array(want[name].astype(np.float32))
        assert (np.abs(got - want[name]) <= bound[name]).all()
        lower = np.where(np.abs(got) > np.abs(want[name]), got * 0.875, got)  # cut off, not rounded
        assert (np.abs(lower - want[name]) > bound[name]).any()


def test_bytes_and_names():
    op, text = (
        get_op("cached_attention"),
        "cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=65536,c={}",
    )
    half, byte = (op.counts(parse_workload(text.format(c))).bytes["dram"] for c in ("bf16", "e4m3"))
    assert half / byte == pytest.approx(2, rel=0.02)
    assert (
        str(scheme_cache_format("fp8"))
        == str(window_cache_format(scheme_cache_format("fp8")))
        == "e4m3"
    )
    for text in ("cached_attention:t=1,h=2,kv=1,d=8,dv=8,cap=64,c=e4m3,arith=int8",
                 "kv_append:t=1,h=2,kv=1,d=8,dv=8,cap=64,c=e4m3,lay=rows",
                 "sparse_attention:t=1,h=2,kv=1,d=8,dv=8,cap=64,block=16,kmax=2,hs=1,c=e4m3"):  # fmt: skip
        with pytest.raises(UsageError):
            parse_workload(text)
