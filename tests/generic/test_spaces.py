"""Spaces of generic functions: legal configs give right kernels, replay exactly and keep their names."""

from __future__ import annotations

import json

import numpy as np
import pytest
from generic_cases import CASES, check, legalised, made

from mimo_compile._tvm import compiler
from mimo_compile.ir import functions
from mimo_compile.ir.counts import LEVELS, TRAITS
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import get_op
from mimo_compile.schedules import get_schedule, names_for
from mimo_compile.schedules.generic.outline import MOST_BITS
from mimo_compile.schedules.generic.x86_tir import default_config
from mimo_compile.search.space import JointSpace

tvm = compiler()
from tvm_ffi import structural_equal

CPU = local_cpu()
TWO = CPU.with_threads(min(2, CPU.cores))
NAMES = ("tir.x86_rules", "tir.x86_trace", "tir.x86_meta")
REDUCING = ("softmax", "softmax_odd", "layer_norm", "conv", "matmul", "matmul_odd", "mean")


def workload(name, at=0):
    return functions.workload_of(legalised(name)[at][0])


def drawn(schedule, w, hardware, seed):
    joint = JointSpace(w, hardware, [get_schedule(schedule)])
    return joint, made(joint, schedule, np.random.default_rng(seed))


def test_every_generic_schedule_is_here():
    assert tuple(names_for("tir")) == (*NAMES, "tir.cuda")


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("name", [*REDUCING, "gelu", "take", "whole", "argmax", "greater"])
def test_defaults_are_right(schedule, name):
    for at in range(len(legalised(name))):
        w = workload(name, at)
        kind = get_schedule(schedule)
        if not kind.supports(w, TWO):
            assert schedule == "tir.x86_meta"
            continue
        check(w, kind.lower(w, kind.space(w, TWO).default, TWO))


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("name", ["softmax_odd", "matmul_odd", "conv", "linear_gelu"])
def test_drawn_configs_are_right_or_refused(schedule, name):
    w = workload(name)
    joint, _ = drawn(schedule, w, TWO, 0)
    right = 0
    for seed in range(3):
        _, candidate = drawn(schedule, w, TWO, seed)
        config = joint.config(candidate)
        try:
            kernel = joint.schedules[schedule].lower(w, config, TWO)
        except ValueError:
            continue
        check(w, kernel)
        right += 1
    assert right >= 1


@pytest.mark.parametrize("schedule", NAMES)
def test_a_config_replays_to_the_same_code(schedule):
    w = workload("matmul")
    joint, candidate = drawn(schedule, w, TWO, 7)
    again = joint.adopt(schedule, json.loads(json.dumps(candidate.config)), TWO.threads)
    assert again == candidate
    kind = joint.schedules[schedule]
    first, second = (kind.lower(w, joint.config(c), TWO) for c in (candidate, again))
    assert first.name == second.name
    assert structural_equal(first.func, second.func)


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("name", ["softmax", "matmul", "conv", "linear_gelu"])
def test_crossover_mutation_and_neighbours_stay_inside(schedule, name):
    w = workload(name)
    joint, a = drawn(schedule, w, TWO, 1)
    _, b = drawn(schedule, w, TWO, 2)
    rng, space = np.random.default_rng(0), joint.spaces[schedule]
    assert space.size < 2**MOST_BITS
    children = [
        space.make(**{k: (a if rng.random() < 0.5 else b).config[k] for k in space.knobs})
        for _ in range(20)
    ]
    children += [
        space.make(**{**{k: a.config[k] for k in space.knobs}, name: value})
        for name, values in space.knobs.items()
        for value in values[:3]
    ]
    legal = [c for c in children if space.legal(c)]
    assert len(legal) > 3
    for child in legal:
        candidate = joint.candidate(schedule, child)
        assert joint.adopt(schedule, candidate.config) == candidate
        assert space.make(**candidate.config) == child


