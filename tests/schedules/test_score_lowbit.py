"""Low-bit scores of blocks for prefill on x86: codes, exact regions, tiles, padding, positions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule

CPU = local_cpu()
SCORE = get_schedule("score_lowbit.x86")
OP = get_op("score_lowbit")
if not SCORE.supports(
    parse_workload("score_lowbit:t=1,h=1,kv=1,d=1,cap=1,block=1,rows=1,first=1,last=1"), CPU
):
    pytest.skip("not on this CPU", allow_module_level=True)


def placed(text, start, valid, seed=0):
    """Return keys up to the last token, NaN behind it and in queries of padding."""
    workload = parse_workload(text)
    p, inputs = OP.full(workload), OP.make_inputs(workload, np.random.default_rng(seed))
    keys = np.random.default_rng(seed).standard_normal(inputs["k_cache"].shape, dtype=np.float32)
    keys[(start + valid) // 2] = 0  # of a zero key all codes are zero
    means = {"k_mean": 0 * inputs["k_mean"]} if seed % 2 else {}
    keys[start + valid :] = np.nan
    inputs["q"][valid:] = np.nan
    keys = parse_cache_format(p["c"]).encode(keys)
    return {**inputs, **means, "k_cache": keys, "pos": np.array([start, valid], np.int32)}


def one_of_any(data, most):
    draw = data.draw
    kv, group = draw(st.integers(1, 2)), draw(st.sampled_from((1, 2, 5)))
    t, block = draw(st.sampled_from((1, 7, 40))), draw(st.sampled_from((3, 8, 16, 32)))
    cap = draw(st.integers(t, most))
    text = (
        f"score_lowbit:t={t},h={kv * group},kv={kv},d={draw(st.integers(1, 20))},cap={cap},block={block},"
        f"rows={draw(st.sampled_from((1, 4, 16, 64)))},first={draw(st.integers(1, 2))},"
        f"last={draw(st.integers(1, 3))},bits={draw(st.sampled_from((2, 4, 8)))},"
        f"c={draw(st.sampled_from(('f32', 'bf16')))},every={draw(st.sampled_from((1, 1, 2, 5)))},"
        f"least={draw(st.sampled_from((0, 0, cap // 2)))}"
    )
    valid = draw(st.integers(1, t))
    start, seed = draw(st.integers(0, cap - valid)), draw(st.integers(0, 999))
    workload = parse_workload(text)
    config = sample_config(SCORE, workload, CPU, seed)
    check(SCORE, workload, config, seed, inputs=placed(text, start, valid, seed))


@settings(max_examples=2)
@given(data=st.data())
def test_any_shape_position_and_config(data):
    one_of_any(data, 300)


@pytest.mark.slow
@settings(max_examples=25)
@given(data=st.data())
def test_many_shapes_positions_and_configs(data):
    one_of_any(data, 900)


@pytest.mark.parametrize("c", ["f32", "bf16"])
def test_usual_sizes_by_default(c):
    text = f"score_lowbit:t=200,h=4,kv=2,d=64,cap=800,block=32,rows=64,first=1,last=5,c={c}"
    check(SCORE, text, inputs=placed(text, 600, 200))


def test_nothing_valid_scores_nothing():
    text = "score_lowbit:t=9,h=2,kv=1,d=8,cap=60,block=4,rows=4,first=1,last=1"
    inputs = placed(text, 50, 5)
    got = check(SCORE, text, inputs=inputs).outputs["score"]
    assert np.isneginf(got[2]).all() and np.isfinite(got[:2]).any()


@pytest.mark.parametrize("start", [40, 41, 90])
def test_few_keys_are_not_estimated(start):
    text = "score_lowbit:t=9,h=2,kv=1,d=8,cap=120,block=4,rows=4,first=1,last=1,least=50"
    got = check(SCORE, text, inputs=placed(text, start, 9)).outputs["score"]
    seen = np.arange(30) <= (start + np.minimum(np.arange(3) * 4 + 3, 8))[:, None] // 4
    assert (np.isposinf(got) == seen[:, None]).all() == (start + 9 <= 50)
    assert np.isneginf(got[~np.broadcast_to(seen[:, None], got.shape)]).all()


def test_queries_that_are_left_out_count_for_nothing():
    """Of a tile of five, those at places 0, 2 and 4 are estimated: others may be anything."""
    text = "score_lowbit:t=10,h=2,kv=1,d=8,cap=120,block=4,rows=5,first=1,last=1,every=2"
    inputs = placed(text, 100, 10)
    other = dict(inputs, q=inputs["q"].copy())
    other["q"][[1, 3, 6, 8]] *= 100
    one, two = (check(SCORE, text, inputs=i).outputs["score"] for i in (inputs, other))
    np.testing.assert_array_equal(one, two)
    whole = check(SCORE, text.replace(",every=2", ""), inputs=inputs).outputs["score"]
    assert (one <= whole).all() and (one < whole).any()


def test_padding_looks_at_nothing_behind_a_full_cache():
    # tiles of padding stand behind the cache, whose end is that of memory that may be read
    text = "score_lowbit:t=40,h=2,kv=2,d=5,cap=128,block=32,rows=4,first=2,last=1,bits=2"
    check(SCORE, text, inputs=placed(text, 105, 21))


def test_codes_of_one_key_alone():
    """A head whose queries and keys are whole numbers: the estimate is the product itself."""
    text = "score_lowbit:t=4,h=1,kv=1,d=4,cap=64,block=4,rows=4,first=1,last=1,bits=4,scale=0.1"
    rng = np.random.default_rng(0)
    k = rng.integers(-7, 8, (64, 1, 4)).astype(np.float32)
    q = rng.integers(-7, 8, (4, 1, 4)).astype(np.float32)
    k[:, 0, 0] = q[:, 0, 0] = 7
    zero = np.zeros((1, 4), np.float32)
    got = check(SCORE, text, inputs={"q": q, "k_cache": k, "q_mean": zero, "k_mean": zero})
    logits = 0.1 * q[:, 0].astype(float) @ k[:, 0].T.astype(float)
    near = np.where(np.arange(64) < 4, logits, -np.inf)
    near = np.where(
        (np.arange(64) >= 60) & (np.arange(64) <= np.arange(60, 64)[:, None]), logits, near
    )
    weight = np.exp(logits) / np.exp(near).sum(-1, keepdims=True)
    want = weight.max(0).reshape(16, 4).max(-1)
    np.testing.assert_allclose(got.outputs["score"][0, 0, 1:15], want[1:15], rtol=1e-5)


def test_counts_cover_what_is_necessary():
    text = "score_lowbit:t=128,h=4,kv=2,d=64,cap=1024,block=32,rows=64,first=1,last=5"
    need = OP.counts(parse_workload(text))
    for seed in range(4):
        workload = parse_workload(text)
        made = SCORE.work(workload, sample_config(SCORE, workload, CPU, seed), CPU)
        assert made.ops["dot_i8"] >= need.ops["dot_i8"]
        assert made.bytes["dram"] >= need.bytes["dram"]


def test_memory_of_every_thread_is_declared():
    text = "score_lowbit:t=64,h=4,kv=2,d=64,cap=65536,block=32,rows=64,first=1,last=5"
    workload, two = parse_workload(text), PRESETS["x86-64-v3"].with_threads(2)
    config = SCORE.space(workload, two).default
    one, many = (
        SCORE.lower(workload, dataclasses.replace(config, parallel=parallel), two).workspace_bytes
        for parallel in (False, True)
    )
    assert many - one >= 4 * (65536 + 64 * 64 // 4)  # greatest weights, and codes of queries


def test_code_without_vnni():
    old = PRESETS["x86-64-v3"].with_threads(2)
    if not old.features <= CPU.features:
        pytest.skip("not on this CPU")
    text = "score_lowbit:t=20,h=2,kv=1,d=9,cap=120,block=8,rows=8,first=1,last=1,bits=8"
    check(SCORE, text, hardware=old, threads=1)
    plain = dataclasses.replace(old, features=frozenset())
    assert not SCORE.supports(parse_workload(text), plain)
