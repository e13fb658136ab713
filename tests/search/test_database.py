"""Records: nothing acknowledged is lost, nothing damaged is served, nothing foreign is accepted."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_records import HW, WORKLOAD, record

from mimo_compile.errors import InputError
from mimo_compile.ir.hardware import CUDA
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search import lookup
from mimo_compile.search.database import Database, default_path
from mimo_compile.search.exchange import (
    check,
    export_records,
    import_records,
    merge,
    prune,
    salvage,
)
from mimo_compile.search.objective import parse_objective
from mimo_compile.search.records import decode, encode
from mimo_compile.search.space import JointSpace


def test_round_trip_and_order(tmp_path: Path) -> None:
    rows = [record(i) for i in range(5)]
    with Database(tmp_path / "a.db") as db:
        db.add(*rows)
        db.add(rows[0])  # the same record again is the same row
        assert list(db) == rows and len(db) == 5
        assert db.records(WORKLOAD, HW) == rows
        assert db.records(WORKLOAD, HW.with_threads(1)) == []
        assert db.records(WORKLOAD, replace(HW, features=HW.features | {"avx512f"})) == []
        assert db.records(op="swiglu") == rows and db.records(op="swi") == []
    with Database(tmp_path / "a.db") as db:
        assert list(db) == rows
        assert db._read.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert db._read.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_default_path_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "mimo_compile" / "records.db"
    with Database() as db:
        db.add(record())
    assert default_path().exists()


@pytest.mark.parametrize("latency", [0.0, -1.0, float("nan"), float("inf")])
def test_senseless_times_are_refused(tmp_path: Path, latency: float) -> None:
    with Database(tmp_path / "a.db") as db:
        with pytest.raises(ValueError, match="latency_us"):
            db.add(msgspec.structs.replace(record(), latency_us=latency))
        with pytest.raises(ValueError, match="without a latency"):
            db.add(msgspec.structs.replace(record(), latency_us=None))
        assert len(db) == 0


@given(data=st.data())
@settings(max_examples=150)
def test_no_damaged_line_is_decoded(data: st.DataObject) -> None:
    line = bytearray(encode(record(3, message='né \x00 "quoted" ,"sum":"')).encode())
    assert decode(bytes(line)) == record(3, message='né \x00 "quoted" ,"sum":"')
    at = data.draw(st.integers(0, len(line) - 1))
    if data.draw(st.booleans()):
        line[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del line[at:]
    with pytest.raises(InputError):
        decode(bytes(line))


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to be looked at as one\n" * 20)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as raw:
        raw.execute("CREATE TABLE t (x)")
    newer = tmp_path / "newer.db"
    with Database(newer) as db:
        db.add(record())
    with sqlite3.connect(newer) as raw:
        raw.execute("PRAGMA user_version=99")
    for path, words in (
        (text, "not a database"),
        (other, "does not hold"),
        (newer, "schema 99"),
        (tmp_path, "folder"),
    ):
        before = path.read_bytes() if path.is_file() else b""
        with pytest.raises(InputError, match=words) as caught:
            Database(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert not before or path.read_bytes() == before
    with pytest.raises(InputError, match="no such database"):
        Database(tmp_path / "absent.db", read_only=True)


def test_a_changed_row_is_found_and_not_served(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with Database(path) as db:
        db.add(*(record(i) for i in range(4)))
    with sqlite3.connect(path) as raw:
        raw.execute(
            "UPDATE records SET line = replace(line, '\"latency_us\":11.0', '\"latency_us\":1.0')"
        )
        raw.execute("UPDATE records SET workload = 'swiglu:t=9,f=9' WHERE id = 4")
    with Database(path) as db:
        assert [r.config["tile"] for r in db] == [0, 2]
        assert db.records("swiglu:t=9,f=9") == []
    outcome = check(path)
    assert (outcome.rows, outcome.sound, outcome.ok) == (4, 2, False)


@pytest.mark.fuzz
@given(data=st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_torn_files_never_serve_wrong_rows(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    path = folder / "a.db"
    rows = {encode(record(i, message="x" * 400)) for i in range(40)}
    with Database(path) as db:
        some = sorted(rows)
        for start in range(0, 40, 8):
            db.add(*(decode(line) for line in some[start : start + 8]))
        wal = path.with_name("a.db-wal")
        torn = folder / "torn.db"
        shutil.copy(path, torn)
        shutil.copy(wal, folder / "torn.db-wal")  # as a power cut would leave them
    victim = data.draw(st.sampled_from([torn, folder / "torn.db-wal"]))
    blob = bytearray(victim.read_bytes())
    if data.draw(st.booleans()):
        del blob[data.draw(st.integers(0, len(blob))) :]
    else:
        at = data.draw(st.integers(0, max(0, len(blob) - 512)))
        blob[at : at + 512] = bytes(512)
    victim.write_bytes(blob)
    try:
        with Database(torn) as db:
            found = {encode(r) for r in db}
        assert found <= rows
    except InputError:
        pass
    victim.write_bytes(blob)
    recovered = salvage(torn, folder / "recovered.db")
    with Database(folder / "recovered.db") as db:
        assert {encode(r) for r in db} <= rows and len(db) == recovered


def test_salvage_finds_nearly_everything(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    rows = [record(i, message="y" * (i % 700)) for i in range(300)]
    with Database(path) as db:
        db.add(*rows)
    blob = bytearray(path.read_bytes())
    blob[:8192] = bytes(8192)  # the header and the whole schema
    at = len(blob) // 2
    blob[at : at + 64] = os.urandom(64)
    path.write_bytes(blob)
    with pytest.raises(InputError, match="salvage"):
        Database(path)
    assert salvage(path, tmp_path / "b.db") >= 0.99 * len(rows)
    with Database(tmp_path / "b.db") as db:
        assert {r.key for r in db} <= {r.key for r in rows}
    with pytest.raises(InputError, match="exists"):
        salvage(path, tmp_path / "b.db")


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from sample_records import record
from mimo_compile.search.database import Database
who, count, slowest = int(sys.argv[3]), int(sys.argv[4]), 0.0
with Database(sys.argv[2]) as db:
    print("ready", flush=True)
    sys.stdin.readline()
    for i in range(count):
        begin = time.monotonic()
        db.add(record(i, seed=who, message=str(who)))
        slowest = max(slowest, time.monotonic() - begin)
print(slowest)
"""


