"""Kernels for GPUs over KV caches of 8-bit floats, run on the CPU and held to the ops' bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.caches import single_format
from mimo_compile.ir.hardware import CUDA, PRESETS
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.attention import cuda_float8_layout as layout
from mimo_compile.schedules.cuda.emulate import compiler, emulate
from mimo_compile.search.measure.emulated import check_emulated, device_arrays

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
APPEND = get_schedule("kv_append.cuda_float8")
DECODE = get_schedule("cached_attention.cuda_float8_decode")
PREFILL = get_schedule("cached_attention.cuda_float8_prefill")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler")


def made(text, places, seed=0):
    """Return a workload's inputs with other places ``pos``; what was never written then holds NaN."""
    workload = parse_workload(text)
    op = get_op(workload.op)
    inputs, rng = op.make_inputs(workload, np.random.default_rng(seed)), np.random.default_rng(seed)
    p = op.full(workload)
    pos = np.array(places, np.int32).reshape(inputs["pos"].shape)
    for name in ("k_cache", "v_cache"):
        drawn = rng.standard_normal((p["b"], p["cap"], *inputs[name].shape[-2:]), dtype=np.float32)
        # rows of very different powers of two
        drawn *= np.exp2(rng.integers(-12, 3, (*drawn.shape[:-1], 1))).astype(np.float32)
        for own, (start, valid) in zip(drawn, pos.reshape(-1, 2), strict=True):
            own[min(start + valid, p["cap"]) :] = np.nan
        inputs[name] = single_format("e4m3").encode(drawn.reshape(inputs[name].shape))
    for i, (_, valid) in enumerate(pos.reshape(-1, 2)):
        inputs["q"][i * p["t"] + valid : (i + 1) * p["t"]] = np.nan
    return {**inputs, "pos": pos}


@settings(max_examples=15, deadline=None)
@given(
    b=st.integers(1, 3), kv=st.integers(1, 3), d=st.integers(1, 70), dv=st.integers(1, 70),
    cap=st.integers(1, 70), seed=st.integers(0, 99),
)  # fmt: skip
def test_packing_is_undone_and_pads_with_zeros(b, kv, d, dv, cap, seed):
    text = f"cached_attention:t=1,h={kv},kv={kv},d={d},dv={dv},cap={cap},len={-(-cap // 2)},c=e4m3,b={b}"
    workload = parse_workload(text)
    inputs = get_op(workload.op).make_inputs(workload, np.random.default_rng(seed))
    caches = {n: inputs[n] for n in ("k_cache", "v_cache")}
    packed = layout.pack(workload, caches)
    args = {a.name: a for a in layout.kernel_args(workload)}
    for name, array in packed.items():
        assert array.shape == args[name].shape and array.dtype == args[name].dtype
    back = layout.unpack(workload, packed)
    assert all(np.array_equal(back[n], caches[n], equal_nan=True) for n in caches)


def test_columns_of_values_alternate_and_powers_stand_behind_16_rows():
    workload = parse_workload("cached_attention:t=1,h=1,kv=1,d=32,dv=32,cap=32,c=e4m3")
    caches = {n: np.zeros((32, 1, 32), np.float32) for n in ("k_cache", "v_cache")}
    for array in caches.values():
        array[16 + 5, 0, 16 + 9] = 448 * 2.0**3
    packed = layout.pack(workload, caches)
    for name, place in (("k_cache", 16 + 9), ("v_cache", 16 + 2 * (9 - 8) + 1)):
        block = packed[name][0, 1]
        assert block[5 * 32 + place] == 0x7E and block[16 * 32 + 5] == 127 + 3
        assert np.count_nonzero(block[: 16 * 32]) == 1


