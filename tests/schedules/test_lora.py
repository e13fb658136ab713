"""QLoRA kernels: adapters over frozen weights against the reference, bits of rows without one, fusions."""

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
from mimo_compile.ir.ops import get_op, load_all, parse_workload
from mimo_compile.ir.ops.lora_mpgemm import adapter_f32
from mimo_compile.schedules import get_schedule, names_for, schedules_for
from mimo_compile.schedules.lora.gemm import FUSIONS
from mimo_compile.schedules.lora.packing import Adapters

CPU = local_cpu().with_threads(max(2, local_cpu().threads))
FORMATS = ("w2g64", "w4g64", "w8", "w3g64", "w4zg32", "w1.58", "nf4g64", "afp4g32", "complex2")
load_all()


def schedules(text):
    return schedules_for(parse_workload(text), CPU)


def configs(schedule, workload):
    """Return a legal config for each fusion."""
    space = schedule.space(workload, CPU)
    # threads of one launch wait for each other only where there are several
    values = [
        dataclasses.replace(space.default, fusion=fusion, parallel=fusion == "shared")
        for fusion in space.knobs["fusion"]
    ]
    return [config for config in values if space.legal(config)]


@settings(max_examples=8)
@given(data=st.data())
def test_any_shape_rank_format_and_config(data):
    fmt = data.draw(st.sampled_from((*FORMATS, "f32", "bf16")))
    act = "a16" if fmt in ("f32", "bf16") else data.draw(st.sampled_from(("a8", "a16")))
    m, n, k = (data.draw(st.integers(1, most)) for most in (6, 120, 200))
    if fmt == "complex2":
        n, k = 2 * n, 2 * k
    r = data.draw(st.sampled_from((1, 2, 3, 16, 17, 35)))
    first = data.draw(st.integers(0, n - 1))
    parts = f",parts={first}+{n - first}" if first else ""
    more = data.draw(st.sampled_from(("", ",bias=1"))) + f",r={r},l={data.draw(st.integers(1, 4))}"
    kind = data.draw(st.sampled_from(("", ",d=f32", ",d=fp8")))
    text = f"lora_mpgemm:m={m},n={n},k={k},w={fmt},a={act}{more}{kind}{parts}"
    workload = parse_workload(text)
    schedule = data.draw(st.sampled_from(schedules(text)))
    seed = data.draw(st.integers(0, 999))
    check(schedule, workload, sample_config(schedule, workload, CPU, seed), seed, hardware=CPU)


@pytest.mark.parametrize("r", [1, 3, 16, 17])
@pytest.mark.parametrize("d", ["f32", "bf16", "fp8"])
def test_every_rank_and_storage(r, d):
    for m in (1, 5):
        text = f"lora_mpgemm:m={m},n=41,k=77,w=w8,a=a8,r={r},l=3,d={d}"
        schedule = schedules(text)[0]
        for config in configs(schedule, parse_workload(text)):
            check(schedule, text, config, hardware=CPU)


def run(schedule, text, config, **inputs):
    return check(schedule, text, config, inputs=inputs, hardware=CPU).outputs["y"]


@pytest.mark.parametrize(
    ("m", "fmt"),
    [(1, "w4g64"), (3, "w4g64"), (1, "w3g64"), (1, "afp4g64"), (1, "complex2"), (2, "f32")],
)
def test_no_adapter_and_zero_b_have_the_bits_of_the_plain_kernel(m, fmt):
    act = "a16" if fmt == "f32" else "a8"
    plain = f"mpgemm:m={m},n=40,k=200,w={fmt},a={act}" + (",bias=1" if m > 1 else "")
    text = f"lora_{plain},r=16,l=2"
    for schedule in schedules(text):
        base = get_schedule(schedule.name.removeprefix("lora_"))
        op = get_op("lora_mpgemm")
        arrays = op.make_inputs(parse_workload(text), np.random.default_rng(5))
        if "scale" in arrays:  # sums of zero with a sign
            signs = np.where(np.arange(arrays["scale"].shape[0]) % 2, 1, -1).astype(np.float32)
            arrays["scale"] = arrays["scale"] * signs[:, None]
        arrays["x"][1:] = 0
        shared = {n: a for n, a in arrays.items() if n not in LORA}
        want = run(base, plain, None, **shared).tobytes()
        for config in configs(schedule, parse_workload(text)):
            for ids in (-1, 2, -(2**31)):
                none = np.full(m, ids, np.int32)
                assert run(schedule, text, config, **{**arrays, "adapter": none}).tobytes() == want
            zero = {**arrays, "lora_b": arrays["lora_b"] * 0}
            assert run(schedule, text, config, **zero).tobytes() == want, (schedule.name, config)


