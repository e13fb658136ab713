"""What becomes the same code is timed once; what differs in code, layout or meter is not taken alike."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import msgspec
import pytest
from sample_records import record as sample
from toy_schedules import Tile, Tiled

from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search.database import Database
from mimo_compile.search.exchange import export_records, import_records, prune
from mimo_compile.search.lookup import summarise
from mimo_compile.search.measure import Measurer, Recalls
from mimo_compile.search.measure.replay import ReplayMeasurer
from mimo_compile.search.measure.twins import Twins
from mimo_compile.search.records import Record, Verdict, decode, encode
from mimo_compile.search.space import Candidate, JointSpace
from mimo_compile.search.tune import tune_workloads

pytestmark = pytest.mark.compile
EMBED = parse_workload("embed:t=4,v=24,d=32")
SWIGLU = parse_workload("swiglu:t=64,f=4096")
TOY = JointSpace(SWIGLU, PRESETS["x86-64-v3"], [Tiled()])


def code_of(measurer: Measurer, space: JointSpace, *candidates: Candidate) -> list[str]:
    return [str(r.value["code_hash"]) for r in measurer.build(space, candidates)]


@pytest.mark.slow
def test_code_differs_exactly_where_a_knob_has_an_effect(measurer: Measurer) -> None:
    """The zoo's second knob changes the kernel's name only."""
    from zoo_schedules import Many, Zoo, ZooConfig

    space = JointSpace(EMBED, local_cpu(), [Zoo()])
    configs = [("honest", 0), ("honest", 3), ("honest_parallel", 0), ("honest_parallel", 1)]
    candidates = [space.candidate("embed.zoo", ZooConfig(*c)) for c in configs]
    a, same, b, again = code_of(measurer, space, *candidates)
    assert a == same != b == again
    measurer.builder.forget(*(c.key for c in candidates))
    many = JointSpace(EMBED, local_cpu(), [Many()])
    different = [many.candidate("embed.many", ZooConfig("honest", i)) for i in (1, 2)]
    assert len(set(code_of(measurer, many, *different))) == 2
    measurer.builder.forget(*(c.key for c in different))


def test_knobs_of_a_real_schedule(measurer: Measurer) -> None:
    """Tiles change a matmul's code; two builds of one config are equal."""
    workload = parse_workload("mpgemm:m=2,n=64,k=128,w=w4g64,a=a8")
    space = JointSpace(workload, local_cpu().with_threads(1))
    default = space.defaults()[0]
    own = space.spaces[default.schedule].knobs
    other = next(
        found
        for value in own["rows"]
        if value != default.config["rows"]
        and (found := space.adopt(default.schedule, {**default.config, "rows": value}))
    )
    first, different = code_of(measurer, space, default, other)
    measurer.builder.forget(default.key, other.key)
    (again,) = code_of(measurer, space, default)
    measurer.builder.forget(default.key)
    assert first == again != different


@pytest.mark.slow
def test_a_search_times_the_same_code_once(
    tmp_path: Path, measurer: Measurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo_schedules import Zoo

    class Pair(Zoo):
        faults = ("honest", "honest_parallel")

    Pair.__module__, Pair.__qualname__ = Zoo.__module__, Zoo.__qualname__  # what children import
    monkeypatch.setattr(measurer, "twins", Twins())
    timed: list[str] = []
    once = measurer.runner.time
    monkeypatch.setattr(
        measurer.runner,
        "time",
        lambda slots, *a, **k: (timed.extend(slots), once(slots, *a, **k))[1],
    )
    path = tmp_path / "records.db"

    def search(trials: int) -> list[Record]:
        with Database(path) as db:
            result = tune_workloads(
                {EMBED: 1.0}, local_cpu(), trials=trials, db=db, measurer=measurer,
                schedules=[Pair()], warm_start=False,
            )  # fmt: skip
            assert result.trials == trials, "what is the same code is a trial too"
            return list(db)

    rows = search(6)
    single = [r for r in rows if r.phase == "search"]
    own = {r.key: r for r in single if not r.twin}
    assert len(own) == len({r.code_hash for r in rows}) <= 2 and len(single) == 6
    for r in single:
        if r.twin:
            like = own[r.twin]
            assert (r.latency_us, r.code_hash) == (like.latency_us, like.code_hash)
            assert r.ok and r.p10_us is r.p90_us is r.cv is None and r.calls == 0
            assert "the same code as embed.zoo(fault=" in r.message
    assert all(not r.twin for r in rows if r.phase == "confirm")
    assert {r.key for r in rows if r.phase == "confirm"} <= own.keys()
    assert len(set(timed)) == len(own)
    twice = len(timed)
    monkeypatch.setattr(measurer, "twins", Twins())  # another day: known from the records
    more = search(8)[len(rows) :]
    assert sum(bool(r.twin) for r in more if r.phase == "search") >= 1
    new = [r for r in more if r.phase == "search" and not r.twin]
    assert not {r.code_hash for r in new} & {r.code_hash for r in rows}
    assert len(timed) == twice + len(new) + sum(r.phase == "confirm" for r in more)


# -- what counts as the same -------------------------------------------------------------------


def known(candidate: Candidate, **more: object) -> Record:
    return msgspec.structs.replace(
        sample(1, 10.0), schedule=candidate.schedule, workload=str(SWIGLU), config=candidate.config,
        code_hash="c" * 64, **more,
    )  # fmt: skip


FACTS = {"code_hash": "c" * 64, "ops": {"fma_f32": 1.0}, "bytes": {}}


def tile(**knobs: object) -> Candidate:
    return TOY.candidate("swiglu.tiled", Tile(**knobs))


def test_same_code_with_another_layout_is_another_kernel() -> None:
    twins = Twins()
    twins.learn(TOY, tile(), known(tile()))
    found = twins.find(TOY, tile(rows=2), FACTS, 7, meter="")
    assert found is not None and found.latency_us == 10.0 and found.seed == 7
    assert found.counts.ops == {"fma_f32": 1.0}, "the work that the candidate itself declares"
    assert twins.find(TOY, tile(layout="b"), FACTS, 7, meter="") is None
    assert twins.find(TOY, tile(rows=2), {**FACTS, "code_hash": "d" * 64}, 7, meter="") is None
    assert twins.find(TOY, tile(), FACTS, 7, meter="") is None, (
        "it is measured again if it is asked"
    )


def test_joules_are_of_the_meter_that_is_asked_for() -> None:
    twins = Twins()
    twins.learn(TOY, tile(), known(tile()))
    assert twins.find(TOY, tile(rows=2), FACTS, 1, meter="rapl") is None
    joules = known(tile(), energy_mj=3.0, energy_source="rapl", phase="energy")
    twins.learn(TOY, tile(), joules)
    found = twins.find(TOY, tile(rows=2), FACTS, 1, meter="rapl")
    assert found is not None and (found.energy_mj, found.energy_source) == (3.0, "rapl")
    assert twins.find(TOY, tile(rows=2), FACTS, 1, meter="nvml") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"twin": "x" * 64}, {"code_hash": ""}, {"verdict": Verdict.CRASH, "latency_us": None},
        {"verdict": Verdict.SUSPICIOUS},
    ],
)  # fmt: skip
def test_what_was_not_measured_right_has_no_twins(changes: dict[str, object]) -> None:
    twins = Twins()
    twins.learn(TOY, tile(), msgspec.structs.replace(known(tile()), **changes))
    assert twins.find(TOY, tile(rows=2), FACTS, 1, meter="") is None


