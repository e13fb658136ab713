"""Descriptors, scores and lists of blocks for GPUs, run on the CPU thread by thread."""

from __future__ import annotations

import numpy as np
import pytest
from harness import sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.hardware import CUDA
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention.cuda_describe import ThreadsConfig
from mimo_compile.schedules.attention.cuda_score import EntriesConfig
from mimo_compile.schedules.attention.cuda_select import ListConfig
from mimo_compile.schedules.cuda import limits
from mimo_compile.schedules.cuda.emulate import compiler, emulate
from mimo_compile.search.measure.emulated import check_emulated, device_arrays

H200 = CUDA["cuda:sm_90a"]
DESCRIBE, SCORE, SELECT = (
    get_schedule(f"{op}.cuda") for op in ("describe_blocks", "score_blocks", "select_blocks")
)
needs_compiler = pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler")
slow = pytest.mark.slow
RESULTS = [
    pytest.param(SELECT, "select_blocks:t=3,hs=2,cap=900,block=4,k=9,last=1,first=2,len=700", ListConfig(64)),
    *(
        pytest.param(*case, marks=slow)
        for case in (
            (SELECT, "select_blocks:t=5,hs=2,cap=300,block=4,k=9,rows=2,last=2,b=2", ListConfig(128)),
            (SELECT, "select_blocks:t=2,hs=1,cap=64,block=16,k=40", ListConfig(32)),
            (SELECT, "select_blocks:t=2,hs=3,cap=200,block=8,share=0.25,kmax=5,positive=1", ListConfig(32)),
            (SELECT, "select_blocks:t=2,hs=1,cap=40,block=8,first=1", None),
            (SELECT, "select_blocks:t=3,hs=2,cap=300,block=4,rule=threshold,last=1", ListConfig(64)),
            (SELECT, "select_blocks:t=3,hs=2,cap=300,block=4,rule=threshold,k=40,first=2,kmax=50", None),
            (SELECT, "select_blocks:t=3,hs=2,cap=300,block=4,rule=threshold,k=5,positive=1,last=3", None),
            (DESCRIBE, "describe_blocks:t=3,kv=2,d=25,cap=70,kind=bounds,size=16,c=bf16", ThreadsConfig(32)),
            (DESCRIBE,
             "describe_blocks:t=5,b=3,kv=1,d=8,cap=90,kind=pool3,size=9,stride=5,c=bf16,whole=1", None),
            (DESCRIBE,
             "describe_blocks:t=5,kv=2,d=9,cap=64,kind=bounds,size=8,whole=1,c=bf16,b=3,page=16,pool=14",
             None),
            (DESCRIBE,
             "describe_blocks:t=40,kv=1,d=9,cap=96,kind=mean,size=32,whole=1,c=bf16,b=2,page=16,pool=14",
             None),
            (SCORE, "score_blocks:t=3,h=4,kv=2,d=9,cap=64,kind=quest,agg=max,block=8,b=3,page=16,pool=14",
             None),
            (SCORE, "score_blocks:t=3,h=4,kv=2,d=9,cap=96,kind=mean,block=32,b=2,page=16,pool=14",
             None),
            (DESCRIBE, "describe_blocks:t=1,kv=2,d=8,cap=33,kind=mean,size=8,c=bf16,e=bf16", None),
            (DESCRIBE, "describe_blocks:t=20,kv=1,d=9,cap=64,kind=peak,size=8,c=bf16", None),
            (SCORE, "score_blocks:t=2,h=6,kv=2,d=25,cap=90,kind=quest,agg=max,block=16", EntriesConfig(2)),
            (SCORE, "score_blocks:t=5,h=4,kv=2,d=40,cap=70,kind=quest,block=8,rows=2,b=2,e=bf16", None),
            (SCORE, "score_blocks:t=2,h=4,kv=1,d=16,cap=70,kind=mean,agg=query,block=8,len=50", None),
            (SCORE, "score_blocks:t=2,h=4,kv=1,d=16,cap=70,kind=mean,agg=mean,block=8", EntriesConfig(1, 4)),
            (SCORE, "score_blocks:t=2,h=4,kv=1,d=16,cap=70,kind=mean,agg=sum,block=8", EntriesConfig(1, 4)),
            (SCORE, "score_blocks:t=2,h=4,kv=2,d=33,cap=70,kind=gate,block=8", EntriesConfig(4, 1)),
        )
    ),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(("schedule", "text", "config"), RESULTS)
def test_results_are_within_the_op_s_bound(schedule, text, config):
    check_emulated(text, schedule, config, H200, seed=1)


@needs_compiler
def test_lists_of_equal_and_of_no_scores():
    schedule, text, config = RESULTS[0].values
    shape = get_op("select_blocks").args(parse_workload(text))[0].shape
    zeros = np.zeros(shape, np.float32)
    zeros[..., ::2] = -0.0  # equal to 0: the lower block wins
    nothing = np.full(shape, -np.inf, np.float32)
    nothing[0, 0, 100] = np.finfo(np.float32).min
    nothing[0, 1, 90], nothing[0, 1, 91] = np.inf, np.nan
    for score in (zeros, nothing):
        check_emulated(text, schedule, config, H200, inputs={"score": score}, orders=(0,))
    start = {"pos": np.array([0, 2], np.int32)}  # the last row is no token
    seen = check_emulated(text, schedule, config, H200, inputs=start, orders=(0,))
    assert not seen.outputs["cnt"][2].any() and (seen.outputs["idx"][2] == -1).all()


WILD = np.array(
    [0, -0.0, 1, 2, -1, -2, np.inf, -np.inf, np.nan, 2**-126, 2**-127, 3e38, -3.4e38, 0.5],
    np.float32,
)
VALUES = np.array([np.nan, np.inf, -np.inf, -1, -0.0, 2**-127], np.float32)


@slow
@needs_compiler
@pytest.mark.parametrize(
    "text",
    [
        "t=7,hs=6,cap=150,block=4,rule=threshold,k=11,first=2,last=2,rows=3,kmax=14,len=131",
        "t=5,hs=6,cap=90,block=2,rule=threshold,k=50,first=1,last=1,rows=2,positive=1,len=90",
        "t=5,hs=6,cap=90,block=2,rule=topk,k=20,first=3,last=2,rows=4,kmax=9,len=77,positive=1",
        "t=4,hs=6,cap=90,block=2,rule=threshold,k=9,first=1,rows=2,kmax=9,len=70,b=2",
    ],
)
def test_lists_of_any_scores_and_thresholds(text):
    """Few different scores, most of them at the ends of what a float is; a threshold of each kind."""
    op, workload = get_op("select_blocks"), parse_workload("select_blocks:" + text)
    shapes = {a.name: a.shape for a in op.args(workload)}
    for seed in range(4):
        score = np.random.default_rng(seed).choice(WILD, shapes["score"])
        inputs = {"score": score}
        if "value" in shapes:
            inputs["value"] = np.resize(np.roll(VALUES, seed), shapes["value"])
        if seed == 3:  # most rows are no tokens
            inputs["pos"] = np.resize(np.array([3, 2], np.int32), shapes["pos"])
        check_emulated(workload, SELECT, ListConfig(32), H200, inputs=inputs, orders=(seed % 2,))


@slow
@needs_compiler
@pytest.mark.parametrize("kind", ["bounds", "peak"])
def test_a_key_that_is_nan_is_in_its_block_s_bounds_wherever_it_stands(kind):
    workload = parse_workload(
        f"describe_blocks:t=24,kv=1,d=9,cap=64,kind={kind},size=8,c=bf16,len=24"
    )
    op = get_op("describe_blocks")
    inputs = op.make_inputs(workload, np.random.default_rng(0))
    for key, column in ((0, 0), (11, 3), (23, 8)):
        inputs["k_cache"][key, 0, column] = 0x7FC0
    expected = op.reference(workload, inputs)["desc"]
    assert np.isnan(expected).any()
    config = ThreadsConfig(32)
    kernel = DESCRIBE.lower(workload, config, H200)
    got = emulate(kernel, H200, device_arrays(workload, DESCRIBE, config, inputs))["desc"]
    np.testing.assert_array_equal(got.reshape(expected.shape), expected)


TEXTS = st.builds(
    "select_blocks:t={},hs={},cap={},block={},k={},first={},last={},rule={},rows={},positive={}"
    .format, st.integers(1, 4),
    st.integers(1, 3), st.integers(10, 400), st.integers(1, 9), st.integers(0, 40), st.integers(0, 3),
    st.integers(0, 3), st.sampled_from(("topk", "threshold")), st.sampled_from((1, 1, 2, 16)),
    st.integers(0, 1),
) | st.builds(
    "score_blocks:t={},h={},kv={},d={},cap={},kind=quest,agg={},block={}".format, st.integers(1, 4),
    st.sampled_from((2, 4)), st.integers(1, 2), st.integers(1, 70), st.integers(10, 90),
    st.sampled_from(("none", "max", "mean", "sum", "query")), st.integers(1, 9),
) | st.builds(
    "describe_blocks:t={},kv={},d={},cap={},kind={},size={},stride={},c=bf16".format, st.integers(1, 9),
    st.integers(1, 2), st.integers(1, 40), st.integers(10, 90),
    st.sampled_from(("bounds", "mean", "peak", "pool3")), st.integers(1, 20), st.integers(1, 9),
)  # fmt: skip


@slow
@needs_compiler
@settings(max_examples=20, deadline=None)
@given(text=TEXTS, seed=st.integers(0, 99))
def test_any_extents_and_knobs(text, seed):
    workload = parse_workload(text)
    (schedule,) = schedules_for(workload, H200)
    config = sample_config(schedule, workload, H200, seed)
    check_emulated(workload, schedule, config, H200, seed, orders=(seed % 2,))


@pytest.mark.parametrize(
    "text",
    [
        "select_blocks:t=1,hs=8,cap=1000000,block=64,k=16,last=1",
        "select_blocks:t=512,hs=8,cap=65536,block=16,k=64",
        "score_blocks:t=1,h=32,kv=8,d=128,cap=65536,kind=quest,agg=max,block=16",
        "score_blocks:t=512,h=32,kv=8,d=128,cap=65536,kind=quest,agg=max,block=16",
        "describe_blocks:t=2048,kv=8,d=128,cap=65536,kind=bounds,size=16,c=bf16",
    ],
)  # fmt: skip
def test_configs_can_be_launched_and_declare_what_is_necessary(text):
    workload = parse_workload(text)
    for hardware in CUDA.values():
        (schedule,) = schedules_for(workload, hardware)
        space, need = schedule.space(workload, hardware), get_op(workload.op).counts(workload)
        assert space.legal(space.default), space.default
        for config in [
            space.default,
            *(sample_config(schedule, workload, hardware, s) for s in range(4)),
        ]:
            kernel = schedule.lower(workload, config, hardware)
            limits.check(kernel, hardware)
            assert all(kernel.counts.bytes[k] >= n for k, n in need.bytes.items())
            assert all(kernel.counts.ops[k] >= n for k, n in need.ops.items())


def test_what_has_no_kernel_is_refused():
    for text in (
        "select_blocks:t=1,hs=8,cap=65536,block=1,k=16",
        "select_blocks:t=3,hs=4,cap=900,block=4,rule=mass",
        "select_blocks:t=3,hs=4,cap=900,block=4,k=9,merge=rank",
        "select_blocks:t=3,hs=4,cap=900,block=4,share=0.1",
        "score_blocks:t=3,h=4,kv=2,d=24,cap=90,kind=gate,block=4,soft=1",
        "describe_blocks:t=1,kv=2,d=8,cap=33,kind=mean,size=8",
    ):  # fmt: skip
        assert not schedules_for(parse_workload(text), H200), text
