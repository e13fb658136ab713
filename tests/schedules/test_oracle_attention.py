"""Attention that scores blocks of keys: any shape, position and config; what it gives its two halves give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.score_keys import ScoreKeys
from mimo_compile.ir.policies.base import Geometry
from mimo_compile.ir.policies.hysparse import HySparse
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.tiny.hysparse import chosen_blocks

CPU = local_cpu()
OP = get_op("oracle_attention")
FUSED = {"f32": "oracle_attention.x86_fused", "bf16": "oracle_attention.x86_fused_pairs"}
TWICE = {"f32": "oracle_attention.x86_twice", "bf16": "oracle_attention.x86_twice_pairs"}


def poisoned(text, start, valid, seed=0):
    """Return caches with NaN in every slot behind the last token, and in queries of padding."""
    workload = parse_workload(text)
    inputs = OP.make_inputs(workload, np.random.default_rng(seed))
    fmt, rng = parse_cache_format(OP.full(workload)["c"]), np.random.default_rng(seed)
    for name in ("k_cache", "v_cache"):
        cache = rng.standard_normal(inputs[name].shape, dtype=np.float32)
        cache[start + valid :] = np.nan
        inputs[name] = fmt.encode(cache)
    inputs["q"][valid:] = np.nan
    return {**inputs, "pos": np.array([start, valid], np.int32)}


def one_of_any(data, names, blocks, most):
    draw = data.draw
    kv, group = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 3, 5)))
    d, dv, c = (
        draw(st.integers(1, 20)),
        draw(st.integers(1, 20)),
        draw(st.sampled_from(tuple(names))),
    )
    t, cap = draw(st.sampled_from((1, 1, 2, 9, 20))), draw(st.integers(20, most))
    shape = f"t={t},h={kv * group},kv={kv},d={d},dv={dv},cap={cap},c={c}"
    text = f"oracle_attention:{shape},block={draw(st.sampled_from(blocks))}"
    valid = draw(st.integers(0, t))
    start, seed = draw(st.integers(0, cap - valid)), draw(st.integers(0, 999))
    schedule, workload = get_schedule(names[c]), parse_workload(text)
    assert schedule.supports(workload, CPU)
    config = sample_config(schedule, workload, CPU, seed)
    check(schedule, workload, config, seed, inputs=poisoned(text, start, valid, seed))


@settings(max_examples=3)
@given(data=st.data())
def test_fused_any_shape_position_and_config(data):
    one_of_any(data, FUSED, (16, 32, 48, 64), 200)


@settings(max_examples=1)
@given(data=st.data())
def test_twice_any_shape_position_and_config(data):
    one_of_any(data, TWICE, (1, 3, 16, 64), 200)


@pytest.mark.slow
@settings(max_examples=30)
@given(data=st.data())
def test_many_shapes_positions_and_configs(data):
    one_of_any(data, FUSED, (16, 32, 48, 64, 128), 900)
    one_of_any(data, TWICE, (1, 3, 16, 64), 900)


@pytest.mark.parametrize("names", [FUSED, pytest.param(TWICE, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("text", "c"),
    [
        ("t=1,h=8,kv=2,d=64,dv=64,cap=2048,block=64", "bf16"),
        ("t=40,h=8,kv=2,d=32,dv=16,cap=600,block=64", "f32"),
        pytest.param("t=5,h=4,kv=4,d=16,dv=16,cap=40,block=64", "f32", marks=pytest.mark.slow),
    ],
)
def test_usual_sizes_by_default(text, c, names):
    check(get_schedule(names[c]), f"oracle_attention:{text},c={c}")


@pytest.mark.parametrize("splits", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_parts_do_not_change_more_than_rounding(splits):
    """A block belongs to one part; a merged denominator is that of all."""
    text = "oracle_attention:t=2,h=4,kv=2,d=16,dv=16,cap=2048,block=32"
    schedule = get_schedule(FUSED["f32"])
    space = schedule.space(parse_workload(text), CPU)
    config = space.make(**{**schedule.config_to_json(space.default), "splits": splits, "block": 32})
    for length in (2, 33, 300, 2048):
        check(schedule, text, config, inputs=poisoned(text, length - 2, 2))


def test_heads_are_normalised_before_they_are_brought_together():
    """One head has large logits everywhere, the other a single key that takes all: its block comes first."""
    text = "oracle_attention:t=1,h=2,kv=1,d=2,dv=1,cap=64,block=16,scale=1"
    keys = np.zeros((64, 1, 2), np.float32)
    keys[:, 0, 0], keys[3, 0, 0], keys[40, 0, 1] = 1, 1.01, 1
    q = np.array([[[50, 0], [0, 20]]], np.float32)
    raw = (keys[:, 0] @ q[0].T).reshape(4, 16, 2).max((1, 2))
    for name in (FUSED["f32"], TWICE["f32"]):
        seen = check(get_schedule(name), text, inputs={"q": q, "k_cache": keys})
        score = seen.outputs["score"][0, 0]
        assert raw.argmax() == 0 and score.argmax() == 2 and score[2] > 0.9


@pytest.mark.parametrize("name", [FUSED["f32"], pytest.param(TWICE["f32"], marks=pytest.mark.slow)])
def test_peaked_heads_list_what_the_model_was_trained_to_list(name):
    """Most blocks underflow to 0, one to a subnormal number: whatever makes the scores, none is listed."""
    text, block, wanted = "oracle_attention:t=1,h=1,kv=1,d=2,dv=1,cap=128,block=16,scale=1", 16, 6
    keys = np.zeros((128, 1, 2), np.float32)
    keys[:, 0, 0] = np.linspace(-300, -200, 128)
    keys[50, 0, 0], keys[20, 0, 0], keys[70, 0, 0] = 0, -60, -95
    q = np.array([[[1, 0]]], np.float32)
    policy = HySparse(block=block, budget=wanted * block)
    weights = torch.softmax(torch.from_numpy(keys[:, 0] @ q[0].T).T[None], -1)
    trained = chosen_blocks(weights, 1, block, wanted)[0, 0].nonzero()[:, 0].tolist()
    seen = check(get_schedule(name), text, inputs={"q": q, "k_cache": keys})
    choice = policy.workloads(Geometry(1, 1, 1, 2, 1, 128)).select
    inputs = {"score": seen.outputs["score"], "pos": seen.inputs["pos"]}
    exact = {"score": seen.expected["score"].astype(np.float32), "pos": seen.inputs["pos"]}
    listed = [
        check(get_schedule("select_blocks.x86"), choice, inputs=i).outputs for i in (inputs, exact)
    ]
    for lists in listed:
        assert lists["idx"][0, 0, : lists["cnt"][0, 0]].tolist() == trained == [1, 3]


def test_bounds_refuse_scores_of_other_keys():
    """A block whose best key is missed, and heads that are not normalised, lie outside."""
    workload = parse_workload("oracle_attention:t=3,h=4,kv=2,d=16,dv=16,cap=90,block=16,len=70")
    inputs = OP.make_inputs(workload, np.random.default_rng(0))
    expected = OP.reference(workload, inputs)
    allowed = OP.bound(workload, inputs, expected)["score"]
    seen = np.isfinite(expected["score"])
    assert not seen[0, :, 5:].any() and (allowed[~seen] == 0).all()
    assert (allowed[seen] < 1e-3 * expected["score"][seen] + 1e-30).all()
    lost = {**inputs, "k_cache": inputs["k_cache"].copy()}
    lost["k_cache"][:16] *= 0.5
    wrong = OP.reference(workload, lost)["score"][..., 0]
    assert (np.abs(wrong - expected["score"][..., 0]) > allowed[..., 0]).all()
    # the softmax of a group's largest logits, which is what bringing raw heads together gives
    raw = ScoreKeys().reference(
        parse_workload("score_keys:t=3,h=4,kv=2,d=16,cap=90,kind=logits,agg=max,len=70"), inputs
    )["score"]
    shares = np.exp(raw - np.logaddexp.reduce(raw, -1, keepdims=True))
    shares = np.pad(shares, ((0, 0), (0, 0), (0, 6))).reshape(3, 2, 6, 16).max(-1)
    assert (np.abs(shares - expected["score"]) > allowed)[seen].all()


def test_a_block_that_cannot_be_noted_has_two_passes():
    """Single tokens, and blocks of no whole vectors."""
    shape = "oracle_attention:t=1,h=8,kv=2,d=64,dv=64,cap=2048,block="
    for block in (1, 8, 24, 1024):
        found = schedules_for(parse_workload(f"{shape}{block}"), CPU)
        assert [schedule.name for schedule in found] == [TWICE["f32"]]