def write_at_once(path: Path, writers: int, each: int) -> tuple[float, float]:
    """Let processes write to one file; return seconds in all, and those of the slowest commit."""
    here = str(Path(__file__).parent / "zoo")
    many = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, here, str(path), str(w), str(each)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for w in range(writers)
    ]  # fmt: skip
    for p in many:
        assert p.stdout is not None and p.stdout.readline() == "ready\n"
    begin = time.monotonic()
    for p in many:
        assert p.stdin is not None
        p.stdin.write("go\n")
        p.stdin.flush()
    told = [p.communicate(timeout=200)[0] for p in many]
    assert [p.returncode for p in many] == [0] * writers
    return time.monotonic() - begin, max(float(text) for text in told)


def none_lost_or_misattributed(path: Path, writers: int, each: int) -> None:
    with Database(path) as db:
        rows = list(db)
    found = sorted((int(r.message), r.config["tile"]) for r in rows)
    assert found == sorted((w, i) for w in range(writers) for i in range(each))
    for r in rows:
        assert r.seed == int(r.message) and r.key == record(int(r.config["tile"])).key
    assert check(path).ok


def test_three_writers_at_once(tmp_path: Path) -> None:
    write_at_once(tmp_path / "shared.db", 3, 50)
    none_lost_or_misattributed(tmp_path / "shared.db", 3, 50)


