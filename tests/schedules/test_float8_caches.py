"""KV caches of 8-bit floats: append and attention, poison, layouts, rows that are no numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import check, compiled, guarded, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile._tvm import from_numpy
from mimo_compile.ir import float8
from mimo_compile.ir.caches import single_format
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention.float8_layout import float8_shapes
from mimo_compile.schedules.attention.layout import pack_caches, unpack_caches
from mimo_compile.schedules.compile import assembly

CPU = local_cpu()
FLASH = get_schedule("cached_attention.x86_flash_float8")
APPEND = get_schedule("kv_append.x86_float8")
OP = get_op("cached_attention")
SMALL = "h=4,kv=2,d=9,dv=20,c=e4m3"


def test_values_of_inputs_are_alike():
    """Heavy ones, which bounds of rounding kernels need, would widen that of exact kernels."""
    workload = parse_workload("cached_attention:t=1,h=4,kv=2,d=8,dv=8,cap=4096,c=e4m3")
    inputs = OP.make_inputs(workload, np.random.default_rng(0))
    assert 3 < np.abs(single_format("e4m3").decode(inputs["v_cache"])).max() < 10


@settings(max_examples=3)
@given(data=st.data())
def test_any_shape_and_config(data):
    one_of_any(data)


@pytest.mark.slow
@settings(max_examples=40)
@given(data=st.data())
def test_many_shapes_and_configs(data):
    one_of_any(data)


def one_of_any(data):
    draw = data.draw
    kv, group, t = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from((1, 1, 2, 7, 40))),
    )
    window = draw(st.sampled_from((0, 0, 1, 20)))
    cap = (window or 1) + t + draw(st.integers(0, 150))
    text = (
        f"cached_attention:t={t},h={kv * group},kv={kv},d={draw(st.integers(1, 40))},window={window},"
        f"dv={draw(st.sampled_from((1, 8, 16, 33, 80)))},cap={cap},sink={draw(st.integers(0, 1))},c=e4m3,"
        f"len={draw(st.integers(t, 3 * cap if window else cap))}"
    )
    seed = draw(st.integers(0, 999))
    check(FLASH, text, sample_config(FLASH, parse_workload(text), CPU, seed), seed)


@settings(max_examples=4)
@given(data=st.data())
def test_append(data):
    draw = data.draw
    kv, group, t = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    d, cap = draw(st.integers(1, 40)), draw(st.integers(t, 50))
    text = (
        f"kv_append:t={t},h={kv * group},kv={kv},d={d},dv={draw(st.integers(1, 40))},cap={cap},"
        f"rot={2 * draw(st.integers(0, d // 2))},norm={draw(st.integers(0, 1))},"
        f"vscale={draw(st.sampled_from((1.0, 0.707)))},c=e4m3"
    )
    seed = draw(st.integers(0, 999))
    check(APPEND, text, sample_config(APPEND, parse_workload(text), CPU, seed), seed)


def appended(rows):
    """Return the keys and values that a kernel leaves of rows ``[T, 2 D]``, which are both at once."""
    t, d = rows.shape[0], rows.shape[1] // 2
    text = f"kv_append:t={t},h=1,kv=1,d={d},dv={d},cap={t},c=e4m3"
    workload = parse_workload(text)
    kernel = APPEND.lower(workload, APPEND.space(workload, CPU).default, CPU)
    qkv = np.concatenate([np.zeros((t, d), np.float32), rows], 1)
    given_ = {
        "qkv": qkv,
        "pos": np.array([0, t], np.int32),
        "table": np.zeros((t, 2, 0), np.float32),
    }
    memory = {
        a.name: guarded(given_.get(a.name, np.zeros(a.shape, a.dtype)))[0] for a in kernel.args
    }
    compiled(kernel, CPU)[kernel.name](*(from_numpy(memory[a.name]) for a in kernel.args))
    caches = {n: memory[n] for n in ("k_cache", "v_cache")}
    return [unpack_caches(workload, caches)[n][:, 0] for n in caches]


def test_rows_become_the_nearest_numbers_bit_for_bit():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((64, 80)) * np.exp2(rng.integers(-140, 120, (64, 1)))
    rows = rows.astype(np.float32)
    ties = float8.rounded_array(rows[:, :40])
    step = np.diff(np.sort(np.unique(np.abs(ties[0]))))[:1]
    rows[0, :40] = ties[0] + step / 2  # half-way between two numbers
    rows[1], rows[2, 3], rows[3, 77], rows[4, 5] = 0, np.nan, -np.inf, 3e38
    for got, part in zip(appended(rows), np.split(rows, 2, 1), strict=True):
        assert np.array_equal(got, float8.rounded_array(part), equal_nan=True)


def test_rows_that_are_no_numbers_stay_to_be_seen():
    text = f"cached_attention:t=1,{SMALL},cap=40"
    workload = parse_workload(text)
    for name in ("k_cache", "v_cache"):
        given_ = OP.make_inputs(workload, np.random.default_rng(0))
        given_[name][11, 1] = np.nan
        kernel = FLASH.lower(workload, FLASH.space(workload, CPU).default, CPU)
        packed = pack_caches(workload, {n: given_[n] for n in ("k_cache", "v_cache")})
        given_ = given_ | packed
        memory = {
            a.name: guarded(given_.get(a.name, np.zeros(a.shape, np.float32)))[0]
            for a in kernel.args
        }
        compiled(kernel, CPU)[kernel.name](*(from_numpy(memory[a.name]) for a in kernel.args))
        lost = np.isnan(memory["out"])
        assert lost[:, 2:].all() and not lost[:, :2].any()


@settings(max_examples=20)
@given(cap=st.integers(1, 50), kv=st.integers(1, 3), d=st.integers(1, 20), dv=st.integers(1, 40))
def test_packing_round_trips(cap, kv, d, dv):
    w = OP.workload(t=1, h=kv, kv=kv, d=d, dv=dv, cap=cap, c="e4m3")
    rng = np.random.default_rng(0)
    arrays = {
        n: float8.rounded_array(rng.standard_normal((cap, kv, wide)).astype(np.float32))
        for n, wide in (("k_cache", d), ("v_cache", dv))
    }
    packed = pack_caches(w, arrays)
    assert {n: a.shape for n, a in packed.items()} == float8_shapes(OP.full(w))
    for name, array in unpack_caches(w, packed).items():
        assert np.array_equal(array, arrays[name])


def test_one_missed_key_is_refused():
    text = "cached_attention:t=1,h=4,kv=2,d=16,dv=16,cap=4096,c=e4m3"
    workload = parse_workload(text)
    given_ = OP.make_inputs(workload, np.random.default_rng(0))
    want = OP.reference(workload, given_)
    less = OP.reference(workload, {**given_, "pos": np.array([4094, 1], np.int32)})["out"]
    assert (np.abs(less - want["out"]) > OP.bound(workload, given_, want)["out"]).any()


def test_code_without_avx512_and_who_takes_these_caches():
    v3 = PRESETS["x86-64-v3"]
    for text, schedule in (
        (f"cached_attention:t=1,{SMALL},cap=64", FLASH),
        (f"kv_append:t=1,{SMALL},cap=64", APPEND),
    ):
        w = parse_workload(text)
        assert [s.name for s in schedules_for(w, CPU)] == [schedule.name]
        config = dataclasses.replace(schedule.space(w, v3).default, parallel=False)
        assert "zmm" not in assembly([schedule.lower(w, config, v3)], v3)
