"""Small ops for GPUs, run on the CPU thread by thread and held to the ops' bounds."""

from __future__ import annotations

import numpy as np
import pytest
from harness import sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.hardware import CUDA
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.cuda import limits
from mimo_compile.schedules.cuda.emulate import compiler, emulate
from mimo_compile.schedules.elementwise.cuda_rms_norm import TeamConfig
from mimo_compile.schedules.elementwise.cuda_rows import MapConfig
from mimo_compile.search.measure.emulated import check_emulated

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
EMBED, NORM, TABLE, SWIGLU = (
    get_schedule(f"{op}.cuda") for op in ("embed", "rms_norm", "rope_table", "swiglu")
)
needs_compiler = pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler")
QUICK = [
    (EMBED, "embed:t=3,v=11,d=24,w=bf16", MapConfig(64, 8)),
    (TABLE, "rope_table:t=3,rot=22,b=2", MapConfig(64, 1)),
    (SWIGLU, "swiglu:t=3,f=36", MapConfig(64, 4)),
    (NORM, "rms_norm:t=3,d=300,residual=1", TeamConfig(128, 64, 4)),
]
"""Of each kernel one text, which several tests run on inputs of their own."""


def seen_with(schedule, text, config, inputs):
    """Return what a kernel makes of inputs that the op says nothing about."""
    workload = parse_workload(text)
    drawn = get_op(workload.op).make_inputs(workload, np.random.default_rng(0))
    return emulate(schedule.lower(workload, config, H200), H200, {**drawn, **inputs})


@needs_compiler
@pytest.mark.parametrize(
    ("schedule", "text", "config"),
    [
        pytest.param(*q, marks=[pytest.mark.slow] * (q[0] in (EMBED, SWIGLU)), id=q[0].name)
        for q in QUICK
    ],
)
def test_results_are_within_the_op_s_bound(schedule, text, config):
    check_emulated(text, schedule, config, H200, seed=3)


@pytest.mark.slow
@needs_compiler
def test_ids_outside_of_a_table_read_its_ends():
    schedule, text, config = QUICK[0]
    ends = seen_with(schedule, text, config, {"ids": np.array([0, 10, 5], np.int32)})["y"]
    got = seen_with(schedule, text, config, {"ids": np.array([-7, 99, 5], np.int32)})["y"]
    assert np.array_equal(got, ends)


@needs_compiler
def test_angles_of_far_positions():
    schedule, text, config = QUICK[1]
    # 2^31 - 4 is the last start whose three tokens have numbers
    for starts in ([0, 2**31 - 4], [12_345_678, 105_615]):
        pos = np.array([[s, 3] for s in starts], np.int32)
        check_emulated(text, schedule, config, H200, inputs={"pos": pos}, orders=(0,))


@pytest.mark.slow
@needs_compiler
def test_swiglu_has_both_tails_and_keeps_nan():
    schedule, text, config = QUICK[2]
    x = np.ones((3, 72), np.float32)
    x[0, :7] = -3e38, -100.0, -np.inf, np.inf, 3e38, np.nan, 0.0
    y = seen_with(schedule, text, config, {"x": x})["y"][0]
    assert not y[0] and abs(y[1]) < 1e-30 and np.isnan(y[2])  # -inf * 0, as in the reference
    assert y[3] == np.inf and y[4] == np.float32(3e38) and np.isnan(y[5]) and y[6] == 0


@needs_compiler
def test_rms_norm_of_a_zero_row_is_zero():
    schedule, text, config = QUICK[3]
    zero = np.zeros((3, 300), np.float32)
    got = seen_with(schedule, text, config, {"x": zero, "residual": zero})
    assert not got["y"].any() and not got["total"].any()


SIZES = st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 77, 128, 129, 333]))
TEXTS = st.one_of(
    st.builds("rms_norm:t={},d={},residual={}".format, st.integers(1, 6), SIZES, st.integers(0, 1)),
    st.builds("swiglu:t={},f={}".format, st.integers(1, 6), SIZES),
    st.builds(
        "embed:t={},v={},d={},w={}".format, st.integers(2, 5), st.integers(2, 9), SIZES,
        st.sampled_from(("f32", "bf16")),
    ),
    st.builds("rope_table:t={},rot={},b={}".format, st.integers(1, 5),
              st.integers(1, 40).map(lambda n: 2 * n), st.integers(1, 3)),
)  # fmt: skip


@pytest.mark.slow
@needs_compiler
@settings(max_examples=20, deadline=None)
@given(text=TEXTS, seed=st.integers(0, 99))
def test_any_extents_and_knobs(text, seed):
    workload = parse_workload(text)
    (schedule,) = schedules_for(workload, H200)
    config = sample_config(schedule, workload, H200, seed)
    check_emulated(workload, schedule, config, H200, seed, orders=(seed % 2,))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("rms_norm:t=2,d=70000", TeamConfig(1024, 1024, 8)),  # read twice
        ("rms_norm:t=2,d=66000,residual=1", TeamConfig(1024, 1024, 2)),
        ("rms_norm:t=7,d=2048", TeamConfig(64, 32, 4)),
        ("rms_norm:t=1,d=4096,eps=0.01", None),
    ],
)
def test_long_rows(text, config):
    check_emulated(text, NORM, config, H200)


@pytest.mark.parametrize("hardware", [A100, H200], ids=lambda h: h.name)
@pytest.mark.parametrize(
    "text",
    [
        "embed:t=1,v=3,d=1", "embed:t=100000,v=150000,d=16384,w=bf16", "swiglu:t=1,f=1",
        "swiglu:t=100000,f=28672", "swiglu:t=1,f=14336", "rope_table:t=1,rot=2",
        "rope_table:t=100000,rot=128", "rms_norm:t=1,d=1", "rms_norm:t=1,d=4096",
        "rms_norm:t=4096,d=4096,residual=1", "rms_norm:t=1,d=4097", "rms_norm:t=100000,d=65537",
    ],
)  # fmt: skip
def test_defaults_and_random_configs_can_be_launched(text, hardware):
    workload = parse_workload(text)
    (schedule,) = schedules_for(workload, hardware)
    space, need = schedule.space(workload, hardware), get_op(workload.op).counts(workload)
    assert space.legal(space.default), space.default
    for config in [
        space.default,
        *(sample_config(schedule, workload, hardware, s) for s in range(5)),
    ]:
        kernel = schedule.lower(workload, config, hardware)
        limits.check(kernel, hardware)
        assert kernel.counts.bytes["dram"] >= need.bytes["dram"]
        assert all(kernel.counts.ops[kind] >= n for kind, n in need.ops.items())
        assert schedule.config_from_json(schedule.config_to_json(config)) == config


def test_few_rows_are_shared_by_more_threads_and_orders_follow_from_the_config():
    def default(t):
        workload = parse_workload(f"rms_norm:t={t},d=4096")
        return NORM.space(workload, H200).default

    assert default(1).team > default(4096).team >= 32
    assert default(4096).threads > default(4096).team
    few, many = (parse_workload(f"rms_norm:t={t},d=4096") for t in (1, 64))
    config = default(64)
    assert NORM.order(few, config, H200) == NORM.order(many, config, H200)
    assert NORM.order(few, TeamConfig(256, 256, 2), H200) != NORM.order(few, TeamConfig(256), H200)
