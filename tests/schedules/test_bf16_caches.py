"""bfloat16 KV caches: append and attention in every arithmetic, pairs, rounding, poison, bounds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import FORMATS, parse_cache_format, scheme_cache_format
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import edge_keys, get_op, parse_workload
from mimo_compile.ir.ops.numerics import bf16_to_f32, f32_to_bf16
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.attention.layout import cache_shapes, pack_caches, unpack_caches
from mimo_compile.schedules.attention.x86_flash_pairs import PairsConfig
from mimo_compile.schedules.compile import assembly

CPU = local_cpu()
FLASH = get_schedule("cached_attention.x86_flash_pairs")
APPEND = get_schedule("kv_append.x86")
OP = get_op("cached_attention")
NAN = 0x7FC0
SMALL = "h=4,kv=2,d=9,dv=8,c=bf16"
ARITH = FLASH.space(parse_workload(f"cached_attention:t=1,{SMALL},cap=9"), CPU).knobs["arith"]


def pos(start, valid):
    return {"pos": np.array([start, valid], np.int32)}


def poisoned(text, start, valid, seed=0):
    """Return inputs with NaN in every slot that was never written, and in queries of padding."""
    workload = parse_workload(text)
    inputs = OP.make_inputs(workload, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    window = OP.full(workload)["window"]
    edges = edge_keys.edges_of_range(start, valid, window)
    for name in ("k_cache", "v_cache"):
        values = rng.standard_normal(inputs[name].shape, dtype=np.float32)
        if name == "v_cache":
            values[np.array(edges) % len(values)] *= edge_keys.heaviness(window or start + valid)
        inputs[name] = f32_to_bf16(values)
        inputs[name][min(start + valid, len(values)) :] = NAN
    inputs["q"][valid:] = np.nan
    return {**inputs, **pos(start, valid)}


def proved(text, config, given_, seed=0):
    """Check a config; exact arithmetic must meet the bound of float32 arithmetic."""
    seen = check(FLASH, text, config, seed, inputs=given_)
    workload = parse_workload(text) if isinstance(text, str) else text
    assert FLASH.exact(config) == (config.arith == "widen")
    if FLASH.exact(config):
        exact = OP.exact_bound(workload, seen.inputs, seen.expected)["out"]
        assert (np.abs(seen.outputs["out"] - seen.expected["out"]) <= exact).all()
    return seen


@settings(max_examples=3)
@given(data=st.data())
def test_any_shape_position_and_config(data):
    one_of_any(data)


@pytest.mark.slow
@settings(max_examples=40)
@given(data=st.data())
def test_many_shapes_positions_and_configs(data):
    one_of_any(data)


def one_of_any(data):
    draw = data.draw
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    t = draw(st.sampled_from((1, 1, 2, 7, 20)))
    d, dv = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    window = draw(st.sampled_from((0, 0, 1, 16, 17, 40)))
    cap = draw(st.integers(window + t - 1 if window else t, 150).filter(lambda n: n >= t))
    text = (
        f"cached_attention:t={t},h={kv * group},kv={kv},d={d},dv={dv},cap={cap},window={window},"
        f"sink={draw(st.integers(0, 1))},c=bf16"
    )
    valid = draw(st.integers(1, t))
    start = draw(st.integers(0, 3 * cap if window else cap - valid))
    workload, seed = parse_workload(text), draw(st.integers(0, 999))
    proved(workload, sample_config(FLASH, workload, CPU, seed), poisoned(text, start, valid, seed))


@pytest.mark.parametrize("arith", ARITH)
def test_a_slot_that_was_never_written_does_not_show_beside_one_that_was(arith):
    text = f"cached_attention:t=1,{SMALL},cap=48"
    config = PairsConfig(1, 16, 1, 2, False, 0, arith)
    seen = check(FLASH, text, config)
    for length in (1, 2, 15, 16, 17, 47):
        results = []
        for bits in (0, NAN, 0x7F80, 0xFFFF, 0x7F7F):
            given_ = poisoned(text, length - 1, 1)
            for name in ("k_cache", "v_cache"):
                given_[name][length:] = bits
            packed = pack_caches(parse_workload(text), given_)
            for name in ("q", "pos", "k_cache", "v_cache"):
                seen.memory[name][...] = packed[name]
            seen.call()
            results.append(seen.memory["out"].copy())
            assert np.array_equal(results[0], results[-1])
        want = OP.reference(parse_workload(text), given_)
        bound = OP.bound(parse_workload(text), given_, want)["out"]
        assert (np.abs(results[0] - want["out"]) <= bound).all()


@pytest.mark.parametrize("arith", ARITH)
def test_padding_of_the_packed_caches_is_never_seen(arith):
    text = "cached_attention:t=2,h=4,kv=2,d=8,dv=5,cap=21,window=20,c=bf16"
    config = PairsConfig(2, 16, 1, 4, False, 0, arith)
    seen = check(FLASH, text, config, inputs=poisoned(text, 100, 2))
    k, v = (seen.memory[n] for n in ("k_cache", "v_cache"))
    k.reshape(2, 2, 4, 16, 2)[:, 1, :, 5:] = NAN
    v.reshape(2, 16, 16, 2)[:, 10, :, 1] = NAN  # slot 21, beside slot 20
    v.reshape(2, 16, 16, 2)[:, 11:] = NAN
    v.reshape(2, 16, 16, 2)[:, :, 5:] = NAN
    seen.call()
    assert np.array_equal(seen.memory["out"], seen.outputs["out"])


@pytest.mark.parametrize("arith", ARITH)
def test_equal_values_come_out_as_they_are(arith):
    # rounded weights are summed as they are rounded, so that those of a row add up to one
    text = f"cached_attention:t=1,{SMALL},cap=300"
    given_ = poisoned(text, 299, 1)
    given_["v_cache"][:] = f32_to_bf16(np.float32([3.140625]))[0]
    config = PairsConfig(1, 32, 4, 2, True, 0, arith)
    got = check(FLASH, text, config, inputs=given_).outputs["out"]
    assert np.allclose(got, 3.140625, rtol=1e-6, atol=0)


@pytest.mark.parametrize("arith", ARITH)
def test_splits_and_tiles_do_not_change_more_than_rounding(arith):
    text = "cached_attention:t=1,h=4,kv=1,d=16,dv=16,cap=600,sink=1,c=bf16"
    given_ = {**poisoned(text, 520, 1), "sink": np.full(4, 5.0, np.float32)}
    for splits, ahead in ((1, 0), (8, 2)):
        proved(text, PairsConfig(1, 32, splits, 4, splits > 1, ahead, arith), given_)


def test_the_bound_refuses_a_missed_key_and_a_key_too_many():
    text = f"cached_attention:t=1,{SMALL},cap=200"
    given_ = poisoned(text, 150, 1)
    workload = parse_workload(text)
    want = OP.reference(workload, given_)
    bound = OP.bound(workload, given_, want)["out"]
    for wrong in (149, 151):
        fill = {"k_cache": 0x3F80, "v_cache": 0x4240}  # 1; 48, as heavy as the edges
        keys = {n: np.where(given_[n] == NAN, x, given_[n]).astype(np.uint16)
                for n, x in fill.items()}  # fmt: skip
        other = OP.reference(workload, {**given_, **keys, **pos(wrong, 1)})["out"]
        assert (np.abs(other - want["out"]) > bound).any()


def test_the_bound_follows_from_roundings():
    # emulate a kernel that rounds both factors, step by step in float64
    text = "cached_attention:t=1,h=8,kv=8,d=64,dv=32,cap=500,c=bf16"
    workload = parse_workload(text)
    given_ = OP.make_inputs(workload, np.random.default_rng(5))
    want = OP.reference(workload, given_)["out"]
    k, v = (bf16_to_f32(given_[n]).astype(np.float64) for n in ("k_cache", "v_cache"))
    q = bf16_to_f32(f32_to_bf16(given_["q"]))[0]
    logits = np.einsum("hd,shd->hs", q, k) / 8
    weights = bf16_to_f32(f32_to_bf16(np.exp(logits - logits.max(1, keepdims=True))))
    got = np.einsum("hs,shd->hd", weights, v) / weights.sum(1, keepdims=True)
    error = np.abs(got - want[0])
    bound = OP.bound(workload, given_, {"out": want})["out"][0]
    assert (error <= bound).all() and error.max() > bound.max() / 100
    assert bound.max() < 2.0**-7 * np.abs(v).max()


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
        f"norm={draw(st.integers(0, 1))},vscale={draw(st.sampled_from((1.0, 0.707)))},c=bf16"
    )
    seed = draw(st.integers(0, 999))
    check(APPEND, text, sample_config(APPEND, parse_workload(text), CPU, seed), seed)


def test_append_rounds_ties_to_even_and_keeps_infinities_and_nan():
    text = "kv_append:t=1,h=1,kv=1,d=19,dv=19,cap=4,c=bf16"
    values = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0xBF808000, 0xBF818000, 0x7F7FFFFF,
                       0x7F800000, 0xFF800000, 0, 0x80000000, 0x00008000, 0x00018000, 0x3F800000, 0x7F7F7FFF,
                       0x42280000, 0x3FFF8000, 0x3FFFFFFF, 0x00010000], np.uint32)  # fmt: skip
    row = values.view(np.float32)
    seen = check(APPEND, text, inputs=pos(5, 1))
    seen.memory["qkv"][...] = np.concatenate([np.zeros(19, np.float32), row, row])[None]
    seen.call()
    states = {n: seen.memory[n] for n in ("k_cache", "v_cache")}
    want = ((values + 0x7FFF + ((values >> 16) & 1)) >> 16).astype(np.uint16)
    for array in unpack_caches(parse_workload(text), states).values():
        assert np.array_equal(array[1, 0], want)
    seen.memory["qkv"][...] = np.uint32(0x7FFFFFFF).view(np.float32)
    seen.call()
    for array in unpack_caches(parse_workload(text), states).values():
        assert np.isnan(bf16_to_f32(array[1, 0])).all()


def test_append_then_attend_shares_one_packed_cache():
    attention = parse_workload(
        "cached_attention:t=3,h=4,kv=2,d=13,dv=6,cap=21,window=16,len=40,c=bf16"
    )
    append = parse_workload("kv_append:t=3,h=4,kv=2,d=13,dv=6,cap=21,rot=4,c=bf16")
    config = FLASH.space(attention, CPU).default
    assert FLASH.layouts(attention, config) == APPEND.layouts(append, None)
    assert FLASH.layouts(attention, config) != APPEND.layouts(
        parse_workload("kv_append:t=3,h=4,kv=2,d=13,dv=6,cap=21,rot=4"), None
    )
    written = check(APPEND, append, inputs=pos(37, 3))
    caches = {n: written.memory[n] for n in ("k_cache", "v_cache")}
    canonical = unpack_caches(append, caches)
    given_ = {"q": written.outputs["q"], **pos(37, 3), **canonical}
    for arith in {ARITH[0], ARITH[-1]}:
        seen = check(FLASH, attention, dataclasses.replace(config, arith=arith), inputs=given_)
        for name, array in caches.items():
            assert np.array_equal(seen.memory[name], array)


@settings(max_examples=20)
@given(cap=st.integers(1, 70), kv=st.integers(1, 3), d=st.integers(1, 20), dv=st.integers(1, 40))
def test_packing_round_trips(cap, kv, d, dv):
    w = OP.workload(t=1, h=kv, kv=kv, d=d, dv=dv, cap=cap, c="bf16")
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 1 << 16, (cap, kv, width), np.uint16)
        for name, width in (("k_cache", d), ("v_cache", dv))
    }
    packed = pack_caches(w, arrays)
    assert {n: a.shape for n, a in packed.items()} == cache_shapes(OP.full(w))
    for name, array in unpack_caches(w, packed).items():
        assert np.array_equal(array, arrays[name])
    # a pair is two dimensions of a slot's key, or two slots of a value's column
    s, h, i, j = (rng.integers(n) for n in (cap, kv, d, dv))
    k = packed["k_cache"].reshape(kv, -1, -(-d // 2), 16, 2)
    v = packed["v_cache"].reshape(kv, -1, -(-dv // 16) * 16, 2)
    assert k[h, s // 16, i // 2, s % 16, i % 2] == arrays["k_cache"][s, h, i]
    assert v[h, s // 2, j, s % 2] == arrays["v_cache"][s, h, j]


def test_code_without_avx512():
    w = parse_workload(f"cached_attention:t=1,{SMALL},cap=64")
    v3 = PRESETS["x86-64-v3"]
    space = FLASH.space(w, v3)
    assert space.knobs["arith"] == ("widen",)
    config = dataclasses.replace(space.default, parallel=False)
    code = assembly([FLASH.lower(w, config, v3)], v3)
    assert "zmm" not in code and "vfmadd" in code


def test_each_schedule_takes_its_own_caches():
    f32 = get_schedule("cached_attention.x86_flash")
    for c, mine in (("f32", f32), ("bf16", FLASH)):
        w = parse_workload(f"cached_attention:t=1,h=4,kv=2,d=8,dv=8,cap=8,c={c}")
        for schedule in (f32, FLASH):
            assert schedule.supports(w, CPU) == (schedule is mine)
    assert "c=" not in str(parse_workload("cached_attention:t=1,h=4,kv=2,d=8,dv=8,cap=8,c=f32"))


def test_caches_of_half_the_bytes():
    texts = [f"cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=8192,c={c}" for c in FORMATS]
    f32, bf16 = (OP.counts(parse_workload(t)).bytes["dram"] for t in texts)
    rows = 4 * 32 * 256
    assert (f32 - rows) == 2 * (bf16 - rows)
    w = parse_workload(texts[1])
    assert FLASH.work(w, FLASH.space(w, CPU).default, CPU).bytes["dram"] == pytest.approx(
        bf16, rel=0.01
    )


def test_unknown_formats_have_one_clear_error():
    with pytest.raises(UsageError, match=r"unknown format of KV caches 'int3'.*f32, bf16"):
        parse_cache_format("int3")
    for op in ("cached_attention", "kv_append"):
        text = f"{op}:t=1,h=1,kv=1,d=8,dv=8,cap=8,c=w4"
        with pytest.raises(UsageError, match="unknown format of KV caches 'w4'"):
            parse_workload(text)
    assert scheme_cache_format("").name == "f32" and scheme_cache_format("16").name == "bf16"
