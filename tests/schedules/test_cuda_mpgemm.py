"""Matmuls for GPUs: packing and its inverse, spaces, counts; kernels emulated against the op's reference."""

from __future__ import annotations

import numpy as np
import pytest
from harness import sample_config
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import CUDA, PRESETS, SIMULATED, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, names_for, schedules_for
from mimo_compile.schedules.cuda import limits
from mimo_compile.schedules.cuda.emulate import compiler
from mimo_compile.schedules.mpgemm.cuda_layout import Rows
from mimo_compile.search.measure.emulated import check_emulated

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
NAMES = [n for n in names_for("mpgemm") if n.startswith("mpgemm.cuda")]
FORMATS = ("w2g64", "w4g64", "w8", "w1.58", "w4grow", "w8g32", "w2gtensor", "w4g16", "bf16")
emulated = pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler")


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_packed_weights_are_the_canonical_ones_again(data):
    fmt = data.draw(st.sampled_from(FORMATS))
    n, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    workload = parse_workload(f"mpgemm:m=1,n={n},k={k},w={fmt},bias=1,s=f16")
    inputs = get_op("mpgemm").make_inputs(workload, np.random.default_rng(0))
    weights = {name: inputs[name] for name in ("w", "codes", "scale", "bias") if name in inputs}
    schedule = get_schedule(NAMES[0])
    packed = schedule.pack(workload, None, weights)
    again = schedule.unpack_weights(workload, None, packed)
    assert set(again) == set(weights)
    for name, array in weights.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize(("fmt", "zero"), [("w2g64", 2), ("w4g64", 8), ("w8", 128), ("w1.58", 1)])
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


def test_kernels_of_cpus_and_gpus_refuse_each_other():
    for text in ("w=w4g64,a=a8", "w=w8,a=a8", "w=bf16,a=abf16", "w=w4g64", "w=bf16", "w=nf4"):
        for m in (1, 100):
            workload = parse_workload(f"mpgemm:m={m},n=64,k=256,{text}")
            for hardware in (A100, H200):
                assert all(s.name in NAMES for s in schedules_for(workload, hardware)), text
            for hardware in (local_cpu(), *PRESETS.values(), *SIMULATED.values()):
                assert not [s.name for s in schedules_for(workload, hardware) if s.name in NAMES]
    for text, refused in (
        ("m=9,n=64,k=256,w=w4g64", "gemv"),
        ("m=1,n=64,k=256,w=w4zg64", "gemv"),
        ("m=1,n=64,k=140000,w=w8,a=a8", "gemv"),
        ("m=1,n=64,k=256,w=bf16", "mma"),
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
    ],
)
def test_default_is_right(name, text):
    check_emulated(f"mpgemm:{text}", f"mpgemm.cuda_{name}", None, H200)


ACTS = {
    "gemv": ("a16", "abf16", "af16", "a8", "a8g32", "a8g64"),
    "mma": ("abf16", "a8"),
    "wgmma": ("abf16", "a8"),
    "mma_codes": ("abf16", "af16", "a8"),
}
WEIGHTS = (
    "bf16",
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
)


def any_kernel(name: str, data: st.DataObject) -> None:
    """Emulate a kernel of any shape, formats and config that it supports."""
    schedule = get_schedule(f"mpgemm.cuda_{name}")
    hardware = H200 if name == "wgmma" else data.draw(st.sampled_from((A100, H200)))
    m, n = data.draw(st.integers(1, 8 if name == "gemv" else 140)), data.draw(st.integers(1, 150))
    k = data.draw(st.integers(1, 700 if name == "gemv" else 400))
    weights = [
        (w, a)
        for w in WEIGHTS
        for a in ACTS[name]
        if not (w == "bf16" and a.startswith("a8"))
        and schedule.supports(parse_workload(f"mpgemm:m={m},n={n},k={k},w={w},a={a}"), hardware)
    ]
    w, a = data.draw(st.sampled_from(weights))
    more = data.draw(st.sampled_from(("", ",bias=1", ",s=f32" if w != "bf16" else "")))
    workload = parse_workload(f"mpgemm:m={m},n={n},k={k},w={w},a={a}{more}")
    config = sample_config(schedule, workload, hardware, data.draw(st.integers(0, 1000)))
    check_emulated(workload, schedule, config, hardware, orders=(0, data.draw(st.integers(1, 99))))


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
