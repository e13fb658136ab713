"""Scores of blocks from keys on x86: every kind, way of bringing heads together, block size, position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload, score_keys
from mimo_compile.ir.ops.score_keys import KINDS
from mimo_compile.schedules import get_schedule

CPU = local_cpu()
SCORE = get_schedule("score_keys.x86")
OP = get_op("score_keys")
WAYS = [(kind, agg) for kind, aggs in KINDS.items() for agg in aggs]


def poisoned(text, start, valid, seed=0):
    """Return keys with NaN in every slot behind the last token, and in queries of padding."""
    workload = parse_workload(text)
    p, inputs = OP.full(workload), OP.make_inputs(workload, np.random.default_rng(seed))
    keys = np.random.default_rng(seed).standard_normal(inputs["k_cache"].shape, dtype=np.float32)
    keys *= np.exp(np.random.default_rng(seed + 1).standard_normal(p["d"])).astype(np.float32)
    if p["span"]:
        inputs["peak"] = peaks_of(keys, start + valid, p)
    elif "peak" in inputs:
        inputs["peak"] = np.abs(keys).max(0)
    keys[start + valid :] = np.nan
    inputs["q"][valid:] = np.nan
    keys = parse_cache_format(p["c"]).encode(keys)
    return {**inputs, "k_cache": keys, "pos": np.array([start, valid], np.int32)}


def peaks_of(keys, length, p):
    """Return what is kept of spans; of those that are not complete it is NaN."""
    span, fmt = p["span"], parse_cache_format(p["c"])
    stored = np.abs(fmt.decode(fmt.encode(keys)))
    out = np.full((-(-p["cap"] // span), p["kv"], p["d"]), np.nan, np.float32)
    for e in range(length // span):
        out[e] = stored[e * span : e * span + span].max(0)
    return fmt.encode(out)


def one_of_any(data, kind, agg, most):
    draw = data.draw
    kv, group = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 3, 5)))
    t, d = draw(st.sampled_from((1, 1, 2, 9, 20))), draw(st.integers(1, 20))
    cap = draw(st.integers(t, most))
    more = ""
    if kind == "channels":
        more = f",channels={draw(st.integers(1, d))},guess={draw(st.integers(0, 1))}"
        more += f",span={draw(st.sampled_from((0, 1, 7, 64)))}"
    text = (
        f"score_keys:t={t},h={kv * group},kv={kv},d={d},cap={cap},kind={kind},agg={agg},"
        f"block={draw(st.sampled_from((1, 1, 3, 16, 64)))}{more},c={draw(st.sampled_from(('f32', 'bf16')))}"
        f"{'' if kind == 'channels' else draw(st.sampled_from(('', ',lay=rows')))}"
    )
    valid = draw(st.integers(0, t))
    start, seed = draw(st.integers(0, cap - valid)), draw(st.integers(0, 999))
    workload = parse_workload(text)
    config = sample_config(SCORE, workload, CPU, seed)
    check(SCORE, workload, config, seed, inputs=poisoned(text, start, valid, seed))


@pytest.mark.parametrize(("kind", "agg"), WAYS)
@settings(max_examples=2)
@given(data=st.data())
def test_any_shape_position_and_config(kind, agg, data):
    one_of_any(data, kind, agg, 200)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "agg"), WAYS)
@settings(max_examples=8)
@given(data=st.data())
def test_many_shapes_positions_and_configs(kind, agg, data):
    one_of_any(data, kind, agg, 700)


@pytest.mark.parametrize(
    "text",
    [
        "t=1,h=8,kv=2,d=128,cap=2048,kind=logits",
        "t=1,h=8,kv=2,d=64,cap=2048,kind=oracle,agg=max,block=64,c=bf16",
        "t=40,h=8,kv=2,d=32,cap=600,kind=oracle,agg=max,block=64",
        "t=1,h=8,kv=2,d=128,cap=2048,kind=channels,agg=mean,channels=8,c=bf16",
        "t=1,h=4,kv=1,d=64,cap=2000,kind=oracle,agg=max",
        "t=1,h=8,kv=2,d=128,cap=2048,kind=logits,lay=rows",
        "t=1,h=12,kv=2,d=72,cap=2048,kind=oracle,agg=max,c=bf16,lay=rows",
        "t=1,h=8,kv=2,d=40,cap=600,kind=channels,agg=mean,channels=8,c=bf16,span=64",
    ],
)
def test_usual_sizes_by_default(text):
    check(SCORE, "score_keys:" + text)


@pytest.mark.parametrize("splits", [1, 8])
def test_parts_do_not_change_more_than_rounding(splits):
    text = "score_keys:t=2,h=4,kv=2,d=16,cap=2048,kind=oracle,agg=max,block=16"
    space = SCORE.space(parse_workload(text), CPU)
    config = space.make(**{**SCORE.config_to_json(space.default), "splits": splits})
    for length in (2, 15, 300, 2048):
        check(SCORE, text, config, inputs=poisoned(text, length - 2, 2))


def test_equal_channels_go_to_the_lower_one():
    text = "score_keys:t=1,h=2,kv=1,d=20,cap=20,kind=channels,agg=mean,channels=1"
    given_ = {"q": np.ones((1, 2, 20), np.float32), "peak": np.ones((1, 20), np.float32)}
    keys = np.arange(400, dtype=np.float32).reshape(20, 1, 20)
    seen = check(SCORE, text, inputs={**given_, "k_cache": keys})
    assert np.array_equal(seen.outputs["score"][0, 0], keys[:, 0, 0])


def test_logits_of_any_size_are_probabilities():
    text = "score_keys:t=1,h=2,kv=1,d=4,cap=100,kind=oracle,block=10"
    q = np.array([[[1e3, 0, 0, 0], [0, 0, 0, 0]]], np.float32)
    seen = check(SCORE, text, inputs={"q": q})
    assert seen.outputs["score"].max() <= 1 + 1e-5


def test_counts_of_an_aligned_case_are_the_formula():
    text = "score_keys:t=1,h=4,kv=2,d=32,cap=1024,kind=logits"
    kernel = check(SCORE, text).kernel
    need = OP.counts(parse_workload(text))
    assert kernel.counts.ops["fma_f32"] == need.ops["fma_f32"]
    assert kernel.counts.bytes["dram"] == pytest.approx(need.bytes["dram"], rel=1e-3)


@pytest.mark.parametrize("c", ["f32", "bf16"])
def test_wrong_probabilities_of_16_bit_keys_are_found(c):
    """The bound has room for float32 arithmetic, not for queries that are rounded."""
    text = f"score_keys:t=1,h=4,kv=1,d=64,cap=8192,kind=oracle,agg=max,c={c}"
    workload = parse_workload(text)
    inputs = OP.make_inputs(workload, np.random.default_rng(0))
    want = OP.reference(workload, inputs)
    bound = OP.bound(workload, inputs, want)["score"]
    assert (bound < 3e-3 * want["score"] + 1e-30).all()


def test_peaks_of_spans_decide_from_the_first_that_is_complete_on():
    """Channel 1 has the largest keys, but only once a span that holds them counts, and then ever after."""
    text = "score_keys:t=1,h=1,kv=1,d=2,cap=32,kind=channels,channels=1,span=8"
    keys = np.ones((32, 1, 2), np.float32)
    keys[8:16, 0, 1] = 9
    q = np.array([[[2, 1]]], np.float32)
    p = OP.full(parse_workload(text))
    for length, channel in ((7, 0), (8, 0), (15, 0), (16, 1), (31, 1)):
        given_ = {
            "q": q, "k_cache": keys, "peak": peaks_of(keys, length, p),
            "pos": np.array([length - 1, 1], np.int32),
        }  # fmt: skip
        got = check(SCORE, text, inputs=given_).outputs["score"][0, 0]
        want = q[0, 0, channel] * keys[:length, 0, channel]
        assert np.array_equal(got[:length], want) and (got[length:] == -np.inf).all()
    keys[...] = 1
    keys[3, 0, 1] = 9  # in the first span, one number
    for length, channel in ((7, 0), (8, 1), (17, 1), (32, 1)):
        given_ = {
            "q": q, "k_cache": keys, "peak": peaks_of(keys, length, p),
            "pos": np.array([length - 1, 1], np.int32),
        }  # fmt: skip
        got = check(SCORE, text, inputs=given_).outputs["score"][0, 0]
        assert np.array_equal(got[:length], q[0, 0, channel] * keys[:length, 0, channel])


WRONG = {
    "none": lambda running, peak, c: torch.ones_like(peak[c - 1]),
    "all but the last": lambda running, peak, c: running[(c - 2).clamp(min=0)],
    "all but the first": lambda running, peak, c: peak[1:].cummax(0).values[(c - 2).clamp(min=0)],
    "the last": lambda running, peak, c: peak[(c - 1).clamp(min=0)],
    "the first": lambda running, peak, c: peak[torch.zeros_like(c)],
}
"""Spans whose peaks a wrong kernel takes."""


@pytest.mark.parametrize("shape", ["t=1,h=4,kv=2,d=16,cap=192,channels=3,span=16",
                                   "t=3,h=6,kv=2,d=24,cap=100,channels=5,span=4,guess=1,c=bf16"])  # fmt: skip
@pytest.mark.parametrize("wrong", WRONG)
def test_drawn_inputs_show_a_span_that_is_missed(monkeypatch, wrong, shape):
    """In the reference's place: whatever a kernel takes instead is outside of the bound."""
    workload = parse_workload(f"score_keys:kind=channels,agg=mean,{shape}")
    for seed in range(6):
        inputs = OP.make_inputs(workload, np.random.default_rng(seed))
        want = OP.reference(workload, inputs)
        bound = OP.bound(workload, inputs, want)["score"]

        def peaks_at(peak, pos, tokens, span):
            complete = (int(pos[0]) + torch.arange(1, tokens + 1)) // span
            return WRONG[wrong](torch.cummax(peak, 0).values, peak, complete)

        with monkeypatch.context() as patched:
            patched.setattr(score_keys, "peaks_at", peaks_at)
            got = OP.reference(workload, inputs)["score"]
        # of nearly all keys, of every KV head, for the token at which the last span is complete
        assert np.mean(~(np.abs(got[-1] - want["score"][-1]) <= bound[-1])) > 0.9


