"""Matmuls for GPUs: packing and its inverse, spaces, counts; kernels emulated against the op's reference."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from harness import sample_config
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mimo_compile.cli.inspect_cuda import launches_of
from mimo_compile.errors import VerificationError
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import CUDA, PRESETS, SIMULATED, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.numerics import bf16_to_f32
from mimo_compile.schedules import get_schedule, names_for, schedules_for
from mimo_compile.schedules.cuda import limits
from mimo_compile.schedules.cuda.emulate import compiler
from mimo_compile.schedules.mpgemm.cuda_books import book_of, takes_int8
from mimo_compile.schedules.mpgemm.cuda_layout import Rows
from mimo_compile.search.measure.emulated import check_emulated

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
NAMES = [n for n in names_for("mpgemm") if n.startswith("mpgemm.cuda")]
FLOATS = ("bf16", "f16", "f32")
FORMATS = (
    "w2g64", "w4g64", "w8", "w1.58", "w4grow", "w8g32", "w2gtensor", "w4g16", "w3g64", "w6zg32", "w4z",
    "w2zgrow", "nf4", "fp3", "fp8b128", *FLOATS,
)  # fmt: skip
emulated = pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler")


def ratio_of_kernels(workload):
    """Return the part of the op's bound that a kernel's errors may take.

    Matrix units add 16 products and a sum at a time, each cut off below 24 bits of the largest: of numbers of
    mean square 1 at most 2.4 * 2**-23 * sqrt(k) in the mean square, and that k / 16 times with signs of their
    own, so 1.2 u k. Eight times as much, nearly, is 4 / sqrt(k) of a bound that is 4 sqrt(k) u times the sum
    of all magnitudes, 0.64 k. Integer products have bounds for their own sums.
    """
    p = get_op("mpgemm").full(workload)
    return 1.0 if p["a"].startswith("a8") else min(1.0, 4 / p["k"] ** 0.5)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_packed_weights_are_the_canonical_ones_again(data):
    fmt = data.draw(st.sampled_from(FORMATS))
    n, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    workload = parse_workload(f"mpgemm:m=1,n={n},k={k},w={fmt},bias=1,s=f16")
    inputs = get_op("mpgemm").make_inputs(workload, np.random.default_rng(0))
    weights = {
        name: inputs[name] for name in ("w", "codes", "scale", "zero", "bias") if name in inputs
    }
    schedule = get_schedule(NAMES[0])
    packed = schedule.pack(workload, None, weights)
    again = schedule.unpack_weights(workload, None, packed)
    assert set(again) == set(weights)
    for name, array in weights.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize(
    ("fmt", "zero"),
    [("w2g64", 2), ("w4g64", 8), ("w8", 128), ("w1.58", 1), ("w3g64", 4), ("w5zg64", 16)],
)
def test_each_code_lies_where_the_layout_says(fmt, zero):
    rows = Rows(parse_weight_format(fmt), 3, 100, "f16")
    codes = np.full((3, 100), zero, np.uint8)
    for column in (0, 1, 5, 17, 63, 99):
        codes[1, column] = zero - 1
        (packed,) = rows.pack({"codes": codes}).values()
        word, within = divmod(column, 32 // rows.bits)
        expected = np.zeros_like(packed)
        field = ((1 << rows.bits) - 1) << (within // 4 * rows.bits)  # -1 is all ones
        expected[1, 4 * word + within % 4] = field
        np.testing.assert_array_equal(packed, expected)
        codes[1, column] = zero


@pytest.mark.parametrize("fmt", ["nf4", "fp3"])
def test_codes_of_books_lie_one_behind_the_other(fmt):
    rows = Rows(parse_weight_format(fmt), 2, 100, "f16")
    codes = np.zeros((2, 100), np.uint8)
    for column in (0, 1, 6, 31, 98, 99):
        codes[1, column] = 5
        (packed,) = rows.pack({"codes": codes}).values()
        expected = np.zeros_like(packed)
        expected[1, column // 2] = 5 << 4 * (column % 2)
        np.testing.assert_array_equal(packed, expected)
        codes[1, column] = 0


@pytest.mark.parametrize("fmt", ["nf4", "nf3", "fp4", "fp3"])
@pytest.mark.parametrize("kind", ["int8", "bf16", "f16", "f32"])
def test_planes_of_a_book_are_its_entries(fmt, kind):
    fmt = parse_weight_format(fmt)
    if kind == "int8" and not takes_int8(fmt):
        with pytest.raises(ValueError, match="no integers"):
            book_of(fmt, kind)
        return
    book = book_of(fmt, kind)
    planes = np.array(book.words, "<u4").view(np.uint8).reshape(book.planes, 16)
    width = {"int8": 1, "f32": 4}.get(kind, 2)
    width = 2 if kind == "f32" and fmt.name.startswith("fp") else width
    found = np.zeros(16)
    for first in range(0, book.planes, width):
        raw = np.ascontiguousarray(planes[first : first + width].T)
        if width == 2 and kind != "f16":
            found += bf16_to_f32(raw.view("<u2").ravel())
        else:
            found += raw.view({1: np.int8, 2: np.float16, 4: np.float32}[width]).ravel()
    values = np.resize(fmt.values, 16)
    # three terms of bfloat16 are as good as float32, two of float16 half as good
    np.testing.assert_allclose(found * book.unit, values, rtol=2**-23 if kind == "f16" else 2**-24)
    assert book.planes == width * ({"bf16": 3, "f16": 2}.get(kind, 1) if "nf" in fmt.name else 1)


def test_kernels_of_cpus_and_gpus_refuse_each_other():
    for text in (
        "w=w4g64,a=a8",
        "w=w8,a=a8",
        "w=bf16,a=abf16",
        "w=w4g64",
        "w=bf16",
        "w=nf4",
        "w=fp8b128",
    ):
        for m in (1, 100):
            workload = parse_workload(f"mpgemm:m={m},n=64,k=256,{text}")
            for hardware in (A100, H200):
                assert all(s.name in NAMES for s in schedules_for(workload, hardware)), text
            for hardware in (local_cpu(), *PRESETS.values(), *SIMULATED.values()):
                assert not [s.name for s in schedules_for(workload, hardware) if s.name in NAMES]
    for text, refused in (
        ("m=9,n=64,k=256,w=w4g64", "gemv"),
        ("m=1,n=64,k=256,w=w1g64", "gemv"),
        ("m=1,n=64,k=256,w=w1.58d", "gemv"),
        ("m=1,n=64,k=256,w=anf4", "gemv"),
        ("m=1,n=64,k=256,w=nf4,a=a8", "gemv"),
        ("m=1,n=64,k=256,w=fp8b128,a=a8", "gemv"),
        ("m=1,n=64,k=128,w=fp8b128,a=a8", "mma"),
        ("m=1,n=64,k=256,w=w8z,a=a8", "gemv"),
        ("m=1,n=64,k=256,w=w8z,a=a8", "mma"),
        ("m=1,n=64,k=256,w=w4zgrow,a=a8", "mma_codes"),
        ("m=1,n=64,k=256,w=w2g64,a=a8g32", "mma_codes"),
        ("m=1,n=64,k=256,w=w8g64,a=a8g64", "mma_codes"),
        ("m=1,n=64,k=256,w=w4zg64,a=af16", "mma_codes"),
        ("m=1,n=64,k=140000,w=w8,a=a8", "gemv"),
        ("m=1,n=64,k=256,w=bf16", "mma"),
        ("m=1,n=64,k=256,w=bf16,a=abf16", "gemv"),
        ("m=1,n=64,k=256,w=w8g64,a=a8", "mma"),
        ("m=1,n=64,k=256,w=w8,a=a8g64", "mma"),
        ("m=1,n=64,k=256,w=w4g16,a=abf16", "mma_codes"),
        ("m=1,n=64,k=256,w=w4g64,a=a16", "mma_codes"),
        ("m=1,n=64,k=256,w=w8,a=a8", "mma_codes"),
    ):
        schedule = get_schedule(f"mpgemm.cuda_{refused}")
        assert not schedule.supports(parse_workload(f"mpgemm:{text}"), H200), text
    hopper = get_schedule("mpgemm.cuda_wgmma")
    workload = parse_workload("mpgemm:m=64,n=64,k=256,w=w8,a=a8")
    assert hopper.supports(workload, H200) and not hopper.supports(workload, A100)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hardware", [A100, H200], ids=lambda h: h.gpu.arch)
def test_legal_configs_can_be_launched_and_declare_what_the_op_needs(name, hardware):
    schedule, found = get_schedule(name), 0
    for m, n, k in ((1, 1, 1), (8, 4096, 4096), (100, 70, 1000), (512, 4096, 14336)):
        for text in (
            "w=w4g64,a=a16",
            "w=w2g64,a=a8",
            "w=w8,a=a8",
            "w=bf16,a=abf16,bias=1",
            "w=w4g64,a=af16",
            "w=fp8b128,a=abf16",
            "w=nf4,a=af16",
            "w=w4z,a=abf16",
            "w=w4g64,a=a8g32",
        ):
            workload = parse_workload(f"mpgemm:m={m},n={n},k={k},{text}")
            if not schedule.supports(workload, hardware):
                continue
            found += 1
            space, need = schedule.space(workload, hardware), get_op("mpgemm").counts(workload)
            assert space.legal(space.default)
            configs = [sample_config(schedule, workload, hardware, seed) for seed in range(6)]
            for config in (space.default, *configs):
                kernel = schedule.lower(workload, config, hardware)
                limits.check(kernel, hardware)
                assert kernel.counts == schedule.work(workload, config, hardware)
                assert (
                    kernel.counts.bytes["l2"] >= kernel.counts.bytes["dram"] >= need.bytes["dram"]
                )
                done = sum(
                    v for o, v in kernel.counts.ops.items() if o[:3] in ("dot", "til", "fma")
                )
                assert done >= sum(need.ops.values())
    assert found or (name.endswith("wgmma") and hardware is A100)


@emulated
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gemv", "m=2,n=9,k=150,w=w4g64,a=a8,bias=1"),
        ("gemv", "m=1,n=5,k=132,w=w4g32"),
        ("mma", "m=19,n=33,k=72,w=bf16,a=abf16"),
        ("wgmma", "m=20,n=40,k=200,w=w8,a=a8,bias=1"),
        ("mma_codes", "m=18,n=34,k=160,w=w4g64,a=abf16"),
        ("gemv", "m=11,n=9,k=131,w=f32"),  # two blocks of tokens
        # whole groups, pieces and tiles, as real layers have them
        ("gemv", "m=1,n=8,k=128,w=w4g64"),
        ("mma", "m=16,n=128,k=256,w=bf16,a=abf16"),
        ("wgmma", "m=64,n=128,k=256,w=bf16,a=abf16"),
        ("mma_codes", "m=16,n=128,k=256,w=w4g64,a=abf16"),
    ],
)
def test_default_is_right(name, text):
    workload = parse_workload(f"mpgemm:{text}")
    check_emulated(
        workload, f"mpgemm.cuda_{name}", None, H200, most_ratio=ratio_of_kernels(workload)
    )


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gemv", "m=3,n=9,k=300,w=fp8b128"),
        ("gemv", "m=2,n=9,k=300,w=nf4,bias=1"),
        ("gemv", "m=2,n=9,k=150,w=fp4g16,a=a8"),
        ("gemv", "m=2,n=9,k=150,w=fp3g32,a=abf16"),
        ("gemv", "m=2,n=9,k=300,w=w4zg128,a=a8"),
        ("gemv", "m=2,n=9,k=300,w=w2zg16,a=a8g32"),
        ("gemv", "m=2,n=9,k=300,w=w3zg64"),
        ("gemv", "m=2,n=9,k=300,w=w8z,a=af16"),
        ("gemv", "m=2,n=9,k=300,w=w5g64,a=a8"),
        ("gemv", "m=2,n=9,k=150,w=w3zg64,a=a8"),
        ("gemv", "m=2,n=9,k=150,w=w6zg32,a=a8,s=f32"),
        ("mma", "m=18,n=34,k=320,w=w6gtensor,a=a8"),
        ("wgmma", "m=70,n=34,k=320,w=w7grow,a=a8,bias=1"),
        ("mma_codes", "m=18,n=34,k=320,w=fp8b128,a=abf16,bias=1"),
        ("mma_codes", "m=18,n=34,k=320,w=fp8b128,a=af16,s=f32"),
        ("mma_codes", "m=18,n=34,k=320,w=nf4,a=abf16"),
        ("mma_codes", "m=18,n=34,k=320,w=nf3grow,a=af16"),
        ("mma_codes", "m=18,n=34,k=320,w=fp4,a=a8"),
        ("mma_codes", "m=18,n=34,k=320,w=fp3g32,a=abf16"),
        ("mma_codes", "m=18,n=34,k=320,w=w4zg128,a=a8"),
        ("mma_codes", "m=18,n=34,k=320,w=w4zg32,a=abf16,bias=1"),
        ("mma_codes", "m=18,n=34,k=320,w=w8z,a=abf16"),
        ("mma_codes", "m=18,n=34,k=320,w=w3zg64,a=abf16"),
        ("mma_codes", "m=18,n=34,k=320,w=w3g64,a=a8"),
        ("mma_codes", "m=18,n=34,k=320,w=w6g64,a=af16"),
        ("mma_codes", "m=18,n=34,k=320,w=w4g64,a=a8g32"),
        ("mma_codes", "m=18,n=34,k=320,w=w4grow,a=a8g256,bias=1"),
        ("mma_codes", "m=18,n=34,k=320,w=w2zg128,a=a8g64"),
        ("mma_codes", "m=18,n=34,k=320,w=w4zgrow,a=a8g64"),
    ],
)
def test_each_format_is_right(name, text):
    """With fractional zero points, one of which is the middle of codes that hardly differ."""
    workload, rng = parse_workload(f"mpgemm:{text}"), np.random.default_rng(1)
    inputs = get_op("mpgemm").make_inputs(workload, rng)
    if "zero" in inputs:
        inputs["zero"] += rng.integers(-7, 8, inputs["zero"].shape).astype(np.float32) / 8
        middle = 1 << (parse_weight_format(workload.text("w")).bits - 1)
        inputs["codes"][:2] = middle + rng.integers(0, 2, inputs["codes"][:2].shape)
        inputs["zero"][:2] = middle
    most = ratio_of_kernels(workload)
    check_emulated(workload, f"mpgemm.cuda_{name}", None, H200, inputs=inputs, most_ratio=most)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gemv", "w=fp8b128"),
        ("gemv", "w=fp4"),
        ("gemv", "w=fp4,a=a8"),
        ("mma_codes", "w=fp8b128,a=abf16"),
        ("mma_codes", "w=fp8b128,a=af16"),
        ("mma_codes", "w=fp4,a=abf16"),
        ("mma_codes", "w=fp3,a=af16"),
        ("gemv", "w=nf4"),
        ("mma_codes", "w=nf4,a=abf16"),
        ("mma_codes", "w=nf4,a=af16"),
        ("mma_codes", "w=nf3,a=abf16"),
        ("mma_codes", "w=nf3,a=af16"),
    ],
)
def test_every_code_is_its_number(name, text):
    """Row n has code n alone; a token with one number that is not zero sees one, and nothing is rounded.

    But for ``nf4`` and ``nf3``: entries of three terms are as good as float32's, of two half as good.
    """
    workload = parse_workload(f"mpgemm:m=8,n=256,k=128,{text}")
    values = np.array(parse_weight_format(workload.text("w")).values)
    codes = np.arange(256) % len(values)
    codes[np.isnan(values[codes])] = 0  # no numbers: refused when weights are read
    inputs = get_op("mpgemm").make_inputs(workload, np.random.default_rng(0))
    inputs["codes"] = np.repeat(codes[:, None], 128, 1).astype(np.uint8)
    inputs["scale"][:] = 0.25
    inputs["x"] = np.zeros((8, 128), np.float32)
    exact = "nf" not in text
    inputs["x"][np.arange(8), 17 * np.arange(8)] = factor = 127.0 if exact else 64.0
    found = check_emulated(workload, f"mpgemm.cuda_{name}", None, H200, inputs=inputs, orders=(0,))
    most = 0.0 if exact else 2**-23 if "af16" in text else 2**-24
    expected = np.tile(values[codes] * factor / 4, (8, 1))
    np.testing.assert_allclose(found.outputs["y"], expected, rtol=most, atol=0.0)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("text", ["w=nf4,a=abf16", "w=nf4,a=af16"])
def test_sums_of_one_sign_of_a_book_s_terms_are_within_the_bound(text):
    """What is cut off of each term's products has the sign of all others: the smallest terms go first."""
    workload = parse_workload(f"mpgemm:m=9,n=16,k=16,{text}")
    inputs = get_op("mpgemm").make_inputs(workload, np.random.default_rng(0))
    inputs["x"] = np.abs(inputs["x"])
    inputs["codes"][:] = np.arange(16, dtype=np.uint8)[:, None]
    check_emulated(workload, "mpgemm.cuda_mma_codes", None, H200, inputs=inputs, orders=(0,))


