"""db on real databases: every action, its JSON, and what damage does."""

import contextlib
import json
import os
import sqlite3
import time
from pathlib import Path

import pytest

from mimo_compile.errors import InputError
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.search.database import Database
from mimo_compile.search.records import Record, Verdict, record_key, versions

WORKLOAD = "mpgemm:m=1,n=64,k=64,w=w4g64,a=a8"


def make_record(index: int, verdict: Verdict = Verdict.OK, workload: str = WORKLOAD) -> Record:
    hardware, config = local_cpu(), {"rows": index}
    key = record_key(workload, "mpgemm.x86_vnni", 1, config, hardware, "cold", versions())
    return Record(
        key=key, workload=workload, schedule="mpgemm.x86_vnni", schedule_version=1, config=config,
        hardware=hardware.id, features=tuple(sorted(hardware.features)), threads=hardware.threads,
        cache="cold", versions=versions(), verdict=verdict,
        latency_us=100.0 / (index + 1) if verdict is Verdict.OK else None,
        modelled_mj=1.0 + index, ops={"dot_i8": 4096.0}, bytes={"dram": 2300.0}, time=time.time() + index,
    )  # fmt: skip


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "records.db"
    with Database(path) as db:
        db.add(*(make_record(i) for i in range(6)), make_record(6, Verdict.WRONG))
    return path


def test_check_export_import_merge_prune(cli, database, tmp_path) -> None:
    value = json.loads(cli("db", "check", database, "--json").out)
    assert (
        value["ok"]
        and value["rows"] == value["sound"] == 7
        and value["verdicts"] == {"ok": 6, "wrong": 1}
    )
    out = tmp_path / "all.jsonl"
    assert json.loads(cli("db", "export", out, "--db", database, "--json").out)["records"] == 7
    assert len(out.read_text().splitlines()) == 7
    other = tmp_path / "other.db"
    value = json.loads(cli("db", "import", out, "--db", other, "--json").out)
    assert (value["new"], value["known"]) == (7, 0)
    value = json.loads(cli("db", "merge", database, "--db", other, "--json").out)
    assert (value["new"], value["known"]) == (0, 7)
    done = cli("db", "prune", "--failures", "--keep", "2", "--db", other)
    assert done.code == 0 and "5 records deleted, 2 left" in done.out
    done = cli("db", "export", out, "--best", "1", "--db", database)
    assert done.code == 0 and len(out.read_text().splitlines()) == 1


def test_damage_is_found_and_salvaged(cli, database, tmp_path) -> None:
    data = bytearray(database.read_bytes())
    at = data.find(b'"rows":3')
    data[at + 7 : at + 8] = b"9"
    database.write_bytes(data)
    done = cli("db", "check", database)
    assert done.code == 1 and "6 of 7" in done.out and "db salvage" in done.out
    done = cli("db", "salvage", database, "-o", tmp_path / "new.db")
    assert done.code == 0 and "6 records recovered" in done.out
    assert cli("db", "check", tmp_path / "new.db").code == 0
    assert cli("db", "salvage", database, "-o", tmp_path / "new.db").code == 1, "never overwrites"


def test_files_that_are_missing_or_something_else(cli, tmp_path) -> None:
    missing = cli("db", "check")
    assert missing.code == 1 and "no such database" in missing.error
    for verb in (["export", tmp_path / "x.jsonl"], ["prune", "--failures"]):
        assert "no such database" in cli("db", *verb, "--db", tmp_path / "none.db").error
    assert cli("db", "import", tmp_path / "none.jsonl").code == 1
    (tmp_path / "bad.jsonl").write_text('{"key": "x"}\nnot json\n')
    done = cli("db", "import", tmp_path / "bad.jsonl", "--db", tmp_path / "new.db")
    assert done.code == 1 and "bad.jsonl:1" in done.error
    (tmp_path / "text.db").write_text("no database" * 100)
    assert cli("db", "check", tmp_path / "text.db").code == 1


