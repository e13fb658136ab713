"""Attention in int8 arithmetic for GPUs, run on the CPU thread by thread and held to the op's bound."""

from __future__ import annotations

import numpy as np
import pytest
from harness import sample_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_attention import made

from mimo_compile.ir.caches import single_format
from mimo_compile.ir.hardware import CUDA, PRESETS
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.int8_attention import TILE
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention.cuda_flash import StagesConfig
from mimo_compile.schedules.cuda.emulate import compiler, emulate
from mimo_compile.search.measure.emulated import check_emulated, device_arrays

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
INT8, HALF = (get_schedule(f"cached_attention.cuda_{name}") for name in ("int8", "int8half"))
KINDS = pytest.mark.parametrize("schedule", [INT8, HALF], ids=lambda s: s.arith)
needs_compiler = pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler")
DIAGONAL = "cached_attention:t=40,h=3,kv=1,d=24,dv=18,cap=400,c=bf16,arith="
"""From position 240 on tokens stand in tiles of slots that lie wholly within the cache."""
RING = "cached_attention:t=20,h=6,kv=2,d=24,dv=18,cap=300,window=150,sink=1,c=bf16,arith="


def uneven(text, places, seed=0):
    """Return a workload's inputs at some places, whose rows have very different magnitudes."""
    inputs, rng = made(text, places, seed), np.random.default_rng(seed)
    for name in ("k_cache", "v_cache"):
        rows = single_format("bf16").decode(inputs[name])
        rows *= np.exp(rng.standard_normal((*rows.shape[:-1], 1))).astype(np.float32)
        inputs[name] = single_format("bf16").encode(rows)
    return inputs


# -- which kernels there are -----------------------------------------------------------------------


@KINDS
def test_each_arithmetic_has_a_kernel_of_its_own_and_none_of_cpus(schedule):
    text = f"cached_attention:t=2,h=4,kv=2,d=16,dv=16,cap=40,c=bf16,arith={schedule.arith}"
    workload = parse_workload(text)
    for hardware in (A100, H200):
        assert [s.name for s in schedules_for(workload, hardware)] == [schedule.name]
    assert not schedule.supports(workload, PRESETS["sapphirerapids"])
    assert not schedules_for(parse_workload(text.replace("c=bf16", "c=f32")), H200)
    append = parse_workload("kv_append:t=2,h=4,kv=2,d=16,dv=16,cap=40,c=bf16")
    (writer,) = schedules_for(append, H200)
    assert schedule.layouts(workload, None) == writer.layouts(append, None)


@KINDS
def test_heads_of_any_width_have_a_legal_default_or_no_kernel(schedule):
    for d, dv in ((64, 64), (128, 128), (192, 128), (256, 256), (576, 512)):
        text = (
            f"cached_attention:t=300,h=8,kv=2,d={d},dv={dv},cap=4096,c=bf16,arith={schedule.arith}"
        )
        workload = parse_workload(text)
        space = schedule.space(workload, H200)
        assert schedule.supports(workload, H200) == (dv <= 128 or (schedule is HALF and dv <= 256))
        assert schedule.supports(workload, H200) == any(space.legal(c) for c in space)
        assert all(c.keys == TILE for c in space) or schedule is HALF


