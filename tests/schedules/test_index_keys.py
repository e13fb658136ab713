"""The index of keys by channels: exact, new tokens and complete spans alone, laid out as scores read it."""

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
INDEX, SCORE = get_schedule("index_keys.x86"), get_schedule("score_keys.x86")
OP = get_op("index_keys")


@settings(max_examples=3)
@given(
    st.integers(1, 20), st.integers(1, 3), st.integers(1, 40), st.integers(0, 60),
    st.sampled_from([1, 4, 16, 99]), st.sampled_from(["f32", "bf16"]), st.integers(0, 99),
)  # fmt: skip
def test_any_shape_position_and_format(t, kv, d, more, span, c, seed):
    workload = parse_workload(f"index_keys:t={t},kv={kv},d={d},cap={t + more},span={span},c={c}")
    rng, fmt = np.random.default_rng(seed), parse_cache_format(c)
    start, valid = int(rng.integers(0, more + 1)), int(rng.integers(0, t + 1))
    keys = fmt.decode(OP.make_inputs(workload, rng)["k_cache"]).copy()
    keys[: start + valid] = rng.standard_normal((start + valid, kv, d), dtype=np.float32)
    keys[start + valid :] = np.nan  # padding is not looked at
    given_ = {"k_cache": fmt.encode(keys), "pos": np.array([start, valid], np.int32)}
    check(INDEX, workload, sample_config(INDEX, workload, CPU, seed), seed, inputs=given_)


@pytest.mark.parametrize("c", ["f32", "bf16"])
def test_scores_read_the_index_as_it_lies(c):
    """A prompt in pieces, then single tokens."""
    shape = f"kv=2,d=24,cap=100,span=16,c={c}"
    scored = parse_workload(f"score_keys:t=1,h=4,{shape},kind=channels,agg=mean,channels=5")
    taken = parse_workload(f"index_keys:t=40,{shape}")
    assert INDEX.layouts(taken, None)["k_copy"] == SCORE.layouts(scored, None)["k_cache"]
    inputs = get_op("score_keys").make_inputs(scored, np.random.default_rng(0))
    given_ = {"k_cache": inputs["k_cache"], "pos": np.array([0, 40], np.int32)}
    run = check(INDEX, taken, inputs=given_)
    for start in (40, 80, *range(90, 100)):
        run.memory["pos"][...] = [start, {40: 40, 80: 10}.get(start, 1)]
        run.call()
    packed = SCORE.pack(scored, None, {n: inputs[n] for n in ("k_cache", "peak")})
    assert np.array_equal(run.memory["k_copy"], packed["k_cache"])
    assert np.array_equal(run.memory["peak"][:6], packed["peak"][:6])  # the seventh is not complete


def test_more_tokens_than_slots_are_refused():
    with pytest.raises(UsageError, match="t=9 tokens do not fit cap=8 slots"):
        parse_workload("index_keys:t=9,kv=1,d=8,cap=8,span=4")
    with pytest.raises(UsageError, match="reads a copy of keys by channels"):
        parse_workload("score_keys:t=1,h=2,kv=1,d=8,cap=8,kind=channels,channels=2,lay=rows")