def test_a_new_file_waits_for_who_is_writing_it(tmp_path: Path) -> None:
    """The switch to a write-ahead log fails at once where another process lays out the same file."""
    path = tmp_path / "shared.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    released = threading.Timer(0.3, other.execute, ("ROLLBACK",))
    released.start()
    with Database(path) as db:
        db.add(record(1))
    released.join()
    other.close()
    assert check(path).ok


@pytest.mark.slow
def test_eight_writers_at_once(tmp_path: Path) -> None:
    seconds, slowest = write_at_once(tmp_path / "shared.db", 8, 500)
    none_lost_or_misattributed(tmp_path / "shared.db", 8, 500)
    print(f"\n8 x 500 commits: {4000 / seconds:.0f}/s, slowest {slowest:.2f} s, 0 lost")


@pytest.mark.fault
@pytest.mark.parametrize("step", [512 * 29, pytest.param(512 * 3, marks=pytest.mark.slow)])
def test_a_torn_log_costs_at_most_the_last_transaction(tmp_path: Path, step: int) -> None:
    """Cut the log anywhere: all transactions that were whole in it are there, and nothing else."""
    path, torn = tmp_path / "a.db", tmp_path / "torn.db"
    with Database(path) as db:
        log = path.with_name("a.db-wal")
        ends = []
        for i in range(25):
            db.add(record(i, message="x" * 400))
            ends.append(log.stat().st_size)
        whole, written = path.read_bytes(), log.read_bytes()
    assert ends == sorted(set(ends)) and len(written) == ends[-1]
    for cut in range(ends[0], ends[-1] + 1, step):
        torn.write_bytes(whole)
        torn.with_name("torn.db-wal").write_bytes(written[:cut])
        with Database(torn) as db:
            tiles = [r.config["tile"] for r in db]
        assert tiles == list(range(sum(end <= cut for end in ends))), cut
        for left in tmp_path.glob("torn.db*"):
            left.unlink()


