"""`--target sim:...` on the command line: tune and inspect, said to be simulated; nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.compile

SPEC = "mpgemm:m=16,n=256,k=256,w=w1.58,a=a8"


@pytest.mark.parametrize("target", ["sim:lut-tensor-core", "sim:lut-tensor-core-8x", "sim:roma"])
def test_tune_and_inspect(cli, tmp_path: Path, target: str) -> None:
    db = tmp_path / "records.db"
    done = cli("tune", "--op", SPEC, "--target", target, "--trials", 6, "--db", db)
    assert done.code == 0, done.err
    assert "best sim us" in done.out and "6 candidates simulated" in done.out
    assert "all times are simulated" in done.out and "measured" not in done.out
    assert "us simulated" in done.err
    again = cli("tune", "--op", SPEC, "--target", target, "--trials", 6, "--db", db, "--json")
    (found,) = json.loads(again.out)["workloads"]
    assert found["new_trials"] == 0 and found["best"]["time_source"] == "simulated"
    shown = cli("inspect", "--op", SPEC, "--target", target, "--db", db)
    assert "6 candidates simulated on this target" in shown.out and "simulated us" in shown.out
    assert "measured us" not in shown.out
    value = json.loads(cli("inspect", "--op", SPEC, "--target", target, "--db", db, "--json").out)
    assert value["measured"] == 0 and value["simulated"] == 6
    assert all(c["measured_us"] is None for c in value["candidates"])
    best = value["candidates"][0]
    assert best["simulated_us"] == best["predicted_us"] == found["best"]["latency_us"]
    assert "simulated" in cli("db", "check", "--db", db).out
    here = json.loads(cli("inspect", "--op", SPEC, "--db", db, "--json").out)
    assert here["measured"] == here["simulated"] == 0  # of this machine nothing is known


def test_targets_lists_them_apart(cli) -> None:
    value = json.loads(cli("targets", "--formats", "--json").out)
    assert {s["name"] for s in value["simulated"]} >= {"sim:lut-tensor-core", "sim:roma"}
    assert not any(n.startswith("sim:") for n in value["presets"])
    (row,) = (
        r for r in value["formats"] if (r["op"], r["weight"], r["act"]) == ("mpgemm", "w2", "a8")
    )
    assert row["kernels"]["sim:roma"] == ["mpgemm.sim_roma"]
    assert not any(".sim_" in s for s in row["kernels"]["cpu"])
    assert "simulated sim:lut-tensor-core" in cli("targets").out


def test_what_cannot_be_done_is_refused(cli, tmp_path: Path) -> None:
    out = tmp_path / "t.mimo"
    done = cli("compile", "tiny", "--target", "sim:roma", "-o", out)
    assert done.code == 2 and "nothing can be compiled for it or run on it" in done.error
    assert not out.exists()
    for arguments, text in (
        (("tune", "--op", SPEC, "--threads", 2), "--threads means nothing"),
        (("tune", "--op", SPEC, "--objective", "energy"), "energy of sim:roma is not modelled"),
        (("tune", "--op", SPEC, "--meter", "rapl"), "the target is sim"),
        (("tune", "--op", "swiglu:t=1,f=64"), "no schedule supports"),
        (("bench", "mpgemm", "--op", SPEC), "--target must be cpu"),
    ):
        done = cli(*arguments, "--target", "sim:roma")
        assert done.code == 2 and text in done.error, done.err
    done = cli("tune", "--op", SPEC, "--target", "sim:h900")
    assert done.code == 2 and "sim:roma" in done.error