def test_float16_results_pass_the_op_s_bound_but_not_the_kernels():
    workload = parse_workload("mpgemm:m=1,n=64,k=16384,w=bf16,a=abf16")

    def half(kernel, hardware, memory, order):
        inputs = {"x": memory["x"], "w": memory["w"][:64]}
        return {
            "y": get_op("mpgemm")
            .reference(workload, inputs)["y"]
            .astype(np.float16)
            .astype(np.float32)
        }

    assert check_emulated(workload, "mpgemm.cuda_mma", None, H200, run=half).error_ratio > 0.1
    with pytest.raises(VerificationError, match=r"of the op's bound, 0\.0312 is asked for"):
        check_emulated(
            workload,
            "mpgemm.cuda_mma",
            None,
            H200,
            run=half,
            most_ratio=ratio_of_kernels(workload),
        )


@pytest.mark.parametrize("name", [n for n in NAMES if "mma" in n])
@pytest.mark.parametrize("hardware", [A100, H200], ids=lambda h: h.gpu.arch)
def test_a_tile_more_than_sms_takes_twice_as_long(name, hardware):
    schedule, tiles = get_schedule(name), {"bm": 128, "bn": 128, "consumers": 2, "split": 1}
    weights = "w=w4g64" if name.endswith("codes") else "w=bf16"
    taken = []
    for blocks in (hardware.cores, hardware.cores + 1):
        workload = parse_workload(f"mpgemm:m=128,n={128 * blocks},k=4096,{weights},a=abf16")
        if not schedule.supports(workload, hardware):
            pytest.skip(f"no kernel for {hardware.name}")
        default = schedule.space(workload, hardware).default
        knobs = {f.name for f in fields(default)}
        config = replace(default, **{n: v for n, v in tiles.items() if n in knobs})
        kernel = schedule.lower(workload, config, hardware)
        taken.append(launches_of(kernel, hardware, None)["parts_us"]["tile_bf16"])
    assert taken[1] == pytest.approx(2 * taken[0])