@pytest.mark.fault
def test_kill_while_writing_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "killed.db"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from sample_records import record; from mimo_compile.search.database import Database\n"
        "db = Database(sys.argv[2]); start = len(db)\n"
        "for i in range(start, 100000):\n"
        "    db.add(record(i)); print(i, flush=True)\n"
    )
    last = -1
    for attempt in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).parent / "zoo"), str(path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        for _ in range(5 + 7 * attempt):
            last = int(child.stdout.readline())
        child.kill()
        rest = child.stdout.read().split()
        child.wait()
        last = int(rest[-1]) if rest else last
        with Database(path) as db:
            assert {r.config["tile"] for r in db} >= set(range(last + 1))
        assert check(path).ok


def test_export_import_merge(tmp_path: Path) -> None:
    a, b = Database(tmp_path / "a.db"), Database(tmp_path / "b.db")
    with a, b:
        a.add(*(record(i) for i in range(6)))
        b.add(*(record(i) for i in range(3, 9)))
        assert export_records(a, tmp_path / "a.jsonl") == 6
        assert merge(b, tmp_path / "a.db") == (3, 3)
        assert merge(b, tmp_path / "a.jsonl") == (0, 6)  # idempotent
        assert import_records(a, tmp_path / "a.jsonl") == (0, 6)
        assert merge(a, tmp_path / "b.db") == (3, 6)
        assert {encode(r) for r in a} == {encode(r) for r in b}  # commutative
        assert export_records(a, tmp_path / "best.jsonl", best_only=2) == 2
    lines = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(lines[:-30])
    with Database(tmp_path / "c.db") as c:
        assert import_records(c, tmp_path / "cut.jsonl") == (5, 0)
        bad = lines.replace(b'"threads":2', b'"threads":3', 1)
        (tmp_path / "bad.jsonl").write_bytes(bad)
        with pytest.raises(InputError, match=r"bad.jsonl:1"):
            import_records(c, tmp_path / "bad.jsonl")
        assert len(c) == 5


def test_prune(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db") as db:
        db.add(
            *(record(i) for i in range(10)),
            record(11, verdict="wrong"),
            record(12, verdict="crash"),
        )
        assert prune(db, keep=3) == 7
        assert [r.config["tile"] for r in db] == [0, 1, 2, 11, 12]
        assert prune(db, failures=True) == 2
        assert len(db) == 3


def test_a_lucky_single_reading_does_not_win(tmp_path: Path) -> None:
    rows = [
        record(1, 10.0), record(1, 16.0, phase="confirm"),
        record(2, 11.0), record(2, 15.0, phase="confirm"),
        record(3, 12.0),  # read after both, when it was slower than they
        record(4, 9.0),  # read once, and faster than all that were read once
        record(5, 18.0),
    ]  # fmt: skip
    found = {r.record.config["tile"]: r.latency_us for r in lookup.summarise(rows)}
    assert found == {1: 16.0, 2: 15.0, 3: pytest.approx(12 * 15 / 11), 4: 9.0, 5: 18.0}
    best = lookup.best(lookup.summarise(rows[:5]), parse_objective("latency"))
    assert best is not None and best.record.config["tile"] == 2


def test_lookup(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db") as db:
        db.add(
            record(1, 10.0, modelled_mj=5.0), record(2, 12.0, modelled_mj=2.0),
            record(3, 13.0, modelled_mj=3.0),
            record(4, 1.0, modelled_mj=1.0), record(4, verdict="wrong"),
            record(5, 2.0, cache="hot"),
        )  # fmt: skip
        db.add(record(6, 14.0, modelled_mj=9.0), record(6, 20.0, phase="confirm", modelled_mj=9.5))
        found = lookup.results_for(WORKLOAD, HW, db)
        assert {r.record.config["tile"]: r.latency_us for r in found} == {
            1: 10.0,
            2: 12.0,
            3: 13.0,
            6: 20.0,
        }
        assert [r.record.config["tile"] for r in lookup.pareto(found)] == [1, 2]
        best = lookup.best(found, parse_objective("energy@latency:1.1"))
        assert best is not None and best.record.config["tile"] == 1
        best = lookup.best(found, parse_objective("energy@latency:1.2"))
        assert best is not None and best.record.config["tile"] == 2
        bigger = replace(HW, name="another", features=HW.features | {"avx512f"}).with_threads(4)
        assert lookup.results_for(WORKLOAD, bigger, db) == []
        assert len(lookup.results_for(WORKLOAD, bigger, db, near=True)) == 4


def test_records_of_other_kinds_do_not_hide_near_ones(tmp_path: Path) -> None:
    a100, h200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
    space = JointSpace(parse_workload(WORKLOAD), a100)
    (name, schedule), config = next(iter(space.schedules.items())), space.defaults()[0].config
    there = {
        "schedule": name, "schedule_version": schedule.version, "config": config, "hardware": h200.id,
        "features": tuple(sorted(h200.features)), "threads": h200.threads, "requires": ("cuda",),
    }  # fmt: skip
    with Database(tmp_path / "a.db") as db:
        db.add(record(1, 4.0, **there))
        assert [r.latency_us for _, r in lookup.known_results(space, db)] == [4.0]
        db.add(record(2, 50.0, hardware="a-cpu.108c", threads=a100.threads))  # comes before it
        stale = {**there, "schedule_version": schedule.version - 1}
        db.add(record(3, 1.0, **{**stale, "hardware": "a-gpu", "threads": a100.threads}))
        assert [r.latency_us for _, r in lookup.known_results(space, db)] == [4.0]


def test_near_results_are_of_one_number_of_threads_and_of_this_compiler(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db") as db:
        db.add(
            record(1, 12.0), record(2, 13.0), record(1, 3.0, threads=8), record(2, 3.5, threads=8),
            record(3, 1.0, versions={"apache-tvm": "0.1"}),
        )  # fmt: skip

        def near(threads: int) -> list[float]:
            found = lookup.results_for(WORKLOAD, HW.with_threads(threads), db, near=True)
            return sorted(r.latency_us for r in found)

        assert near(2) == near(4) == [12.0, 13.0] and near(6) == near(8) == [3.0, 3.5]
