"""Searches for machines on paper: found, verified, marked, and never taken for measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mimo_compile.cost_models.simulated import estimate
from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import SIMULATED, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.simulated import Matmul
from mimo_compile.report import write_report
from mimo_compile.schedules.simulated.lut_tensor_core import LutTensorCore
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import results_for
from mimo_compile.search.measure.simulated import OUTPUTS, ROWS, SimulatedMeasurer, witness
from mimo_compile.search.plan import make_plan
from mimo_compile.search.progress import Event
from mimo_compile.search.records import Verdict, decode, encode
from mimo_compile.search.space import JointSpace
from mimo_compile.search.tune import tune_workloads

pytestmark = pytest.mark.compile

LUT, ROMA = SIMULATED["sim:lut-tensor-core"], SIMULATED["sim:roma"]
W = parse_workload("mpgemm:m=300,n=704,k=256,w=w1.58,a=a8")


@pytest.fixture
def db(tmp_path: Path):
    with Database(tmp_path / "records.db") as database:
        yield database


@pytest.mark.parametrize("hardware", [LUT, ROMA], ids=lambda h: h.name)
def test_search_finds_the_best_program_of_all(db: Database, hardware) -> None:
    events: list[Event] = []
    result = tune_workloads({W: 1.0}, hardware, trials=32, db=db, progress=events.append)
    (found,) = result.workloads
    space = JointSpace(W, hardware)
    times = [estimate(Matmul.of(W), space.config(c)).latency_us for c in space]
    assert found.best is not None and found.best.latency_us == pytest.approx(min(times))
    assert found.verdicts == {"ok": found.trials} and found.default is not None
    assert result.simulated and all(e.simulated for e in events)
    assert {p["time_source"] for w in result.to_json()["workloads"] for p in w["pareto"]} == {
        "simulated"
    }
    for record in db:
        assert (
            record.simulated and record.cache == "simulated" and record.requires == ("simulated",)
        )
        assert record.energy_mj is None and record.modelled_mj is None and record.calls == 0
        assert record.error_ratio is not None and record.error_ratio <= 1
        assert decode(encode(record)) == record
    rows = len(db)
    again = tune_workloads({W: 1.0}, hardware, trials=32, db=db)
    assert again.new_trials == 0 and len(db) == rows


def test_no_other_target_ever_sees_a_simulated_record(db: Database) -> None:
    tune_workloads({W: 1.0}, ROMA, trials=4, db=db)
    here = local_cpu()
    assert results_for(W, ROMA, db)
    for hardware in (here, LUT, SIMULATED["sim:lut-tensor-core-8x"]):
        for near in (False, True):
            assert not results_for(W, hardware, db, near=near)
    plan = make_plan({W: 1.0}, here, db=db)
    (choice,) = plan.choices.values()
    assert choice.option.source == "default" and ".sim_" not in choice.option.candidate.schedule
    # not even when a record claims to be of this machine
    (first, *_) = db
    import msgspec

    claims = {
        "hardware": here.id, "threads": here.threads, "features": tuple(sorted(here.features)),
    }  # fmt: skip
    db.add(msgspec.structs.replace(first, **claims, key="1" * 64))
    assert not results_for(W, here, db) and not results_for(W, here, db, near=True)


def test_wrong_programs_are_refused(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, only = LutTensorCore.simulate, [LutTensorCore()]

    def off_by_one(self, workload, config, arrays: Mapping[str, np.ndarray]):
        got = honest(self, workload, config, arrays)
        return got if config.tile_k == 64 else {"y": np.roll(got["y"], 1, axis=1)}

    def greedy(self, workload, config, arrays: Mapping[str, np.ndarray]):
        arrays["x"][:] = 0
        return honest(self, workload, config, arrays)

    monkeypatch.setattr(LutTensorCore, "simulate", off_by_one)
    (found,) = tune_workloads({W: 1.0}, LUT, trials=16, db=db, schedules=only).workloads
    assert found.verdicts[Verdict.WRONG] > 0
    assert found.best is not None and found.best.record.config["tile_k"] == 64
    assert all(r.latency_us is None for r in db if r.verdict is Verdict.WRONG)
    monkeypatch.setattr(LutTensorCore, "simulate", greedy)
    other = W.replace(n=64)
    (found,) = tune_workloads({other: 1.0}, LUT, trials=3, db=db, schedules=only).workloads
    assert found.best is None and found.verdicts[Verdict.CRASH] == found.trials


def test_slack_is_for_int8_tables_alone() -> None:
    hardware = SIMULATED["sim:lut-tensor-core-8x"]
    space, measurer = JointSpace(W, hardware), SimulatedMeasurer(hardware)
    name = LutTensorCore.name
    default = space.spaces[name].default
    candidates = [space.candidate(name, replace(default, table=t)) for t in ("f16", "i8")]
    results = list(measurer.measure(space, candidates, 1))
    assert [r.verdict for r in results] == [Verdict.OK, Verdict.OK]
    assert list(measurer.confirm(space, candidates, 1)) == []
    assert measurer.predict_us(space, candidates) == [r.latency_us for r in results]


def test_a_witness_keeps_the_depth() -> None:
    part = witness(W)
    assert (part["m"], part["n"], part["k"]) == (ROWS, OUTPUTS, 256)
    small = parse_workload("mpgemm:m=2,n=3,k=64,w=w2,a=a8")
    assert witness(small) == small


def test_what_is_not_modelled_is_refused(db: Database) -> None:
    for more in ({"objective": "energy"}, {"objective": "edp"}, {"joules": 5.0}):
        with pytest.raises(UsageError, match="energy of sim:roma is not modelled"):
            tune_workloads({W: 1.0}, ROMA, trials=2, db=db, **more)
    with pytest.raises(UsageError, match="no schedule supports"):
        tune_workloads({parse_workload("swiglu:t=1,f=64"): 1.0}, ROMA, trials=2, db=db)
    assert not len(db)


def test_report_says_simulated(db: Database, tmp_path: Path) -> None:
    tune_workloads({W: 1.0}, ROMA, trials=8, db=db)
    page = tmp_path / "report.html"
    write_report(db.path, page)
    text = page.read_text()
    assert "sim-roma.256c, simulated: all times are modelled, none was measured" in text
    assert "<td>simulated</td>" in text and "<td>measured</td>" not in text