LORA = ("adapter", "lora_a", "lora_b", "gain")


def test_every_matmul_of_a_cpu_has_adapters():
    for name in (n for n in names_for("mpgemm") if ".x86_" in n):
        fused, base = get_schedule(f"lora_{name}"), get_schedule(name)
        assert type(base) is fused.base and fused.__doc__ and type(fused).__name__ != "Lora"
        assert fused.config(fusion="after") == fused.config_from_json(
            fused.config_to_json(fused.config(fusion="after"))
        )
        assert get_schedule(f"lora_{name}").config is fused.config


@pytest.mark.parametrize(
    ("fmt", "act"),
    [("w4g64", "a8"), ("w1.58", "a8"), ("anf4g128", "a16"), ("complex2wl", "a8"), ("w2g64", "a8")],
)
def test_schedules_of_every_algorithm(fmt, act):
    text = f"lora_mpgemm:m=2,n=70,k=256,w={fmt},a={act},r=5,l=2,bias=1"
    for schedule in schedules(text):
        check(schedule, text, configs(schedule, parse_workload(text))[-1], hardware=CPU)


def test_fusions_agree():
    text = "lora_mpgemm:m=1,n=530,k=333,w=w2g32,a=a8,r=16,l=2"
    for schedule in schedules(text):
        results = [run(schedule, text, c) for c in configs(schedule, parse_workload(text))]
        assert len(results) == len(FUSIONS)
        for other in results[1:]:
            norm = np.linalg.norm(results[0])
            assert np.linalg.norm(results[0] - other) <= 1e-6 * norm


def test_swapping_adapters_restores_results_and_leaves_weights_alone():
    text = "lora_mpgemm:m=2,n=64,k=128,w=w4g64,a=a8,r=4,l=2"
    schedule = schedules(text)[0]
    ids = np.zeros(2, np.int32)
    done = check(schedule, text, inputs={"adapter": ids}, hardware=CPU)
    weights = {n: a.tobytes() for n, a in done.memory.items() if n not in ("x", "y", "adapter")}
    first = done.outputs["y"].tobytes()
    seen = []
    for chosen in (1, -1, 0):
        done.memory["adapter"][...] = chosen
        done.call()
        seen.append(done.memory["y"].tobytes())
    assert seen[2] == first and len({first, *seen}) == 3
    assert all(done.memory[n].tobytes() == bits for n, bits in weights.items())


def test_rows_of_a_batch_have_their_own_adapters():
    text = "lora_mpgemm:m=5,n=48,k=96,w=w4g32,a=a8,r=3,l=3"
    schedule = schedules(text)[0]
    rng = np.random.default_rng(2)
    x = np.repeat(rng.standard_normal((1, 96), dtype=np.float32), 5, 0)
    mixed = run(schedule, text, None, x=x, adapter=np.array([2, -1, 0, 2, 1], np.int32))
    assert np.array_equal(mixed[0], mixed[3])
    assert len({row.tobytes() for row in mixed}) == 4
    for row, i in ((0, 2), (1, -1), (2, 0), (4, 1)):
        same = run(schedule, text, None, x=x, adapter=np.full(5, i, np.int32))
        assert np.array_equal(same[0], mixed[row])


def test_adapters_see_activations_before_they_are_quantised():
    # one large value makes int8 codes of all others zero
    n, k = 16, 32
    x = np.full((1, k), 0.01, np.float32)
    x[0, 0] = 1000.0
    a, b = np.ones((1, 1, k), np.float32), np.ones((1, n, 1), np.float32)
    a[0, 0, 0] = 0
    text = f"lora_mpgemm:m=1,n={n},k={k},w=w8,a=a8,r=1,d=f32"
    arrays = {"x": x, "lora_a": a, "lora_b": b, "gain": np.full((1, 1), 2, np.float32)}
    arrays |= {"codes": np.full((n, k), 128, np.uint8)}
    for schedule in schedules(text):
        np.testing.assert_allclose(run(schedule, text, None, **arrays), 0.01 * 31 * 2, rtol=1e-6)