def test_gpus_and_cpus_do_not_get_each_other_s_kernels():
    for op in ("kv_append", "cached_attention"):
        workload = parse_workload(f"{op}:t=2,h=4,kv=2,d=16,dv=16,cap=128,c=e4m3")
        for hardware in (A100, H200):
            found = schedules_for(workload, hardware)
            assert found and all(".cuda_float8" in s.name for s in found)
            assert all(s.layouts(workload, None) == APPEND.layouts(workload, None) for s in found)
        assert not any(
            ".cuda" in s.name for s in schedules_for(workload, PRESETS["sapphirerapids"])
        )
    ring = "cached_attention:t=2,h=4,kv=2,d=16,dv=16,cap=65,window=64,c=e4m3"
    assert not schedules_for(parse_workload(ring), H200)  # blocks would not lie together


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (DECODE, "cached_attention:t=3,h=16,kv=2,d=64,dv=40,cap=3000,len=2500,c=e4m3,b=3"),
        (DECODE, "cached_attention:t=3,h=16,kv=2,d=64,dv=40,cap=608,window=500,c=e4m3"),
        (PREFILL, "cached_attention:t=300,h=16,kv=2,d=64,dv=40,cap=3000,len=2500,c=e4m3"),
        (APPEND, "kv_append:t=5,h=4,kv=2,d=20,dv=16,cap=40,rot=8,norm=1,c=e4m3,b=2"),
    ],
)
def test_counts_are_those_of_the_kernel_and_no_less_than_needed(schedule, text):
    workload = parse_workload(text)
    need = get_op(workload.op).counts(workload)
    for seed in range(10):
        config = sample_config(schedule, workload, H200, seed)
        kernel = schedule.lower(workload, config, H200)
        counts = kernel.counts
        assert counts == schedule.work(workload, config, H200)
        assert need.bytes["dram"] <= counts.bytes["dram"] * (1 + 1e-9)
        assert counts.bytes["dram"] <= counts.bytes["l2"] * (1 + 1e-9)
        assert counts.ops.get("tile_bf16", 0.0) / 3 + counts.ops["fma_f32"] >= need.ops["fma_f32"]
        assert len(counts.parts) in (0, len(kernel.device.launches))


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("schedule", "most"), [(DECODE, 6), (PREFILL, 60)])
def test_any_shape_and_place(schedule, most):
    @settings(max_examples=10, deadline=None, database=None)
    @given(data=st.data())
    def held(data):
        draw = data.draw
        t, b, kv = draw(st.integers(1, most)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
        window = draw(st.sampled_from((0, 0, 1, 16, 17, 40, 90)))
        cap = draw(st.integers(max(t, window + t - 1), 260))
        cap = -(-cap // 16) * 16 if window else cap
        text = (
            f"cached_attention:t={t},h={kv * draw(st.integers(1, 6))},kv={kv},d={draw(st.integers(1, 70))},"
            f"dv={draw(st.integers(1, 70))},cap={cap},window={window},sink={draw(st.integers(0, 1))},"
            f"c=e4m3,b={b}"
        )
        places = []
        for _ in range(b):
            valid = draw(st.integers(0 if b > 1 else 1, t))
            places.append((draw(st.integers(0, 3 * cap if window else cap - valid)), valid))
        hardware, seed = draw(st.sampled_from((A100, H200))), draw(st.integers(0, 99))
        config = sample_config(schedule, parse_workload(text), hardware, seed)
        check_emulated(text, schedule, config, hardware, inputs=made(text, places, seed))

    held()


PRECISE = "cached_attention:t=1,h=4,kv=1,d=128,dv=128,cap=512,len=450,c=e4m3"


def check_precise(schedule, text, config):
    """Hold results to a part of the op's bound which sums of two bfloat16 numbers are beyond."""
    check_emulated(text, schedule, config, H200, most_ratio=0.03)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("schedule", [DECODE, PREFILL])
def test_queries_and_weights_have_24_bits(schedule):
    check_precise(schedule, PRECISE, None)


@pytest.mark.slow
@needs_compiler
def test_a_value_that_is_no_number_shows_behind_a_weight_of_0():
    text = "cached_attention:t=2,h=2,kv=2,d=16,dv=16,cap=192,len=150,c=e4m3"
    workload = parse_workload(text)
    for schedule in (DECODE, PREFILL):
        seen = check_emulated(text, schedule, None, H200)
        inputs = {n: a.copy() for n, a in seen.inputs.items()}
        inputs["q"][...] = 0
        inputs["q"][..., 0] = 40
        inputs["k_cache"][...] = 0
        inputs["k_cache"][0, 0, 0] = 40  # of head 0: all other weights are 2^-577 of its own
        inputs["v_cache"][70, 0] = np.nan
        inputs["v_cache"][149, 1] = np.nan  # seen by the second token alone
        config = schedule.space(workload, H200).default
        arrays = device_arrays(workload, schedule, config, inputs)
        out = emulate(seen.kernel, H200, arrays)["out"]
        assert np.isnan(out[:, 0]).all() and np.isnan(out[1, 1]).all(), schedule.name
        assert np.isfinite(out[0, 1]).all(), schedule.name


@pytest.mark.slow
@needs_compiler
def test_a_fault_stays_to_be_seen():
    text = "cached_attention:t=1,h=2,kv=2,d=16,dv=16,cap=192,len=150,c=e4m3"
    workload = parse_workload(text)
    for name, schedule in (("k_cache", DECODE), ("v_cache", PREFILL)):
        seen = check_emulated(text, schedule, None, H200)
        inputs = dict(seen.inputs)
        inputs[name] = inputs[name].copy()
        inputs[name][70, 0] = np.nan  # of head 0
        config = schedule.space(workload, H200).default
        arrays = device_arrays(workload, schedule, config, inputs)
        out = emulate(seen.kernel, H200, arrays)["out"]
        assert np.isnan(out[0, 0]).all() and np.isfinite(out[0, 1]).all()


@pytest.mark.slow
@needs_compiler
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_append_of_any_shape(data):
    draw = data.draw
    kv, t, d = draw(st.integers(1, 2)), draw(st.integers(1, 20)), draw(st.integers(1, 140))
    text = (
        f"kv_append:t={t},h={kv * draw(st.integers(1, 3))},kv={kv},d={d},dv={draw(st.integers(1, 140))},"
        f"cap=48,rot={2 * draw(st.integers(0, d // 2))},norm={draw(st.integers(0, 1))},vscale=0.5,"
        f"c=e4m3,b={draw(st.integers(1, 2))}"
    )
    seed = draw(st.integers(0, 99))
    config = sample_config(APPEND, parse_workload(text), H200, seed)
    check_emulated(text, APPEND, config, H200, seed)


@pytest.mark.slow
@needs_compiler
def test_every_code_is_the_nearest_and_ties_go_to_even():
    """Values that are not turned or normalised are exact, and so are the codes they become."""
    text = "kv_append:t=16,h=1,kv=1,d=16,dv=256,cap=16,c=e4m3"
    workload = parse_workload(text)
    inputs = get_op(workload.op).make_inputs(workload, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    codes = np.arange(256, dtype=np.uint8)[None].repeat(16, 0)
    codes[codes % 128 == 127] = 0
    near = np.float32(1) + rng.integers(-2, 3, (16, 256)) * np.float32(2.0**-4)  # ties and others
    numbers = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32).numpy() * near
    numbers[:, 0] = 448  # the power of two is one
    inputs["qkv"][:, 32:] = np.clip(numbers, -448, 448)
    inputs["pos"] = np.array([0, 16], np.int32)
    seen = check_emulated(text, APPEND, None, H200, inputs=inputs)
    want = single_format("e4m3").encode(inputs["qkv"][:, 32:].reshape(16, 1, 256))
    assert np.array_equal(seen.outputs["v_cache"], want)
