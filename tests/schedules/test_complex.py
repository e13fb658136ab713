"""Complex weights: four exact sums, halves of x and y, bit planes, kernels that multiply nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st
from instrument import executed

from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.numerics import quantize_rows
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.emit.layout import unpack_rows
from mimo_compile.schedules.emit.lookup import LOOKUPS
from mimo_compile.schedules.emit.masks import FLUSH, unpack_planes

CPU = local_cpu()
FORMATS = ("complex2", "complex2grow", "complex2wl", "complex2wl2", "complex2wl2grow")
MASKS = "mpgemm.x86_fairy_masks"
vnni = pytest.mark.skipif(not CPU.has_vnni, reason="needs AVX-512 VNNI")


def spec(fmt, m, n, k, act="a8", extra=""):
    return f"mpgemm:m={m},n={n},k={k},w={fmt},a={act}{extra}"


def schedules(text):
    found = schedules_for(parse_workload(text), CPU)
    assert found, f"no kernel for {text}"
    return found


@settings(max_examples=16)
@given(data=st.data())
def test_any_shape_format_and_config(data):
    fmt, act = data.draw(st.sampled_from(FORMATS)), data.draw(st.sampled_from(("a8", "a8", "a16")))
    m, n, k = (data.draw(st.integers(1, most)) for most in (4, 50, 150))
    extra = data.draw(st.sampled_from(("", ",bias=1", ",s=f32")))
    workload = parse_workload(spec(fmt, m, 2 * n, 2 * k, act, extra))
    schedule = data.draw(st.sampled_from(schedules(str(workload))))
    seed = data.draw(st.integers(0, 999))
    check(schedule, workload, sample_config(schedule, workload, CPU, seed), seed)


@pytest.mark.parametrize("act", ["a8", "a16"])
def test_every_way(act):
    for m, n, fmt in ((1, 46, "complex2"), (3, 36, "complex2wl2grow")):
        workload = parse_workload(spec(fmt, m, n, 90, act, ",bias=1"))
        for schedule in schedules(str(workload)):
            space = schedule.space(workload, CPU)
            for dot in space.knobs["dot"]:
                config = dataclasses.replace(space.default, dot=dot, rows=1, tokens=1, unroll=1)
                check(schedule, workload, config)


@pytest.mark.parametrize("fmt", ["complex2", "complex2wl2"])
def test_adversarial_values(fmt):
    m, n, k = 2, 34, 2 * (2 * FLUSH + 10)  # 16-bit sums are emptied twice and hold a rest
    parsed = parse_weight_format(fmt)
    rows, columns = parsed.code_shape(n, k)
    ones = np.ones(parsed.scale_shape(n, k), np.float32)
    codes = np.ones((rows, columns), np.uint8)
    signs = np.where(np.arange(k) % 2, 1.0, -1.0).astype(np.float32) * np.ones((m, 1), np.float32)
    outlier = np.zeros((m, k), np.float32)
    outlier[:, k // 4] = 3e4  # the imaginary half is zero
    axis = ones.copy()
    axis[:, 0] = 0
    cases = {f"all {c}": {"x": signs * signs * 9, "codes": codes * np.uint8(c)} for c in range(4)}
    cases["alternating"] = {"x": signs, "codes": codes * (np.arange(columns) % 2 * 2).astype("u1")}
    cases["outlier"] = {"x": outlier, "codes": codes * np.uint8(3)}
    cases["zero row"] = {"x": outlier * 0, "codes": codes}
    cases["empty axis"] = {"x": signs, "codes": codes * np.uint8(2), "scale": axis}
    for act in ("a8", "a16"):
        for schedule in schedules(spec(fmt, m, n, k, act)):
            for name, arrays in cases.items():
                done = check(schedule, spec(fmt, m, n, k, act), inputs={"scale": ones, **arrays})
                assert np.isfinite(done.outputs["y"]).all(), name


@settings(max_examples=2)
@given(seed=st.integers(0, 2**31))
def test_four_sums_are_exact(seed):
    # only one axis has a scale, and x only one part, so that y is one of the sums
    m, n, k = 1, 36, 180
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, (n // 2, k // 2), dtype=np.uint8)
    signs = (np.array([1, 0, -1, 0]), np.array([0, 1, 0, -1]))
    for part in (0, 1):
        x = np.zeros((m, k), np.float32)
        half = x[:, part * k // 2 : (part + 1) * k // 2]
        half[...] = rng.integers(-127, 128, half.shape)
        half[:, 0] = 127
        for axis in (0, 1):
            scale = np.zeros((n // 2, 2), np.float32)
            scale[:, axis] = 1
            sums = half.astype(np.int64) @ signs[axis][codes].T
            # RR and II give Re y, IR gives Im y and RI minus it
            place, sign = (part + axis) % 2, -1 if (part, axis) == (1, 0) else 1
            for schedule in schedules(spec("complex2", m, n, k)):
                space = schedule.space(parse_workload(spec("complex2", m, n, k)), CPU)
                dots = [d for d in space.knobs["dot"] if d in LOOKUPS or not d]
                for dot in dots[:: max(1, len(dots) - 1)]:
                    config = dataclasses.replace(space.default, dot=dot)
                    done = check(
                        schedule, spec("complex2", m, n, k), config,
                        inputs={"x": x, "codes": codes, "scale": scale},
                    )  # fmt: skip
                    y = done.outputs["y"].reshape(m, 2, n // 2)
                    assert np.array_equal(y[:, place], (sign * sums).astype(np.float32))
                    assert not y[:, 1 - place].any()


def test_halves_of_x_have_scales_of_their_own():
    # weights 1 (and no others): Re y = sum of Re x, Im y = - sum of Im x
    k = 64
    x = np.random.default_rng(0).standard_normal((1, k)).astype(np.float32)
    x[:, k // 2 :] *= 1e-3
    codes, scale = np.zeros((16, k // 2), np.uint8), np.ones((16, 2), np.float32)
    q, s = quantize_rows(torch.from_numpy(x.reshape(2, -1)))
    sums = (q.double().sum(-1) * s[:, 0].double()).numpy()
    for schedule in schedules(spec("complex2", 1, 32, k)):
        arrays = {"x": x, "codes": codes, "scale": scale}
        y = check(schedule, spec("complex2", 1, 32, k), inputs=arrays).outputs["y"]
        np.testing.assert_allclose(y[0, :16], sums[0], rtol=1e-6)
        np.testing.assert_allclose(y[0, 16:], -sums[1], rtol=1e-6)


@settings(max_examples=20)
@given(st.sampled_from(FORMATS), st.integers(1, 50), st.integers(1, 150), st.integers(0, 99))
def test_packing_is_undone(fmt, half_n, half_k, seed):
    n, k, parsed = 2 * half_n, 2 * half_k, parse_weight_format(fmt)
    workload = parse_workload(spec(fmt, 1, n, k, extra=",bias=1"))
    arrays = get_op("mpgemm").make_inputs(workload, np.random.default_rng(seed))
    weights = {name: a for name, a in arrays.items() if name != "x"}
    for schedule in schedules(str(workload)):
        problem = schedule.problem(workload)
        packed = schedule.pack(workload, schedule.space(workload, CPU).default, weights)
        shapes = {a.name: a.shape for a in problem.args() if a.role == "weight"}
        assert {name: a.shape for name, a in packed.items()} == shapes
        if schedule.name == MASKS:
            codes = unpack_planes(packed["codes"], half_n, half_k)
        else:
            codes = problem.layout.unpack(packed["codes"])
            scale = unpack_rows(packed["scale"], half_n).reshape(-1, 2)
            assert np.array_equal(scale, arrays["scale"])
        assert np.array_equal(codes.reshape(parsed.terms * half_n, half_k), arrays["codes"])
        bias = packed["bias"].reshape(2, -1)[:, :half_n].reshape(-1)
        assert np.array_equal(bias, arrays["bias"])


def test_layouts_tell_planes_from_codes():
    workload = parse_workload(spec("complex2wl2", 1, 4096, 4096))
    layouts = {
        s.name: s.layouts(workload, s.space(workload, CPU).default)["weight"]
        for s in schedules(str(workload))
    }
    assert layouts["mpgemm.x86_complex"] != layouts[MASKS]
    for schedule in schedules(str(workload)):
        (codes,) = (a for a in schedule.problem(workload).args() if a.name == "codes")
        size = np.prod(codes.shape) * np.dtype(codes.dtype).itemsize
        assert size == 4096 * 4096 * 2 / 8


def products(func):
    """Return the multiplications of vectors, and calls that multiply, inside the innermost loops."""
    from tvm_ffi import structural_walk

    from mimo_compile._tvm import compiler

    tvm, found = compiler(), []

    def loops(node):
        out = []
        structural_walk(node, (tvm.tirx.For, out.append))
        return out

    def vector(node):
        if "x" in str(node.ty).removeprefix("uint").removeprefix("int").removeprefix("float"):
            found.append(node)

    def call(node):
        if any(w in str(node)[:300] for w in ("pdpbusd", "pmadd", "llvm.fma")):
            found.append(node)

    for each in loops(func.body):
        if not loops(each.body):
            structural_walk(each.body, (tvm.tirx.Mul, vector))
            structural_walk(each.body, (tvm.ir.Call, call))
    return found


def test_masks_multiply_nothing():
    """The loops over columns only test bits, choose and add; scales come after them."""
    workload = parse_workload(spec("complex2wl2", 2, 256, 1024))
    schedule = get_schedule(MASKS)
    config = dataclasses.replace(schedule.space(workload, CPU).default, parallel=False)
    # the same count sees the products of the other kernel
    other = get_schedule("mpgemm.x86_complex")
    usual = other.lower(workload, other.space(workload, CPU).default, CPU)
    quantising = 1  # x / scale, once in the loop that quantises rows
    assert len(products(schedule.lower(workload, config, CPU).func)) == quantising
    assert len(products(usual.func)) > quantising


@vnni
@pytest.mark.parametrize("fmt", ["complex2", "complex2wl2"])
def test_declared_counts(fmt):
    workload = parse_workload(spec(fmt, 3, 70, 200))
    schedule = get_schedule("mpgemm.x86_complex")
    space = schedule.space(workload, CPU)
    for dot in ("vpermb.vnni512", "vpshufb.vnni512"):
        if dot not in space.knobs["dot"]:
            continue
        config = dataclasses.replace(space.default, rows=2, tokens=2, dot=dot, unroll=1)
        kernel = schedule.lower(workload, config, CPU)
        ops, seen = kernel.counts.ops, executed(kernel.func)
        assert seen["dot_i8"] == ops["dot_i8"] >= 3 * 70 * 200
        assert seen["and_u8"] == ops.get("unpack_u8", 0)


@pytest.mark.parametrize("features", [(), ("sse3", "ssse3"), ("avx", "avx2", "fma", "ssse3")])
def test_code_for_lesser_cpus_is_right(features):
    hardware = dataclasses.replace(CPU, features=frozenset(features) & CPU.features)
    for act in ("a8", "a16"):
        for schedule in schedules_for(parse_workload(spec("complex2wl", 1, 36, 90, act)), hardware):
            check(schedule, spec("complex2wl", 1, 36, 90, act), hardware=hardware, threads=1)


def test_odd_extents_are_refused():
    with pytest.raises(UsageError, match="even"):
        parse_workload(spec("complex2wl", 1, 35, 90))
