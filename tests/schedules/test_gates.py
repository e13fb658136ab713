"""Gates of SeerAttention-R on x86: queries and compressed keys, every shape, format and position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.kv_append import rotate
from mimo_compile.ir.ops.seer_gates import angles, gate_keys, gate_queries
from mimo_compile.schedules import get_schedule

CPU = local_cpu()
QUERIES, KEYS = get_schedule("gate_queries.x86"), get_schedule("gate_keys.x86")
QUERIES_OP, KEYS_OP = get_op("gate_queries"), get_op("gate_keys")


def places(start, valid):
    return {"pos": np.array([start, valid], np.int32)}


def cached(text, start, valid, seed):
    """Return keys up to the last token and NaN behind it."""
    workload = parse_workload(text)
    fmt = parse_cache_format(KEYS_OP.full(workload)["c"])
    shape = next(a.shape for a in KEYS_OP.args(workload) if a.name == "k_cache")
    keys = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    keys[start + valid :] = np.nan
    return {"k_cache": fmt.encode(keys), **places(start, valid)}


def drawn_widths(draw):
    """Return the parameters of widths: odd ones, partial rotations, vectors and single numbers."""
    d, g = draw(st.integers(2, 40)), draw(st.sampled_from((2, 7, 16, 24, 33, 64)))
    rot, grot = 2 * draw(st.integers(1, d // 2)), 2 * draw(st.integers(1, g // 2))
    norm, w = draw(st.integers(0, 1)), draw(st.sampled_from(("f32", "bf16")))
    return f"d={d},g={g},rot={rot},grot={grot},norm={norm},w={w}"


@settings(max_examples=2)
@given(data=st.data())
def test_queries_of_any_shape(data):
    one_of_any_queries(data)


@settings(max_examples=2)
@given(data=st.data())
def test_keys_of_any_shape_position_and_format(data):
    one_of_any_keys(data)


@pytest.mark.slow
@settings(max_examples=40)
@given(data=st.data())
def test_many_shapes_positions_and_formats(data):
    one_of_any_queries(data)
    one_of_any_keys(data)


def one_of_any_queries(data):
    draw = data.draw
    kv, t = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 5)))
    text = (
        f"gate_queries:t={t},h={kv * draw(st.integers(1, 3))},kv={kv},{drawn_widths(draw)},eps=1e-5"
    )
    start, seed = draw(st.integers(0, 100_000)), draw(st.integers(0, 999))
    workload = parse_workload(text)
    config = sample_config(QUERIES, workload, CPU, seed)
    check(QUERIES, workload, config, seed, inputs=places(start, draw(st.integers(0, t))))


def one_of_any_keys(data):
    draw = data.draw
    t = draw(st.sampled_from((1, 1, 2, 17, 60)))
    cap = draw(st.integers(t, 150))
    text = (
        f"gate_keys:t={t},kv={draw(st.integers(1, 3))},cap={cap},"
        f"size={draw(st.sampled_from((1, 3, 16, 20, 32)))},last={draw(st.integers(0, 1))},"
        f"c={draw(st.sampled_from(('f32', 'bf16')))},{drawn_widths(draw)}"
    )
    valid = draw(st.integers(0, t))
    start, seed = draw(st.integers(0, cap - valid)), draw(st.integers(0, 999))
    workload = parse_workload(text)
    config = sample_config(KEYS, workload, CPU, seed)
    check(KEYS, workload, config, seed, inputs=cached(text, start, valid, seed))


@pytest.mark.parametrize("w", ["f32", "bf16"])
def test_usual_sizes(w):
    shape = f"kv=2,d=128,g=128,rot=128,grot=128,norm=1,w={w}"
    check(QUERIES, f"gate_queries:t=1,h=8,{shape}")
    check(KEYS, f"gate_keys:t=70,cap=256,size=64,c=bf16,len=200,{shape}")


def test_keys_step_by_step_equal_those_at_once():
    """Whatever order tokens come in, of 16-bit keys; nothing is written before a block is complete."""
    text = "gate_keys:t={},kv=2,d=9,cap=40,size=8,g=17,rot=6,grot=10,norm=1,c=bf16"
    one, whole = parse_workload(text.format(1)), cached(text.format(35), 0, 35, 1)
    at_once = check(KEYS, text.format(35), inputs=whole).outputs["desc"]
    seen = check(KEYS, one, inputs=cached(text.format(1), 0, 1, 1))
    seen.memory["k_cache"][...] = KEYS.pack(one, None, whole)["k_cache"]
    held = seen.memory["desc"].copy()
    for start in range(35):
        seen.memory["pos"][...] = [start, 1]
        seen.call()
        assert (seen.memory["desc"] != held).any() == (start % 8 == 7)
        held = seen.memory["desc"].copy()
    state = KEYS.unpack_state(one, None, {"desc": held})["desc"]
    assert np.array_equal(state[:4], at_once[:4])


def test_a_block_that_is_completed_again_has_its_new_keys():
    """Going back needs nothing that was kept: block 1 is overwritten from its middle on."""
    text = "gate_keys:t={},kv=1,d=8,cap=40,size=8,g=16,rot=8,grot=8"
    first, again = cached(text.format(20), 0, 20, 1), cached(text.format(20), 0, 20, 2)
    old = check(KEYS, text.format(20), inputs=first).outputs["desc"]
    mixed = first["k_cache"].copy()
    mixed[11:20] = again["k_cache"][11:20]
    entries = {"desc": old, "k_cache": mixed}
    went_back = check(KEYS, text.format(9), inputs={**entries, **places(11, 9)}).outputs["desc"]
    afresh = check(KEYS, text.format(20), inputs={**first, "k_cache": mixed}).outputs["desc"]
    assert np.array_equal(went_back[:2], afresh[:2])
    assert not np.allclose(went_back[1], old[1])


@settings(max_examples=10)
@given(seed=st.integers(0, 999), start=st.integers(0, 5000), last=st.booleans())
def test_ops_compute_the_gates_of_what_was_not_rotated(seed, start, last):
    """In float64, from raw queries and keys; pools of a block are greatest, least, mean."""
    torch.manual_seed(seed)
    freq, own = 0.3 ** torch.arange(2.0), 0.2 ** torch.arange(3.0)
    q, wq = torch.randn(3, 6, 4).double(), torch.randn(2, 12, 8).double()
    norm, pos = torch.rand(8).double(), torch.tensor([start, 3], dtype=torch.int32)
    at = start + torch.arange(3)
    got = torch.ops.mimo.gate_queries(
        rotate(q, angles(at, freq, torch.float64)), pos, freq, own, wq, norm, 1e-6
    )
    table = angles(at, own, torch.float64)
    torch.testing.assert_close(got, gate_queries(q, wq, norm, table))
    keys, wk = torch.randn(12, 2, 4).double(), torch.randn(2, 12, 8).double()
    desc = torch.zeros(3, 2, 1, 8).double()
    stored = rotate(keys, angles(torch.arange(12), freq, torch.float64))
    pos = torch.tensor([0, 11], dtype=torch.int32)
    torch.ops.mimo.gate_keys(stored, pos, freq, own, wk, norm, desc, 4, last, 1e-6)
    blocks = keys[:8].unflatten(0, (2, 4))
    pools = torch.stack([blocks.amax(1), blocks.amin(1), blocks.mean(1)], 2)
    table = angles(torch.tensor([0, 4]) + 3 * last, own, torch.float64)
    torch.testing.assert_close(desc[:2, :, 0], gate_keys(pools, wk, norm, table))
    assert not desc[2].any()


@pytest.mark.parametrize(
    ("op", "text", "out"),
    [
        (QUERIES_OP, "gate_queries:t=2,h=8,kv=2,d=64,g=64,rot=64,grot=64,norm=1", "out"),
        (KEYS_OP, "gate_keys:t=70,kv=2,d=64,cap=128,size=64,g=64,rot=64,grot=64,norm=1", "desc"),
    ],
)
def test_bounds_refuse_what_is_wrong(op, text, out):
    """One weight of the wrong sign, angles a thousandth off, a norm that is left out."""
    workload = parse_workload(text)
    inputs = op.make_inputs(workload, np.random.default_rng(1))
    expected = op.reference(workload, inputs)
    bound = op.bound(workload, inputs, expected)[out]
    assert bound.max() < 5e-3  # of numbers around one
    weight = inputs["weight"].copy()
    weight[1, 5, 7] *= -1
    freq = inputs["gate_freq"] * np.float32(1.001)
    plain = {"norm": np.ones_like(inputs["norm"])}
    for changed in ({"weight": weight}, {"gate_freq": freq}, plain):
        other = op.reference(workload, {**inputs, **changed})[out]
        assert (np.abs(other - expected[out]) > bound).any(), changed.keys()


def test_counts_are_those_of_a_block():
    text = "gate_keys:t=1,kv=2,d=32,cap=256,size=64,g=16,rot=32,grot=16,w=bf16,c=bf16"
    kernel = check(KEYS, text).kernel
    keys, weights, entries = 2 * 2 * 64 * 32, 2 * 2 * 96 * 16, 4 * 2 * 16
    assert kernel.counts.bytes["dram"] == keys + weights + entries + 8
    assert kernel.counts.ops["add_f32"] == 3 * 2 * 64 * 32
    idle = KEYS_OP.counts(parse_workload(f"{text},len=250"))
    assert idle.bytes["dram"] == 8 and not any(idle.ops.values())


def test_code_without_avx512():
    old = PRESETS["x86-64-v3"].with_threads(2)
    if old.features <= CPU.features:
        text = "gate_queries:t=3,h=4,kv=2,d=9,g=18,rot=4,grot=6,norm=1,w=bf16"
        check(QUERIES, text, hardware=old, threads=1)
        text = "gate_keys:t=40,kv=2,d=9,cap=80,size=16,g=18,rot=4,grot=6,c=bf16"
        check(KEYS, text, hardware=old, threads=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate_queries:t=1,h=3,kv=2,d=8,g=8,rot=8,grot=8", "h=3 is not a multiple of kv=2"),
        ("gate_queries:t=1,h=2,kv=2,d=8,g=8,rot=3,grot=8", "must be even"),
        ("gate_keys:t=1,kv=2,d=8,cap=9,size=4,g=8,rot=8,grot=10", "grot at most g"),
        ("gate_keys:t=1,kv=2,d=8,cap=9,size=4,g=8,rot=8,grot=8,w=f16", "w must be f32 or bf16"),
        ("gate_keys:t=1,kv=2,d=8,cap=9,size=4,g=8,rot=8,grot=8,len=10", "between t and cap"),
    ],
)
def test_bad_workloads(text, message):
    with pytest.raises(UsageError, match=message):
        parse_workload(text)