def test_what_l2_does_not_hold_between_launches_comes_from_memory():
    schedule = get_schedule("mpgemm.cuda_mma")
    for m, split, x_far, sums_far in ((512, 2, 0, 0), (16384, 1, 1, 0), (8192, 4, 1, 1)):
        workload = parse_workload(f"mpgemm:m={m},n=4096,k=4096,w=bf16,a=abf16")
        config = replace(schedule.space(workload, H200).default, split=split)
        counts = schedule.work(workload, config, H200)
        held, operand, sums = 50 << 20, 2 * m * 4096, 4 * split * m * 4096
        far = x_far * (operand - held) + sums_far * (sums - held)
        given = 4 * m * (4096 + 4096) + 2 * 4096 * 4096
        assert counts.bytes["dram"] == given + 2 * far  # to memory, and back
        assert [part.name for part in counts.parts] == ["prepare", "tiles", "join"][
            : 2 + (split > 1)
        ]


ACTS = {
    "gemv": ("a16", "abf16", "af16", "a8", "a8g32", "a8g64"),
    "mma": ("abf16", "a8"),
    "wgmma": ("abf16", "a8"),
    "mma_codes": ("abf16", "af16", "a8", "a8g32", "a8g64", "a8g256"),
}
WEIGHTS = (
    *FLOATS,
    "w8",
    "w8g16",
    "w8gtensor",
    "w4g16",
    "w4g32",
    "w4g64",
    "w4grow",
    "w2g16",
    "w2g64",
    "w2g128",
    "w1.58",
    "w3g64",
    "w5g32",
    "w4zg32",
    "w2zg64",
    "w8zg128",
    "w4zgrow",
    "nf4",
    "nf3g32",
    "fp4g128",
    "fp3grow",
    "fp8b128",
)


