"""INT8 arithmetic of attention: its definition, and kernels that keep it whatever their tiles."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, int8_attention, parse_workload
from mimo_compile.ir.ops.cached_attention import attend
from mimo_compile.ir.ops.int8_attention import TILE, attend_int8, attended
from mimo_compile.ir.ops.numerics import f32_to_bf16, quantize_rows
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention import int8_dot
from mimo_compile.schedules.attention.x86_int8 import Int8Config
from mimo_compile.schedules.compile import assembly

CPU = local_cpu()
INT8 = get_schedule("cached_attention.x86_int8")
OP = get_op("cached_attention")
SMALL = "h=4,kv=2,d=12,dv=20"
needs_avx2 = pytest.mark.skipif(int8_dot.best_way(CPU) is None, reason="the CPU has no AVX2")
PLAIN = dataclasses.replace(
    CPU, features=frozenset(f for f in CPU.features if not f.startswith("avx512"))
)
"""The processor without AVX-512."""
OLDER = dataclasses.replace(CPU, features=CPU.features - {"avx512vnni", "avx512bf16"})


def pos(start, valid):
    return {"pos": np.array([start, valid], np.int32)}


def poisoned(text, start, valid, seed=0):
    """Return inputs with NaN in every slot that was never written, and in queries of padding."""
    workload = parse_workload(text) if isinstance(text, str) else text
    rng = np.random.default_rng(seed)
    inputs = OP.make_inputs(workload, rng)
    bf16 = OP.full(workload)["c"] == "bf16"
    for name in ("k_cache", "v_cache"):
        values = rng.standard_normal(inputs[name].shape, dtype=np.float32)
        values *= np.exp(rng.standard_normal((len(values), 1, 1))).astype(np.float32)
        inputs[name] = f32_to_bf16(values) if bf16 else values
        inputs[name][min(start + valid, len(values)) :] = 0x7FC0 if bf16 else np.nan
    inputs["q"][valid:] = np.nan
    return {**inputs, **pos(start, valid)}


def tensors(t=5, h=4, kv=2, d=16, dv=8, cap=300, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((t, h, d), (cap, kv, d), (cap, kv, dv))
    return [torch.from_numpy(rng.standard_normal(s, dtype=np.float32)) for s in shapes]


def at(start, valid):
    return torch.tensor([start, valid])


# -- the definition -----------------------------------------------------------------------------


@settings(max_examples=10)
@given(data=st.data())
def test_logits_are_as_near_as_the_codes_allow(data):
    seed, d = data.draw(st.integers(0, 999)), data.draw(st.integers(1, 64))
    rng = np.random.default_rng(seed)
    q, k = (torch.from_numpy(rng.standard_normal((9, d), dtype=np.float32)) for _ in range(2))
    (qc, qs), (kc, ks) = quantize_rows(q), quantize_rows(k)
    got = (qc.double() @ kc.double().T) * qs * ks.T
    exact = q.double() @ k.double().T
    bound = q.abs().sum(1)[:, None] * ks.T / 2 + k.abs().sum(1)[None] * qs / 2 + d * qs * ks.T / 4
    assert ((got - exact).abs() <= bound.double() * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("window", [0, 40])
def test_it_is_near_plain_attention_within_the_bound_of_its_roundings(half, window):
    q, k, v = tensors()
    got = attend_int8(q, k, v, at(290, 5), None, 0.25, window, half=half).out
    want = attend(q.double(), k.double(), v.double(), at(290, 5), None, 0.25, window)
    (_, qs), (_, ks), (vc, vs) = (quantize_rows(x) for x in (q, k, v))
    worst = torch.zeros_like(want)
    for i, h in np.ndindex(5, 4):
        low = 290 + i - window + 1 if window else 0
        seen, kv = slice(low, 290 + i + 1), h // 2
        keys, values = k[seen, kv].double(), v[seen, kv].double()
        # what each logit may be off by: half a step of every code on either side
        half_q, half_k = float(qs[i, h, 0]) / 2, ks[seen, kv, 0].double() / 2
        off = 0.25 * (half_q * keys.abs().sum(1) + half_k * q[i, h].double().abs().sum()
                      + q.shape[-1] * half_q * half_k)  # fmt: skip
        share = torch.softmax(0.25 * keys @ q[i, h].double(), 0)
        # logits that are off by e: shares by a factor of up to exp(2 max e), about their mean
        grown = (torch.exp(off + off.max()) - 1) * share
        worst[i, h] = grown @ (values - want[i, h]).abs()
        if half:
            continue
        step = vs[seen, kv].double() / 2
        worst[i, h] += ((1 + torch.exp(off + off.max()) - 1) * share) @ step.expand(-1, 8)
        # a tile's weights are whole numbers of 255ths of its largest share times scale
        weighted = share * 2 * step[:, 0]
        for tile in range(0, 300, TILE):
            mine = (torch.arange(low, 290 + i + 1) // TILE) == tile // TILE
            if mine.any():
                level = weighted[mine].max() * torch.exp(2 * off.max()) / 255 / 2
                worst[i, h] += level * vc[seen, kv][mine].double().abs().sum(0)
    error = (got - want).abs()
    assert (error <= worst).all()
    # the bound can fail: it is below the largest results
    assert float(worst.max()) < float(want.abs().amax()) and error.mean() < MEANS[half, window]


MEANS = {(True, 0): 0.001, (True, 40): 0.0022, (False, 0): 0.0015, (False, 40): 0.0032}
"""Twice the mean errors that were found, by (half, window)."""


def test_half_errs_less_than_whole():
    errors = {}
    for half in (False, True):
        for seed in range(4):
            q, k, v = tensors(t=16, seed=seed)
            got = attend_int8(q, k, v, at(284, 16), None, 0.25, 0, half=half).out
            want = attend(q.double(), k.double(), v.double(), at(284, 16), None, 0.25, 0)
            errors[half] = errors.get(half, 0.0) + float((got - want).abs().mean())
    assert errors[True] < errors[False]


@pytest.mark.parametrize("place", ["first", "last", "between"])
def test_flat_keys_keep_their_weight_wherever_an_outlier_stands(place):
    # one key 6 nats above 16000 equal ones: together they hold 97 % of the weight
    cap, one = 16001, {"first": 0, "last": 16000, "between": 8000}[place]
    q, k, v = torch.zeros(1, 1, 16), torch.zeros(cap, 1, 16), torch.full((cap, 1, 4), 10.0)
    q[0, 0, 0], k[one, 0, 0], v[one] = 1.0, 6.0, -100.0
    got = attend_int8(q, k, v, at(cap - 1, 1), None, 1.0, 0, half=False).out
    want = attend(q.double(), k.double(), v.double(), at(cap - 1, 1), None, 1.0, 0)
    assert (got - want).abs().max() < 0.1


def test_a_key_of_no_value_keeps_its_weight():
    # what models learn as a sink: most of the weight, hardly any value
    q, k, v = tensors(t=1, h=1, kv=1)
    k[0], v[0] = 3 * q[0] / q[0].norm() * 2, 1e-6 * v[0]
    for first in (v[0].clone(), torch.zeros_like(v[0])):
        v[0] = first
        got = attend_int8(q, k, v, at(299, 1), None, 2.0, 0, half=False).out
        want = attend(q.double(), k.double(), v.double(), at(299, 1), None, 2.0, 0)
        assert (got - want).abs().max() < 0.02 * want.abs().max() + 1e-3


def test_a_query_sees_no_difference_in_what_is_called_with_it():
    q, k, v = tensors(t=9)
    together = attend_int8(q, k, v, at(200, 9), None, 0.25, 0, half=False).out
    for i in range(9):
        alone = attend_int8(q[i : i + 1], k, v, at(200 + i, 1), None, 0.25, 0, half=False).out
        assert torch.allclose(together[i], alone[0], rtol=1e-12, atol=1e-13)


def test_scores_of_one_kv_head_are_held_at_a_time(monkeypatch):
    # those of a long prompt, of all heads, in float64 and ten times over, would not fit into memory
    held = []

    def counted(scene, *rest):
        held.append(scene.logits.shape[0])
        return weigh(scene, *rest)

    weigh = int8_attention._full
    monkeypatch.setattr(int8_attention, "_full", counted)
    q, k, v = tensors(h=6, kv=3)
    attend_int8(q, k, v, at(290, 5), None, 0.25, 0, half=False)
    assert held == [2, 2, 2]


def test_permuting_keys_within_a_tile_changes_nothing():
    q, k, v = tensors(t=1)
    order = torch.cat([torch.randperm(TILE), TILE + torch.randperm(TILE), torch.arange(256, 300)])
    one, other = (
        attend_int8(q, k[o], v[o], at(299, 1), None, 0.25, 0, half=False).out
        for o in (torch.arange(300), order)
    )
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)


# -- kernels -------------------------------------------------------------------------------------


@needs_avx2
@settings(max_examples=3)
@given(data=st.data())
def test_any_shape_position_and_config(data):
    one_of_any(data)


@pytest.mark.slow
@needs_avx2
@settings(max_examples=60)
@given(data=st.data())
def test_many_shapes_positions_and_configs(data):
    one_of_any(data)


def one_of_any(data):
    draw = data.draw
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    t = draw(st.sampled_from((1, 2, 7, 20)))
    d, dv = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    window = draw(st.sampled_from((0, 0, 1, 17, 130)))
    cap = draw(st.integers(window + t - 1 if window else t, 400).filter(lambda n: n >= t))
    text = (
        f"cached_attention:t={t},h={kv * group},kv={kv},d={d},dv={dv},cap={cap},window={window},"
        f"sink={draw(st.integers(0, 1))},c={draw(st.sampled_from(('f32', 'bf16')))},"
        f"arith={draw(st.sampled_from(('int8', 'int8', 'int8half')))}"
    )
    valid = draw(st.integers(1, t))
    start = draw(st.integers(0, 3 * cap if window else cap - valid))
    workload, seed = parse_workload(text), draw(st.integers(0, 999))
    hardware = draw(st.sampled_from((CPU, CPU, OLDER, PLAIN)))
    config = sample_config(INT8, workload, hardware, seed)
    given_ = poisoned(workload, start, valid, seed)
    proved(workload, config, seed, given_, hardware)


def proved(workload, config, seed, given_, hardware):
    """Check a config; weights that stay float32 must meet the bound of float32 arithmetic."""
    seen = check(INT8, workload, config, seed, inputs=given_, hardware=hardware)
    p = OP.full(workload)
    if config.values == "widen":
        exact = attended(p, OP.softmax_scale(p), seen.inputs).slack.numpy() + 1e-30
        assert (np.abs(seen.outputs["out"] - seen.expected["out"]) <= exact).all()


def test_two_keys_are_allowed_what_roundings_of_their_weights_do():
    workload = parse_workload(
        "cached_attention:t=2,h=4,kv=1,d=1,dv=1,cap=131,c=bf16,arith=int8half"
    )
    p, scale = OP.full(workload), OP.softmax_scale(OP.full(workload))
    for seed in range(10):
        given_ = poisoned(workload, 0, 2, seed)
        expected = OP.reference(workload, given_)
        rounded = attended(
            p, scale, given_, lambda w: w * (1 + 2**-9 * (-1) ** torch.arange(w.shape[-1]))
        )
        error = np.abs(rounded.out.numpy() - expected["out"])
        assert (error <= OP.bound(workload, given_, expected)["out"]).all()


@needs_avx2
@pytest.mark.parametrize("hardware", [CPU, OLDER, PLAIN], ids=["cpu", "older", "plain"])
def test_weights_that_stay_float32_are_as_exact(hardware):
    text = f"cached_attention:t=2,{SMALL},cap=200,sink=1,c=bf16,arith=int8half"
    workload, given_ = parse_workload(text), poisoned(text, 150, 2)
    config = dataclasses.replace(INT8.space(workload, hardware).default, values="widen")
    proved(workload, config, 0, given_, hardware)


@needs_avx2
@pytest.mark.parametrize("c", ["f32", "bf16"])
def test_tuning_does_not_change_results(c):
    text = f"cached_attention:t=6,{SMALL},cap=700,sink=1,c={c},arith=int8"
    given_ = {**poisoned(text, 640, 5), "sink": np.full(4, 1.0, np.float32)}
    results = [
        check(INT8, text, Int8Config(tile, TILE, splits, rows, splits > 1), inputs=given_).outputs[
            "out"
        ]
        for tile, splits, rows in ((1, 1, 1), (8, 2, 3))
    ]
    for other in results[1:]:
        assert np.allclose(results[0], other, rtol=0, atol=1e-5)


@needs_avx2
@pytest.mark.parametrize("outlier", [0, 1299])
def test_an_outlier_before_or_behind_others(outlier):
    text = "cached_attention:t=3,h=2,kv=1,d=16,dv=4,cap=1302,scale=1.0,arith=int8"
    given_ = poisoned(text, 1299, 3)
    given_["k_cache"][:], given_["v_cache"][:] = 0, 10
    given_["k_cache"][outlier, 0, 0], given_["v_cache"][outlier] = 4.0, -100
    given_["q"][:], given_["q"][:, :, 0] = 0, 1.0
    got = check(INT8, text, inputs=given_).outputs["out"]
    weight = np.exp(4.0) / (np.exp(4.0) + 1299 + np.arange(3))
    # flat keys of the outlier's own tile are lost, a tenth of all; the others are not
    assert np.allclose(got, (10 - 110 * weight)[:, None, None], atol=1.1)


@needs_avx2
def test_the_bound_refuses_a_missed_key_and_a_key_too_many():
    for arith in ("int8", "int8half"):
        text = f"cached_attention:t=1,{SMALL},cap=200,arith={arith}"
        workload, given_ = parse_workload(text), poisoned(text, 150, 1)
        want = OP.reference(workload, given_)
        bound = OP.bound(workload, given_, want)["out"]
        assert bound.max() < 0.02
        keys = {n: np.nan_to_num(given_[n], nan=1.0) for n in ("k_cache", "v_cache")}
        for wrong in (149, 151):
            other = OP.reference(workload, {**given_, **keys, **pos(wrong, 1)})["out"]
            assert (np.abs(other - want["out"]) > bound).any()


@needs_avx2
@pytest.mark.parametrize(
    ("arith", "hardware", "splits"),
    [("int8", CPU, 1)]
    + [
        pytest.param(arith, hardware, splits, marks=pytest.mark.slow)
        for arith in ("int8", "int8half")
        for hardware in (CPU, PLAIN)
        for splits in (1, 2)
        if (arith, hardware, splits) != ("int8", CPU, 1)
    ],
)
def test_what_is_no_number_reaches_those_who_see_it_and_no_others(arith, hardware, splits):
    text = f"cached_attention:t=5,{SMALL},cap=200,sink=1,c=f32,arith={arith}"
    workload, given_ = parse_workload(text), poisoned(text, 140, 5)
    config = dataclasses.replace(INT8.space(workload, hardware).default, splits=splits)
    seen = check(INT8, text, config, inputs=given_, hardware=hardware)
    for name, place, value in SPOILT:
        if arith == "int8half" and name == "v_cache":
            continue  # floats as they are
        arrays = {**given_, name: given_[name].copy()}
        arrays[name][place] = value
        own = {n: arrays[n] for n in ("k_cache", "v_cache")}
        for n, array in (INT8.pack(workload, config, own) | {"q": arrays["q"]}).items():
            seen.memory[n][...] = array
        seen.call()
        got, want = seen.memory["out"], OP.reference(workload, arrays)["out"]
        hit = np.isnan(want)
        assert hit.any() and not hit.all() and (np.isnan(got) == hit).all()
        assert np.allclose(got[~hit], want[~hit], atol=0.05)


SPOILT = (
    ("k_cache", (3, 1, 2), np.nan), ("k_cache", (142, 0, 11), -np.nan), ("k_cache", (143, 1, 0), np.inf),
    ("v_cache", (130, 0, 19), np.nan), ("v_cache", (143, 1, 3), np.nan), ("v_cache", (142, 0, 0), -np.inf),
    ("q", (2, 1, 7), np.nan), ("q", (0, 3, 0), np.inf),
)  # fmt: skip
"""Arrays, places and what stands there: keys and values that some queries do not see, too."""


@needs_avx2
def test_rows_of_zeros_and_nothing_valid():
    text = f"cached_attention:t=3,{SMALL},cap=40,arith=int8"
    given_ = poisoned(text, 20, 3)
    given_["q"][0], given_["k_cache"][3], given_["v_cache"][4], given_["v_cache"][5] = (
        0,
        0,
        0,
        1e-30,
    )
    seen = check(INT8, text, inputs=given_)
    seen.memory["pos"][...] = [0, 0]
    seen.memory["out"].fill(np.nan)
    seen.call()
    assert not seen.memory["out"].any()


@pytest.mark.parametrize(
    ("hardware", "product"), [("sapphirerapids", "vpdpbusd"), ("x86-64-v3", "vpmaddwd")]
)
def test_the_instructions(hardware, product):
    machine = PRESETS[hardware]
    workload = parse_workload("cached_attention:t=16,h=4,kv=1,d=64,dv=64,cap=256,c=bf16,arith=int8")
    kernel = INT8.lower(workload, INT8.space(workload, machine).default, machine)
    text = assembly([kernel], machine)
    assert product in text and "mimo_dot_bytes@PLT" not in text
    assert "zmm" in text if machine.has_avx512 else "zmm" not in text
    assert kernel.workspace_bytes >= 256 * (64 + 64)


def test_who_takes_what():
    names = {}
    for arith in ("float", "int8", "int8half"):
        workload = parse_workload(f"cached_attention:t=1,{SMALL},cap=9,arith={arith}")
        names[arith] = [s.name for s in schedules_for(workload, CPU)]
    assert "cached_attention.x86_int8" not in names["float"] and names["float"]
    assert (
        names["int8"]
        == names["int8half"]
        == ["cached_attention.x86_int8"] * (int8_dot.best_way(CPU) is not None)
    )
    with pytest.raises(UsageError, match="arith=int9"):
        parse_workload(f"cached_attention:t=1,{SMALL},cap=9,arith=int9")
    with pytest.raises(UsageError, match="takes d of up to"):
        parse_workload("cached_attention:t=1,h=1,kv=1,d=2048,dv=8,cap=9,arith=int8")


@needs_avx2
def test_work_counts_bytes_of_dots():
    workload = parse_workload("cached_attention:t=128,h=4,kv=2,d=64,dv=32,cap=128,arith=int8")
    config = INT8.space(workload, CPU).default
    counts = INT8.work(workload, config, CPU)
    assert counts.ops["dot_i8"] == 4 * 128 * 128 * (64 + 32)
    need = OP.counts(workload)
    assert all(counts.ops.get(k, 0) >= v for k, v in need.ops.items())
