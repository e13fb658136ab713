"""Codebook, two-sided and fp8 weights: every format, way and config against the op's reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st
from instrument import executed

from mimo_compile.ir.formats import E4M3_NAN, parse_weight_format
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.emit.book import IntegerWay, ways
from mimo_compile.schedules.emit.columns import unpack_columns
from mimo_compile.schedules.emit.layout import CodeLayout, unpack_rows
from mimo_compile.schedules.emit.lookup import LOOKUPS

CPU = local_cpu()
COLUMNS = "mpgemm.x86_codebook_columns"
BOOKS = ("nf3", "nf4", "fp3", "fp4", "anf3", "anf4", "afp3", "afp4")
GROUPS = ("", "g16", "g32", "g256", "grow", "gtensor")
vnni = pytest.mark.skipif(not CPU.has_vnni, reason="needs AVX-512 VNNI")


def spec(fmt, m, n, k, act="a8", extra=""):
    scale = ",s=f32" if fmt == "fp8b128" else ""
    return f"mpgemm:m={m},n={n},k={k},w={fmt},a={act}{scale}{extra}"


def schedules(text):
    found = schedules_for(parse_workload(text), CPU)
    assert found, f"no kernel for {text}"
    return found


@settings(max_examples=8)
@given(data=st.data())
def test_any_shape_format_and_config(data):
    one_of_any(data)


@pytest.mark.slow
@settings(max_examples=80)
@given(data=st.data())
def test_many_shapes_formats_and_configs(data):
    one_of_any(data)


def one_of_any(data):
    fmt = data.draw(st.sampled_from((*(b + g for b in BOOKS for g in GROUPS), "fp8b128")))
    m, n, k = (data.draw(st.integers(1, most)) for most in (7, 100, 300))
    act, bias = (
        data.draw(st.sampled_from(("a8", "a16"))),
        data.draw(st.sampled_from(("", ",bias=1"))),
    )
    workload = parse_workload(spec(fmt, m, n, k, act, bias))
    schedule = data.draw(st.sampled_from(schedules(str(workload))))
    seed = data.draw(st.integers(0, 999))
    check(schedule, workload, sample_config(schedule, workload, CPU, seed), seed)


@pytest.mark.parametrize("act", ["a8", "a16"])
@pytest.mark.parametrize("fmt", ["nf4", "anf4g32", "fp4", "afp4", "afp3grow", "fp8b128"])
def test_every_way(fmt, act):
    workload = parse_workload(spec(fmt, 2, 23, 150, act))
    for schedule in schedules(str(workload)):
        space = schedule.space(workload, CPU)
        for dot in space.knobs["dot"]:
            config = dataclasses.replace(space.default, dot=dot, rows=1, unroll=1)
            check(schedule, workload, config)


def adversarial(fmt, n, k, m):
    """Yield named canonical arrays that stress ranges, signs and zeros."""
    values = np.nan_to_num(np.array(fmt.values), nan=0.0)
    top, bottom = np.uint8(values.argmax()), np.uint8(values.argmin())
    ones = np.ones(fmt.scale_shape(n, k), np.float32)
    full = np.ones((n, k), np.uint8)
    alternating = np.where(np.arange(k) % 2, top, bottom).astype(np.uint8) * full
    signs = np.where(np.arange(k) % 2, 1.0, -1.0).astype(np.float32) * np.ones((m, 1), np.float32)
    outlier = np.zeros((m, k), np.float32)
    outlier[:, k // 2] = 3e4
    yield "all max", {"x": signs * signs * 2.5, "codes": full * top, "scale": ones}
    yield "all min", {"x": signs * signs * -2.5, "codes": full * bottom, "scale": ones}
    yield "alternating", {"x": signs, "codes": alternating, "scale": ones}
    yield "outlier", {"x": outlier, "codes": full * bottom, "scale": ones}
    yield "zero row", {"x": outlier * 0, "codes": full * top, "scale": ones}
    rows = alternating.copy()
    rows[n // 2] = np.uint8(np.abs(values).argmin())
    group = ones.copy()
    group[:, 0] = 0
    yield "zero weights", {"x": signs, "codes": rows, "scale": ones}
    yield "zero group", {"x": signs, "codes": alternating, "scale": group}
    if fmt.two_sided:
        side = ones.copy()
        side[:, 1::2] = 0  # nothing below zero
        yield "one side", {"x": signs, "codes": full * top, "scale": side}
        yield "other side", {"x": signs, "codes": full * bottom, "scale": 1 - side}


@pytest.mark.parametrize("fmt", ["nf3", "anf4", "fp4", "afp4", "afp3", "fp8b128"])
def test_adversarial_values(fmt):
    m, n, k = 1, 17, 190
    parsed = parse_weight_format(fmt)
    for act in ("a8", "a16"):
        for schedule in schedules(spec(fmt, m, n, k, act)):
            for name, arrays in adversarial(parsed, n, k, m):
                done = check(schedule, spec(fmt, m, n, k, act), inputs=arrays)
                assert np.isfinite(done.outputs["y"]).all(), name


@pytest.mark.parametrize(
    ("fmt", "seed"),
    [
        *(pytest.param(fmt, seed, marks=[pytest.mark.slow] * (seed > 0 or "3" in fmt))
          for fmt in ("fp3grow", "fp4grow", "afp3grow", "afp4grow") for seed in range(4)),
    ],
)  # fmt: skip
def test_sums_of_whole_numbers_are_exact(fmt, seed):
    # rows whose largest value is 127 are their own codes; scales of powers of two keep sides apart
    m, n, k = 2, 20, 333
    rng = np.random.default_rng(seed)
    x = rng.integers(-127, 128, (m, k)).astype(np.float32)
    x[:, 0] = 127
    parsed = parse_weight_format(fmt)
    scale = np.ones(parsed.scale_shape(n, k), np.float32)
    if parsed.two_sided:
        scale[:, 1] = 0.5
    text = spec(fmt, m, n, k)
    workload = parse_workload(text)
    for schedule in schedules(text):
        space = schedule.space(workload, CPU)
        for dot in (d for d in space.knobs["dot"] if d in LOOKUPS):
            config = dataclasses.replace(space.default, dot=dot, rows=1)
            done = check(schedule, text, config, inputs={"x": x, "scale": scale})
            values = np.array(parsed.values)[done.inputs["codes"]]
            quarters = np.where(values < 0, scale[:, -1:], scale[:, :1]) * values * 4
            whole = x.astype(np.int64) @ quarters.astype(np.int64).T
            assert np.array_equal(done.outputs["y"], (whole / 4).astype(np.float32))


def test_every_fp8_number():
    """Subnormal ones included, each by itself against x = 1."""
    codes = np.arange(256, dtype=np.uint8)
    codes[list(E4M3_NAN)] = 0
    eye = np.zeros((256, 128), np.uint8)
    eye[np.arange(256), np.arange(256) % 128] = codes
    inputs = {"x": np.ones((1, 128), np.float32), "codes": eye, "scale": np.ones((256, 1), "f4")}
    for act in ("a8", "a16"):
        text = spec("fp8b128", 1, 256, 128, act)
        done = check(schedules(text)[0], text, inputs=inputs)
        want = np.array(parse_weight_format("fp8b128").values, np.float32)[codes]
        assert np.array_equal(done.outputs["y"][0], want)


@settings(max_examples=20)
@given(
    st.sampled_from([*BOOKS, "afp4g32", "anf3grow", "fp8b128"]),
    st.integers(1, 50), st.integers(1, 300), st.integers(0, 99),
)  # fmt: skip
def test_packing_is_undone(fmt, n, k, seed):
    workload = parse_workload(spec(fmt, 1, n, k))
    arrays = get_op("mpgemm").make_inputs(workload, np.random.default_rng(seed))
    weights = {name: a for name, a in arrays.items() if name != "x"}
    for schedule in schedules(str(workload)):
        packed = schedule.pack(workload, schedule.space(workload, CPU).default, weights)
        if schedule.name == COLUMNS:
            assert np.array_equal(unpack_columns(packed["codes"], k), arrays["codes"])
            assert np.array_equal(packed["scale"], arrays["scale"])
        else:
            layout = schedule.problem(workload).layout
            assert np.array_equal(layout.unpack(packed["codes"]), arrays["codes"])
            assert np.array_equal(unpack_rows(packed["scale"], n), arrays["scale"])
        for arg in schedule.lower(workload, schedule.space(workload, CPU).default, CPU).args:
            if arg.role == "weight":
                assert packed[arg.name].shape == arg.shape


LESSER = [
    pytest.param(
        features, fmt, act, marks=[pytest.mark.slow] * (fmt == "anf3" and "avx" not in features)
    )  # LLVM takes long to make vectors of three planes out of less
    for features in ((), ("sse3", "ssse3"), ("avx", "avx2", "fma", "ssse3"))
    for fmt, act in (("nf4", "a8"), ("anf3", "a16"), ("afp4g32", "a8"), ("fp8b128", "a16"))
]


@pytest.mark.parametrize(("features", "fmt", "act"), LESSER)
def test_code_for_lesser_cpus_is_right(features, fmt, act):
    hardware = dataclasses.replace(CPU, features=frozenset(features) & CPU.features)
    workload = parse_workload(spec(fmt, 2, 20, 100, act))
    for schedule in schedules_for(workload, hardware):
        check(schedule, workload, hardware=hardware, threads=1)


@vnni
@pytest.mark.parametrize("fmt", ["fp4", "afp4", "anf4", "nf3g32", "fp8b128"])
def test_declared_counts(fmt):
    workload = parse_workload(spec(fmt, 5, 70, 192))
    for schedule in schedules(str(workload)):
        space = schedule.space(workload, CPU)
        for dot in space.knobs["dot"]:
            config = dataclasses.replace(space.default, rows=2, tokens=2, dot=dot, unroll=1)
            if "256" in dot or "128" in dot or not space.legal(config):
                continue
            kernel = schedule.lower(workload, config, CPU)
            ops, seen = kernel.counts.ops, executed(kernel.func)
            if schedule.name == COLUMNS:
                assert 4 * seen["permuted"] == ops["shuffle_u8"]
                assert ops["fma_f32"] >= seen["fma_f32"] >= 5 * 70 * 192
            elif "vnni" in dot:
                assert seen["dot_i8"] == ops["dot_i8"]
                assert seen["and_u8"] == ops.get("unpack_u8", 0) or "planes" in schedule.name
            elif dot in LOOKUPS:
                assert ops["dot_i8"] >= 5 * 70 * 192
            else:
                assert 4 * seen["permuted"] == ops.get("shuffle_u8", 0)
                assert ops["fma_f32"] == pytest.approx(seen["fma_f32"], rel=0.01)
            assert seen["store:y"] == 4 * 5 * 70


def test_integer_ways_need_int8_activations():
    for fmt, act, integer in (("fp4", "a8", True), ("fp4", "a16", False), ("nf4", "a8", True)):
        layout = CodeLayout(parse_weight_format(fmt), 16, 64)
        found = ways(layout, act, CPU)
        assert any(n in LOOKUPS for n in found) == (integer and "ssse3" in CPU.features)
    layout = CodeLayout(parse_weight_format("fp4"), 16, 64)
    assert IntegerWay("vpermb.vnni512", layout, True).dot.tables == (
        (12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0),
    )
    two = IntegerWay("vpermb.vnni512", CodeLayout(parse_weight_format("afp4"), 16, 64), True)
    assert two.dot.tables == (
        (0, 1, 2, 3, 4, 6, 8, 12, *[0] * 8), (*[0] * 9, 1, 2, 3, 4, 6, 8, 12),
    )  # fmt: skip


@pytest.mark.parametrize("fmt", ["nf4", "nf3", "anf4", "anf3"])
def test_three_bytes_of_fractions_are_as_good_as_a_float(fmt):
    way = IntegerWay("vpermb.vnni512", CodeLayout(parse_weight_format(fmt), 16, 64), True)
    tables = np.array(way.dot.tables, np.float64).reshape(-1, 3, len(way.codes.fmt.values))
    sides = (tables * [[[1.0], [1 / 256], [1 / 65536]]]).sum(1)
    value = sides[0] - (sides[1] if len(sides) == 2 else way.offset)
    assert np.abs(value * way.units - way.codes.fmt.values).max() <= 2.0**-24
    assert tables.min() == 0 and tables.max() <= 255


def test_three_bits_take_three_bits():
    workload = parse_workload(spec("afp3", 1, 64, 512))
    by_name = {s.name: s.problem(workload).packed_bytes() for s in schedules(str(workload))}
    scales = 64 * 8 * 2 * 2
    assert by_name["mpgemm.x86_codebook_planes"] == 64 * 512 * 3 / 8 + scales
    assert by_name["mpgemm.x86_codebook"] == 64 * 512 / 2 + scales
    assert not get_schedule("mpgemm.x86_codebook_planes").supports(
        parse_workload(spec("afp4", 1, 64, 512)), CPU
    )


def test_groups_that_end_within_a_block_of_planes_are_left_to_others():
    """Groups of 16 in blocks of 32 columns once took their neighbours' scales."""
    names = {s.name for s in schedules(spec("nf3g16", 1, 1, 17, act="a8"))}
    assert names and "mpgemm.x86_codebook_planes" not in names
    names = {s.name for s in schedules(spec("nf3g32", 1, 1, 70, act="a8"))}
    assert "mpgemm.x86_codebook_planes" in names


@settings(max_examples=8)
@given(data=st.data())
def test_routed_experts(data):
    fmt = data.draw(st.sampled_from((*BOOKS, "afp4g32", "nf4grow", "fp8b128")))
    act, t = data.draw(st.sampled_from(("a8", "a16"))), data.draw(st.sampled_from((1, 2, 5)))
    d, f = (data.draw(st.sampled_from((16, 40, 72))) for _ in range(2))
    scale = ",s=f32" if fmt == "fp8b128" else ""
    workload = parse_workload(f"moe:t={t},e=5,k=2,d={d},f={f},w={fmt},a={act}{scale}")
    schedule = get_schedule("moe.x86_codebook")
    assert schedule.supports(workload, CPU)
    seed = data.draw(st.integers(0, 99))
    check(schedule, workload, sample_config(schedule, workload, CPU, seed), seed)