def test_decisions_of_other_functions_are_refused():
    joint, candidate = drawn("tir.x86_trace", workload("conv"), TWO, 3)
    other = JointSpace(workload("softmax"), TWO, [get_schedule("tir.x86_trace")])
    assert other.adopt("tir.x86_trace", candidate.config) is None
    assert other.adopt("tir.x86_trace", {**joint.defaults()[0].config, "b9.tile": 4}) is None


def test_sketches_mean_the_same_on_any_number_of_threads():
    w, kind = workload("softmax"), get_schedule("tir.x86_meta")
    spaces = [kind.space(w, CPU.with_threads(1)), kind.space(w, TWO)]
    plain = [{n: v for n, v in s.knobs.items() if n != "parallel"} for s in spaces]
    assert plain[0] == plain[1]
    rng = np.random.default_rng(0)
    drawn = {n: v[rng.integers(len(v))] for n, v in spaces[0].knobs.items()}
    one = JointSpace(w, CPU.with_threads(1), [kind])
    config = spaces[0].make(**drawn)
    assert JointSpace(w, TWO, [kind]).adopt(kind.name, one.candidate(kind.name, config).config, 1)
    a, b = (kind.lower(w, config, CPU.with_threads(n)) for n in (1, TWO.threads))
    assert a.name == b.name and structural_equal(a.func, b.func)


def test_factors_that_do_not_divide_are_refused():
    w, kind = workload("matmul"), get_schedule("tir.x86_meta")
    space = kind.space(w, TWO)
    assert space.legal(space.default)
    values = dict(space.default.made)
    tiles = sorted(n for n in values if n.startswith("t0."))
    for wrong in ({n: space.knobs[n][-1] for n in tiles}, {tiles[0]: 5}, {tiles[-1]: 1 << 20}):
        config = kind.config_from_json({**values, **wrong})
        assert not space.legal(config)
        assert JointSpace(w, TWO, [kind]).adopt(kind.name, dict(config.made)) is None


def test_the_default_is_what_the_rules_do():
    for name in REDUCING:
        w = workload(name)
        func = functions.function_of(w)
        rules, trace = (get_schedule(n) for n in NAMES[:2])
        assert rules.space(w, CPU).default == default_config(func)
        a = rules.lower(w, rules.space(w, CPU).default, CPU)
        b = trace.lower(w, trace.space(w, CPU).default, CPU)
        same = structural_equal(
            a.func.without_attr("global_symbol"), b.func.without_attr("global_symbol")
        )
        assert same, name


def test_a_function_of_other_names_takes_the_same_records():
    w = workload("softmax")
    func = functions.function_of(w)
    renamed = tvm.ir.load_json(tvm.ir.save_json(func).replace("T_softmax", "other"))
    assert functions.workload_of(renamed) == w


@pytest.mark.parametrize("schedule", NAMES)
def test_work_of_blocks_adds_up(schedule):
    for name in ("softmax", "conv", "matmul"):
        w = workload(name)
        joint, candidate = drawn(schedule, w, TWO, 1)
        kind = joint.schedules[schedule]
        counts = kind.work(w, joint.config(candidate), TWO)
        assert counts.parts and len({p.name for p in counts.parts}) == len(counts.parts)
        for level in LEVELS:
            assert counts.bytes[level] == pytest.approx(sum(p.bytes[level] for p in counts.parts))
        for part in counts.parts:
            assert set(part.traits) == set(TRAITS)
            far = [part.bytes[level] for level in LEVELS]
            assert far == sorted(far) and far[0] > 0
        assert counts.bytes["dram"] >= 0.99 * get_op("tir").counts(w).bytes["dram"]


def test_other_hardware_and_unknown_functions_have_no_schedule(monkeypatch):
    w = workload("matmul")
    kind = get_schedule("tir.x86_rules")
    assert kind.supports(w, PRESETS["x86-64-v3"])
    monkeypatch.setattr(functions, "_KNOWN", {})
    monkeypatch.setattr(functions, "_SOURCES", [])
    assert not kind.supports(w.replace(hash="h0000000000000000"), CPU)


def test_cases_hold_what_they_say():
    assert {c for c in CASES if CASES[c].want is None} == {"rsqrt", "cancelled"}
