"""Row kernels against their references: odd sizes, every knob, far positions, bad ids, NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import schedules_for
from mimo_compile.schedules.compile import assembly
from mimo_compile.schedules.elementwise.rows import RowConfig

CPU = local_cpu()
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 77, 128, 129, 333]))


def only(text):
    (schedule,) = schedules_for(parse_workload(text), CPU)
    return schedule


def any_config(text, seed):
    schedule = only(text)
    check(schedule, text, sample_config(schedule, parse_workload(text), CPU, seed), seed)


@settings(max_examples=8)
@given(t=st.integers(1, 6), d=SIZES, residual=st.integers(0, 1), seed=st.integers(0, 99))
def test_rms_norm(t, d, residual, seed):
    any_config(f"rms_norm:t={t},d={d},residual={residual}", seed)


def test_rms_norm_of_a_zero_row_is_zero():
    text = "rms_norm:t=2,d=20,residual=1"
    zero = np.zeros((2, 20), np.float32)
    seen = check(only(text), text, inputs={"x": zero, "residual": zero})
    assert not seen.outputs["y"].any()


@settings(max_examples=6)
@given(t=st.integers(1, 5), f=SIZES, seed=st.integers(0, 99))
def test_swiglu(t, f, seed):
    any_config(f"swiglu:t={t},f={f}", seed)


def test_swiglu_has_both_tails_and_keeps_nan():
    text = "swiglu:t=1,f=40"
    x = np.ones((1, 80), np.float32)
    x[0, :40] = np.linspace(-3e38, 3e38, 40)
    x[0, 5], x[0, 6], x[0, 7] = -np.inf, np.inf, 1e-38
    schedule = only(text)
    call = check(schedule, text)
    call.memory["x"][...] = x
    call.call()
    got = call.memory["y"][0]
    assert np.isnan(got[5])  # -inf * 0, as in the reference
    assert got[6] == np.inf
    assert got[7] == np.float32(0.5e-38)
    assert np.array_equal(got[20:], x[0, 20:40])
    assert not got[8:20].any()
    call.memory["x"][0, 3] = np.nan
    call.call()
    assert np.isnan(call.memory["y"][0, 3])


@settings(max_examples=6)
@given(
    t=st.integers(2, 5), v=st.integers(2, 9), d=SIZES, w=st.sampled_from(("f32", "bf16")),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_embed(t, v, d, w, seed):
    any_config(f"embed:t={t},v={v},d={d},w={w}", seed)


def test_embed_clamps_ids_outside_of_the_table():
    text = "embed:t=4,v=3,d=20"
    seen = check(only(text), text)
    seen.memory["ids"][...] = [-1, 3, -(2**31), 2**31 - 1]
    seen.call()
    table = seen.inputs["table"]
    assert np.array_equal(seen.memory["y"], table[[0, 2, 0, 2]])


@settings(max_examples=6)
@given(t=st.integers(1, 5), half=st.integers(1, 40), start=st.integers(0, 200_000))
def test_rope_table(t, half, start):
    text = f"rope_table:t={t},rot={2 * half}"
    check(only(text), text, inputs={"pos": np.array([start, t], np.int32)})


def test_rope_table_is_exact_far_out_and_at_every_quadrant():
    text = "rope_table:t=64,rot=64"
    schedule = only(text)
    for start in (0, 199_936, 2**22):
        inv = np.linspace(0.01, 1, 32, dtype=np.float32)
        check(schedule, text, inputs={"pos": np.array([start, 64], np.int32), "inv_freq": inv})


@pytest.mark.parametrize(
    "text",
    ["rope_table:t=1,rot=34", "swiglu:t=1,f=17", "route:t=1,e=17,k=2", "rms_norm:t=1,d=17"],
)
def test_no_call_leaves_the_object(text):
    # what a serving process links must not depend on its libm
    kernel = only(text).lower(parse_workload(text), RowConfig(False, 1), CPU)
    code = assembly([kernel], CPU)
    for name in ("exp", "cos", "sin", "tanh", "rint", "fma"):
        assert f"{name}f@PLT" not in code
        assert f"{name}@PLT" not in code


def test_code_for_a_cpu_without_avx512_uses_none():
    text = "rms_norm:t=1,d=64"
    v3 = PRESETS["x86-64-v3"]
    code = assembly([only(text).lower(parse_workload(text), RowConfig(False, 4), v3)], v3)
    assert "ymm" in code
    assert "zmm" not in code


def test_accumulators_stay_off_the_workspace_allocator():
    text = "rms_norm:t=1,d=640,residual=1"
    kernel = only(text).lower(parse_workload(text), RowConfig(False, 8), CPU)
    assert "AllocWorkspace" not in assembly([kernel], CPU)


def test_counts_are_the_formula():
    text = "swiglu:t=3,f=50"
    w = parse_workload(text)
    kernel = only(text).lower(w, RowConfig(), CPU)
    assert kernel.counts.ops["exp_f32"] == 150
    assert kernel.counts.bytes["dram"] == 4 * 3 * (100 + 50)
    assert kernel.counts.ops == get_op("swiglu").counts(w).ops


def test_small_work_is_serial_and_large_is_parallel_by_default():
    two = PRESETS["x86-64-v3"]
    for text, parallel in (("rms_norm:t=4,d=64", False), ("rms_norm:t=256,d=4096", True)):
        assert only(text).space(parse_workload(text), two).default.parallel is parallel


def test_names_differ_where_code_differs():
    w = parse_workload("swiglu:t=3,f=50")
    s = only(str(w))
    names = {
        s.lower(w, c, h).name
        for c in (RowConfig(False, 1), RowConfig(False, 2), RowConfig(True, 1))
        for h in (CPU, PRESETS["x86-64-v3"])
    }
    assert len(names) == (6 if CPU.features != PRESETS["x86-64-v3"].features else 3)
    assert all(len(n) < 64 and n.isidentifier() for n in names)
    assert math.prod(len(v) for v in s.space(w, CPU).knobs.values()) == s.space(w, CPU).size
