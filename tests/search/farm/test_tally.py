"""What each worker did: counted exactly, its time without gaps, kept beside the records."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inline import HOSTS, Inline
from sample_records import record
from test_farm import BUILDERS, DEVICE, HW, db, search, space  # noqa: F401

from mimo_compile.errors import InputError
from mimo_compile.search.database import Database
from mimo_compile.search.exchange import check, export_records, merge, prune, salvage
from mimo_compile.search.farm.coordinator import Farm
from mimo_compile.search.farm.measurer import FarmMeasurer
from mimo_compile.search.farm.scheduling import LIVES, Action, Node
from mimo_compile.search.farm.tally import Tally
from mimo_compile.search.farm_runs import SCHEMA, Worker, decode, load, searches, store
from mimo_compile.search.records import Verdict, encode
from mimo_compile.search.records import decode as decode_record
from mimo_compile.search.result import TuningResult

LAB = replace(DEVICE, name="d" * 40, label="lab")
NAMELESS = replace(BUILDERS, name="0123456789abcdef")


def test_records_name_who_came_to_the_verdict(db: Database) -> None:  # noqa: F811
    executor = Inline([LAB, NAMELESS], HOSTS)
    with FarmMeasurer(Farm(executor), HW) as m:
        found, good = space()
        bad = next(c for c in found if c.config["rows"] == 32)
        executor.deaths["measure", good[1].key] = LIVES
        answers = {a.candidate: a for a in m.measure(found, [*good[:3], bad], 3)}
        compared = list(m.confirm(found, [good[0], good[2]], 4))
        builder, lab = m.workers()
    assert [answers[c].worker for c in good[:3]] == ["lab/cpu"] * 3 and len(compared) == 2
    assert answers[good[1]].verdict is Verdict.CRASH
    assert answers[bad].worker == "01234567" and {x.worker for x in compared} == {"lab/cpu"}
    assert (builder.name, builder.compiled, builder.failed, builder.measured) == (
        "01234567",
        3,
        1,
        0,
    )
    assert (lab.name, lab.measured, lab.lost, lab.compiled) == ("lab", 4, LIVES, 0)
    assert lab.started == 3 + LIVES and (lab.hardware, lab.devices) == (HW.id, ("cpu",))
    executor = Inline([LAB, NAMELESS], HOSTS)
    with FarmMeasurer(Farm(executor), HW) as m:
        search(db, m, trials=30)
        told = m.workers()
    by = {w.name: [r for r in db if r.worker.partition("/")[0] == w.name] for w in told}
    assert sum(map(len, by.values())) == len(db)
    assert sum(r.ok for r in by["lab"] if not r.twin) == told[1].measured
    assert {r.verdict for r in by["01234567"] if not r.twin} == {Verdict.BUILD_FAILED}


def test_seconds_are_those_of_the_node() -> None:
    """Two builds of four seconds on a node of four, one after the other measured for two on the device."""
    now = [0.0]
    executor = Inline([Node("n", 4, ("cpu",))], {k: lambda o: ("ok", o) for k in HOSTS})
    farm = Farm(executor, clock=lambda: now[0])
    now[0] = 3.0  # nothing waits
    executor.on_wait = lambda: now.__setitem__(0, now[0] + 2.0)
    for number in (1, 2):
        farm.submit(Action(number, "build"), number)
    now[0] = 4.0
    farm.next()  # ends at 6, the other at 8
    farm.next()
    now[0] = 9.0  # the tuner's second
    farm.submit(Action(3, "measure", exclusive=True), 3)
    farm.next()
    (row,) = farm.workers()
    assert row.busy_s == pytest.approx(2 / 4 + 4 / 4 + 2) and row.seconds == 11.0
    assert row.idle_s == pytest.approx(11.0 - 3.5) and row.share == pytest.approx(3.5 / 11)
    assert (row.started, row.waited_s, row.wait_s) == (3, 2.0, pytest.approx(2 / 3))
    assert row.tuner_s == pytest.approx(4.0 + 1.0)


@given(st.lists(st.sampled_from(["lost", "vanish", "stuck", "fine", "break"]), max_size=12))
@settings(max_examples=25)
def test_busy_and_idle_make_the_time_a_node_was_there(fates: list[str]) -> None:
    now = [0.0]
    nodes = [Node("a", 2, ("cpu",), label="same"), Node("b", 3, ("cpu",), label="same")]
    executor = Inline(nodes, {k: lambda o: ("ok", o) for k in HOSTS})
    executor.on_wait = lambda: now.__setitem__(0, now[0] + 1.0)
    farm = Farm(executor, clock=lambda: now[0])
    b_left: float | None = None
    for number, fate in enumerate(fates, 1):
        content, kind = f"c{number}", ("build", "measure")[number % 2]
        executor.deaths[kind, content] = fate == "lost"
        executor.vanishing[content] = fate == "vanish"
        if fate == "stuck":
            executor.stuck.add(content)
        if fate == "break" and "b" in executor.present:
            del executor.present["b"]
            b_left = now[0]
        action = Action(number, kind, content=content, exclusive=kind == "measure", timeout_s=5.0)
        farm.submit(action, number)
        farm.next()
    (row,) = farm.workers()
    there = now[0] + (now[0] if b_left is None else b_left)
    assert row.busy_s + row.idle_s == pytest.approx(there)
    assert 0.0 <= row.share <= 1.0 and row.cpus == 5
    assert row.lost == sum(f in ("lost", "vanish", "stuck") for f in fates)
    assert row.compiled + row.measured == sum(f != "stuck" for f in fates)


# -- beside the records --------------------------------------------------------------------------


def rows(search: str = "s1", began: float = 50.0) -> list[Worker]:
    names = ("lab", "builder")
    return [
        Worker(name=n, search=search, began=began, measured=3, busy_s=2.0, idle_s=2.0)
        for n in names
    ]


def test_old_lines_stay_what_they_are_and_new_ones_say_who() -> None:
    old = encode(record(1))
    assert "worker" not in old and "twin" not in old and encode(decode_record(old)) == old
    for told in ({"worker": "lab/cpu"}, {"twin": "f" * 64}, {"worker": "lab", "twin": "f" * 64}):
        line = encode(record(1, **told))
        assert decode_record(line) == record(1, **told) and encode(decode_record(line)) == line
    with pytest.raises(InputError, match="checksum"):
        decode_record(encode(record(1, worker="lab/cpu")).replace("lab/cpu", "lob/cpu"))


def test_rows_are_kept_merged_pruned_and_recovered(tmp_path: Path) -> None:
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    with Database(old) as opened:
        opened.add(record())
    with Database(old, read_only=True) as opened:
        assert load(opened) == []  # a database that knows of no farms
    with Database(new) as opened:
        opened.add(record(1, worker="lab/cpu"))
        store(opened, rows())
        store(opened, [*rows(), *rows("s2", 90.0)])  # the same twice
        assert len(load(opened)) == 4 and check(new).ok
        assert [[w.name for w in ws] for ws in searches(load(opened))] == [["builder", "lab"]] * 2
        assert [ws[0].search for ws in searches(load(opened))] == ["s2", "s1"]
    with Database(old) as opened:
        assert merge(opened, new) == (1, 0) and merge(opened, new) == (0, 1)
        assert sorted(w.search for w in load(opened)) == ["s1", "s1", "s2", "s2"]
        assert {r.worker for r in opened} == {"", "lab/cpu"}
        assert export_records(opened, tmp_path / "r.jsonl") == 2
        with Database(tmp_path / "third.db") as third:
            assert merge(third, tmp_path / "r.jsonl") == (2, 0) and load(third) == []
            assert {r.worker for r in third} == {"", "lab/cpu"}
    assert salvage(new, tmp_path / "saved.db") == 1
    with Database(tmp_path / "saved.db") as opened:
        assert sorted(w.search for w in load(opened)) == ["s1", "s1", "s2", "s2"]
    with sqlite3.connect(new) as raw:
        raw.execute(
            "UPDATE farm_workers SET line = replace(line, '\"lab\"', '\"lob\"') WHERE id = 1"
        )
    raw.close()
    assert "1 rows of farms' workers" in check(new).problems[0]
    with Database(new) as opened:
        assert len(load(opened)) == 3
        prune(opened, older_than_days=1.0)
        assert load(opened) == [] and len(opened) == 0


def test_rows_of_newer_versions_and_with_other_sums_are_told(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    with Database(path) as opened:
        store(opened, [*rows(), msgspec.structs.replace(rows()[0], schema=SCHEMA + 1)])
    found = check(path).problems
    assert found == ("1 rows of farms' workers are of a newer version of mimo-compile",)
    with Database(tmp_path / "old.db") as opened:
        with pytest.raises(InputError, match="newer version"):
            merge(opened, path)
        assert load(opened) == []
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE farm_workers SET sum = 'x' WHERE id = 1")
    raw.close()
    assert "1 rows of farms' workers do not match" in check(path).problems[0]
    with Database(path) as opened:
        assert len(load(opened)) == 1


def test_nodes_with_one_label_are_counted_together() -> None:
    tally = Tally()
    for name, units in (("a", 4), ("b", 2)):
        tally.joined(Node(name, units, (), label="lab"), 0.0)
    assert [w.cpus for w in tally.workers(1.0, [])] == [6]
    tally.left("a", 2.0)
    tally.joined(Node("c", 3, (), label="lab"), 3.0)  # never more than six at a time
    assert [w.cpus for w in tally.workers(4.0, [])] == [6]


def test_the_command_prints_them() -> None:
    from types import SimpleNamespace
    from typing import Any

    from mimo_compile.cli.tune import show
    from mimo_compile.search.objective import parse_objective

    told = tuple(msgspec.structs.replace(w, seconds=4.0, tuner_s=1.0) for w in rows())
    result = TuningResult((), parse_objective("latency"), "trials", 4.0, None, workers=told)
    said: list[str] = []
    console: Any = SimpleNamespace(say=said.append)
    show(console, result)
    shown = "\n".join(said).splitlines()
    assert any(line.split()[:2] == ["worker", "devices"] for line in shown)
    assert sum(line.endswith("50 %") for line in shown) == 2
    assert "the farm was open for 4 s; for 1 s of it the tuner computed" in shown
    assert [w["used"] for w in result.to_json()["workers"]] == [0.5, 0.5]


def test_what_is_no_row_of_a_worker_is_refused() -> None:
    from mimo_compile.search.records import seal

    good = rows()[0]
    assert decode(seal(msgspec.json.encode(good))) == good
    newer = msgspec.structs.replace(good, schema=SCHEMA + 1)
    for body, words in (
        (msgspec.json.encode(newer), f"schema {SCHEMA + 1}"),
        (b'{"kind":"worker","name":"x","lost":-1}', ">= 0"),
        (b'{"kind":"other"}', "not a row"),
    ):
        with pytest.raises(InputError, match=words):
            decode(seal(body))