def test_the_bound_at_a_tie_of_channels_is_of_what_they_score():
    """Two channels of a guess tie in float32 only; the query is a thousand times as large as the guess."""
    guess = np.array([3e-3, 1e-3], np.float32)
    peak = np.array([1, np.nextafter(np.float32(3), np.float32(9))], np.float32)
    text = "score_keys:t=1,h=1,kv=1,d=2,cap=4,kind=channels,channels=1,guess=1"
    inputs = {
        "q": np.array([[[1, 2]]], np.float32), "pos": np.array([3, 1], np.int32),
        "guess": guess.reshape(1, 1, 2), "peak": peak.reshape(1, 2),
        "k_cache": np.ones((4, 1, 2), np.float32),
    }  # fmt: skip
    want = OP.reference(parse_workload(text), inputs)
    bound = OP.bound(parse_workload(text), inputs, want)["score"]
    assert (bound >= 1).all() and (bound <= 3.001).all()  # either channel, or both for rounding
    # and where the guess does not tie, it does not matter how large it is
    inputs["guess"] = np.array([[[3e3, 1e9]]], np.float32)
    bound = OP.bound(parse_workload(text), inputs, OP.reference(parse_workload(text), inputs))
    assert (bound["score"] < 1e-5).all()


def test_a_few_channels_are_a_few_bytes():
    text = "score_keys:t=1,h=32,kv=8,d=128,cap=65536,kind=channels,agg=mean,channels="
    few, all_ = (
        SCORE.work(w, SCORE.space(w, CPU).default, CPU).bytes["dram"]
        for w in (parse_workload(text + "8"), parse_workload(text + "128"))
    )
    assert few < all_ / 10


def test_code_without_avx512():
    old = PRESETS["x86-64-v3"].with_threads(2)
    if not old.features <= CPU.features:
        pytest.skip("not on this CPU")
    for kind in ("oracle,agg=max,block=16", "channels,agg=mean,channels=3,c=bf16"):
        check(SCORE, f"score_keys:t=2,h=4,kv=2,d=9,cap=300,kind={kind}", hardware=old, threads=1)
