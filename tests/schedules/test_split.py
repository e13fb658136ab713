"""Columns cut into pieces: the same results, to the bit where sums are integers, whatever the threads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from every import MACHINES
from harness import check
from hypothesis import given, settings
from hypothesis import strategies as st
from instrument import executed

from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.base import Schedule
from mimo_compile.schedules.mpgemm.problem import GemmConfig

CPU = local_cpu().with_threads(2)
V4 = PRESETS["sapphirerapids"].with_threads(2)
FORMATS = (
    "w4g64,a=a8", "w2zg32,a=a8", "w4grow,a=a8", "w8zgrow,a=a8", "w1.58,a=a8", "w1.58d,a=a8",
    "w3grow,a=a8", "w1grow,a=a8", "w8grow,a=a8g64", "w4g32,a=a8g128", "bf16", "f32", "w4grow",
    "w3zg64", "bf16,a=abf16", "w4zg64,a=abf16", "w8zgrow,a=abf16", "nf4g64", "afp4g64,a=a8", "fp8b128",
)  # fmt: skip


def with_pieces(schedule: Schedule, workload: Any, hardware: Any) -> list[GemmConfig]:
    """Return a schedule's configs of more than one piece."""
    space = schedule.space(workload, hardware)
    if len(space.knobs.get("split", ())) < 2:
        return []
    return [config for config in space if config.split > 1]


def any_pieces(data: st.DataObject) -> None:
    """Check a kernel of any format, shape and config of several pieces."""
    op = data.draw(st.sampled_from(("mpgemm", "mpgemm", "mpgemm", "lora_mpgemm")))
    more = ",r=5" if op == "lora_mpgemm" else ""
    n, m = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 7))
    k = data.draw(st.integers(500, 2000)) // 4 * 4
    more += data.draw(st.sampled_from(("", ",bias=1")))
    fmt = data.draw(st.sampled_from(FORMATS))
    workload = parse_workload(f"{op}:m={m},n={n},k={k},w={fmt}{more}")
    hardware = data.draw(st.sampled_from(MACHINES)).with_threads(2)
    found = [s for s in schedules_for(workload, hardware) if with_pieces(s, workload, hardware)]
    if found:
        schedule = data.draw(st.sampled_from(found))
        config = data.draw(st.sampled_from(with_pieces(schedule, workload, hardware)))
        check(schedule, workload, config, hardware=hardware)


@settings(max_examples=3)
@given(data=st.data())
def test_pieces_of_any_kernel(data):
    any_pieces(data)


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data())
def test_pieces_of_many_kernels(data):
    any_pieces(data)


@pytest.mark.parametrize(
    ("name", "fmt"),
    [("vnni", "w8zgrow"), ("portable", "w5grow"), ("lut", "w1.58"), ("strits", "w1.58")],
)
def test_one_scale_a_row_stays_exact(name, fmt):
    workload = parse_workload(f"mpgemm:m=3,n=40,k=2560,w={fmt},a=a8")
    schedule = get_schedule(f"mpgemm.x86_{name}")
    if not schedule.supports(workload, CPU):
        pytest.skip("not on this CPU")
    config = max(with_pieces(schedule, workload, CPU), key=lambda c: c.split)
    seen = check(schedule, workload, config).outputs["y"]
    whole = check(schedule, workload, dataclasses.replace(config, split=1))
    assert np.array_equal(seen, whole.outputs["y"]), schedule.name


def test_results_do_not_depend_on_threads():
    workload = parse_workload("mpgemm:m=3,n=40,k=2560,w=w4g64,a=a8")
    for schedule in schedules_for(workload, CPU)[:1]:
        config = with_pieces(schedule, workload, CPU)[-1]
        one, two = (check(schedule, workload, config, threads=n).outputs["y"] for n in (1, 2))
        assert np.array_equal(one, two)


@pytest.mark.parametrize("name", ["x86_vnni", "x86_portable", "x86_lut4"])
def test_few_rows_keep_all_threads_busy(name):
    schedule = get_schedule(f"mpgemm.{name}")
    for m, n, k, busy in ((16, 32, 8192, True), (16, 16, 16384, True), (1, 16, 1024, False)):
        workload = parse_workload(f"mpgemm:m={m},n={n},k={k},w=w4g64,a=a8")
        space = schedule.space(workload, V4)
        traits = schedule.work(workload, space.default, V4).traits
        assert (traits["share"] <= 0.55 and traits["tasks"] >= 2) == busy
        if n > 16:
            plain = sum(config.split == 1 for config in space)
            assert len(list(space)) <= 2 * plain


def test_many_rows_are_not_cut():
    for name, fmt in (("x86_vnni", "w4g64,a=a8"), ("x86_lut", "w2g64,a=a8"), ("x86_float", "bf16")):
        workload = parse_workload(f"mpgemm:m=1,n=4096,k=4096,w={fmt}")
        assert get_schedule(f"mpgemm.{name}").space(workload, V4).knobs["split"] == (1,)


def test_work_counts_the_sums_of_pieces():
    schedule, workload = (
        get_schedule("mpgemm.x86_vnni"),
        parse_workload("mpgemm:m=16,n=64,k=4096,w=w4g64,a=a8"),
    )
    problem = schedule.problem(workload)
    whole = GemmConfig(rows=4, tokens=4, parallel=True, dot="vnni512")
    cut = dataclasses.replace(whole, split=2)
    one, two = (schedule.work(workload, config, V4) for config in (whole, cut))
    assert (one.traits["tasks"], one.traits["share"]) == (1, 1)
    assert (two.traits["tasks"], two.traits["share"]) == (2, 0.5)
    assert two.ops["add_f32"] == 2 * 16 * 64
    more = 4 * 2 * 16 * 64
    assert schedule.workspace_bytes(problem, cut) == schedule.workspace_bytes(problem, whole) + more


@pytest.mark.parametrize("fmt", ["w4g64", "w8grow", "w2zg32"])
def test_pieces_are_all_of_the_columns(fmt):
    schedule = get_schedule("mpgemm.x86_vnni")
    workload = parse_workload(f"mpgemm:m=3,n=40,k=1408,w={fmt},a=a8")
    for split, rows in ((2, 1), (4, 2), (8, 1)):
        config = GemmConfig(rows=rows, tokens=2, split=split, dot="vnni512")
        kernel = schedule.lower(workload, config, V4)
        seen = executed(kernel.func)
        assert seen["dot_i8"] == kernel.counts.ops["dot_i8"]
        assert seen["store:y"] == 4 * 3 * 40
