"""Every schedule x weight format x activations: packing undone, and sums equal to those of int64.

Nothing is listed here: schedules come from the registry, formats from the grammar (`every.cases`), so that
new ones are covered at once. The quick tests take a part of the matrix, the slow ones all of it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import numpy as np
import pytest
from every import LONG, Built, Case, adversarial, cases, names, runnable, standing_for_all
from harness import Arrays, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import _WEIGHT, ACT_NAMES, BASES, parse_weight_format, weight_formats
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op, load_all, parse_workload
from mimo_compile.schedules import names_for
from mimo_compile.schedules.base import Schedule

CPU = local_cpu()
NAMES = names()
FEW = 3
"""Cases of each schedule in the quick tests, besides those that hypothesis draws."""
PARTS = 4
"""Of the slow tests of a schedule."""
PACKED = {
    "mpgemm": "m=1,n={n},k={k}", "lora_mpgemm": "m=1,n={n},k={k},r={r},l=2,d={d}{parts}",
    "moe": "t=1,e=3,k=1,d={n},f={k}",
}  # fmt: skip
"""Extents of the ops whose weights have formats."""
load_all()


@settings(max_examples=200)
@given(st.from_regex(_WEIGHT, fullmatch=True))
def test_the_list_of_formats_is_the_grammar(text):
    try:
        fmt = parse_weight_format(text)
    except UsageError:
        return
    assert text.partition("g")[0] in BASES
    assert fmt in weight_formats()


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_takes_some_format(name):
    if not cases(name):
        missing = PRESETS["sapphirerapids"].features - CPU.features
        assert missing, f"{name} takes no format on any machine"
        pytest.skip(f"not on a CPU without {' '.join(sorted(missing))}")


def test_every_format_has_a_schedule():
    taken = {case.fmt for name in NAMES for case in cases(name)}
    # float16 weights and groups of 16 to 256 of dense trits have no kernel
    left = {f.name for f in weight_formats() if f not in taken}
    assert all(n == "f16" or n.startswith("w1.58dg") for n in left)


# -- packing ---------------------------------------------------------------------------------------


def config_of(data: st.DataObject, schedule: Schedule, workload, hardware):
    """Draw any config of a schedule's space."""
    space = schedule.space(workload, hardware)
    for _ in range(5):
        knobs = {k: data.draw(st.sampled_from(v), label=k) for k, v in space.knobs.items()}
        if space.legal(config := space.make(**knobs)):
            return config
    return space.default


def assert_undone(schedule: Schedule, workload, config, args, seed: int) -> Arrays:
    """Pack random weights, unpack them, compare; return what was packed."""
    op = get_op(workload.op)
    weights = {a.name for a in op.args(workload) if a.role == "weight"}
    arrays = op.make_inputs(workload, np.random.default_rng(seed))
    arrays = {n: a for n, a in arrays.items() if n in weights}
    packed = schedule.pack(workload, config, arrays)
    where = f"{schedule.name} {workload} {config}"
    if args is not None:
        shapes = {a.name: (a.shape, np.dtype(a.dtype)) for a in args if a.role == "weight"}
        assert {n: (a.shape, a.dtype) for n, a in packed.items()} == shapes, where
    back = schedule.unpack_weights(workload, config, packed)
    assert back.keys() == arrays.keys(), where
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype, f"{where}: {name}"
        assert np.array_equal(back[name], array), f"{where}: {name} comes back changed"
    return packed


