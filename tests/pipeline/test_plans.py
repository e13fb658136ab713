"""Plans side by side: an artifact plans as its model does, and what is printed is what was planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planned import records_of

from mimo_compile.cli import main
from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.pipeline import build
from mimo_compile.pipeline.choose import choose
from mimo_compile.pipeline.plans import (
    OBJECTIVES,
    compare_plans,
    config_change,
    problem_of_artifact,
    problem_of_model,
)
from mimo_compile.runtime.container import Parts
from mimo_compile.search.database import Database
from mimo_compile.search.space import JointSpace

pytestmark = pytest.mark.compile


def test_an_artifact_plans_as_its_model_does(model, monkeypatch) -> None:
    hardware = local_cpu()
    monkeypatch.setattr(build, "compile_isolated", lambda *_: b"")  # planning reads no code
    made = build.build_artifact(
        model, choose(model, hardware, "latency", None).choices, hardware, build.Extras()
    )
    parts = Parts(made.manifest, made.programs, b"", None, {}, "x.mimo")
    ours, theirs = problem_of_artifact(parts), problem_of_model(model, hardware)
    assert ours.calls == theirs.calls and ours.hardware == hardware
    # equal but for tensors that only one layout exists of: packed apart, so of no consequence
    assert {frozenset(g) for g in theirs.shared} == {frozenset(g) for g in ours.shared}
    same = compare_plans(ours, None, ["latency"])
    assert same.unlike_built(same.plans[0]) == 0
    assert problem_of_artifact(parts, threads=1).hardware.threads == 1


def test_plans_side_by_side(model, tmp_path: Path) -> None:
    """One kernel has a fast and a frugal config; no other was measured."""
    hardware = local_cpu()
    problem = problem_of_model(model, hardware)
    workload = next(w for w in problem.calls if w.op == "mpgemm" and w.integer("m") == 1)
    space = JointSpace(workload, hardware)
    some = [c for _, c in zip(range(40), space, strict=False)]
    fast, frugal = (
        some[0],
        next(c for c in some if space.layouts(c) == space.layouts(some[0]) and c != some[0]),
    )
    with Database(tmp_path / "r.db") as db:
        db.add(*records_of(workload, fast, frugal))
        found = compare_plans(problem, db, [*OBJECTIVES, "edp"])
    latency, slack, energy, edp = found.plans
    (difference,) = found.differences()
    assert difference.workload == workload
    assert [c.option.candidate for c in difference.choices] == [fast, frugal, frugal, frugal]
    assert [found.changed(p) for p in found.plans] == [0, 1, 1, 1]
    assert latency.latency_us < slack.latency_us <= 1.05 * latency.latency_us
    assert (
        energy.energy_mj <= slack.energy_mj < latency.energy_mj and edp.energy_source == "modelled"
    )
    calls = problem.calls[workload]["step_1"]
    before, after = (found.entry_totals(p)["step_1"] for p in (latency, energy))
    assert after[0] - before[0] == pytest.approx(0.2 * calls)
    value = json.loads(json.dumps(found.to_json()))
    assert [p["objective"] for p in value["plans"]] == [*OBJECTIVES, "edp"]
    assert (
        value["plans"][0]["measured_share"] < 1
        and value["differences"][0]["calls"]["step_1"] == calls
    )


def test_the_command_shows_plans_of_a_checkpoint(
    llama_folder, monkeypatch, tmp_path, capsys
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    command = ["inspect", str(llama_folder), "--plan", "--quant", "w4g32a8", "--max-context", "4"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for text in (
        "energy@latency:1.05",
        "energy mJ, modelled",
        "planned in",
        "nothing was measured",
    ):
        assert text in shown
    assert main([*command, "--objective", "latency@energy:0.001mJ"]) == 2
    assert "or more" in capsys.readouterr().err


def test_what_changes_in_a_config() -> None:
    assert config_change({"a": 1, "b": 2}, {"a": 1, "b": 4}) == "b 2 -> 4"
    assert config_change({"a": 1}, {"c": True}) == "a 1 -> -, c - -> True"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["x.mimo", "--plan", "--kernel", "k"], "none of the other views"),
        (["x.mimo", "--quant", "w8a8"], "--plan SRC"),
        (["x.mimo", "--objective", "edp"], "go with --op or --plan"),
        (["--op", "swiglu:t=1,f=64", "--plan"], "not with --op"),
        (["x.mimo", "--limit", "3"], "--limit goes with --op"),
        (["x.mimo", "--kernel", "k", "--asm", "--db", "r.db"], "without --tir and --asm"),
    ],
)
def test_options_that_do_not_go_together(arguments, text, capsys) -> None:
    assert main(["inspect", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_a_plan_of_nothing_is_refused(model) -> None:
    with pytest.raises(UsageError, match="not pareto"):
        compare_plans(problem_of_model(model, local_cpu()), None, ["pareto"])
