"""Another plan for a finished artifact: what stays, what is made anew, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from planned import records_of

import mimo_compile as mc
from mimo_compile import api
from mimo_compile.artifact import Artifact
from mimo_compile.cli import main
from mimo_compile.errors import EnvironmentMismatch, UsageError
from mimo_compile.ir.hardware import PRESETS, built_for, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.pipeline import build
from mimo_compile.pipeline import replan as replan_module
from mimo_compile.pipeline.choose import choose
from mimo_compile.pipeline.plans import (
    OBJECTIVES,
    built_version,
    compare_plans,
    problem_of_artifact,
)
from mimo_compile.pipeline.replan import replan
from mimo_compile.runtime.container import Parts, read_manifest
from mimo_compile.schedules import get_schedule
from mimo_compile.search.database import Database
from mimo_compile.search.plan import Planner
from mimo_compile.search.records import encode
from mimo_compile.search.space import JointSpace
from mimo_compile.verify import check_kernels

pytestmark = pytest.mark.compile


def test_another_plan_keeps_programs_and_weights(model, two_plans, monkeypatch) -> None:
    workload, second, db = two_plans
    hardware = local_cpu()
    for module in (build, replan_module):
        monkeypatch.setattr(module, "compile_isolated", lambda kernels, *_: b"%d" % len(kernels))
    choices = choose(model, hardware, "latency", db).choices
    made = build.build_artifact(model, choices, hardware, build.Extras())
    same = replan(made, problem_of_artifact(made), "latency", db)
    assert same.code is made.code and same.programs == made.programs
    assert same.manifest.plan == made.manifest.plan
    other = replan(made, problem_of_artifact(made), "energy", db)
    assert other.code == b"%d" % len(made.manifest.plan) and other.weights is made.weights
    assert other.manifest.objective == "energy" and other.manifest.states == made.manifest.states
    before = {c.workload: c for c in made.manifest.plan}
    after = {c.workload: c for c in other.manifest.plan}
    assert set(before) == set(after)
    changed = {w for w in before if before[w].kernel != after[w].kernel}
    assert str(workload) in changed and dict(after[str(workload)].config) == second.config
    assert all(before[w].calls == after[w].calls for w in before)
    names = {c.kernel for c in other.manifest.plan}
    assert {c.kernel for e in other.programs.entries.values() for c in e.calls} == names
    assert second.config in [json.loads(line)["config"] for line in other.records.splitlines()]
    cut = msgspec.structs.replace(
        made.manifest, target=msgspec.structs.replace(made.manifest.target, features=("avx2",))
    )
    elsewhere = Artifact(cut, made.programs, b"")
    with pytest.raises(EnvironmentMismatch, match="was built for"):
        replan(elsewhere, problem_of_artifact(elsewhere), "energy", db)


@pytest.mark.slow
def test_an_artifact_with_another_plan_computes_the_same(
    llama_folder: Path, two_plans, tmp_path: Path
) -> None:
    _, second, db = two_plans
    path = tmp_path / "a.mimo"
    mc.compile(llama_folder, quant="w4g32a8", max_context=4, db=db).save(path)
    other = mc.compile(path, objective="energy", db=db)
    other.save(tmp_path / "b.mimo")
    first, again = mc.load(path), mc.load(tmp_path / "b.mimo", verify="full")
    assert any(dict(c.config) == second.config for c in again.manifest.plan)
    np.testing.assert_allclose(
        again.token_logprobs([5, 7, 9, 11]), first.token_logprobs([5, 7, 9, 11]), atol=2e-4
    )
    with pytest.raises(UsageError, match="only its plan can change"):
        mc.compile(path, quant="w8a8")


@pytest.fixture
def made(model, two_plans, monkeypatch):
    """An artifact that was planned with the records of `two_plans`; nothing is compiled."""
    for module in (build, replan_module):
        monkeypatch.setattr(module, "compile_isolated", lambda kernels, *_: b"%d" % len(kernels))
    plan = choose(model, local_cpu(), "latency", two_plans[2])
    return build.build_artifact(
        model, plan.choices, local_cpu(), build.Extras(records=plan.records)
    )


def _with(made: Artifact, target: dict | None = None, **fields: object) -> Artifact:
    if target is not None:
        fields["target"] = msgspec.structs.replace(made.manifest.target, **target)
    changed = msgspec.structs.replace(made.manifest, **fields)
    return Artifact(changed, made.programs, made.code, made.weights, records=made.records)


def test_an_artifact_brings_its_own_records(made, two_plans, tmp_path) -> None:
    """Without the database it was tuned with, also beside a few new readings, its plan stays."""
    workload, second, db = two_plans
    (chosen,) = [c for c in made.manifest.plan if c.workload == str(workload)]
    assert chosen.source == "measured" and chosen.latency_us == 10.0
    same = replan(made, problem_of_artifact(made), "latency", None)
    assert same.manifest.plan == made.manifest.plan and same.code is made.code
    assert same.records == made.records
    comparison = compare_plans(problem_of_artifact(made), None, ["latency"])
    assert comparison.unlike_built(comparison.plans[0]) == 0
    with Database(tmp_path / "few.db") as few:
        few.add(*(r for r in db.records(workload) if r.config == second.config))
        again = replan(made, problem_of_artifact(made), "latency", few)
        frugal = replan(made, problem_of_artifact(made), "energy", few)
    assert again.manifest.plan == made.manifest.plan
    (other,) = [c for c in frugal.manifest.plan if c.workload == str(workload)]
    assert dict(other.config) == second.config and other.source == "measured"
    assert set(made.records.splitlines()) < set(frugal.records.splitlines())


def test_code_and_the_versions_that_built_it_go_together(made) -> None:
    old = {**made.manifest.versions, "apache-tvm": "0.1.0"}
    stale = _with(made, versions=old)
    stale.code = b"old"
    fresh = replan(stale, problem_of_artifact(stale), "latency", None)
    assert fresh.code != b"old" and fresh.manifest.versions == made.manifest.versions


def test_what_cannot_be_planned_again_is_refused_with_code_3(made) -> None:
    here = local_cpu()
    choice = made.manifest.plan[0]
    cases = {
        "was built for": _with(made, {"features": ("avx2",)}),
        f"--threads {here.cores}": _with(made, {"threads": here.cores + 7}),
        "built by mimo_compile 9.1.0": _with(made, versions={"mimo_compile": "9.1.0"}),
        "has changed since": _with(
            made, plan=(msgspec.structs.replace(choice, config={"old": 1}), *made.manifest.plan[1:])
        ),
        "gone.schedule has changed": _with(
            made, plan=(msgspec.structs.replace(choice, schedule="gone.schedule"), *made.manifest.plan[1:])
        ),
    }  # fmt: skip
    for text, artifact in cases.items():
        with pytest.raises(EnvironmentMismatch, match=text) as refused:
            replan(artifact, problem_of_artifact(artifact), "latency", None)
        assert refused.value.exit_code == 3 and refused.value.remedy


def test_what_is_refused_is_refused_before_the_search(made, monkeypatch) -> None:
    def searched(*_: object, **__: object) -> None:
        raise AssertionError("it was tuned first")

    monkeypatch.setattr(api, "_tune", searched)
    monkeypatch.setattr(Artifact, "load", classmethod(lambda cls, path: loaded[path]))
    loaded = {
        "other.mimo": _with(made, {"features": ("avx2",)}),
        "none.mimo": _with(made, plan=()),
        "good.mimo": made,
    }
    with pytest.raises(EnvironmentMismatch, match="was built for"):
        mc.compile("other.mimo", trials=4)
    with pytest.raises(UsageError, match="generic"):
        mc.compile("none.mimo", trials=4)
    with pytest.raises(UsageError, match="not pareto"):
        mc.compile("good.mimo", trials=4, objective="pareto")
    with pytest.raises(UsageError, match="only its plan can change"):
        mc.compile("good.mimo", adapter_format="bf16")
    with pytest.raises(AssertionError, match="tuned first"):
        mc.compile("good.mimo", trials=4)
    with pytest.raises(UsageError, match="is an artifact"):
        mc.tune("good.mimo", trials=4)


def test_an_artifact_of_a_preset_has_the_presets_cores(made, monkeypatch) -> None:
    """More threads than this machine has are no error for an artifact of a larger one."""
    preset = PRESETS["x86-64-v4"]
    features = tuple(sorted(preset.features))
    theirs = _with(made, {"name": preset.name, "features": features, "threads": 16})
    problem = problem_of_artifact(theirs)
    assert problem.hardware == preset
    monkeypatch.setattr(Artifact, "load", classmethod(lambda cls, path: theirs))
    other = mc.compile("preset.mimo", threads=12)
    assert other.manifest.target.threads == 12 and other.manifest.target.name == preset.name
    with pytest.raises(UsageError, match=r"outside 1\.\.16"):
        mc.compile("preset.mimo", threads=17)


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "command-line.md").read_text()


def _documented(verb: str) -> set[str]:
    text = PAGE.split(f"\n## {verb}\n")[1].split("\n## ")[0]
    return set(re.findall(r"`(\w+)`", text[text.index("\nJSON") :]))


def _keys(value: object) -> set[str]:
    """All keys of objects in objects, but for those that are data."""
    if isinstance(value, list):
        return set().union(*(_keys(v) for v in value))
    if not isinstance(value, dict):
        return set()
    data = {"config", "calls", "entries", "choices"}
    return {*value}.union(*(_keys(v) for k, v in value.items() if k not in data))


def test_what_the_commands_print_of_an_artifact(made, monkeypatch, tmp_path, capsys) -> None:
    """JSON and exit codes of `compile OUT.mimo` and `inspect OUT.mimo --plan`, no records but its own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    path, out = made.save(tmp_path / "a.mimo"), tmp_path / "b.mimo"

    def call(code: int, *arguments: object) -> dict:
        assert main([*map(str, arguments), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    found = call(0, "compile", path, "-o", out)
    assert _keys(found) <= _documented("compile") and found["choices"]["measured"] >= 1
    assert found["objective"] == "latency" and Artifact.load(out).records == made.records
    found = call(0, "inspect", path, "--plan")
    assert _keys(found) <= _documented("inspect")
    assert [p["objective"] for p in found["plans"]] == [*OBJECTIVES]
    assert found["plans"][0]["unlike_built"] == 0 and found["plans"][0]["measured_share"] > 0
    for text in ("nonsense", "pareto"):
        assert call(2, "inspect", path, "--plan", "--objective", text)["exit_code"] == 2
        assert call(2, "compile", path, "-o", out, "--objective", text)["exit_code"] == 2
    assert call(2, "compile", path, "-o", out, "--adapter-format", "bf16")["exit_code"] == 2
    _with(made, {"features": ("avx2",)}).save(path)
    refused = call(3, "compile", path, "-o", out)
    assert refused["exit_code"] == 3 and "was built for" in refused["error"]
    path.write_bytes(path.read_bytes()[:-100])
    for command in (("inspect", path, "--plan"), ("compile", path, "-o", out)):
        assert call(3, *command)["exit_code"] == 3
    path.unlink()
    assert "No such file" in call(1, "inspect", path, "--plan")["error"]


def test_a_kernel_of_a_larger_machine_is_shown(made, monkeypatch, tmp_path, capsys) -> None:
    """More threads than there are cores here, of a preset and of a machine that is not known."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    kernel = next(c.kernel for c in made.manifest.plan if c.source != "measured")
    features = made.manifest.target.features
    for name, threads in (("x86-64-v4", 64), ("some larger cpu", 96)):
        assert built_for(name, "cpu", frozenset(features), threads).threads == threads
        path = _with(made, {"name": name, "threads": threads}).save(tmp_path / "a.mimo")
        assert main(["inspect", str(path), "--kernel", kernel]) == 0, capsys.readouterr().err
        assert "why" in capsys.readouterr().out


def test_an_objective_is_read_before_the_model(monkeypatch, capsys) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the model was read first")

    monkeypatch.setattr("mimo_compile.pipeline.source.open_source", opened)
    assert main(["inspect", "tiny", "--plan", "--objective", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_weights_packed_for_a_kernel_that_was_never_measured(tmp_path) -> None:
    """Records of other layouts only: a config that reads the packed one stands in, behind these."""
    hardware = local_cpu()
    workload = parse_workload("mpgemm:m=1,n=256,k=256,w=w4g32,a=a8")
    space = JointSpace(workload, hardware)
    found = {space.layouts(c).get("weight"): c for _, c in zip(range(4000), space, strict=False)}
    (_, first), (packed, second) = list(found.items())[:2]
    with Database(tmp_path / "r.db") as db:
        db.add(*records_of(workload, first, first)[:1])
        layouts = {workload: tuple(sorted(space.layouts(second).items()))}
        planner = Planner({workload: 1.0}, hardware, db=db, packed=layouts)
    (option,) = planner.options[workload]
    assert dict(option.layouts)["weight"] == packed and option.source == "modelled"
    assert option.latency_us >= 20
    gone = {workload: (("weight", "no-such-layout"),)}
    with pytest.raises(EnvironmentMismatch, match="as they are packed"):
        Planner({workload: 1.0}, hardware, packed=gone)


def test_generic_kernels_need_the_source() -> None:
    made = mc.compile(torch.nn.GELU(), example_inputs=(torch.zeros(2, 3),))
    with pytest.raises(UsageError, match=r"generic.*from its source"):
        replan(made, problem_of_artifact(made), "energy", None)


# -- versions of schedules ---------------------------------------------------------------------


def _raised(monkeypatch, name: str, by: int = 1) -> int:
    """Install another version of a schedule; return the one before."""
    schedule = get_schedule(name)
    before = schedule.version
    monkeypatch.setattr(type(schedule), "version", before + by)
    return before


def test_weights_of_another_version_are_not_read(made, two_plans, monkeypatch, capsys) -> None:
    """A layout's name may mean another packing now: no kernel of today reads weights of then."""
    workload, _, db = two_plans
    (choice,) = [c for c in made.manifest.plan if c.workload == str(workload)]
    before = _raised(monkeypatch, choice.schedule)
    assert choice.schedule_version == before
    text = f"version {before} packed its weights, {before + 1} is installed"
    for again in (
        lambda: replan(made, problem_of_artifact(made), "latency", db),
        lambda: compare_plans(problem_of_artifact(made), db, ["latency"]),
    ):
        with pytest.raises(EnvironmentMismatch, match=text) as refused:
            again()
        assert "from its source" in (refused.value.remedy or "")
    monkeypatch.undo()
    assert (
        replan(made, problem_of_artifact(made), "latency", db).manifest.plan == made.manifest.plan
    )


def test_a_kernel_without_weights_is_made_by_the_new_version(made, monkeypatch) -> None:
    """Nothing is packed for it: it gets new code, which says so, and no old record speaks for it."""
    plan = made.manifest.plan
    (choice,) = [c for c in plan if c.workload.startswith("swiglu") and c.calls.get("step_1")]
    workload = parse_workload(choice.workload)
    old = next(
        r for r in records_of(workload, *JointSpace(workload, local_cpu()).defaults()[:1] * 2)
    )
    kept = made.records + (encode(old) + "\n").encode()
    artifact = Artifact(made.manifest, made.programs, b"old", made.weights, records=kept)
    same = replan(artifact, problem_of_artifact(artifact), "latency", None)
    (measured,) = [c for c in same.manifest.plan if c.workload == choice.workload]
    assert measured.source == "measured" and encode(old).encode() in same.records
    before = _raised(monkeypatch, choice.schedule)
    problem = problem_of_artifact(artifact)
    other = replan(artifact, problem, "latency", None)
    (fresh,) = [c for c in other.manifest.plan if c.workload == choice.workload]
    assert (choice.schedule_version, fresh.schedule_version) == (before, before + 1)
    assert fresh.kernel != choice.kernel and other.code != b"old"
    assert fresh.source != "measured" and encode(old).encode() not in other.records
    comparison = compare_plans(problem, None, ["latency"])
    assert comparison.unlike_built(comparison.plans[0]) >= 1


def test_artifacts_from_before_versions_were_noted(made, two_plans, monkeypatch) -> None:
    workload, _, db = two_plans
    bare = tuple(msgspec.structs.replace(c, schedule_version=None) for c in made.manifest.plan)
    text = msgspec.json.encode(msgspec.structs.replace(made.manifest, plan=bare))
    plain = json.loads(text)
    assert not any("schedule_version" in choice for choice in plain["plan"])
    manifest = read_manifest(json.dumps(plain).encode(), "old.mimo")
    assert manifest.plan == bare
    (choice,) = [c for c in bare if c.workload == str(workload)]
    kept = problem_of_artifact(made).kept
    assert built_version(choice, {}) is None
    assert built_version(choice, kept) == get_schedule(choice.schedule).version
    older = Artifact(manifest, made.programs, made.code, made.weights)  # no records either
    names = {c.schedule for c in bare}
    for name in names:
        monkeypatch.setattr(type(get_schedule(name)), "version", 1)
    assert problem_of_artifact(older).packed()  # never raised: it cannot have been another
    monkeypatch.setattr(type(get_schedule(choice.schedule)), "version", 2)
    with pytest.raises(EnvironmentMismatch, match="version unknown packed its weights, 2 is"):
        replan(older, problem_of_artifact(older), "latency", db)


def test_old_kernels_are_not_verified_by_new_schedules(made, monkeypatch) -> None:
    """They would be given weights that are packed in another way."""
    choice = next(c for c in made.manifest.plan if c.schedule_version is not None)
    before = _raised(monkeypatch, choice.schedule)
    monkeypatch.setattr("mimo_compile.verify._tvm.load_object", lambda code: None)
    parts = Parts(
        msgspec.structs.replace(made.manifest, plan=(choice,)), made.programs, b"", None, {}, "x"
    )
    (check,) = check_kernels(parts, 1, 0)
    assert check.skipped and f"version {before} made it" in check.message