@settings(max_examples=60)
@given(data=st.data())
def test_unpacking_undoes_packing(data):
    """For any schedule of any op, format, extents, config, storage of scales."""
    op = data.draw(st.sampled_from(sorted(PACKED)))
    schedule = runnable(data.draw(st.sampled_from(names_for(op)), label="schedule"))
    fmt = data.draw(st.sampled_from(weight_formats()), label="format")
    n, k, r = (data.draw(st.integers(1, most)) for most in (70, 300, 20))
    if fmt.family == "complex":
        n, k = 2 * n, 2 * k
    first = data.draw(st.integers(0, n - 1))
    more = data.draw(st.sampled_from(("", ",s=f32"))) if not fmt.is_float else ""
    if op != "moe":
        more += data.draw(st.sampled_from(("", ",bias=1")))
    extents = PACKED[op].format(
        n=n, k=k, r=r, d=data.draw(st.sampled_from(("f32", "bf16", "fp8"))),
        parts=f",parts={first}+{n - first}" if first else "",
    )  # fmt: skip
    for act in ACT_NAMES:
        try:
            workload = parse_workload(f"{op}:{extents},w={fmt},a={act}{more}")
        except UsageError:
            continue
        if not schedule.supports(workload, CPU):
            continue
        config = config_of(data, schedule, workload, CPU)
        seed = data.draw(st.integers(0, 99))
        packed = assert_undone(schedule, workload, config, None, seed)
        # other configs with the same layout share the bytes
        other = sample_config(schedule, workload, CPU, seed)
        if schedule.layouts(workload, other) == schedule.layouts(workload, config):
            again = assert_undone(schedule, workload, other, None, seed)
            assert all(np.array_equal(packed[n], again[n]) for n in packed)


@pytest.mark.parametrize("name", NAMES)
def test_unpacking_undoes_packing_in_every_format(name):
    for case in {c.fmt.name: c for c in cases(name)}.values():  # packing knows no activations
        for n, k in ((17, 1440), (1, 333)):
            workload = case.workload(n, k, extra=",bias=1")
            if workload is not None:
                config = case.schedule.space(workload, case.hardware).default
                args = case.schedule.problem(workload).args()
                assert_undone(case.schedule, workload, config, args, 1)


# -- sums ------------------------------------------------------------------------------------------


def prove(chosen: Iterable[Case]) -> None:
    """Run each case on all adversarial inputs, 14336 columns and an odd number of rows; tell all that fail.

    Raises:
        AssertionError: with the message of each case that is wrong.
    """
    wrong, exact = [], 0
    for case in chosen:
        workload = case.workload(17, LONG)
        assert workload is not None, case
        try:
            built = Built(case, workload, case.schedule.space(workload, case.hardware).default)
            for name, inputs in adversarial(case, workload, zlib.crc32(str(case).encode())):
                exact += built.prove(name, inputs)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, f"{len(wrong)} cases fail:\n" + "\n".join(wrong)
    assert exact


@pytest.mark.parametrize("name", NAMES)
def test_sums_are_exact(name):
    found = standing_for_all(name)
    if not found:
        pytest.skip("not on this CPU")
    # another part of the formats for each schedule
    step = math.ceil(len(found) / FEW)
    prove(found[NAMES.index(name) % step :: step])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", NAMES)
def test_sums_are_exact_in_every_format(name, part):
    if found := standing_for_all(name)[part::PARTS]:
        prove(found)


def any_sums(data: st.DataObject) -> None:
    """Prove a kernel of any case, shape and config; the least extents are one."""
    name = data.draw(st.sampled_from([n for n in NAMES if cases(n)]))
    case = data.draw(st.sampled_from(cases(name)))
    n, k = (data.draw(st.integers(1, most)) for most in (50, 600))
    m = data.draw(st.integers(1, 9)) + (case.tokens if case.tokens > 8 else 0)
    workload = case.workload(n, k, m, data.draw(st.sampled_from(("", ",s=f32"))))
    if workload is None:
        return
    built = Built(case, workload, config_of(data, case.schedule, workload, case.hardware))
    for what, inputs in adversarial(case, workload, data.draw(st.integers(0, 999))):
        built.prove(what, inputs)


@settings(max_examples=16)
@given(data=st.data())
def test_sums_of_any_shape_and_config_are_exact(data):
    any_sums(data)


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data())
def test_sums_of_many_shapes_and_configs_are_exact(data):
    any_sums(data)
