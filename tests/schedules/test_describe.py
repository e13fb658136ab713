"""Descriptors of blocks on x86: every kind, size, format; what was there before and what is unwritten."""

from __future__ import annotations

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.attention import descriptors

CPU = local_cpu()
DESCRIBE = get_schedule("describe_blocks.x86")
OP = get_op("describe_blocks")
KINDS = ("bounds", "mean", "peak", "pool3")
FORMATS = ("c=f32,e=f32", "c=bf16,e=f32", "c=bf16,e=bf16")


def pos(start, valid):
    return {"pos": np.array([start, valid], np.int32)}


def filled(text, start, valid, seed):
    """Return keys up to the last token and NaN behind it."""
    workload = parse_workload(text)
    inputs = OP.make_inputs(workload, np.random.default_rng(seed))
    fmt = parse_cache_format(OP.full(workload)["c"])
    keys = np.random.default_rng(seed).standard_normal(inputs["k_cache"].shape, dtype=np.float32)
    keys[start + valid :] = np.nan
    return {**inputs, "k_cache": fmt.encode(keys), **pos(start, valid)}


@settings(max_examples=3)
@given(data=st.data())
def test_any_kind_shape_position_and_format(data):
    one_of_any(data)


@pytest.mark.slow
@settings(max_examples=30)
@given(data=st.data())
def test_many_kinds_shapes_positions_and_formats(data):
    one_of_any(data)


def one_of_any(data):
    draw = data.draw
    size = draw(st.sampled_from((1, 3, 16, 20, 32, 64)))
    stride = draw(st.sampled_from(sorted({size, max(1, size // 2), 16})))
    t = draw(st.sampled_from((1, 1, 2, 17, 60)))
    cap = draw(st.integers(t, 200))
    text = (
        f"describe_blocks:t={t},kv={draw(st.integers(1, 3))},d={draw(st.integers(1, 20))},cap={cap},"
        f"kind={draw(st.sampled_from(KINDS))},size={size},stride={stride},"
        f"whole={draw(st.integers(0, 1))},{draw(st.sampled_from(FORMATS))}"
    )
    valid = draw(st.integers(0, t))
    start, seed = draw(st.integers(0, cap - valid)), draw(st.integers(0, 999))
    workload = parse_workload(text)
    config = sample_config(DESCRIBE, workload, CPU, seed)
    check(DESCRIBE, workload, config, seed, inputs=filled(text, start, valid, seed))


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_at_a_usual_size(kind, formats):
    text = f"describe_blocks:t=5,kv=2,d=33,cap=300,kind={kind},size=16,{formats}"
    check(DESCRIBE, text, inputs=filled(text, 140, 5, 3))


def test_step_by_step_equals_at_once():
    """Whatever order tokens come in; of the running block nothing is written with ``whole``."""
    text = "describe_blocks:t={},kv=2,d=9,cap=64,kind=bounds,size=8,whole=1,c=bf16,e=bf16"
    whole = filled(text.format(50), 0, 50, 1)
    at_once = check(DESCRIBE, text.format(50), inputs=whole).outputs["desc"]
    seen = check(DESCRIBE, text.format(1), inputs=filled(text.format(1), 0, 1, 1))
    seen.memory["k_cache"][...] = DESCRIBE.pack(parse_workload(text.format(1)), None, whole)[
        "k_cache"
    ]
    packed = seen.memory["desc"].copy()
    for start in range(50):
        seen.memory["pos"][...] = [start, 1]
        seen.call()
        changed = (seen.memory["desc"] != packed).any()
        assert changed == (start % 8 == 7)
        packed = seen.memory["desc"].copy()
    state = DESCRIBE.unpack_state(parse_workload(text.format(1)), None, {"desc": packed})["desc"]
    assert np.array_equal(state[:6], at_once[:6])


@settings(max_examples=20)
@given(
    entries=st.integers(1, 40), kv=st.integers(1, 3), parts=st.integers(1, 3), d=st.integers(1, 9)
)
def test_layout_round_trips(entries, kv, parts, d):
    for fmt in (parse_cache_format("f32"), parse_cache_format("bf16")):
        values = np.random.default_rng(0).standard_normal((entries, kv, parts, d), dtype=np.float32)
        desc = fmt.encode(values)
        laid = descriptors.laid_out(desc, fmt)
        assert laid.shape == descriptors.shape(entries, kv, parts, d, fmt)
        assert np.array_equal(descriptors.canonical(laid, entries, d, fmt), desc)


def test_bounds_of_16_bit_keys_are_exact_in_16_bits():
    text = "describe_blocks:t=64,kv=1,d=8,cap=64,kind=bounds,size=16,c=bf16,e={}"
    fmt = parse_cache_format("bf16")
    wide = check(DESCRIBE, text.format("f32")).outputs["desc"]
    narrow = check(DESCRIBE, text.format("bf16")).outputs["desc"]
    assert np.array_equal(fmt.decode(narrow), wide)


def test_counts_are_what_is_touched():
    kernel = check(DESCRIBE, "describe_blocks:t=1,kv=2,d=32,cap=256,kind=bounds,size=16").kernel
    assert kernel.counts.ops["add_f32"] == 2 * 2 * 16 * 32
    assert kernel.counts.bytes["dram"] == 4 * 2 * 32 * (16 + 2) + 8
    idle = OP.counts(
        parse_workload("describe_blocks:t=1,kv=2,d=32,cap=256,kind=bounds,size=16,len=250,whole=1")
    )
    assert idle.ops["add_f32"] == 0 and idle.bytes["dram"] == 8


def test_code_without_avx512():
    old = PRESETS["x86-64-v3"].with_threads(2)
    text = "describe_blocks:t=20,kv=2,d=9,cap=80,kind=pool3,size=16"
    if old.features <= CPU.features:
        check(DESCRIBE, text, hardware=old, threads=1)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_workloads(kind):
    with pytest.raises(UsageError, match="e=bf16 entries would round c=f32 keys"):
        parse_workload(f"describe_blocks:t=1,kv=2,d=8,cap=8,kind={kind},size=4,e=bf16")