@KINDS
@pytest.mark.parametrize("more", ["cap=3000,len=2500", "cap=1000,window=600", "cap=512,len=300"])
def test_counts_are_those_of_the_launches_and_no_less_than_needed(schedule, more):
    text = f"cached_attention:t=300,h=16,kv=2,d=64,dv=40,c=bf16,arith={schedule.arith},{more}"
    workload = parse_workload(text)
    need = get_op(workload.op).counts(workload)
    for seed in range(8):
        config = sample_config(schedule, workload, H200, seed)
        kernel = schedule.lower(workload, config, H200)
        counts = kernel.counts
        assert counts == schedule.work(workload, config, H200)
        assert len(counts.parts) == len(kernel.device.launches)
        assert need.bytes["dram"] <= counts.bytes["dram"] * (1 + 1e-9)
        assert counts.bytes["dram"] <= counts.bytes["l2"] * (1 + 1e-9)
        assert need.ops["dot_i8"] <= counts.ops["tile_i8"]
        attend = counts.parts[1].bytes
        # 16 rows share what they read: a byte of a key for each 16 products at least
        assert attend["l1"] >= attend["l2"] + counts.ops["tile_i8"] / 16
        assert (
            need.ops.get("fma_f32", 0.0) <= counts.ops.get("tile_bf16", 0.0) + counts.ops["fma_f32"]
        )


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
@KINDS
def test_any_shape_and_place(schedule):
    @settings(max_examples=6, deadline=None, database=None)
    @given(data=st.data())
    def held(data):
        draw = data.draw
        t, kv = draw(st.integers(1, 40)), draw(st.integers(1, 2))
        window = draw(st.sampled_from((0, 0, 1, 40, 128, 150)))
        cap = draw(st.integers(max(t, window + t - 1), 400))
        text = (
            f"cached_attention:t={t},h={kv * draw(st.integers(1, 6))},kv={kv},d={draw(st.integers(1, 70))},"
            f"dv={draw(st.integers(1, 70))},cap={cap},window={window},sink={draw(st.integers(0, 1))},"
            f"c=bf16,arith={schedule.arith}"
        )
        valid = draw(st.integers(0, t))
        places = [(draw(st.integers(0, 3 * cap if window else cap - valid)), valid)]
        hardware, seed = draw(st.sampled_from((A100, H200))), draw(st.integers(0, 99))
        config = sample_config(schedule, parse_workload(text), hardware, seed)
        check_emulated(text, schedule, config, hardware, inputs=uneven(text, places, seed))

    held()


@pytest.mark.slow
@needs_compiler
@KINDS
def test_arithmetic_is_that_of_the_integers(schedule):
    # the bound of int8half has room for weights of bfloat16, and so for logits of floats
    text = "cached_attention:t=8,h=4,kv=2,d=64,dv=32,cap=400,c=bf16,arith="
    seen = check_emulated(text + schedule.arith, schedule, None, H200, orders=(0,))
    plain = get_op("cached_attention").reference(parse_workload(text + "float"), seen.inputs)["out"]
    own = np.abs(seen.outputs["out"] - seen.expected["out"]).sum()
    assert own < 0.25 * np.abs(seen.outputs["out"] - plain).sum()


@pytest.mark.slow
@needs_compiler
@KINDS
def test_no_query_sees_later_tokens_of_a_whole_tile(schedule):
    check_integers(schedule, DIAGONAL + schedule.arith, None)


@pytest.mark.slow
@needs_compiler
def test_heads_as_wide_as_int8_goes():
    text = "cached_attention:t=10,h=2,kv=1,d=250,dv=140,cap=200,c=bf16,arith=int8"
    check_emulated(text, INT8, None, H200, inputs=uneven(text, [(150, 10)]))


@pytest.mark.slow
@needs_compiler
@KINDS
def test_what_is_no_number_reaches_those_who_see_it(schedule):
    workload = parse_workload(DIAGONAL + schedule.arith)
    given_ = uneven(DIAGONAL + schedule.arith, [(240, 40)])
    config = schedule.space(workload, H200).default
    kernel, op = schedule.lower(workload, config, H200), get_op("cached_attention")
    near = 0.05 * np.abs(op.reference(workload, given_)["out"]).max()
    for name, place, value in SPOILT:
        inputs = {**given_, name: given_[name].copy()}
        inputs[name][place] = value
        want = op.reference(workload, inputs)["out"]
        memory = device_arrays(workload, schedule, config, inputs)
        got, hit = emulate(kernel, H200, memory)["out"], np.isnan(want)
        assert hit.any()
        if schedule is HALF and name == "v_cache":  # floats as they are, of one column
            column = place[-1]
            assert not np.isfinite(got[240 + np.arange(40) >= place[0], :, column]).any()
            assert np.isfinite(np.delete(got, column, 2)).all()
            continue
        assert (np.isnan(got) == hit).all()
        assert np.allclose(got[~hit], want[~hit], atol=near)


