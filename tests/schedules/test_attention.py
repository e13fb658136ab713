"""Attention and append: windows, rings, sinks, splits, padding and poison, against the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.attention.layout import cache_shapes, pack_caches, unpack_caches
from mimo_compile.schedules.attention.reach import Tiling, visited
from mimo_compile.schedules.attention.x86_flash import FlashConfig
from mimo_compile.schedules.compile import assembly

CPU = local_cpu()
FLASH = get_schedule("cached_attention.x86_flash")
APPEND = get_schedule("kv_append.x86")
SMALL = "h=4,kv=2,d=8,dv=8"


def pos(start, valid):
    return {"pos": np.array([start, valid], np.int32)}


def poisoned(text, start, valid, seed=0):
    """Return inputs with NaN in every slot that was never written."""
    workload = parse_workload(text)
    inputs = get_op(workload.op).make_inputs(workload, np.random.default_rng(seed))
    cap = inputs["k_cache"].shape[0]
    rng = np.random.default_rng(seed)
    for name in ("k_cache", "v_cache"):
        inputs[name] = rng.standard_normal(inputs[name].shape, dtype=np.float32)
        inputs[name][min(start + valid, cap) :] = np.nan
    inputs["q"][valid:] = np.nan  # padding may hold anything
    return {**inputs, **pos(start, valid)}


@settings(max_examples=12)
@given(data=st.data())
def test_any_shape_position_and_config(data):
    draw = data.draw
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    t = draw(st.sampled_from((1, 1, 2, 4, 7, 20)))
    d, dv = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    window = draw(st.sampled_from((0, 0, 1, 15, 16, 17, 40)))
    cap = draw(st.integers(window + t - 1 if window else t, 150).filter(lambda n: n >= t))
    text = (
        f"cached_attention:t={t},h={kv * group},kv={kv},d={d},dv={dv},cap={cap},window={window},"
        f"sink={draw(st.integers(0, 1))}"
    )
    valid = draw(st.integers(1, t))
    start = draw(st.integers(0, 3 * cap if window else cap - valid))
    workload, seed = parse_workload(text), draw(st.integers(0, 999))
    config = sample_config(FLASH, workload, CPU, seed)
    check(FLASH, workload, config, seed, inputs=poisoned(text, start, valid, seed))


@pytest.mark.parametrize("length", [1, 10, 31, 32, 33, 34, 64, 65])
@pytest.mark.parametrize("t", [1, 3])
def test_window_boundary(length, t):
    # window 32: its edge falls on, before and behind a block of slots
    if length < t:
        pytest.skip("shorter than the call")
    text = f"cached_attention:t={t},{SMALL},cap=40,window=32,sink=1"
    check(FLASH, text, inputs=poisoned(text, length - t, t))


@pytest.mark.parametrize("c", ["f32", "bf16"])
@pytest.mark.parametrize(
    "t, cap, block, start", [(1, 128, 96, 371), (1, 130, 64, 301), (16, 144, 64, 431)]
)
def test_the_last_step_of_a_ring_stays_within_it(c, t, cap, block, start):
    # its blocks go beyond those seen, round the ring's end and to the end once more
    schedule = FLASH if c == "f32" else get_schedule("cached_attention.x86_flash_pairs")
    text = f"cached_attention:t={t},h=2,kv=1,d=16,dv=16,cap={cap},window=128,c={c}"
    default = schedule.space(parse_workload(text), CPU).default
    config = dataclasses.replace(default, tile=t, block=block, splits=1, parallel=False)
    check(schedule, text, config, inputs=pos(start, t))


def attend(text, config=None, **inputs):
    return check(FLASH, text, config, inputs=inputs).outputs["out"]


def test_ring_equals_full_cache():
    rng = np.random.default_rng(0)
    length, window, ring = 90, 20, 23
    keys, values = (rng.standard_normal((length, 2, 8), dtype=np.float32) for _ in range(2))
    q = rng.standard_normal((4, 4, 8), dtype=np.float32)
    slots = np.arange(length - ring, length)
    small = {n: np.zeros((ring, 2, 8), np.float32) for n in ("k", "v")}
    small["k"][slots % ring], small["v"][slots % ring] = keys[slots], values[slots]
    text = f"cached_attention:t=4,{SMALL},cap={{}},window={window},sink=1"
    sink = rng.standard_normal(4, dtype=np.float32)
    same = {"q": q, "sink": sink, **pos(length - 4, 4)}
    full = attend(text.format(length), k_cache=keys, v_cache=values, **same)
    wrapped = attend(text.format(ring), k_cache=small["k"], v_cache=small["v"], **same)
    assert np.allclose(full, wrapped, atol=1e-6)


def test_sink_vanishes_and_swallows():
    base = f"cached_attention:t=2,{SMALL},cap=50"
    given_ = poisoned(base, 30, 2)
    without = check(FLASH, base, inputs=given_).outputs["out"]
    for logit, expected in ((-1e30, without), (-np.inf, without), (60.0, None), (1e30, None)):
        got = attend(base + ",sink=1", **given_, sink=np.full(4, logit, np.float32))
        if expected is not None:
            assert np.allclose(got, expected, atol=1e-7)
        else:
            assert np.abs(got).max() < 1e-20


def test_sink_is_added_once_whatever_the_splits():
    text = "cached_attention:t=1,h=4,kv=1,d=16,dv=16,cap=600,sink=1"
    given_ = {**poisoned(text, 520, 1), "sink": np.full(4, 5.0, np.float32)}
    results = [
        check(FLASH, text, FlashConfig(1, 32, n, 4, n > 1), inputs=given_).outputs["out"]
        for n in (1, 2, 8)
    ]
    for other in results[1:]:
        assert np.allclose(results[0], other, atol=1e-6)


@pytest.mark.parametrize("extra", ["cap=64", "cap=24,window=20,sink=1"])
def test_several_queries_equal_sequential_decode(extra):
    text = f"cached_attention:t={{}},{SMALL},{extra}"
    start = 17 if "window" not in extra else 100
    given_ = poisoned(text.format(4), start, 4)
    together = check(FLASH, text.format(4), inputs=given_).outputs["out"]
    if "window" in extra:  # earlier queries would see slots that later tokens overwrote
        given_ = dict(given_)
    for i in range(4):
        keep = {n: given_[n] for n in given_ if n not in ("q", "pos", "k_cache", "v_cache")}
        caches = {n: given_[n].copy() for n in ("k_cache", "v_cache")}
        if "window" not in extra:
            for cache in caches.values():
                cache[start + i + 1 :] = np.nan
            alone = attend(
                text.format(1), q=given_["q"][i : i + 1], **pos(start + i, 1), **keep, **caches
            )
            assert np.allclose(together[i], alone[0], atol=1e-6)
    if "window" in extra:
        alone = attend(
            text.format(1), q=given_["q"][3:], **pos(start + 3, 1),
            **{n: given_[n] for n in ("k_cache", "v_cache", "sink")},
        )  # fmt: skip
        assert np.allclose(together[3], alone[0], atol=1e-6)


def test_nothing_valid_gives_zeros():
    for extra in ("", ",sink=1"):
        text = f"cached_attention:t=3,{SMALL},cap=20{extra}"
        seen = check(FLASH, text)
        seen.memory["pos"][...] = [0, 0]
        seen.memory["out"].fill(np.nan)
        seen.call()
        assert not seen.memory["out"].any()


def test_padding_of_the_packed_caches_is_never_seen():
    text = "cached_attention:t=2,h=4,kv=2,d=8,dv=5,cap=21,window=20"
    seen = check(FLASH, text, inputs=poisoned(text, 100, 2))
    seen.memory["k_cache"][:, 1, :, 5:] = np.nan
    seen.memory["v_cache"][:, 21:] = np.nan
    seen.memory["v_cache"][:, :, 5:] = np.nan
    seen.call()
    assert np.array_equal(seen.memory["out"], seen.outputs["out"])


def test_nan_that_is_seen_is_shown():
    text = f"cached_attention:t=1,{SMALL},cap=40"
    seen = check(FLASH, text)
    seen.memory["v_cache"][0, 3, 0] = np.nan
    seen.call()
    assert np.isnan(seen.memory["out"]).any()


def test_reals_of_the_family_it_was_made_for():
    # asymmetric heads of 192 and 128 with 16 and 8 queries each, scaled down in count only
    for text in (
        "cached_attention:t=1,h=16,kv=1,d=192,dv=128,cap=300",
        "cached_attention:t=4,h=16,kv=2,d=192,dv=128,cap=131,window=128,sink=1,len=700",
    ):
        check(FLASH, text)


def test_scores_that_overflow_exponentials():
    text = f"cached_attention:t=1,{SMALL},cap=70,scale=300.0"
    check(FLASH, text)


@settings(max_examples=6)
@given(data=st.data())
def test_append(data):
    draw = data.draw
    kv, group, t = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    d = draw(st.integers(1, 40))
    first = draw(st.sampled_from((0, 16)))
    cap = first + (16 * draw(st.integers(1, 3)) if first else draw(st.integers(t, 50)))
    text = (
        f"kv_append:t={t},h={kv * group},kv={kv},d={d},dv={draw(st.integers(1, 40))},"
        f"cap={cap},first={first},rot={2 * draw(st.integers(0, d // 2))},"
        f"norm={draw(st.integers(0, 1))},vscale={draw(st.sampled_from((1.0, 0.707)))}"
    )
    seed = draw(st.integers(0, 999))
    check(APPEND, text, sample_config(APPEND, parse_workload(text), CPU, seed), seed)


def test_append_then_attend_shares_one_packed_cache():
    attention = parse_workload("cached_attention:t=3,h=4,kv=2,d=12,dv=6,cap=21,window=16,len=40")
    append = parse_workload("kv_append:t=3,h=4,kv=2,d=12,dv=6,cap=21,rot=4")
    config = FLASH.space(attention, CPU).default
    assert FLASH.layouts(attention, config) == APPEND.layouts(append, None)
    written = check(APPEND, append, inputs=pos(37, 3))
    caches = {n: written.memory[n] for n in ("k_cache", "v_cache")}
    canonical = unpack_caches(append, caches)
    q = written.outputs["q"]
    seen = check(FLASH, attention, inputs={"q": q, **pos(37, 3), **canonical})
    for name, array in caches.items():
        assert np.array_equal(seen.memory[name], array)


@settings(max_examples=20)
@given(cap=st.integers(1, 70), kv=st.integers(1, 3), d=st.integers(1, 20), dv=st.integers(1, 40))
def test_packing_round_trips(cap, kv, d, dv):
    w = get_op("cached_attention").workload(t=1, h=kv, kv=kv, d=d, dv=dv, cap=cap)
    rng = np.random.default_rng(0)
    arrays = {"k_cache": rng.random((cap, kv, d)), "v_cache": rng.random((cap, kv, dv))}
    packed = pack_caches(w, arrays)
    assert {n: a.shape for n, a in packed.items()} == cache_shapes(get_op(w.op).full(w))
    for name, array in unpack_caches(w, packed).items():
        assert np.array_equal(array, arrays[name])


@settings(max_examples=60)
@given(data=st.data())
def test_visited_blocks_hold_all_that_is_seen_and_little_more(data):
    draw = data.draw
    t, tokens, window = draw(st.integers(1, 20)), draw(st.integers(1, 8)), draw(st.integers(0, 40))
    cap = draw(st.integers(max(1, window + t - 1 if window else t), 130))
    start = draw(st.integers(0, 400 if window else max(0, cap - t)))
    sizes = Tiling(
        {"cap": cap, "window": window, "kv": 1, "h": 1, "t": t, "d": 1, "dv": 1}, tokens, 2, 1, 4, 0
    )  # fmt: skip
    last = start + t - 1
    for first in range(0, t, tokens):
        queries = np.arange(start + first, min(start + first + tokens, start + t))
        oldest = np.maximum(0, queries - window + 1 if window else 0 * queries)
        spans = zip(oldest, queries, strict=True)
        positions = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in spans]))
        positions = positions[positions > last - cap]
        blocks = np.unique(positions % cap // 16)
        steps, live = visited(sizes, start, t, first)
        assert steps == -(-len(blocks) // 2)
        assert live == sum(min(16, max(0, min(last + 1, cap) - 16 * b)) for b in blocks)


def test_counts_of_an_aligned_dense_case_are_the_formula():
    w = parse_workload("cached_attention:t=1,h=8,kv=2,d=32,dv=16,cap=256")
    config = FlashConfig(1, 64, 1, 4, False)
    counts = FLASH.work(w, config, CPU)
    assert counts.ops["fma_f32"] == 8 * 256 * (32 + 16)
    assert counts.ops["exp_f32"] == 8 * 256
    assert counts.bytes["dram"] == get_op(w.op).counts(w).bytes["dram"]
    assert FLASH.lower(w, config, CPU).counts == counts


@pytest.mark.parametrize("length", [20, 600])
def test_counts_cover_what_is_necessary_and_follow_the_window(length):
    w = parse_workload(f"cached_attention:t=8,h=4,kv=2,d=16,dv=16,cap=600,len={length}")
    ring = parse_workload(
        f"cached_attention:t=8,h=4,kv=2,d=16,dv=16,cap=600,window=16,len={length}"
    )
    for workload in (w, ring):
        space = FLASH.space(workload, CPU)
        counts = FLASH.work(workload, space.default, CPU)
        need = get_op(w.op).counts(workload)
        assert all(counts.ops[k] >= v for k, v in need.ops.items())
    if length == 600:  # work follows what is visible, not the capacity
        dense, windowed = (FLASH.work(x, FlashConfig(8, 16, 1, 4), CPU) for x in (w, ring))
        assert windowed.ops["fma_f32"] < dense.ops["fma_f32"] / 8


def test_every_space_has_a_legal_default_and_survives_json():
    for text in (
        "cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=32768",
        "cached_attention:t=256,h=32,kv=8,d=128,dv=128,cap=4096",
        "cached_attention:t=4,h=64,kv=4,d=192,dv=128,cap=131,window=128,sink=1",
        "cached_attention:t=1,h=1,kv=1,d=1,dv=1,cap=1",
    ):
        for hardware in (CPU, *PRESETS.values()):
            workload = parse_workload(text)
            space = FLASH.space(workload, hardware)
            assert space.legal(space.default)
            assert all(getattr(space.default, k) in v for k, v in space.knobs.items())
            json = FLASH.config_to_json(space.default)
            assert FLASH.config_from_json(json) == space.default
            assert any(True for _ in space)
    few = FLASH.space(
        parse_workload("cached_attention:t=1,h=1,kv=1,d=64,dv=64,cap=8192"), PRESETS["x86-64-v4"]
    )
    assert few.default.splits >= 16


def test_bad_shapes_have_one_clear_error():
    with pytest.raises(UsageError, match="multiple of kv"):
        parse_workload("cached_attention:t=1,h=3,kv=2,d=8,dv=8,cap=8")
    with pytest.raises(UsageError, match="cap must be at least window"):
        parse_workload("cached_attention:t=4,h=2,kv=2,d=8,dv=8,cap=8,window=8")


def test_code_without_avx512():
    w = parse_workload(f"cached_attention:t=1,{SMALL},cap=64")
    v3 = PRESETS["x86-64-v3"]
    config = dataclasses.replace(FLASH.space(w, v3).default, parallel=False)
    code = assembly([FLASH.lower(w, config, v3)], v3)
    assert "zmm" not in code
    assert "vfmadd" in code
    assert "exp2f@PLT" not in code
