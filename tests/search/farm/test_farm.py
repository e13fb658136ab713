"""A search over a farm whose workers die, hang, break and vanish: nothing acknowledged is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inline import HOSTS, Answer, Inline
from toy_schedules import Other, Tiled

from mimo_compile.errors import DeviceLost, MimoError
from mimo_compile.ir.hardware import PRESETS
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search.database import Database
from mimo_compile.search.farm import measurer as farm_measurer
from mimo_compile.search.farm.coordinator import Farm
from mimo_compile.search.farm.hosts import Built
from mimo_compile.search.farm.measurer import FarmMeasurer
from mimo_compile.search.farm.scheduling import NODE_LOSSES, Action, Node
from mimo_compile.search.measure.base import Measurement
from mimo_compile.search.measure.worker import Reply
from mimo_compile.search.records import Verdict
from mimo_compile.search.result import TuningResult
from mimo_compile.search.space import Candidate, JointSpace
from mimo_compile.search.strategies import DEFAULT
from mimo_compile.search.tuner import Tuner

pytestmark = [pytest.mark.compile]
HW = PRESETS["x86-64-v3"]
BIG, SMALL = (parse_workload(f"swiglu:t={t},f=512") for t in (64, 8))
ONE = Node("one", 2, ("cpu",))
BUILDERS = Node("builders", 3, kinds=frozenset({"build"}))
DEVICE = Node("device", 2, ("cpu",), kinds=frozenset({"measure"}))


def measurer(executor: Inline, **more) -> FarmMeasurer:
    return FarmMeasurer(Farm(executor, **more), HW)


def space(workload=BIG) -> tuple[JointSpace, list[Candidate]]:
    found = JointSpace(workload, HW, [Tiled(), Other()])
    return found, [c for c in found if c.config["rows"] != 32]


def search(db: Database, m: FarmMeasurer, trials: int = 40, **more) -> TuningResult:
    from mimo_compile.search import tune_workloads

    return tune_workloads(
        {BIG: 2.0, SMALL: 1.0}, HW, trials=trials, db=db, schedules=[Tiled(), Other()],
        warm_start=False, **m.how(), **more,
    )  # fmt: skip


@pytest.fixture
def db(tmp_path: Path):
    with Database(tmp_path / "records.db") as opened:
        yield opened


# -- searching -----------------------------------------------------------------------------------


def test_a_search_runs_on_one_node_and_on_two(db: Database) -> None:
    executor = Inline([ONE], HOSTS)
    with measurer(executor) as m:
        assert not m.overlaps
        result = search(db, m)
    assert result.stopped == "trials" and result.trials == 40 and executor.closed
    assert all(w.best is not None for w in result.workloads)
    assert {k for k, *_ in executor.log} == {"build", "measure"}
    assert m.farm.statistics.overlapped == 0  # quiet: no build beside a clock
    assert len(db) > 40  # with the comparison at the end
    spread = Inline([DEVICE, BUILDERS], HOSTS)
    with measurer(spread) as m:
        assert m.overlaps
        search(db, m, trials=80)
    assert {(k, n) for k, n, _ in spread.log} == {("build", "builders"), ("measure", "device")}
    assert m.farm.statistics.overlapped > 10


def test_builds_that_fail_are_verdicts() -> None:
    executor = Inline([ONE], HOSTS)
    with measurer(executor) as m:
        found, good = space()
        bad = next(c for c in found if c.config["rows"] == 32)
        answers = {a.candidate: a for a in m.measure(found, [good[0], bad], 3)}
    assert answers[good[0]].verdict is Verdict.OK and answers[good[0]].seed == 3
    assert answers[bad].verdict is Verdict.BUILD_FAILED and "no such tile" in answers[bad].message


def test_code_is_built_once_and_compared_on_one_node() -> None:
    executor = Inline([ONE, Node("two", 2, ("cpu",))], HOSTS)
    with measurer(executor) as m:
        found, (a, b, c, *_) = space()
        assert len(list(m.measure(found, [a, b], 1))) == 2
        answers = list(m.confirm(found, [a, b, c], 2))
        assert list(m.measure(found, [], 1)) == []
    assert [x.candidate for x in answers] == [a, b, c]
    built = Counter(content for kind, _, content in executor.log if kind == "build")
    assert set(built.values()) == {1} and len(built) == 3
    assert executor.log[-1][0] == "measure" and sum(k == "measure" for k, *_ in executor.log) == 3


def test_the_same_code_is_timed_once(db: Database) -> None:
    def build(order: Any) -> Answer:
        value = {"code_hash": str(order.candidate.config["rows"]), "ops": {}, "bytes": {}}
        return "ok", Built(Reply("ok", value), b"code")

    executor = Inline([ONE], {**HOSTS, "build": build})
    executor.hosts["measure"] = lambda o: ("ok", [_with_hash(m) for m in HOSTS["measure"](o)[1]])
    with measurer(executor) as m:
        result = search(db, m, trials=60)
    assert result.trials == 60
    twins = [r for r in db if r.twin]
    assert twins and all("the same code as" in r.message for r in twins)
    timed = [r for r in db if not r.twin and r.phase == "search"]
    assert len(twins) + len(timed) == 60 and len(timed) < 45


def _with_hash(m: Measurement) -> Measurement:
    return replace(m, code_hash=str(m.candidate.config["rows"]))


def test_the_next_batch_is_built_while_this_one_is_measured(db: Database) -> None:
    executor = Inline([DEVICE, BUILDERS], HOSTS)
    with measurer(executor) as m:
        found, (a, b, c, d, *_) = space()
        m.prepare(found, [c, d])
        assert {x.candidate for x in m.measure(found, [a, b], 1)} == {a, b}
        before = len(executor.log)
        assert {x.candidate for x in m.measure(found, [c, d], 2)} == {c, d}
    wanted = [content for kind, _, content in executor.log if kind == "build"]
    assert wanted.index(a.key) < 2 and wanted.index(b.key) < 2, "what is wanted now goes first"
    assert all(kind == "measure" for kind, *_ in executor.log[before:])


def test_a_search_that_ends_early_leaves_nothing_behind() -> None:
    executor = Inline([ONE], HOSTS)
    with measurer(executor) as m:
        found, some = space()
        stream = m.measure(found, some[:6], 1)
        next(stream)
        stream.close()
        assert not any(
            k == "measure" for k in (w.action.kind for w in m.farm.scheduler.waiting.values())
        )
        assert len(list(m.measure(found, some[:6], 2))) == 6


# -- faults --------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["build", "measure"])
def test_a_dead_worker_s_action_is_run_again_once(kind: str) -> None:
    executor = Inline([ONE], HOSTS)
    with measurer(executor) as m:
        found, (a, b, c, *_) = space()
        executor.deaths[kind, a.key] = 1
        executor.deaths[kind, b.key] = 2
        answers = {x.candidate: x for x in m.measure(found, [a, b, c], 1)}
        assert {k: v.verdict for k, v in answers.items()} == {
            a: Verdict.OK, b: Verdict.CRASH, c: Verdict.OK,
        }  # fmt: skip
        assert "worker died 2 times" in answers[b].message and m.farm.statistics.rerun == 3
        starts = len(executor.log)
        (again,) = m.measure(found, [b], 2)  # it is not tried any more
        assert again.verdict is Verdict.CRASH and "before" in again.message
        assert all(content != b.key or k != kind for k, _, content in executor.log[starts:])


@pytest.mark.fault
def test_a_vanished_node_is_blamed_on_a_candidate_only_in_the_end() -> None:
    executor = Inline([ONE], HOSTS)
    with measurer(executor) as m:
        found, (a, b, *_) = space()
        executor.vanishing.update({a.key: NODE_LOSSES - 1, b.key: NODE_LOSSES})
        answers = {x.candidate: x for x in m.measure(found, [a, b], 1)}
    assert answers[a].verdict is Verdict.OK and answers[b].verdict is Verdict.CRASH
    assert "4 nodes vanished below it" in answers[b].message


@pytest.mark.fault
def test_a_search_outlives_workers_and_keeps_every_record(db: Database) -> None:
    executor = Inline([ONE], HOSTS)
    stored: list[str] = []
    calls = 0

    def die_sometimes() -> None:
        nonlocal calls
        calls += 1
        if calls % 7 == 0 and executor.queue:
            start = executor.queue[0][0]
            executor.deaths[start.action.kind, start.action.content] = 1

    executor.on_wait = die_sometimes

    def show(event) -> None:
        if event.record is not None:
            stored.append(event.record.key)

    with measurer(executor) as m:
        result = search(db, m, trials=60, progress=show)
        assert m.farm.statistics.rerun >= 10
    assert result.stopped == "trials" and result.trials == 60
    assert Counter(stored) == Counter(r.key for r in db)


@pytest.mark.fault
def test_ctrl_c_keeps_what_was_acknowledged(db: Database) -> None:
    executor = Inline([ONE], HOSTS)
    calls = 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt

    executor.on_wait = interrupt
    with measurer(executor) as m:
        result = search(db, m, trials=200)
    assert result.stopped == "interrupted" and 0 < result.trials == len({r.key for r in db}) < 30


@pytest.mark.fault
def test_a_hanging_worker_is_ended() -> None:
    now = [0.0]
    executor = Inline([ONE], HOSTS)
    executor.on_wait = lambda: now.__setitem__(0, now[0] + 100.0)
    with measurer(executor, clock=lambda: now[0]) as m:
        found, (a, b, *_) = space()
        executor.stuck.add(a.key)
        answers = {x.candidate: x for x in m.measure(found, [a, b], 1)}
    assert answers[a].verdict is Verdict.TIMEOUT and answers[b].verdict is Verdict.OK
    assert "no answer from its worker" in answers[a].message and executor.killed


@pytest.mark.fault
def test_nodes_join_and_leave() -> None:
    executor = Inline([ONE], HOSTS)
    with measurer(executor) as m:
        found, some = space()
        calls = 0

        def change() -> None:
            nonlocal calls
            calls += 1
            if calls == 3:  # builders come: the device's node only measures from now on
                executor.present = {"one": Node("one", 2, ("cpu",), kinds=frozenset({"measure"}))}
                executor.present["builders"] = BUILDERS
            if calls == 9:
                executor.present.pop("builders")
                executor.queue = [(s, p) for s, p in executor.queue if s.node != "builders"]
                executor.present["one"] = ONE

        executor.on_wait = change
        answers = list(m.measure(found, some[:12], 1))
    assert [x.verdict for x in answers] == [Verdict.OK] * 12
    assert {n for _, n, _ in executor.log} == {"one", "builders"}


@pytest.mark.fault
def test_without_any_device_the_search_ends_with_the_reason() -> None:
    now = [0.0]
    executor = Inline([DEVICE, BUILDERS], HOSTS)
    with measurer(executor, clock=lambda: now[0], grace_s=30.0) as m:
        found, some = space()

        def lose() -> None:
            now[0] += 5.0
            if now[0] == 20.0:
                executor.present.pop("device")
                executor.queue = [(s, p) for s, p in executor.queue if s.node != "device"]

        executor.on_wait = lose
        with pytest.raises(DeviceLost, match="none came within 30 s"):
            list(m.measure(found, some[:12], 1))


@pytest.mark.fault
def test_a_broken_node_is_left_out() -> None:
    executor = Inline([DEVICE, BUILDERS, Node("other", 1, ("cpu",))], HOSTS)
    executor.broken["device"] = MimoError("no space left", where="device")
    with measurer(executor) as m:
        found, some = space()
        assert [x.verdict for x in m.measure(found, some[:4], 1)] == [Verdict.OK] * 4
        assert sum(n == "device" for _, n, _ in executor.log) == 1
        executor.broken["other"] = MimoError("device in use", where="other")
        with pytest.raises(MimoError, match=r"no space left|in use"):
            list(m.measure(found, some[4:8], 2))


@pytest.mark.fault
def test_what_runs_on_a_node_that_breaks_is_not_to_blame() -> None:
    """Each disk that fills up takes a candidate's builds with it: it is built all the same."""
    many = [Node(f"b{i}", 1, kinds=frozenset({"build"})) for i in range(NODE_LOSSES + 1)]
    executor = Inline([DEVICE, *many], HOSTS)
    with measurer(executor) as m:
        found, (a, *_) = space()
        for node in many[:-1]:
            executor.broken[node.name] = MimoError("no space left", where=node.name)
        (answer,) = m.measure(found, [a], 1)
    assert answer.verdict is Verdict.OK


