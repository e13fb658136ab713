"""Every expert schedule x weight format x activations, from the registry and the grammar: the op's bound,
and one result for all schedules whose sums are exact."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
from every import MACHINES
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import ACT_NAMES, parse_weight_format, weight_formats
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, names_for
from mimo_compile.schedules.compile import assembly

CPU = local_cpu()
NAMES = [n for n in names_for("moe") if ".cuda" not in n]
WIDE = "moe:t=3,e=3,k=2,d=480,f=320"
"""Extents that blocks of any layout fill nearly."""


def workload_of(text, fmt, act):
    """Return a workload, or None where weights and activations do not go together."""
    scale = ",s=f32" if parse_weight_format(fmt).family == "fp8" else ""
    try:
        return parse_workload(f"{text},w={fmt},a={act}{scale}")
    except UsageError:
        return None


@cache
def cases(name):
    """Return (format, activations, hardware) of all that a schedule takes, the best hardware first."""
    schedule, found = get_schedule(name), []
    for fmt in weight_formats():
        for act in ACT_NAMES:
            workload = workload_of(WIDE, fmt.name, act)
            fits = (h for h in MACHINES if workload and schedule.supports(workload, h))
            if (hardware := next(fits, None)) is not None:
                found.append((fmt.name, act, hardware))
    return tuple(found)


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_takes_some_format(name):
    if not cases(name):
        missing = PRESETS["sapphirerapids"].features - CPU.features
        assert missing, f"{name} takes no format on any machine"
        pytest.skip(f"not on a CPU without {' '.join(sorted(missing))}")


def test_every_format_has_a_schedule():
    taken = {fmt for name in NAMES for fmt, _, _ in cases(name)}
    left = {f.name for f in weight_formats()} - taken
    # float16 weights and groups of dense trits have none
    assert all(n == "f16" or n.startswith("w1.58dg") for n in left), left
    assert {"w1.58d", "w1.58dgrow"} <= taken


def test_older_cpus_take_every_format_too():
    for preset in ("x86-64-v3", "x86-64-v4"):
        for fmt in ("w1", "w2g64", "w3", "w1.58", "w1.58d", "w4g64", "w8"):
            workload = workload_of(WIDE, fmt, "a8")
            assert any(get_schedule(n).supports(workload, PRESETS[preset]) for n in NAMES), fmt


def any_case(data):
    """Prove any case, shape and config."""
    name = data.draw(st.sampled_from([n for n in NAMES if cases(n)]))
    fmt, act, hardware = data.draw(st.sampled_from(cases(name)))
    schedule = get_schedule(name)
    e = data.draw(st.integers(1, 4))
    k, t = data.draw(st.integers(1, e)), data.draw(st.integers(1, 9))
    d, f = (data.draw(st.integers(1, most)) for most in (300, 200))
    if parse_weight_format(fmt).family == "complex":
        d, f = d + d % 2, f + f % 2
    workload = workload_of(f"moe:t={t},e={e},k={k},d={d},f={f}", fmt, act)
    if not schedule.supports(workload, hardware):
        return
    seed = data.draw(st.integers(0, 999))
    check(schedule, workload, sample_config(schedule, workload, hardware, seed), seed,
          hardware=hardware)  # fmt: skip


@settings(max_examples=6)
@given(data=st.data())
def test_any_case_shape_and_config_is_within_the_bound(data):
    any_case(data)


@pytest.mark.slow
@settings(max_examples=40)
@given(data=st.data())
def test_many_cases_shapes_and_configs_are_within_the_bound(data):
    any_case(data)


def one_result(fmt, x, shape=WIDE, *, every=False):
    """Run every schedule of exact sums on small tiles; all must agree to the bit.

    ``every``: on CPUs of two kinds, with every way to multiply and any tiles.
    """
    workload, results = workload_of(shape, fmt, "a8"), {}
    arrays = get_op("moe").make_inputs(workload, np.random.default_rng(1))
    arrays["x"] = x(arrays["x"].shape)
    for name in NAMES:
        schedule = get_schedule(name)
        for hardware in MACHINES[:2]:
            if not schedule.supports(workload, hardware):
                continue
            space = schedule.space(workload, hardware)
            for dot in space.knobs["dot"] if every else space.knobs["dot"][:1]:
                small = {"rows13": 1, "rows2": 1, "tokens": 2, "unroll": 1, "apart": True}
                config = dataclasses.replace(space.default, **small, dot=dot)
                if every:
                    sampled = sample_config(schedule, workload, hardware, len(results))
                    sampled = dataclasses.replace(sampled, dot=dot)
                    config = sampled if space.legal(sampled) else config
                if (name, dot) not in results:
                    done = check(schedule, workload, config, inputs=arrays, hardware=hardware)
                    results[name, dot] = done.outputs["y"]
    first, *others = results
    for other in others:
        same = np.array_equal(results[first], results[other])
        assert same, f"{fmt}: {other} differs from {first}"
    return {name for name, _ in results}


ROWS = {
    "sign": lambda shape: (
        np.where(np.arange(shape[1]) % 2, 1, -1).astype("f4") * np.ones(shape, "f4")
    ),
    "heavy": lambda shape: np.random.default_rng(3).standard_normal(shape).astype("f4") ** 5,
}
"""Rows whose tables overflow a byte throughout, and rows where few do."""


@pytest.mark.parametrize(("fmt", "kind"), [("w2g64", "sign"), ("w1.58d", "heavy")])
def test_exact_schedules_agree_to_the_bit(fmt, kind):
    assert len(one_result(fmt, ROWS[kind])) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fmt", "kind"),
    [("w1g32", "sign"), ("w2zg32", "heavy"), ("w3g128", "heavy"), ("w4g64", "heavy"),
     ("w5zg32", "sign"), ("w1.58", "heavy"), ("w1.58dgrow", "sign")],
)  # fmt: skip
def test_exact_schedules_agree_to_the_bit_whatever_the_tiles(fmt, kind):
    one_result(fmt, ROWS[kind], every=True)


@pytest.mark.skipif(
    not {"avx512vbmi", "avx512vnni"} <= CPU.features, reason="needs permutations of 64 bytes"
)
def test_tables_are_made_once_for_a_token():
    # the tables' stores do not grow with experts or with gate and up: one build before each matmul
    schedule = get_schedule("moe.x86_lut2")
    counts = []
    for e, k in ((2, 1), (8, 8)):
        workload = parse_workload(f"moe:t=1,e={e},k={k},d=256,f=64,w=w2g64,a=a8")
        kernel = schedule.lower(workload, schedule.space(workload, CPU).default, CPU)
        text = assembly([kernel], CPU)
        assert "vpermb" in text
        counts.append(kernel.counts.ops)
    # 16 entries for each 4 columns: d once, f for each slot
    tables = [16 * (256 + k * 64) // 4 * 8 for k in (1, 8)]
    lookups = [3 * 256 * 64 * k // 4 * 2 for k in (1, 8)]
    assert [c["shuffle_u8"] for c in counts] == lookups
    made = [c["dot_i8"] - n for c, n in zip(counts, lookups, strict=True)]
    assert made == tables