def any_kernel(name: str, data: st.DataObject) -> None:
    """Emulate a kernel of any shape, formats and config that it supports."""
    schedule = get_schedule(f"mpgemm.cuda_{name}")
    hardware = H200 if name == "wgmma" else data.draw(st.sampled_from((A100, H200)))
    m, n = data.draw(st.integers(1, 8 if name == "gemv" else 140)), data.draw(st.integers(1, 150))
    k = data.draw(st.integers(1, 700 if name == "gemv" else 400))
    if data.draw(st.booleans()):  # whole groups and pieces
        k = 128 * max(1, k // 128)
    if data.draw(st.booleans()):  # whole tiles, or nearly
        m, n = 16 * -(-m // 16) if name != "gemv" else m, 32 * -(-n // 32)
    weights = [
        (w, a)
        for w in WEIGHTS
        for a in ACTS[name]
        if not (w in FLOATS and a.startswith("a8"))
        and schedule.supports(parse_workload(f"mpgemm:m={m},n={n},k={k},w={w},a={a}"), hardware)
    ]
    w, a = data.draw(st.sampled_from(weights))
    more = data.draw(st.sampled_from(("", ",bias=1", ",s=f32" if w not in FLOATS else "")))
    workload = parse_workload(f"mpgemm:m={m},n={n},k={k},w={w},a={a}{more}")
    config = sample_config(schedule, workload, hardware, data.draw(st.integers(0, 1000)))
    orders, most = (0, data.draw(st.integers(1, 99))), ratio_of_kernels(workload)
    check_emulated(workload, schedule, config, hardware, orders=orders, most_ratio=most)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("name", ACTS)
@given(data=st.data())
@settings(  # without shrinking: an example compiles for seconds
    max_examples=10,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
def test_any_kernel_is_right(name, data):
    any_kernel(name, data)