@pytest.mark.fault
def test_vanished_nodes_do_not_bar_a_schedule(db: Database) -> None:
    executor = Inline([ONE], HOSTS)
    doomed: set[str] = set()

    def vanish() -> None:
        for start, order in executor.queue:
            c = getattr(order, "candidate", None)
            if c is not None and c.schedule == Tiled.name and c.workload == BIG and len(doomed) < 4:
                doomed.add(c.key)
            executor.vanishing[start.action.content] = start.action.content in doomed

    executor.on_wait = vanish
    with measurer(executor) as m:
        search(db, m, trials=40)
    lost = [r for r in db if "nodes vanished" in r.message]
    assert len(lost) == len(doomed) == 4 and {r.verdict for r in lost} == {Verdict.CRASH}
    assert any(r.ok for r in db if (r.schedule, r.workload) == (Tiled.name, str(BIG)))


@pytest.mark.fault
def test_a_broken_builder_does_not_end_the_wait_for_a_device(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    more = Node("more", 1, kinds=frozenset({"build"}))
    executor = Inline([DEVICE, BUILDERS, more], HOSTS)
    executor.broken["more"] = MimoError("no space left", where="more")

    def lose() -> None:
        now[0] += 5.0
        if now[0] == 20.0:
            executor.present.pop("device")
            executor.queue = [(s, p) for s, p in executor.queue if s.node != "device"]
        if now[0] == 60.0:
            executor.present["device"] = DEVICE

    executor.on_wait = lose
    with measurer(executor, clock=lambda: now[0], grace_s=60.0) as m:
        found, some = space()
        assert len(list(m.measure(found, some[:12], 1))) == 12
    assert ["more" in r.message and "no space" in r.message for r in caplog.records] == [True]


def test_code_that_is_wanted_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(farm_measurer, "_KEPT", 3)
    executor = Inline([ONE], HOSTS)
    with measurer(executor) as m:
        found, some = space()
        assert len(list(m.measure(found, some[:6], 1))) == 6
        assert [x.candidate for x in m.confirm(found, some[:6], 2)] == some[:6]
        m.prepare(found, some[6:12])
        assert len(list(m.measure(found, some[12:24], 1))) == 12
        assert len(m._known) <= 3 and not m._wanted


@pytest.mark.fault
def test_what_cannot_be_built_again_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(farm_measurer, "_KEPT", 0)
    executor = Inline([ONE], HOSTS)
    with measurer(executor) as m:
        found, (a, b, *_) = space()
        assert len(list(m.measure(found, [a, b], 1))) == 2
        executor.deaths["build", a.key] = 2
        assert [x.candidate for x in m.confirm(found, [a, b], 2)] == [b]
        assert not m._lost
        assert list(m.confirm(found, [a], 2)) == []


# -- the coordinator alone -----------------------------------------------------------------------


def test_results_wait_while_a_clock_runs_at_home() -> None:
    """The tuner works when it has a result: not beside a measurement on its own machine."""
    executor = Inline(
        [DEVICE, BUILDERS], {"build": lambda o: ("ok", o), "measure": lambda o: ("ok", o)}
    )
    farm = Farm(executor)
    order = [Action(1, "build"), Action(2, "measure", exclusive=True)]
    for action in order:
        farm.submit(action, action.id)
    assert {farm.next().action.id, farm.next().action.id} == {1, 2}
    assert [k for k, *_ in executor.log] and farm.statistics.ended["done"] == 2
    with pytest.raises(MimoError, match="nothing is left"):
        farm.next()
    executor.home = "device"
    for number in (3, 4):
        kind = "build" if number == 3 else "measure"
        farm.submit(Action(number, kind, exclusive=number == 4), number)
    farm.next()
    assert not farm.scheduler.running, "both had ended before the first was told"


def test_what_is_cancelled_is_not_told() -> None:
    executor = Inline([Node("n", 1)], {"build": lambda o: ("ok", o)})
    farm = Farm(executor)
    for number in (1, 2, 3):
        farm.submit(Action(number, "build"), number)
    farm.cancel(2)
    executor.on_wait = lambda: farm.cancel(1)  # it runs by then
    assert farm.next().action.id == 3 and [k for k, *_ in executor.log] == ["build", "build"]
    assert farm.statistics.ended["done"] == 2


def test_what_is_about_to_be_refused_can_be_cancelled() -> None:
    executor = Inline([Node("n", 1)], HOSTS)
    farm = Farm(executor)
    farm.submit(Action(1, "measure", exclusive=True), None)  # no node could
    farm.cancel(1)
    with pytest.raises(MimoError, match="nothing is left"):
        farm.next()


def test_the_caller_s_own_time_is_not_learned() -> None:
    """A build that ended while the tuner computed took nobody knows how long."""
    now = [0.0]
    executor = Inline([Node("n", 2)], {"build": lambda o: ("ok", o)})
    executor.on_wait = lambda: now.__setitem__(0, now[0] + 1.0)
    farm = Farm(executor, clock=lambda: now[0])
    for number in (1, 2):
        farm.submit(Action(number, "build", "w"), number)
    farm.next()
    before = farm.scheduler.estimates.seconds("build", "w", 0.0, 1)
    executor.on_wait = lambda: None
    now[0] += 100.0  # the tuner's
    farm.next()
    assert farm.scheduler.estimates.seconds("build", "w", 0.0, 1) == before == pytest.approx(1.0)


def test_early_batches_are_used_in_their_turn(db: Database) -> None:
    from mimo_compile.cost_models.analytic import DeviceModel
    from mimo_compile.search.budget import Budget, Clock
    from mimo_compile.search.objective import parse_objective

    executor = Inline([DEVICE, BUILDERS], HOSTS)
    with measurer(executor) as m:
        tuner = Tuner(
            HW, db, m, parse_objective("latency"), seed=0, device=DeviceModel.guess(HW),
            strategy=DEFAULT,
        )  # fmt: skip
        for workload in (BIG, SMALL):
            tuner.add(workload, 1.0, [Tiled(), Other()])
        result = tuner.run(Clock(Budget(trials=50), None))
    assert result.trials == 50
    measured = Counter(c for k, _, c in executor.log if k == "measure" and c)
    built = Counter(c for k, _, c in executor.log if k == "build")
    assert max(measured.values()) == 1 and max(built.values()) == 1
    assert len(set(built) - set(measured)) <= 16 + sum(
        r.verdict is Verdict.BUILD_FAILED for r in db
    )
