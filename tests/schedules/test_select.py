"""Lists of blocks on x86: every rule, exactly; ties, forced blocks, NaN and -inf, padding, ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.block_lists import check_lists
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.attention.x86_select import SelectConfig

CPU = local_cpu()
SELECT = get_schedule("select_blocks.x86")
OP = get_op("select_blocks")
EXTREMES = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, -1.0], "f4"
)


def inputs_of(workload, start, valid, seed, wild):
    """Return scores on a coarse grid, or of any size, with NaN behind the last block."""
    p = OP.full(workload)
    inputs = OP.make_inputs(workload, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    shape = inputs["score"].shape
    score = (rng.integers(0 if p["rule"] == "mass" else -40, 41, shape) / 32).astype(np.float32)
    if wild and p["rule"] != "mass":
        score = np.where(rng.random(shape) < 0.5, rng.choice(EXTREMES, shape), score)
        score = np.where(rng.random(shape) < 0.3, rng.standard_normal(shape) * 1e20, score)
    elif wild:
        score = np.where(rng.random(shape) < 0.5, rng.random(shape) ** 9, score)
    score = score.astype(np.float32)
    score[..., max(0, start + valid - 1) // p["block"] + 1 :] = np.nan
    return {**inputs, "score": score, "pos": np.array([start, valid], np.int32)}


def one_of_any(data, rule, most):
    draw = data.draw
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    block = pick(1, 1, 3, 16)
    t = pick(1, 1, 2, 5, 40)
    cap = draw(st.integers(t, max(t, most)))
    p = dict(
        t=t, hs=pick(1, 2, 3), cap=cap, block=block, k=pick(0, 1, 5, 14, 100), rule=rule,
        rows=pick(1, 1, 2, 16), first=pick(0, 0, 1, 3, 40), last=pick(0, 1, 2, 30),
        positive=pick(0, 1),
    )  # fmt: skip
    if rule == "topk":
        p |= dict(share=pick(0.0, 0.0, 0.1, 0.25, 1.0), merge=pick("none", "none", "rank"))
    if draw(st.booleans()):
        p["kmax"] = OP.most_forced(OP.full(OP.workload(**p))) + draw(st.integers(1, 9))
    workload, seed = OP.workload(**p), draw(st.integers(0, 9999))
    valid = draw(st.integers(0, t))
    start = draw(st.integers(0, cap - valid))
    inputs = inputs_of(workload, start, valid, seed, draw(st.booleans()))
    seen = check(SELECT, workload, sample_config(SELECT, workload, CPU, seed), inputs=inputs)
    idx, cnt = (torch.from_numpy(seen.outputs[n]) for n in ("idx", "cnt"))
    check_lists(idx, cnt, inputs["score"].shape[2])


@pytest.mark.parametrize("rule", ["topk", "threshold", "mass"])
@settings(max_examples=2)
@given(data=st.data())
def test_any_rule_shape_and_position(rule, data):
    one_of_any(data, rule, 200)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["topk", "topk", "threshold", "mass"])
@settings(max_examples=25)
@given(data=st.data())
def test_many_rules_shapes_and_positions(rule, data):
    one_of_any(data, rule, 1500)


@pytest.mark.parametrize("run", [0, 2, 8])
@pytest.mark.parametrize("k", [1, 40, 700])
def test_sieves_of_every_size_choose_the_same(run, k):
    """Few runs, runs that are all equal, fewer candidates than are wanted."""
    text = f"select_blocks:t=1,hs=2,cap=1500,block=1,k={k},last=1"
    workload = parse_workload(text)
    space = SELECT.space(workload, CPU)
    config = SelectConfig(run if run in space.knobs["run"] else 0)
    for seed, length in ((0, 1500), (1, 20), (2, 701)):
        check(SELECT, workload, config, inputs=inputs_of(workload, length - 1, 1, seed, seed > 0))
    flat = np.zeros((1, 2, 1500), np.float32)
    flat[0, 1, 300:320] = np.arange(20)
    check(SELECT, workload, config, inputs={"score": flat})


@pytest.mark.parametrize("merge", ["none", "rank"])
@pytest.mark.parametrize("run", [0, 4])
def test_ties_go_to_the_lower_block_and_the_lower_head(merge, run):
    text = f"select_blocks:t=1,hs=3,cap=256,block=1,k=7,merge={merge}"
    zeros = np.zeros((1, 3, 256), np.float32)
    zeros[0, 0, ::2] = -0.0
    even = check(SELECT, text, SelectConfig(run), inputs={"score": zeros}).outputs["idx"]
    assert (even == np.arange(7)).all()
    zeros[0, 1, 100], zeros[0, 2, 50] = 2, 1
    check(SELECT, text, SelectConfig(run), inputs={"score": zeros})


@pytest.mark.parametrize(
    "more", ["k=4", "rule=threshold,k=2,first=1", "rule=mass,k=3", "k=4,merge=rank,last=2"]
)
def test_nothing_may_be_chosen(more):
    text = f"select_blocks:t=2,hs=2,cap=40,block=4,{more}"
    for value in (np.nan, -np.inf):
        check(SELECT, text, inputs={"score": np.full((2, 2, 10), value, np.float32)})


@pytest.mark.parametrize("run", [0, 2])
def test_probabilities_that_underflowed_are_not_chosen(run):
    """Zeros, subnormal and negative numbers in whole vectors and behind them; fewer are left than wanted."""
    text = "select_blocks:t=1,hs=2,cap=300,block=1,k=60,positive=1"
    least = np.finfo(np.float32).tiny
    score = np.random.default_rng(0).choice([0.0, -0.0, 1e-45, least / 2, -1.0], (1, 2, 300))
    score[..., 5:300:21], score[0, 1, 298] = least, 0.5
    seen = check(SELECT, text, SelectConfig(run), inputs={"score": score.astype(np.float32)})
    assert seen.outputs["cnt"].tolist() == [[15, 16]]


@pytest.mark.parametrize("value", [0.0, 1.0, 1.5, np.nan, -np.inf, np.inf, 0.999999])
@pytest.mark.parametrize("rule", ["threshold", "mass"])
def test_values_at_the_edge(rule, value):
    text = f"select_blocks:t=1,hs=2,cap=300,block=2,rule={rule},kmax=60,k=3"
    workload = parse_workload(text)
    inputs = inputs_of(workload, 260, 1, 3, False)
    check(SELECT, workload, inputs={**inputs, "value": np.full(2, value, np.float32)})


@pytest.mark.parametrize(
    "text",
    [
        "t=1,hs=8,cap=65536,block=16,k=64,last=1",
        "t=1,hs=1,cap=65536,block=1,k=2048",
        "t=1,hs=4,cap=30000,block=1,k=1024,first=4,last=252,merge=rank",
        "t=1,hs=8,cap=65536,block=16,k=16,share=0.1",
        "t=200,hs=4,cap=4096,block=64,k=3,len=1000",
    ],
)
def test_usual_sizes_by_default(text):
    workload = parse_workload("select_blocks:" + text)
    arg = OP.args(workload)[0]
    score = np.random.default_rng(0).standard_normal(arg.shape).astype(np.float32)
    check(SELECT, workload, inputs={"score": score})


def test_mass_of_many_blocks():
    """8,192 of them: the choice is judged, not only where no cut is near."""
    text = "select_blocks:t=1,hs=4,cap=131072,block=16,rule=mass"
    score = np.random.default_rng(0).random((1, 4, 8192), dtype=np.float32)
    seen = check(SELECT, text, inputs={"score": score})
    bound = OP.bound(parse_workload(text), seen.inputs, seen.expected)
    assert (bound["cnt"] <= 3).all()
    check_lists(*(torch.from_numpy(seen.outputs[n]) for n in ("idx", "cnt")), 8192)


def test_counts_grow_with_what_is_looked_at():
    text = "select_blocks:t=1,hs=8,cap=65536,block=1,k=512"
    workload = parse_workload(text)
    need = OP.counts(workload)
    made = {run: SELECT.work(workload, SelectConfig(run), CPU) for run in (0, 8, 32)}
    assert made[0].ops["int_op"] > made[8].ops["int_op"] > made[32].ops["int_op"]
    for counts in made.values():
        assert counts.ops["int_op"] >= need.ops["int_op"]
        assert counts.bytes["dram"] >= need.bytes["dram"]
    short = SELECT.work(parse_workload(text + ",len=1000"), SelectConfig(0), CPU)
    assert short.ops["int_op"] < made[0].ops["int_op"] / 60


def test_code_without_avx512():
    old = PRESETS["x86-64-v3"].with_threads(2)
    if not old.features <= CPU.features:
        pytest.skip("not on this CPU")
    check(SELECT, "select_blocks:t=2,hs=2,cap=900,block=1,k=40,last=2", hardware=old, threads=1)