def test_report_of_a_database(cli, database, tmp_path) -> None:
    done = cli("report", database, "-o", tmp_path / "r.html", "--json")
    value = json.loads(done.out)
    assert done.code == 0 and value["bytes"] == (tmp_path / "r.html").stat().st_size < 1_000_000


@pytest.mark.compile
def test_inspect_op_shows_predicted_and_measured(cli, database) -> None:
    value = json.loads(cli("inspect", "--op", WORKLOAD, "--db", database, "--json").out)
    assert value["workload"] == WORKLOAD and value["measured"] == 6
    assert value["candidates"][0]["measured_us"] == pytest.approx(100 / 6)
    assert any(c["measured_us"] is None and c["predicted_us"] > 0 for c in value["candidates"])


def test_targets_tells_about_meters(cli) -> None:
    value = json.loads(cli("targets", "--json").out)
    assert value["ok"] and value["machine"]["cores"] >= 1
    meters = {m["name"]: m for m in value["meters"]}
    assert {"nvml", "rapl", "modelled"} <= set(meters) and all(m["reason"] for m in meters.values())
    assert cli("targets").out.count("machine") >= 1


@pytest.mark.compile
def test_formats_lists_kernels_and_their_absence(cli) -> None:
    rows = json.loads(cli("targets", "--formats", "--json").out)["formats"]
    by = {(r["op"], r["weight"], r["act"]): r["kernels"] for r in rows}
    assert by["mpgemm", "w4", "a8"]["cpu"] and by["mpgemm", "f32", "a16"]["x86-64-v3"]
    assert ("mpgemm", "f32", "a8") not in by
    assert by["moe", "w1.58d", "a16"]["cpu"] == []


def test_outputs_that_would_replace_something_else(cli, database, decoder_file, tmp_path) -> None:
    before = database.read_bytes()
    done = cli("db", "export", database, "--best", "1", "--db", database)
    assert done.code == 1 and "replace their own database" in done.error
    assert database.read_bytes() == before
    artifact = decoder_file.read_bytes()
    done = cli("report", decoder_file, "-o", decoder_file)
    assert done.code == 2 and "should end in .html" in done.error
    assert decoder_file.read_bytes() == artifact
    os.mkfifo(tmp_path / "pipe.html")
    os.mkfifo(tmp_path / "pipe")
    for arguments in (
        ("report", database, "-o", tmp_path / "pipe.html"),
        ("db", "export", tmp_path / "pipe", "--db", database),
    ):
        done = cli(*arguments)
        assert done.code == 2 and "is not a regular file" in done.error
    assert (tmp_path / "pipe.html").is_fifo() and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("days", ["0", "-1", "nan", "inf", "soon"])
def test_prune_wants_a_positive_number_of_days(cli, database, days) -> None:
    done = cli("db", "prune", f"--older-than={days}", "--db", database)
    assert done.code == 2 and "positive number of days" in done.error


def test_prune_of_a_database_that_another_program_holds(cli, database, monkeypatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr("sqlite3.connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.01}))
    with contextlib.closing(connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        done = cli("db", "prune", "--failures", "--db", database)
    assert done.code == 1 and "locked" in done.error and "try again" in done.error


def test_without_a_home_folder(cli, monkeypatch, tmp_path) -> None:
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    done = cli("db", "check")
    assert done.code == 2 and "XDG_DATA_HOME or give --db FILE" in done.error
    assert cli("inspect", "--op", "swiglu:t=1,f=64").code == 0
    assert cli("targets").code == 0


@pytest.mark.compile
def test_compiling_needs_no_place_for_records(monkeypatch, tmp_path) -> None:
    import torch

    import mimo_compile as mc

    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    linear = torch.nn.Linear(3, 4).eval()
    artifact = mc.compile(linear, example_inputs=(torch.zeros(2, 3),))
    assert artifact.manifest.entries == ("main",)
    mc.compile(linear, example_inputs=(torch.zeros(2, 3),), db=tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()
    with pytest.raises(InputError, match="--db FILE that can be written"):
        mc.tune("swiglu:t=1,f=64", trials=1)
