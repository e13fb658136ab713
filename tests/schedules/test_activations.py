"""Activation formats of matmuls: groups of int8 codes, 16-bit floats; every schedule that takes them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st
from instrument import executed

from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.compile import assembly

CPU = local_cpu()
INTEGERS = ("w1", "w2g64", "w3g32", "w4g64", "w4g128", "w5", "w8", "w8g32", "w2zg32", "w4z", "w4zgrow",
            "w8zg128", "w1.58", "w1.58g64", "w3g16", "w6g256", "w7grow")  # fmt: skip
BOOKS = ("nf4", "fp4", "fp3g32", "anf4", "afp3", "fp8b128")
GROUPED = ("a8g32", "a8g64", "a8g128", "a8g256")
FLOATS = ("abf16", "af16")


def schedules(text):
    return schedules_for(parse_workload(text), CPU)


@settings(max_examples=16)
@given(data=st.data())
def test_any_shape_format_and_config(data):
    fmt = data.draw(st.sampled_from((*INTEGERS, *BOOKS, "complex2wl", "bf16", "f32")))
    plain = fmt in ("bf16", "f32", "complex2wl")
    act = data.draw(st.sampled_from(FLOATS if plain else (*GROUPED, *FLOATS)))
    m = data.draw(st.integers(1, 9))
    n = data.draw(st.integers(1, 90))
    k = data.draw(st.integers(1, 600))
    if fmt == "complex2wl":
        n, k = 2 * n, 2 * k
    bias = data.draw(st.sampled_from(("", ",bias=1")))
    text = f"mpgemm:m={m},n={n},k={k},w={fmt},a={act}{bias}"
    schedule = data.draw(st.sampled_from(schedules(text)))
    seed = data.draw(st.integers(0, 999))
    check(schedule, text, sample_config(schedule, parse_workload(text), CPU, seed), seed)


@pytest.mark.parametrize("fmt", INTEGERS)
def test_every_schedule_of_int8_groups(fmt):
    act = GROUPED[INTEGERS.index(fmt) % 3]
    text = f"mpgemm:m=3,n=40,k=328,w={fmt},a={act},bias=1"
    for schedule in schedules(text):
        check(schedule, text)


@pytest.mark.parametrize("fmt", [*INTEGERS[:4], "w4z", "w8", *BOOKS, "bf16", "f32", "complex2wl"])
def test_every_schedule_of_16_bit_floats(fmt):
    for act in FLOATS:
        text = f"mpgemm:m=5,n=40,k=328,w={fmt},a={act},bias=1"
        for schedule in schedules(text):
            check(schedule, text)


def adversarial(m, k):
    """Yield activations that stress ranges, signs, ties and zeros."""
    signs = np.where(np.arange(k) % 2, 1.0, -1.0).astype(np.float32) * np.ones((m, 1), np.float32)
    outlier = np.ones((m, k), np.float32)
    outlier[:, k // 2] = 3e4
    gaps = signs.copy()
    gaps[:, : k // 2] = 0  # whole groups of zeros
    gaps[0] = 0
    ties = np.full((m, k), 1.00390625, np.float32)  # between two bfloat16 numbers
    ties[:, ::2] = 1.01171875
    return {
        "all max": np.full((m, k), 2.5, np.float32),
        "all min": np.full((m, k), -2.5, np.float32),
        "alternating": signs,
        "outlier": outlier,
        "zeros": gaps,
        "ties": ties,
        "tiny": signs * np.float32(1e-41),
        "huge": signs * np.float32(1e30),
    }


@pytest.mark.parametrize(("fmt", "act"), [("w8", "a8g32"), ("w4g64", "abf16"), ("w1.58", "a8g128")])
def test_adversarial_values(fmt, act):
    stress(fmt, act)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["w1", "w4g64", "w8", "w4zg128", "w1.58", "w2grow"])
@pytest.mark.parametrize("act", ["a8g32", "a8g128", *FLOATS])
def test_adversarial_values_of_all_formats(fmt, act):
    stress(fmt, act)


def stress(fmt, act):
    m, n, k = 2, 17, 1504
    parsed = parse_weight_format(fmt)
    text = f"mpgemm:m={m},n={n},k={k},w={fmt},a={act}"
    codes = np.resize(np.array([0, parsed.max_code], np.uint8), (n, k))
    ones = np.ones((n, parsed.groups(k)), np.float32)
    for schedule in schedules(text):
        space = schedule.space(parse_workload(text), CPU)
        for dot in space.knobs["dot"]:
            config = dataclasses.replace(space.default, dot=dot, unroll=1, rows=1)
            for name, x in adversarial(m, k).items():
                if name == "huge" and act != "af16":
                    continue
                done = check(schedule, text, config, inputs={"x": x, "codes": codes, "scale": ones})
                assert np.isfinite(done.outputs["y"]).all()


@settings(max_examples=6)
@given(seed=st.integers(0, 2**31), fmt=st.sampled_from(["w8", "w4grow", "w4g32", "w8zgrow"]))
def test_integer_part_is_exact_to_the_bit(seed, fmt):
    # scales 1 and groups whose largest value is 127: y is the integer sum itself
    m, n, k = 3, 33, 352
    rng = np.random.default_rng(seed)
    x = rng.integers(-127, 128, (m, k)).astype(np.float32)
    x[:, ::32] = 127
    text = f"mpgemm:m={m},n={n},k={k},w={fmt},a=a8g64"
    ones = np.ones((n, parse_weight_format(fmt).groups(k)), np.float32)
    for schedule in schedules(text):
        done = check(schedule, text, seed=seed % 97, inputs={"x": x, "scale": ones})
        np.testing.assert_array_equal(done.outputs["y"], done.expected["y"])


@pytest.mark.parametrize("fmt", ["w8", "w4g128"])
def test_long_rows_fill_accumulators(fmt):
    n, k = 16, 14336
    parsed = parse_weight_format(fmt)
    codes = np.full((n, k), parsed.max_code, np.uint8)
    x = np.full((2, k), -3, np.float32)
    for act in ("a8g256", "abf16"):
        text = f"mpgemm:m=2,n={n},k={k},w={fmt},a={act}"
        for schedule in schedules(text):
            check(schedule, text, inputs={"x": x, "codes": codes})


bf16 = pytest.mark.skipif("avx512bf16" not in CPU.features, reason="needs AVX512-BF16")


@bf16
@pytest.mark.parametrize("fmt", ["bf16", "w4g64", "w8", "w2zg32", "fp4"])
def test_dots_of_bfloat16_are_counted_and_emitted(fmt):
    schedule = get_schedule("mpgemm.x86_bf16")
    workload = parse_workload(f"mpgemm:m=9,n=40,k=200,w={fmt},a=abf16")
    for seed in range(3):
        config = dataclasses.replace(
            sample_config(schedule, workload, CPU, seed), parallel=False, chunk=1
        )
        kernel = schedule.lower(workload, config, CPU)
        assert executed(kernel.func)["dot_bf16"] == kernel.counts.ops["dot_bf16"]
    text = assembly([kernel], CPU)
    assert "vdpbf16ps" in text and "mimo_dot_bf16" not in text.replace("mimo_dot_bf16:", "")


@bf16
@settings(max_examples=6)
@given(data=st.data())
def test_bfloat16_weights_in_pairs_come_back(data):
    n, k = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 90))
    schedule = get_schedule("mpgemm.x86_bf16")
    workload = parse_workload(f"mpgemm:m=1,n={n},k={k},w=bf16,a=abf16")
    w = np.random.default_rng(n * k).integers(0, 2**16, (n, k)).astype(np.uint16)
    config = schedule.space(workload, CPU).default
    packed = schedule.pack(workload, config, {"w": w})
    np.testing.assert_array_equal(schedule.unpack_weights(workload, config, packed)["w"], w)


@bf16
def test_weights_that_bfloat16_does_not_hold_are_left_to_float32():
    for fmt in ("nf4", "anf4", "afp4", "fp8b128", "f32", "complex2wl"):
        found = schedules(f"mpgemm:m=1,n=64,k=64,w={fmt},a=abf16")
        assert found and "mpgemm.x86_bf16" not in {s.name for s in found}


def test_float16_saturates():
    x = np.array([[1e6, -1e6, 65519, 1.0]], np.float32)
    w = np.eye(4, dtype=np.float32)
    done = check(
        get_schedule("mpgemm.x86_float"), "mpgemm:m=1,n=4,k=4,w=f32,a=af16", inputs={"x": x, "w": w}
    )
    assert done.outputs["y"].tolist() == [[65504, -65504, 65504, 1]]


@pytest.mark.parametrize(
    "text", ["w=bf16,a=a8g64", "w=complex2wl,a=a8g64", "w=w4,a=a8g48", "w=w4,a=a7"]
)
def test_what_does_not_go_together(text):
    with pytest.raises(UsageError):
        parse_workload(f"mpgemm:m=1,n=64,k=64,{text}")


@settings(max_examples=5)
@given(data=st.data())
def test_experts(data):
    fmt = data.draw(st.sampled_from(("bf16", "w4g32", "w4zg64", "w8", "nf4", "complex2wl")))
    plain = fmt in ("bf16", "complex2wl")
    act = data.draw(st.sampled_from(FLOATS if plain else (*GROUPED, *FLOATS)))
    t, d, f = (data.draw(st.integers(1, most)) for most in (6, 90, 60))
    text = f"moe:t={t},e=5,k=2,d={2 * d},f={2 * f},w={fmt},a={act}"
    schedule = data.draw(st.sampled_from(schedules(text)))
    seed = data.draw(st.integers(0, 99))
    check(schedule, text, sample_config(schedule, parse_workload(text), CPU, seed), seed)
