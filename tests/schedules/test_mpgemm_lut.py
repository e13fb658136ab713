"""Matmuls by table lookup: exactness where tables overflow a byte, layouts, AVX2, code."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_amx import SPR, PlainTiles

from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.compile import assembly
from mimo_compile.schedules.emit.dense import PACKINGS
from mimo_compile.schedules.emit.lut_x86 import LOOKUPS, Shuffle
from mimo_compile.schedules.emit.nibbles import NibbleLayout
from mimo_compile.schedules.mpgemm.problem import GemmConfig
from mimo_compile.schedules.mpgemm.x86_amx import X86AmxBits

CPU = local_cpu()
OLDER = dataclasses.replace(CPU, features=CPU.features - {"avx512vbmi"})
"""This CPU, were it to permute bytes within 128 bits only."""
FORMATS = {
    "mpgemm.x86_lut": (
        "w1", "w1g32", "w1zg64", "w1grow", "w2", "w2zg32", "w3g32", "w3zg64", "w1.58",
    ),
    "mpgemm.x86_lut4": ("w4g64", "w4zgrow"),
    "mpgemm.x86_lut_shuffle": ("w1", "w1grow", "w2zg32", "w3g64", "w4grow", "w1.58"),
    "mpgemm.x86_tl1": ("w1.58", "w1.58grow", "w1.58g64"),
    "mpgemm.x86_tl2": ("w1.58", "w1.58d", "w1.58grow"),
}  # fmt: skip
CASES = [(name, fmt) for name, formats in FORMATS.items() for fmt in formats]


def supported(name, text):
    schedule, workload = get_schedule(name), parse_workload(text)
    hardware = OLDER if "shuffle" in name else CPU
    if not schedule.supports(workload, hardware):
        pytest.skip(f"{name} does not run here")
    return schedule, workload, hardware


ANY = (
    st.sampled_from(CASES), st.integers(1, 16), st.integers(1, 100), st.integers(1, 700),
    st.sampled_from(["normal", "sign", "heavy"]), st.integers(0, 999),
)  # fmt: skip


@settings(max_examples=7)
@given(*ANY)
def test_any_shape_and_config_is_exact(case, m, n, k, kind, seed):
    one_of_any(case, m, n, k, kind, seed)


@pytest.mark.slow
@settings(max_examples=80)
@given(*ANY)
def test_many_shapes_and_configs_are_exact(case, m, n, k, kind, seed):
    one_of_any(case, m, n, k, kind, seed)


def one_of_any(case, m, n, k, kind, seed):
    name, fmt = case
    schedule, workload, hardware = supported(name, f"mpgemm:m={m},n={n},k={k},w={fmt},a=a8")
    rng = np.random.default_rng(seed)
    # rows of equal magnitudes quantise to 127 throughout: every table overflows a byte
    x = rng.standard_normal((m, k), dtype=np.float32)
    x = {"normal": x, "sign": np.sign(x), "heavy": x**5}[kind]
    config = sample_config(schedule, workload, hardware, seed)
    check(schedule, workload, config, seed, inputs={"x": x}, hardware=hardware)


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_integer_part_is_exact_to_the_bit(name, fmt):
    m, n, k = 2, 33, 1120
    text = f"mpgemm:m={m},n={n},k={k},w={fmt},a=a8"
    schedule, workload, hardware = supported(name, text)
    parsed = parse_weight_format(fmt)
    rng = np.random.default_rng(5)
    # part of the columns small, part large: spans with one and with two tables in one row
    size = np.where(np.arange(k) < k // 2, 20, 127)
    x = rng.integers(-size, size + 1, (m, k)).astype(np.float32)
    x[:, -1] = 127
    ones = np.ones(parsed.scale_shape(n, k), np.float32)
    space = schedule.space(workload, hardware)
    for dot in space.knobs["dot"]:
        config = dataclasses.replace(space.default, dot=dot)
        inputs = {"x": x, "scale": ones}
        done = check(schedule, workload, config, inputs=inputs, hardware=hardware)
        zero = done.inputs.get("zero", np.full((n, parsed.groups(k)), parsed.fixed_zero))
        twice = 2 * done.inputs["codes"].astype(np.int64)
        point = np.repeat((2 * zero).astype(np.int64), parsed.group_size(k), 1)[:, :k]
        want = x.astype(np.int64) @ (twice - point).T
        assert np.array_equal(2.0 * done.outputs["y"], want.astype(np.float32))


@given(
    st.sampled_from([(n, f) for n, fs in FORMATS.items() for f in fs]),
    st.booleans(), st.integers(1, 70), st.integers(1, 300), st.integers(0, 999),
)  # fmt: skip
def test_packing_is_undone(case, apart, n, k, seed):
    name, fmt = case
    packing = get_schedule(name).packing
    packing += ".apart" if apart and f"{packing}.apart" in PACKINGS else ""
    layout = PACKINGS[packing](parse_weight_format(fmt), n, k)
    assert isinstance(layout, NibbleLayout)
    codes = np.random.default_rng(seed).integers(0, layout.fmt.max_code + 1, (2, n, k), np.uint8)
    packed = layout.pack(codes)
    assert packed.shape == (2, layout.row_blocks, layout.blocks * layout.lines, 64)
    assert np.array_equal(layout.unpack(packed), codes)


def test_one_instruction_looks_up_four_tables():
    schedule = get_schedule("mpgemm.x86_lut")
    hardware = PRESETS["sapphirerapids"].with_threads(1)
    workload = parse_workload("mpgemm:m=1,n=64,k=512,w=w1,a=a8")
    kernel = schedule.lower(workload, schedule.space(workload, hardware).default, hardware)
    text = assembly([kernel], hardware)
    assert "vpermb" in text and "vpdpbusd" in text
    spans = [kernel.counts.ops[k] for k in ("shuffle_u8", "dot_i8")]
    assert spans[0] == 64 * 512 / 4 and spans[1] > spans[0]


class BitsOnPlainTiles(X86AmxBits):
    """Matrix tiles that every CPU has."""

    name = "mpgemm.x86_amx_bits_plain"
    tiles_class = PlainTiles

    def supports(self, workload, hardware):
        return super().supports(workload, dataclasses.replace(hardware, features=SPR.features))

    def lower(self, workload, config, hardware):
        return dataclasses.replace(super().lower(workload, config, hardware), features=frozenset())


@pytest.mark.parametrize("fmt", ["w1grow", "w2g64", "w3zg32", "w1.58"])
def test_matrix_tiles_read_what_lookups_read(fmt):
    workload = parse_workload(f"mpgemm:m=20,n=34,k=416,w={fmt},a=a8")
    schedule, lookups = BitsOnPlainTiles(), get_schedule("mpgemm.x86_lut")
    config = schedule.space(workload, CPU).default
    assert schedule.layouts(workload, config) == lookups.layouts(workload, GemmConfig())
    check(schedule, workload, config)


def test_every_ternary_triple():
    """Each of the 27 triples gives the digits that went in, and all share 14 magnitudes."""
    codes = np.array([[v // 9, v // 3 % 3, v % 3] for v in range(27)], np.uint8)
    layout = PACKINGS["triples"](parse_weight_format("w1.58d"), 27, 96)
    wide = np.tile(codes, (1, 32))
    packed = layout.pack(wide)
    assert np.array_equal(layout.unpack(packed), wide)
    assert (packed[:, :4] & 15).max() == 13
    assert packed[0, 4].reshape(16, 4)[:13].min() == 255  # those below zero, in all 32 runs
    assert not packed[0, 4].reshape(16, 4)[13:].any()
    assert layout.lines * 64 * 8 / (16 * layout.block) == pytest.approx(5 / 3)


def test_groups_that_blocks_do_not_fill_are_left_to_others():
    for name, text in (("x86_tl2", "w1.58g64"), ("x86_lut", "w2g16")):
        workload = parse_workload(f"mpgemm:m=1,n=64,k=640,w={text},a=a8")
        assert not get_schedule(f"mpgemm.{name}").supports(workload, CPU)


def test_avx2_looks_up_in_256_bits():
    schedule, hardware = get_schedule("mpgemm.x86_lut_shuffle"), PRESETS["x86-64-v3"]
    workload = parse_workload("mpgemm:m=1,n=64,k=512,w=w1,a=a8")
    assert schedule.space(workload, hardware).knobs["dot"] == ("pshufb256",)
    kernel = schedule.lower(workload, schedule.space(workload, hardware).default, hardware)
    text = assembly([kernel], hardware)
    lookups = [line for line in text.splitlines() if "vpshufb" in line]
    assert any("ymm" in line for line in lookups) and "zmm" not in text


def test_avx2_code_runs():
    """The code of a CPU without AVX-512 gives the same result, on any that has AVX2."""
    if "avx2" not in CPU.features:
        pytest.skip("no AVX2")
    old = dataclasses.replace(CPU, features=CPU.features & PRESETS["x86-64-v3"].features)
    for fmt in ("w1", "w2zg32", "w3grow"):
        text = f"mpgemm:m=3,n=40,k=416,w={fmt},a=a8"
        check(get_schedule("mpgemm.x86_lut_shuffle"), text, hardware=old)


def test_parts_divide_groups_and_fit_16_bits():
    for packing, fmt in (
        ("bits4", "w1"),
        ("bits4", "w2grow"),
        ("bits4", "w4g128"),
        ("triples", "w1.58"),
    ):
        layout = PACKINGS[packing](parse_weight_format(fmt), 16, 4096)
        for way in LOOKUPS.values():
            lookup = way(layout)
            assert lookup.part * lookup.parts * layout.groups == lookup.runs
            if isinstance(lookup, Shuffle):
                # each of a span's parts of lines adds two halves to a sum of 16 bits
                assert 255 * lookup.span * 2 * (64 // lookup.width) < 2**16


@pytest.mark.parametrize(
    ("name", "fmt"), [("mpgemm.x86_tl2", "w1.58d"), ("mpgemm.x86_lut", "w3g64")]
)
def test_second_tables_hold_any_part_of_the_runs(name, fmt):
    n, k = 32, 1152
    text = f"mpgemm:m=5,n={n},k={k},w={fmt},a=a8"
    schedule, workload, hardware = supported(name, text)
    rng = np.random.default_rng(3)
    large = rng.random((5, k)) < np.array([[0.0], [0.01], [0.3], [0.9], [1.0]])
    x = rng.integers(1, 128, (5, k)) * large + rng.integers(-9, 10, (5, k))
    x[:, 0] = 127
    for rows in (1, 2):
        config = dataclasses.replace(schedule.space(workload, hardware).default, rows=rows)
        check(schedule, workload, config, inputs={"x": x.astype(np.float32)}, hardware=hardware)