def test_every_e4m3_number_is_decoded_exactly():
    codes = np.array([c for c in range(256) if c not in (0x7F, 0xFF)], np.uint8)
    n, k = len(codes), 33
    x = np.zeros((1, k), np.float32)
    x[0, 20] = 1
    a = np.zeros((1, 1, k), np.uint8)
    a[0, 0, 20] = 0x38  # one
    text = f"lora_mpgemm:m=1,n={n},k={k},w=f32,r=1,d=fp8"
    zero = np.zeros((n, k), np.float32)
    for schedule in schedules(text):
        arrays = {"x": x, "w": zero, "lora_a": a, "lora_b": codes[None, :, None]}
        got = run(schedule, text, None, **arrays, gain=np.ones((1, 1), np.float32))
        assert np.array_equal(got[0], adapter_f32(codes))
        # and the same numbers in A
        text2 = f"lora_mpgemm:m=1,n={n},k={k},w=f32,r={n},d=fp8"
        a2 = np.zeros((1, n, k), np.uint8)
        a2[0, :, 20] = codes
        b2 = (np.eye(n, dtype=np.uint8) * 0x38)[None]
        arrays = {"x": x, "w": zero, "lora_a": a2, "lora_b": b2}
        got = run(schedule, text2, None, **arrays, gain=np.ones((1, 1), np.float32))
        assert np.array_equal(got[0], adapter_f32(codes))


def test_codes_that_are_no_number_are_refused():
    adapters = Adapters.of(parse_workload("lora_mpgemm:m=1,n=16,k=16,r=1,d=fp8"))
    with pytest.raises(UsageError, match="no number"):
        adapters.pack({"lora_a": np.full((1, 1, 16), 0x7F, np.uint8)})


@pytest.mark.parametrize("parts", ["32+16+16", "20+12+32"])
def test_stacked_matrices_are_separate_adapters(parts):
    rows = [int(p) for p in parts.split("+")]
    text = f"lora_mpgemm:m=2,n=64,k=48,w=w8,a=a8,r=5,l=2,parts={parts}"
    workload = parse_workload(text)
    aligned = all(sum(rows[:i]) % 16 == 0 for i in range(len(rows)))
    assert Adapters.of(workload).columns == (5 if aligned else 15)
    arrays = get_op("lora_mpgemm").make_inputs(workload, np.random.default_rng(0))
    arrays["gain"][:, 1] = 0
    schedule = schedules(text)[0]
    y = run(schedule, text, None, **arrays)
    none = run(schedule, text, None, **{**arrays, "adapter": np.full(2, -1, np.int32)})
    second = slice(rows[0], rows[0] + rows[1])
    assert np.array_equal(y[:, second], none[:, second])
    assert (y[0, : rows[0]] != none[0, : rows[0]]).all()


def test_torch_op_is_the_reference():
    for text in (
        "lora_mpgemm:m=4,n=40,k=64,w=w4g64,a=a8,r=3,l=2,bias=1,parts=8+32",
        "lora_mpgemm:m=4,n=40,k=64,w=f32,r=3,l=2,d=fp8",
    ):
        workload = parse_workload(text)
        op = get_op("lora_mpgemm")
        arrays = op.make_inputs(workload, np.random.default_rng(0))
        p = op.full(workload)
        t = {n: torch.from_numpy(a) for n, a in arrays.items() if a.dtype != np.uint16}
        for name in ("lora_a", "lora_b"):
            if arrays[name].dtype == np.uint16:
                t[name] = torch.from_numpy(arrays[name].view(np.int16)).view(torch.bfloat16)
        lora = t["lora_a"], t["lora_b"], t["gain"]
        if "codes" in t:
            y = torch.ops.mimo.lora_mpgemm(
                t["x"], t["adapter"], t["codes"], t["scale"], None, t["bias"], *lora,
                p["w"], p["a"], p["s"], p["parts"],
            )  # fmt: skip
        else:
            y = torch.ops.mimo.lora_linear(t["x"], t["adapter"], t["w"], None, *lora, p["parts"])
        want = op.reference(workload, arrays)
        bound = op.bound(workload, arrays, want)["y"]
        assert (np.abs(y.numpy() - want["y"]) <= 4 * bound).all()


@pytest.mark.parametrize("text", ["r=0", "r=4,l=0", "r=4,d=int8", "r=4,parts=8+9", "r=4,parts=x"])
def test_bad_parameters(text):
    with pytest.raises(UsageError):
        parse_workload(f"lora_mpgemm:m=1,n=16,k=16,{text}")


def test_code_for_lesser_cpus_runs_here():
    for features in (PRESETS["x86-64-v3"].features & CPU.features, frozenset()):
        hardware = dataclasses.replace(CPU, features=features)
        for d in ("bf16", "fp8"):
            text = f"lora_mpgemm:m=3,n=40,k=100,w=w4g32,a=a8,r=5,l=2,d={d}"
            for schedule in schedules_for(parse_workload(text), hardware):
                assert "vnni" not in schedule.name
                check(schedule, text, hardware=hardware, threads=1)