def test_code_found_wrong_later_is_not_trusted_again() -> None:
    twins = Twins()
    for record in (known(tile()), known(tile(), verdict=Verdict.WRONG, phase="confirm")):
        twins.learn(TOY, tile(), record)
    assert twins.find(TOY, tile(rows=2), FACTS, 1, meter="") is None


def test_what_replays_recalls_nothing() -> None:
    assert isinstance(Measurer(local_cpu()), Recalls)
    assert not isinstance(ReplayMeasurer([]), Recalls)


# -- records -----------------------------------------------------------------------------------


def test_records_without_a_twin_are_what_they_were() -> None:
    line = encode(sample(1))
    assert "twin" not in json.loads(line) and decode(line) == sample(1)
    twin = sample(2, twin=sample(1).key)
    assert decode(encode(twin)) == twin and json.loads(encode(twin))["twin"] == sample(1).key


def wrong_one() -> Record:
    return sample(3, verdict="wrong", phase="confirm")


def test_twins_follow_the_one_that_was_timed() -> None:
    first, second = sample(1, 9.0), sample(2, 10.0)
    twin = sample(3, 9.0, twin=first.key)
    rows = [
        first, second, twin, sample(1, 14.0, phase="confirm"), sample(2, 12.0, phase="confirm"),
    ]  # fmt: skip
    for order in (rows, rows[::-1]):
        found = {r.record.config["tile"]: r.latency_us for r in summarise(order)}
        assert found == {1: 14.0, 2: 12.0, 3: 14.0}, "its lucky reading is no reading of its own"
    barred = [*rows, sample(1, verdict="wrong")]
    assert {r.record.config["tile"] for r in summarise(barred)} == {2}
    assert [r.latency_us for r in summarise([twin])] == [9.0], "the other record was left behind"
    crash = sample(3, verdict="crash", phase="confirm")
    for also in (first, second):  # with the records of the one that was timed, and without
        left = {r.record.config["tile"]: r.latency_us for r in summarise([also, twin, crash])}
        assert left[3] == 9.0, "a crash of its own only adds no time"
        assert all(r.record.config["tile"] != 3 for r in summarise([also, twin, wrong_one()]))
    own = [*rows, sample(3, 13.0, phase="confirm")]
    assert {r.record.config["tile"]: r.latency_us for r in summarise(own)}[3] == 13.0


def test_exports_and_prunes_keep_different_code(tmp_path: Path) -> None:
    twins = [sample(i, 1.0, twin=sample(1).key) for i in (5, 6)]
    with Database(tmp_path / "a.db") as db, Database(tmp_path / "b.db") as other:
        db.add(sample(1, 1.0), *twins, sample(2, 2.0), sample(3, 3.0))
        assert export_records(db, tmp_path / "best.jsonl", best_only=2) == 2
        assert import_records(other, tmp_path / "best.jsonl") == (2, 0)
        assert [r.config["tile"] for r in other] == [1, 2]
        assert export_records(db, tmp_path / "all.jsonl") == 5
        assert import_records(other, tmp_path / "all.jsonl") == (3, 2)
        assert list(itertools.chain(r.twin for r in other if r.twin)) == [sample(1).key] * 2
        assert prune(db, keep=2) == 3
        assert [r.config["tile"] for r in db] == [1, 2]
