"""Generic functions through the whole chain: tuned, kept, found again, compiled into a module."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from generic_cases import legalised, made

import mimo_compile as mc
from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.cost_models.features import ANALYTIC, Extractor
from mimo_compile.ir import functions
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.pipeline.build import lower_model
from mimo_compile.pipeline.choose import choose, planned, tunable
from mimo_compile.pipeline.graphs import module_graphs
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.generic.sketches import sketches_of
from mimo_compile.search import kept_functions
from mimo_compile.search.database import Database
from mimo_compile.search.measure import Measurer, Timing
from mimo_compile.search.records import Record, Verdict, record_key, versions
from mimo_compile.search.space import JointSpace
from mimo_compile.search.warm import samples_of

pytestmark = pytest.mark.compile
CPU = local_cpu().with_threads(1)
QUICK = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.02, repeats=1, cache="hot")


class Mix(torch.nn.Module):
    """Nothing that an op of the dialect covers."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.norm = torch.nn.LayerNorm(12)

    def forward(self, x):
        y = torch.relu(self.conv(x))
        scores = torch.softmax(y @ y.transpose(-1, -2), -1)
        return self.norm(scores), torch.cumsum(x, -1)


class Scores(torch.nn.Module):
    """Two functions."""

    def forward(self, x):
        return torch.softmax(x @ x, -1)


def workload(name):
    return functions.workload_of(legalised(name)[0][0])


@pytest.mark.parametrize("draws", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_every_schedule_is_measured_right(draws):
    space = JointSpace(workload("softmax"), CPU)
    rng = np.random.default_rng(0)
    drawn = [made(space, n, rng) for n in space.schedules for _ in range(draws)]
    with Measurer(CPU, timing=QUICK, builders=1) as measurer:
        found = list(measurer.measure(space, [*space.defaults(), *drawn], 3, energy=False))
    assert {m.verdict.value for m in found} <= {"ok", "build_failed"}
    assert [m.verdict.value for m in found[:3]] == ["ok"] * 3
    assert all(m.error_ratio <= 1 for m in found if m.verdict.value == "ok")


@pytest.mark.slow
def test_a_module_is_tuned_and_compiled_with_what_was_found(tmp_path):
    torch.manual_seed(0)
    module, x = Mix().eval(), torch.randn(1, 3, 12, 12)
    db = tmp_path / "records.db"
    result = mc.tune(module, example_inputs=(x,), trials=24, threads=1, db=db, meter="modelled")
    names = [w.workload for w in result.workloads]
    assert names and all(w.op == "tir" for w in names)
    assert result.new_trials >= 12
    best = {str(w.workload): w.best.record for w in result.workloads if w.best}
    artifact = mc.compile(module, example_inputs=(x,), threads=1, db=db)
    plan = {c.workload: c for c in artifact.manifest.plan}
    assert any(c.source == "measured" for c in plan.values())
    for name, record in best.items():
        assert (plan[name].schedule, dict(plan[name].config)) == (record.schedule, record.config)
    with torch.no_grad():
        expected = module(x)
    for got, want in zip(artifact.module()(x), expected, strict=True):
        assert np.allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)
    # the same functions in another model, and without any model
    graphs = module_graphs(module, (x,))
    assert set(names) == set(tunable(graphs, CPU, search=True))
    kept = {p.stem for p in kept_functions.folder_of(db).iterdir()}
    assert kept == {w.text("hash") for w in names}


def test_without_records_the_rules_decide(tmp_path):
    artifact = mc.compile(Scores(), example_inputs=(torch.randn(1, 12, 12),), db=tmp_path / "no.db")
    assert {(c.schedule, c.source) for c in artifact.manifest.plan} == {
        ("tir.x86_rules", "default")
    }


def record_of(space, candidate, latency_us):
    """Return a record as a search would have stored it."""
    schedule = space.schedules[candidate.schedule]
    facts = {
        "workload": str(space.workload), "schedule": schedule.name,
        "schedule_version": schedule.version, "config": candidate.config, "cache": "cold",
    }  # fmt: skip
    return Record(
        key=record_key(
            str(space.workload), schedule.name, schedule.version, candidate.config,
            space.hardware, "cold", versions(),
        ),
        **facts, hardware=space.hardware.id, features=tuple(sorted(space.hardware.features)),
        threads=space.hardware.threads, versions=versions(), verdict=Verdict.OK,
        latency_us=latency_us,
    )  # fmt: skip


def test_functions_without_records_keep_out_of_the_plan(tmp_path):
    """Their modelled energy would make the whole plan's joules modelled ones, and their spaces take long."""
    graphs = module_graphs(Scores(), (torch.randn(1, 20, 20),))
    made_before = sketches_of.cache_info().misses
    assert planned(graphs, CPU) == {}
    plan = choose(graphs, CPU, "energy", None)
    assert {(c.schedule, c.source) for c in plan.choices.values()} == {("tir.x86_rules", "default")}
    assert sketches_of.cache_info().misses == made_before
    first, second = graphs.functions()
    with Database(tmp_path / "r.db") as db:
        space = JointSpace(first, CPU)
        record = record_of(space, space.defaults()[0], 5.0)
        db.add(msgspec.structs.replace(record, energy_mj=0.25, energy_source="rapl"))
        old = record_of(JointSpace(second, CPU), JointSpace(second, CPU).defaults()[0], 5.0)
        db.add(msgspec.structs.replace(old, schedule_version=99))  # of other code: nothing is known
        assert set(planned(graphs, CPU, db)) == {first}
        choices = choose(graphs, CPU, "energy", db).choices
    assert (choices[first].energy_source, choices[first].energy_mj) == ("rapl", 0.25)
    assert (choices[second].schedule, choices[second].source) == ("tir.x86_rules", "default")
    assert set(lower_model(graphs, choices, CPU)) == {first, second}