NAN, INFINITE = 0x7FC0, 0xFF80
SPOILT = (
    ("k_cache", (3, 0, 2), NAN), ("k_cache", (241, 0, 23), 0x8000 | NAN), ("k_cache", (279, 0, 0), INFINITE),
    ("v_cache", (130, 0, 17), NAN), ("v_cache", (279, 0, 3), NAN), ("v_cache", (250, 0, 0), INFINITE),
    ("q", (2, 1, 7), np.nan), ("q", (0, 2, 0), np.inf),
)  # fmt: skip
"""Arrays, places and what stands there: keys and values that some queries do not see, too."""


@pytest.mark.slow
@needs_compiler
def test_a_query_that_sees_no_number_at_all_is_none():
    text = "cached_attention:t=3,h=2,kv=1,d=16,dv=16,cap=20,c=bf16,arith=int8"
    workload, inputs = parse_workload(text), uneven(text, [(0, 2)])
    for schedule in (INT8, HALF):
        workload = parse_workload(text.replace("int8", schedule.arith))
        inputs["k_cache"][0] = NAN
        config = schedule.space(workload, H200).default
        memory = device_arrays(workload, schedule, config, inputs)
        got = emulate(schedule.lower(workload, config, H200), H200, memory)["out"]
        assert np.isnan(got[:2]).all() and not got[2].any()


def check_integers(schedule, text, config):
    """Check a kernel at the place of `DIAGONAL` or `RING` that asks most, or with a workload's own inputs."""
    place = {DIAGONAL: (240, 40), RING: (385, 20)}.get(text.removesuffix(schedule.arith))
    check_emulated(text, schedule, config, H200, inputs=place and uneven(text, [place]))


@pytest.mark.slow
@needs_compiler
@KINDS
def test_rings_that_turn_within_a_tile(schedule):
    # the newest position stands in the middle of a tile of slots; of 385 in that which is not whole
    for start in (281, 385, 570):
        inputs = uneven(RING + schedule.arith, [(start, 20)])
        seen = check_emulated(RING + schedule.arith, schedule, None, H200, inputs=inputs)
        assert np.isfinite(seen.outputs["out"]).all()


@pytest.mark.slow
@needs_compiler
def test_no_knob_changes_a_bit_of_int8():
    text = RING + "int8"
    inputs, outs = uneven(text, [(570, 20)]), set()
    for config in (StagesConfig(TILE, 2, 1), StagesConfig(TILE, 3, 2), StagesConfig(TILE, 2, 8)):
        seen = check_emulated(text, INT8, config, H200, inputs=inputs, orders=(0,))
        outs.add(seen.outputs["out"].tobytes())
    assert len(outs) == 1


@pytest.mark.slow
@needs_compiler
def test_a_prompt_in_chunks_is_the_same_to_the_bit():
    whole = "cached_attention:t=24,h=6,kv=2,d=24,dv=18,cap=200,c=bf16,arith=int8"
    inputs = uneven(whole, [(150, 24)])
    first = check_emulated(whole, INT8, None, H200, inputs=inputs, orders=(0,)).outputs["out"]
    for start, count in ((150, 10), (160, 14)):
        text = whole.replace("t=24", f"t={count}")
        own = {**inputs, "q": inputs["q"][start - 150 : start - 150 + count]}
        own["pos"] = np.array([start, count], np.int32)
        got = check_emulated(text, INT8, None, H200, inputs=own, orders=(0,)).outputs["out"]
        assert got.tobytes() == first[start - 150 : start - 150 + count].tobytes()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("zero", [True, False])
def test_keys_of_almost_no_value_keep_their_weight(zero):
    text = "cached_attention:t=20,h=2,kv=1,d=16,dv=16,cap=200,c=bf16,arith=int8"
    inputs = made(text, [(150, 20)])
    keys, values = (single_format("bf16").decode(inputs[n]) for n in ("k_cache", "v_cache"))
    keys[3] = 4 * np.sign(inputs["q"][:, 0].mean(0))  # what all queries look at, somewhat
    values[3] = 0.0 if zero else 1e-12
    values[100] *= 1e9  # beside values of the same tile that are large
    for name, array in (("k_cache", keys), ("v_cache", values)):
        inputs[name] = single_format("bf16").encode(array)
    check_emulated(text, INT8, None, H200, inputs=inputs)
