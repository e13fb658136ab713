"""Every objective through the command line, by measured joules and by modelled ones: the pick is the best."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mimo_compile.cli import main
from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.search import tune as tune_module
from mimo_compile.search.budget import Budget, Clock
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import Result, summarise
from mimo_compile.search.meters import replay

pytestmark = pytest.mark.compile
SPEC = "swiglu:t=8,f=512"
TRIALS = 6
STEP_MJ = 5.0
"""What the recorded counter rises by from one reading to the next."""
OBJECTIVES = (
    "latency", "energy", "edp", "ed2p", "pareto", "energy@latency:1.05", "energy@latency:3",
    "latency@energy:1000J", "latency@energy:0.000001mJ",
)  # fmt: skip


class Recorded(replay.ReplayMeter):
    """A counter that was recorded in even steps."""

    opened: list[Recorded]

    def __init__(self) -> None:
        self.total_mj = 0.0
        super().__init__(self._steps(), step_s=0.0005)
        type(self).opened.append(self)

    def _steps(self) -> Iterator[float]:
        for self.total_mj in itertools.count(0.0, STEP_MJ):
            yield self.total_mj


@pytest.fixture
def quick(measurer, monkeypatch) -> None:
    """Commands measure with the children of all tests, in short windows, by a recorded counter."""
    clock = measurer.runner.clock
    quickly = replace(clock, timing=replace(clock.timing, energy_window_s=0.02))
    monkeypatch.setattr(measurer.runner, "clock", quickly)
    monkeypatch.setattr(measurer.runner, "meter", None)
    monkeypatch.setattr(measurer, "close", lambda: None)
    Recorded.opened = []
    monkeypatch.setattr(replay, "ReplayMeter", Recorded)

    def shared(hardware, *, device, meter, timing):
        measurer.runner.meter = meter
        return measurer

    monkeypatch.setattr(tune_module, "Measurer", shared)
    guess = DeviceModel.guess(local_cpu())
    monkeypatch.setattr("mimo_compile.search.calibrate.device_model", lambda *_, **__: guess)


def tuned(capsys, db: Path, *more: object) -> dict:
    capsys.readouterr()
    command = ["tune", "--op", SPEC, "--trials", TRIALS, "--db", db, "--seed", 3, "--json", *more]
    assert main([str(a) for a in command]) == 0
    return json.loads(capsys.readouterr().out)


def known(db: Path) -> list[Result]:
    with Database(db, read_only=True) as records:
        return summarise(records)


def ranking(objective: str, us: float, mj: float, fastest: float) -> tuple[float, float]:
    """What an objective means, said once more: (limit missed by, what is to be least)."""
    kind, _, limit = objective.partition(":")
    if kind == "energy@latency":
        over = us / (float(limit) * fastest)
        return (over, us) if over > 1 else (0.0, mj)
    if kind == "latency@energy":
        budget = float(limit.removesuffix("mJ").removesuffix("J"))
        over = mj / (budget if limit.endswith("mJ") else 1000 * budget)
        return (over, mj) if over > 1 else (0.0, us)
    value = {"latency": us, "energy": mj, "edp": mj * us, "ed2p": mj * us * us, "pareto": mj * us}
    return 0.0, value[kind]


def named(schedule: str, config: Mapping[str, object]) -> str:
    return f"{schedule} {sorted(config.items())}"


CHEAP = ("energy@latency:3",)


@pytest.mark.parametrize(
    "objective", [o if o in CHEAP else pytest.param(o, marks=pytest.mark.slow) for o in OBJECTIVES]
)
@pytest.mark.parametrize("meter", ["replay", "modelled"])
def test_the_pick_is_the_best_of_the_records(
    quick, capsys, tmp_path: Path, objective: str, meter: str
) -> None:
    found = tuned(capsys, tmp_path / "r.db", "--objective", objective, "--meter", meter)
    (w,) = found["workloads"]
    results = known(tmp_path / "r.db")
    points = {}
    for r in results:
        mj = r.measured_mj if meter == "replay" else r.modelled_mj
        assert r.energy_source == ("" if r.measured_mj is None else meter)
        if mj is not None or objective == "latency":
            points[named(r.record.schedule, r.record.config)] = r.latency_us, mj
    fastest = min(r.latency_us for r in results)
    best = w["best"]
    assert best["energy_source"] == meter, "every joule says where it comes from"
    pick = points[named(best["schedule"], best["config"])]
    assert pick == (best["latency_us"], best["energy_mj"])
    score = ranking(objective, pick[0], pick[1] or 0.0, fastest)
    assert score == min(ranking(objective, us, mj or 0.0, fastest) for us, mj in points.values())
    front = [(p["latency_us"], p["energy_mj"]) for p in w["pareto"]]
    with_joules = [p for p in points.values() if p[1] is not None]
    assert all(p in with_joules for p in front if p[1] is not None)
    for us, mj in with_joules:
        assert any(a <= us and (b or math.inf) <= mj for a, b in front), "the front covers all"
    assert found["objective"] == objective.replace("1000J", "1e+06mJ").replace("0.000001", "1e-06")


def test_another_objective_picks_anew_from_the_same_records(quick, capsys, tmp_path: Path) -> None:
    """With joules read once, all objectives are answered without another measurement."""
    db = tmp_path / "r.db"
    tuned(capsys, db, "--objective", "energy", "--meter", "replay")
    results = [r for r in known(db) if r.measured_mj is not None]
    middle = sorted(r.measured_mj for r in results)[len(results) // 2]
    for objective in ("energy", "ed2p", f"latency@energy:{middle:.6f}mJ"):
        (w,) = tuned(capsys, db, "--objective", objective, "--meter", "replay")["workloads"]
        assert w["new_trials"] == 0
        now = [r for r in known(db) if r.measured_mj is not None]
        fastest = min(r.latency_us for r in known(db))
        best = ranking(objective, w["best"]["latency_us"], w["best"]["energy_mj"], fastest)
        assert best == min(ranking(objective, r.latency_us, r.measured_mj, fastest) for r in now)


@pytest.mark.parametrize("budget_j", [0.15, 0.3])
def test_a_budget_in_joules_is_kept(quick, capsys, tmp_path: Path, budget_j: float) -> None:
    command = [
        "tune",
        "--op",
        SPEC,
        "--db",
        str(tmp_path / "r.db"),
        "--objective",
        "energy",
        "--json",
    ]
    assert main([*command, "--meter", "replay", "--joules", str(budget_j)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stopped"] == "joules" and found["new_trials"] >= 1
    (meter,) = Recorded.opened[-1:]
    used_j = meter.total_mj / 1000
    assert 0.4 * budget_j <= found["joules"] <= used_j <= budget_j + 3 * STEP_MJ / 1000
    assert main([*command, "--joules", "1", "--meter", "modelled"]) == 2
    assert "needs a meter" in json.loads(capsys.readouterr().out)["error"]


def test_the_costliest_candidate_says_what_the_next_may_cost() -> None:
    readings = iter([0.0, 100.0, 100.0, 400.0, 400.0, 700.0, 700.0, 900.0])
    clock = Clock(Budget(joules=1.1), replay.ReplayMeter(readings), lambda: 0.0)
    clock.note()  # 100 mJ
    assert clock.affords(9)
    clock.note()  # 300 mJ
    assert clock.affords(2)
    assert clock.affords(1) and not clock.affords(2)
    assert clock.reached(0) == "joules", "the next one may pass the budget"
    assert not Clock(Budget(seconds=1), None, iter([0.0, 2.0]).__next__).affords()


def test_no_costly_candidate_but_the_first_is_forgotten_early() -> None:
    used = [0.0, 500.0]  # children start with the first one
    for step in (300.0, *[100.0] * 15):
        used.append(used[-1] + step)
    readings = iter([*used, used[-1], used[-1] + 100, used[-1] + 100])
    clock = Clock(Budget(joules=2.5), replay.ReplayMeter(readings), lambda: 0.0)
    for _ in range(17):
        clock.note()
    assert not clock.affords(), "2.3 J used, and 0.3 J is one of the last sixteen"
    clock.note()
    assert clock.affords(), "2.4 J used; it no longer is"


def test_candidates_measured_in_turns_are_one_step_each() -> None:
    readings = iter([0.0, 100.0, 500.0, 500.0, 500.0])
    clock = Clock(Budget(joules=1.0), replay.ReplayMeter(readings), lambda: 0.0)
    clock.note()
    clock.note(4)
    assert clock.affords(5) and not clock.affords(6)