def test_the_best_record_of_a_function_is_compiled(tmp_path):
    x = torch.randn(1, 12, 12)
    graphs = module_graphs(Scores(), (x,))
    rng = np.random.default_rng(0)
    chosen = {}
    with Database(tmp_path / "r.db") as db:
        for n, w in enumerate(tunable(graphs, CPU)):
            space = JointSpace(w, CPU)
            name = list(space.schedules)[1 + n % 2]
            best = made(space, name, rng)
            db.add(record_of(space, space.defaults()[0], 5.0))
            db.add(record_of(space, best, 3.0))
            chosen[str(w)] = name, best.config
    artifact = mc.compile(Scores(), example_inputs=(x,), db=tmp_path / "r.db", threads=1)
    plan = {c.workload: (c.schedule, dict(c.config)) for c in artifact.manifest.plan}
    assert plan == chosen
    got = artifact.module()(x)
    assert np.allclose(got, Scores()(x).numpy(), rtol=1e-4, atol=1e-6)


def test_the_same_answers_and_seed_give_the_same_search():
    """The strategy is asked in turn with a stand-in for the clock: a time from the config alone."""
    from mimo_compile.search.strategies import Setting, make_strategy
    from mimo_compile.search.strategies.base import Observation

    def asked(seed):
        space = JointSpace(workload("conv"), CPU)
        strategy = make_strategy(
            "evolutionary", Setting(space, np.random.default_rng(seed), space.defaults())
        )
        keys = []
        for _ in range(5):
            batch = strategy.ask(6)
            keys += [c.key for c in batch]
            strategy.tell([Observation(c, 1.0 + int(c.key[:6], 16) / 2**24) for c in batch])
        return keys

    first = asked(4)
    assert len(set(first)) == len(first) > 12
    assert asked(4) == first


def test_features_are_of_each_block_with_its_own_knobs():
    w = workload("softmax")
    space = JointSpace(w, CPU, [get_schedule("tir.x86_trace")])
    candidate = space.candidate("tir.x86_trace", space.spaces["tir.x86_trace"].default)
    knobs = {**candidate.config, "chain": 0}
    counts = space.schedules["tir.x86_trace"].work(w, space.config(candidate), CPU)
    extract = Extractor(w, CPU, DeviceModel.guess(CPU))
    rows = extract.blocks(counts, "tir.x86_trace", knobs)
    assert len(rows) == len(counts.parts) > 1
    for part, row in zip(counts.parts, rows, strict=True):
        rule = knobs[f"{part.name}.rule"]
        assert row[f"knobs.tir.x86_trace.rule={rule}"] == 1.0
        assert not any(".b" in k for k in row if k.startswith("knobs."))
        assert np.isfinite(row[ANALYTIC])
    # what takes no blocks apart is one
    single = extract.blocks(counts.parts[0], "tir.x86_trace", {})
    assert len(single) == 1


def test_features_tell_the_tiles_of_a_sketch():
    w, name = workload("matmul"), "tir.x86_meta"
    space = JointSpace(w, CPU, [get_schedule(name)])
    kind, knobs = space.schedules[name], space.spaces[name].knobs["t0.1"]
    base = space.candidate(name, space.spaces[name].default).config
    extract, rows = Extractor(w, CPU, DeviceModel.guess(CPU)), []
    for value in knobs[:2]:
        told = {**base, "t0.1": value}
        counts = kind.work(w, kind.config_from_json(told), CPU)
        rows.append(extract.blocks(counts, name, told))
    assert len(rows[0]) == len(rows[1]) > 0
    for one, other in zip(*rows, strict=True):
        assert {k for k in one.keys() | other.keys() if one.get(k) != other.get(k)} == {
            f"knobs.{name}.t0.1"
        }


def test_knobs_of_inlined_blocks_are_of_no_other():
    w, name = workload("linear_gelu"), "tir.x86_trace"
    space = JointSpace(w, CPU, [get_schedule(name)])
    config = space.spaces[name].default
    assert config.inlined()
    counts = space.schedules[name].work(w, config, CPU)
    knobs = space.candidate(name, config).config
    for row in Extractor(w, CPU, DeviceModel.guess(CPU)).blocks(counts, name, knobs):
        assert not any(k.startswith(f"knobs.{name}.b") for k in row)


def test_records_of_unknown_functions_teach_nothing(monkeypatch):
    space = JointSpace(workload("gelu"), CPU)
    rng = np.random.default_rng(0)
    drawn = [made(space, n, rng) for n in space.schedules]
    records = [record_of(space, c, 2.0 + n) for n, c in enumerate(drawn)]
    samples, seen = samples_of(records)
    assert len(samples) == len(drawn) and set(seen) == set(space.schedules)
    monkeypatch.setattr(functions, "_KNOWN", {})
    monkeypatch.setattr(functions, "_SOURCES", [])
    assert samples_of(records) == ([], {})
