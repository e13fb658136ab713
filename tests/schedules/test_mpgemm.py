"""Matmul schedules: every format and config against the op's reference, layouts, counts, code."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.numerics import quantize_rows
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.compile import assembly, compile_kernels
from mimo_compile.schedules.emit.dense import PACKINGS
from mimo_compile.schedules.emit.layout import (
    CodeLayout,
    pack_rows,
    pack_scales,
    unpack_rows,
)

CPU = local_cpu()
FORMATS = (
    "w1",
    "w2",
    "w3g32",
    "w4g64",
    "w4g128",
    "w5",
    "w8",
    "w8g32",
    "w2zg32",
    "w4z",
    "w4zgrow",
    "w8zgrow",
    "w8zg128",
    "w4gtensor",
    "w1.58",
    "w1.58g64",
    "w1.58grow",
    "w3zg64",
    "w6g32",
    "w7",
    "w3g16",
    "w6g16",
    "w2zg16",
    "w5g16",
    "w1.58g128",
    "w1.58g256",
)
DENSE = {
    "planes": ("w3", "w3g32", "w3zg64", "w5g128", "w6z", "w7grow"),
    "trits": ("w1.58d", "w1.58grow", "w1.58g64"), "strits": ("w1.58d", "w1.58grow", "w1.58g64"),
}  # fmt: skip
vnni = pytest.mark.skipif(not CPU.has_vnni, reason="needs AVX-512 VNNI")


def schedules(text):
    return schedules_for(parse_workload(text), CPU)


@settings(max_examples=16)
@given(data=st.data())
def test_any_shape_format_and_config(data):
    fmt = data.draw(st.sampled_from((*FORMATS, "f32", "bf16")))
    act = "a16" if fmt in ("f32", "bf16") else data.draw(st.sampled_from(("a8", "a8", "a16")))
    m = data.draw(st.integers(1, 9))
    n = data.draw(st.integers(1, 150))
    k = data.draw(st.integers(1, 300))
    scale = "" if fmt in ("f32", "bf16") else data.draw(st.sampled_from(("", ",s=f32")))
    bias = data.draw(st.sampled_from(("", ",bias=1")))
    workload = parse_workload(f"mpgemm:m={m},n={n},k={k},w={fmt},a={act}{scale}{bias}")
    schedule = data.draw(st.sampled_from(schedules(str(workload))))
    seed = data.draw(st.integers(0, 999))
    check(schedule, workload, sample_config(schedule, workload, CPU, seed), seed)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_by_default(fmt):
    for m, act in ((5, "a8"), (1, "a16")):
        text = f"mpgemm:m={m},n=40,k=200,w={fmt},a={act},bias=1"
        for schedule in schedules(text):
            check(schedule, text)


def adversarial(fmt, n, k, m):
    """Yield named canonical arrays that stress ranges, signs and zeros."""
    low, high = np.uint8(0), np.uint8(fmt.max_code)
    ones = np.ones((n, fmt.groups(k)), np.float32)
    alternating = np.where(np.arange(k) % 2, high, low).astype(np.uint8) * np.ones((n, 1), np.uint8)
    signs = np.where(np.arange(k) % 2, 1.0, -1.0).astype(np.float32) * np.ones((m, 1), np.float32)
    outlier = np.zeros((m, k), np.float32)
    outlier[:, k // 2] = 3e4
    full = np.full((n, k), high)
    yield "all max", {"x": np.full((m, k), 2.5, np.float32), "codes": full, "scale": ones}
    yield "all min", {"x": np.full((m, k), -2.5, np.float32), "codes": full * 0, "scale": ones}
    yield "alternating", {"x": signs, "codes": alternating, "scale": ones}
    yield "outlier", {"x": outlier, "codes": full, "scale": ones}
    yield "zero row", {"x": outlier * 0, "codes": full, "scale": ones}
    yield "zero scale", {"x": signs, "codes": full, "scale": ones * 0}


@pytest.mark.parametrize("fmt", ["w1", "w4g64", "w8", "w8zgrow", "w8g128", "w1.58"])
def test_adversarial_values_are_exact(fmt):
    # k is above what one float32 run holds exactly for 8-bit codes
    m, n, k = 2, 17, 1500
    parsed = parse_weight_format(fmt)
    text = f"mpgemm:m={m},n={n},k={k},w={fmt},a=a8"
    for schedule in schedules(text):
        workload = parse_workload(text)
        space = schedule.space(workload, CPU)
        for dot in space.knobs["dot"]:
            config = dataclasses.replace(space.default, dot=dot, unroll=1, rows=1)
            for _, arrays in adversarial(parsed, n, k, m):
                done = check(schedule, workload, config, inputs=arrays)
                assert np.isfinite(done.outputs["y"]).all()


@vnni
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31), fmt=st.sampled_from(["w8", "w4grow", "w2grow", "w8zgrow"]))
def test_integer_part_is_exact_to_the_bit(seed, fmt):
    # scale 1 and rows whose largest value is 127: y is the integer sum itself
    m, n, k = 3, 33, 333
    rng = np.random.default_rng(seed)
    x = rng.integers(-127, 128, (m, k)).astype(np.float32)
    x[:, 0] = 127
    scale = np.ones((n, 1), np.float32)
    for schedule in schedules(f"mpgemm:m={m},n={n},k={k},w={fmt},a=a8"):
        done = check(
            schedule, f"mpgemm:m={m},n={n},k={k},w={fmt},a=a8", seed=seed % 97,
            inputs={"x": x, "scale": scale},
        )  # fmt: skip
        zero = done.inputs.get("zero", float(parse_weight_format(fmt).fixed_zero))
        weights = done.inputs["codes"].astype(np.int64) - np.asarray(zero).astype(np.int64)
        assert np.array_equal(
            done.outputs["y"], (x.astype(np.int64) @ weights.T).astype(np.float32)
        )


@vnni
def test_activations_quantise_bit_for_bit():
    # identity weights show the int8 codes: y = q * scale of the row
    k = 96
    text = f"mpgemm:m=7,n={k},k={k},w=w8grow,a=a8"
    codes = np.full((k, k), 128, np.uint8) + np.eye(k, dtype=np.uint8)
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((7, k)) * 10.0 ** rng.integers(-20, 20, (7, 1))).astype(np.float32)
    x[1, :8] = [63.5, 0.5, 1.5, 2.5, -0.5, -1.5, 127, 0]  # ties, with scale one
    x[1, 8:] = 0
    x[2] = np.float32(1e-38)

    q, s = quantize_rows(torch.from_numpy(x))
    for schedule in schedules(text):
        done = check(
            schedule, text, inputs={"x": x, "codes": codes, "scale": np.ones((k, 1), "f4")}
        )
        assert np.array_equal(done.outputs["y"], (q.float() * s).numpy())


@settings(max_examples=30)
@given(
    st.sampled_from(FORMATS), st.integers(1, 70), st.integers(1, 300), st.booleans(), st.integers()
)
def test_packing_is_undone(fmt, n, k, experts, seed):
    layout = CodeLayout(parse_weight_format(fmt), n, k)
    rng = np.random.default_rng(abs(seed))
    lead = (3,) if experts else ()
    codes = rng.integers(0, layout.fmt.max_code + 1, (*lead, n, k), dtype=np.uint8)
    packed = layout.pack(codes)
    assert packed.shape == (*lead, layout.row_blocks, layout.blocks, 64)
    assert np.array_equal(layout.unpack(packed), codes)
    values = rng.random((*lead, n, k)).astype(np.float32)
    assert np.array_equal(unpack_rows(pack_rows(values), n), values)


@given(
    st.sampled_from([(p, f) for p, formats in DENSE.items() for f in formats]),
    st.integers(1, 70), st.integers(1, 300), st.booleans(), st.integers(0, 999),
)  # fmt: skip
def test_dense_packing_is_undone(which, n, k, experts, seed):
    packing, name = which
    fmt = parse_weight_format(name)
    layout = PACKINGS[packing](fmt, n, k)
    rng = np.random.default_rng(seed)
    lead = (2,) if experts else ()
    codes = rng.integers(0, fmt.max_code + 1, (*lead, n, k), dtype=np.uint8)
    packed = layout.pack(codes)
    assert packed.shape == (*lead, layout.row_blocks, layout.blocks * layout.lines, 64)
    assert np.array_equal(layout.unpack(packed), codes)
    # no bit is wasted but for padding: a fifth of a byte for a ternary code
    bits = 1.6 if fmt.family == "ternary" else fmt.bits
    assert packed[..., 0, 0, :].size * layout.lines * 8 * layout.blocks == pytest.approx(
        bits * np.prod(lead, dtype=int) * 16 * layout.k_padded
    )


def test_all_ternary_bytes():
    """Each of the 243 bytes gives the digits that went in, by either encoding, and no byte twice."""
    codes = np.array([[v // 3**i % 3 for i in range(5)] for v in range(243)], np.uint8)
    for packing in ("trits", "strits"):
        layout = PACKINGS[packing](parse_weight_format("w1.58d"), 243 * 16, 20)
        wide = np.repeat(codes, 4, axis=1).repeat(16, axis=0)
        packed = layout.pack(wide)
        assert np.array_equal(layout.unpack(packed), wide)
        assert len(np.unique(packed)) == 243


def test_dense_names_want_dense_layouts():
    assert [s.name for s in schedules("mpgemm:m=1,n=64,k=80,w=w1.58d,a=a8")][:2] in (
        ["mpgemm.x86_strits", "mpgemm.x86_trits"], ["mpgemm.x86_trits"],
    )  # fmt: skip
    names = {s.name for s in schedules("mpgemm:m=1,n=64,k=640,w=w1.58,a=a8")}
    assert {"mpgemm.x86_trits", "mpgemm.x86_portable"} <= names
    # blocks of 20 columns would pad each group of 64 to 80
    names = {s.name for s in schedules("mpgemm:m=1,n=64,k=640,w=w1.58g64,a=a8")}
    assert "mpgemm.x86_trits" not in names


@pytest.mark.parametrize(
    "text",
    ["mpgemm:m=1,n=70,k=4096,w=w1.58d,a=a8", "mpgemm:m=3,n=33,k=257,w=w3g32,a=a8,bias=1",
     "mpgemm:m=2,n=16,k=513,w=w6zg64,a=a8", "mpgemm:m=7,n=20,k=260,w=w1.58grow,a=a8"],
)  # fmt: skip
def test_dense_schedules_with_every_dot(text):
    workload = parse_workload(text)
    m, n, k = (workload.integer(name) for name in "mnk")
    fmt = parse_weight_format(dict(workload.params)["w"])
    seen = 0
    for schedule in schedules(text):
        if schedule.name not in ("mpgemm.x86_planes", "mpgemm.x86_trits", "mpgemm.x86_strits"):
            continue
        space = schedule.space(workload, CPU)
        for dot in space.knobs["dot"]:
            config = dataclasses.replace(space.default, dot=dot)
            if not space.legal(config):
                config = dataclasses.replace(config, rows=1, tokens=1, unroll=1)
            check(schedule, workload, config)
            seen += 1
        for name, inputs in adversarial(fmt, n, k, m):
            inputs = {key: value for key, value in inputs.items() if not fmt.has_zero or key == "x"}
            assert name, check(schedule, workload, inputs=inputs)
    assert seen


def test_packed_bytes_as_documented():
    layout = CodeLayout(parse_weight_format("w4g64"), 16, 64)
    codes = np.arange(16 * 64, dtype=np.uint8).reshape(16, 64) % 16
    packed = layout.pack(codes)
    assert layout.block == 8 and packed.shape == (1, 8, 64)
    for n, column in ((0, 0), (3, 13), (15, 63)):
        b, p, j = column // 8, column % 8 // 4, column % 4
        assert (packed[0, b, 4 * n + j] >> (4 * p)) & 15 == codes[n, column]


def test_scales_that_float16_cannot_hold_are_refused():
    scale = np.array([[1.0], [1.0 + 2.0**-12]], np.float32)
    with pytest.raises(UsageError, match="float16 cannot hold"):
        pack_scales(scale, "f16", "scale")
    assert pack_scales(scale, "f32", "scale").dtype == np.float32
    with pytest.raises(UsageError, match="float16"):
        pack_scales(scale * 1e6, "f16", "scale")


@vnni
@pytest.mark.parametrize("rows,tokens,order", [(1, 1, "rows"), (3, 2, "rows"), (2, 4, "tokens")])
@pytest.mark.parametrize("fmt", ["w4g64", "w8", "w2zg32"])
def test_declared_counts_match_the_code(fmt, rows, tokens, order):
    from instrument import executed

    workload = parse_workload(f"mpgemm:m=5,n=70,k=192,w={fmt},a=a8")
    schedule = get_schedule("mpgemm.x86_vnni")
    config = schedule.config(rows=rows, tokens=tokens, order=order, chunk=2, dot="vnni512")
    kernel = schedule.lower(workload, config, CPU)
    seen = executed(kernel.func)
    ops = kernel.counts.ops
    assert seen["dot_i8"] == ops["dot_i8"]
    assert seen["and_u8"] == ops.get("unpack_u8", 0)
    weights = [a for a in kernel.args if a.role == "weight"]
    loaded = sum(seen[f"load:{a.name}"] for a in weights)
    passes = -(-5 // tokens)
    packed = sum(a.nbytes for a in pack(schedule, workload, config).values())
    scales = packed - np.prod(weights[0].shape)
    # codes once for each tile of tokens, scales once for each of its tokens at most
    assert np.prod(weights[0].shape) * passes <= loaded
    assert loaded <= np.prod(weights[0].shape) * passes + scales * 5
    assert seen["store:y"] == 4 * 5 * 70
    necessary = get_op("mpgemm").counts(workload)
    assert ops["dot_i8"] >= necessary.ops["dot_i8"]
    levels = kernel.counts.bytes
    assert levels["l1"] >= levels["l2"] >= levels["dram"] >= necessary.bytes["dram"]
    assert levels["dram"] == packed + 4 * 5 * (192 + 70)


@pytest.mark.parametrize("fmt", ["f32", "bf16", "w4g64", "w4zg32"])
def test_declared_counts_of_float_kernels(fmt):
    from instrument import executed

    workload = parse_workload(f"mpgemm:m=5,n=70,k=192,w={fmt}")
    (schedule,) = schedules(str(workload))
    space = schedule.space(workload, CPU)
    for dot in space.knobs["dot"]:
        config = dataclasses.replace(space.default, rows=2, tokens=2, dot=dot)
        kernel = schedule.lower(workload, config, CPU)
        seen = executed(kernel.func)
        assert seen["fma_f32"] == kernel.counts.ops["fma_f32"]
        assert 4 * seen["permuted"] == kernel.counts.ops.get("shuffle_u8", 0)
        assert seen["store:y"] == 4 * 5 * 70


def pack(schedule, workload, config):
    op = get_op("mpgemm")
    arrays = op.make_inputs(workload, np.random.default_rng(0))
    return schedule.pack(workload, config, {n: a for n, a in arrays.items() if n != "x"})


@vnni
def test_inner_loops_use_512_bit_dots():
    workload = parse_workload("mpgemm:m=1,n=128,k=512,w=w4g64,a=a8")
    schedule = get_schedule("mpgemm.x86_vnni")
    kernel = schedule.lower(workload, schedule.space(workload, CPU).default, CPU)
    text = assembly([kernel], CPU)
    dots = [line for line in text.splitlines() if "vpdpbusd" in line]
    assert dots and all("zmm" in line for line in dots)
    assert "AllocWorkspace" not in text.split("parallel_lambda:")[-1].split(".Lfunc_end")[0]


def test_float_kernels_use_fma_of_the_widest_registers():
    for name, register in (("x86-64-v3", "ymm"), ("x86-64-v4", "zmm")):
        hardware = PRESETS[name].with_threads(1)
        workload = parse_workload("mpgemm:m=1,n=64,k=64,w=f32")
        schedule = get_schedule("mpgemm.x86_float")
        kernel = schedule.lower(workload, schedule.space(workload, hardware).default, hardware)
        fma = [x for x in assembly([kernel], hardware).splitlines() if "vfmadd" in x and "ps" in x]
        assert fma and all(register in x for x in fma)


@pytest.mark.parametrize("preset", ["x86-64-v3", "x86-64-v4"])
def test_code_for_lesser_cpus_runs_here(preset):
    hardware = PRESETS[preset].with_threads(2)
    if hardware.missing(CPU.features):
        hardware = dataclasses.replace(hardware, features=hardware.features & CPU.features)
    if hardware.features != PRESETS[preset].features:
        pytest.skip("this CPU lacks the preset's features")
    for text in (
        "mpgemm:m=3,n=40,k=100,w=w4g32,a=a8",
        "mpgemm:m=3,n=40,k=100,w=w8",
        "mpgemm:m=1,n=9,k=9",
    ):
        workload = parse_workload(text)
        for schedule in schedules_for(workload, hardware):
            assert schedule.name != "mpgemm.x86_vnni"
            check(schedule, workload, hardware=hardware, threads=1)


@pytest.mark.parametrize("features", [(), ("sse3", "ssse3")])
def test_code_for_the_oldest_cpus_is_right(features):
    hardware = dataclasses.replace(CPU, features=frozenset(features))
    for text in ("mpgemm:m=3,n=20,k=100,w=w4g32,a=a8", "mpgemm:m=2,n=20,k=100,w=w2"):
        (schedule,) = schedules_for(parse_workload(text), hardware)
        check(schedule, text, hardware=hardware, threads=1)


def test_several_kernels_share_one_object():
    from mimo_compile._tvm import load_object

    kernels = []
    for text in ("mpgemm:m=1,n=16,k=32", "mpgemm:m=2,n=16,k=32"):
        workload = parse_workload(text)
        (schedule,) = schedules(text)
        kernels.append(schedule.lower(workload, schedule.space(workload, CPU).default, CPU))
    module = load_object(compile_kernels([*kernels, kernels[0]], CPU))
    for kernel in kernels:
        assert module[kernel.name] is not None
    other = dataclasses.replace(kernels[0], target={"fast-math-reassoc": True})
    with pytest.raises(ValueError, match="target"):
        compile_kernels([other, kernels[1]], CPU)
    with pytest.raises(ValueError, match="two different kernels"):
        compile_kernels([kernels[0], dataclasses.replace(kernels[1], name=kernels[0].name)], CPU)


def test_names_tell_configs_apart():
    workload = parse_workload("mpgemm:m=1,n=64,k=64,w=w4g64,a=a16")
    (schedule,) = schedules(str(workload))
    configs = list(schedule.space(workload, CPU))[:40]
    names = {schedule.lower(workload, c, CPU).name for c in configs}
    assert len(names) == len(configs)
    assert all(n.isidentifier() and n.startswith("mpgemm_m1_n64_k64_w4g64") for n in names)


def test_rows_too_long_for_32_bits_are_not_supported():
    assert schedules("mpgemm:m=1,n=16,k=60000,w=w8,a=a8")
    assert not schedules("mpgemm:m=1,n=16,k=70000,w=w8,a=a8")


@pytest.mark.parametrize("m", [1, 3, 5, 64])
@pytest.mark.parametrize("w", ["f32", "bf16", "w4g64,a=a8", "w8,a=a8", "w1,a=a8", "w4", "w1"])
def test_default_is_one_of_the_configs(m, w):
    for n in (5, 16, 40, 2048):
        workload = parse_workload(f"mpgemm:m={m},n={n},k=200,w={w}")
        for schedule in schedules_for(workload, CPU):
            space = schedule.space(workload, CPU)
            assert space.legal(space.default)
            for knob, values in space.knobs.items():
                assert getattr(space.default, knob) in values, (workload, knob)


def test_default_runs_small_matmuls_on_one_thread():
    hardware = CPU.with_threads(1) if CPU.threads == 1 else CPU
    small, large = (parse_workload(f"mpgemm:m=1,n={n},k={n},w=w4g64,a=a8") for n in (256, 4096))
    for schedule in schedules_for(small, hardware):
        assert not schedule.space(small, hardware).default.parallel
        assert schedule.space(large, hardware).default.parallel == (hardware.threads > 1)
