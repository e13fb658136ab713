"""Spaces, strategies, budget and the tuner on recorded spaces: no clock, no compiler."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from recordings import DEVICE, HW, LARGE, SMALL, recorded, schedules

from mimo_compile.cost_models.learned import LatencyModel
from mimo_compile.errors import InputError, UsageError
from mimo_compile.ir.hardware import PRESETS
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search import tune as front
from mimo_compile.search.budget import Budget, Clock, Share, mark_heavy, next_share, patience
from mimo_compile.search.database import Database
from mimo_compile.search.grid import Grid
from mimo_compile.search.interrupts import finish_first
from mimo_compile.search.learner import Learner
from mimo_compile.search.lookup import Result, best, meter_of, pareto
from mimo_compile.search.measure.replay import ReplayMeasurer
from mimo_compile.search.meters.replay import ReplayMeter
from mimo_compile.search.objective import BEHIND, parse_objective
from mimo_compile.search.progress import Event, PlainProgress
from mimo_compile.search.records import Record, Verdict
from mimo_compile.search.result import TuningResult
from mimo_compile.search.space import Candidate, JointSpace
from mimo_compile.search.strategies import STRATEGIES, Observation, Options, Setting, make_strategy
from mimo_compile.search.transfer import distance
from mimo_compile.search.tune import tune_workloads
from mimo_compile.search.tuner import Tuner

pytestmark = pytest.mark.compile


def tune(db: Database, measurer: ReplayMeasurer, workloads=None, **more) -> TuningResult:
    more.setdefault("trials", 96)
    return tune_workloads(
        workloads or {LARGE: 1.0},
        HW,
        db=db,
        measurer=measurer,
        schedules=schedules(),
        device=DEVICE,
        **more,
    )


# -- space -------------------------------------------------------------------------------------


def test_joint_space() -> None:
    space = JointSpace(LARGE, HW, schedules())
    everything = {c.key: c for c in space}
    assert len(everything) == sum(1 for s in space.spaces.values() for _ in s)
    assert [c.schedule for c in space.defaults()] == ["swiglu.tiled", "swiglu.other"]
    grid, rng = Grid(space), np.random.default_rng(0)
    draws = grid.sample(rng, 300)
    for number, other in zip(draws[::2], draws[1::2], strict=True):
        c, o = grid.known(number), grid.known(other)
        if (moved := grid.mutate(number, rng)) is not None:
            m = grid.known(moved)
            assert sum(c.config[k] != m.config[k] for k in c.config) == 1
        child = grid.crossover(number, other, rng)
        assert child is None or c.schedule == o.schedule
        if child is not None:
            x = grid.known(child)
            assert all(x.config[k] in (c.config[k], o.config[k]) for k in x.config)
    assert space.adopt("swiglu.tiled", {"rows": 3}) is None  # not a value of the knob
    assert space.adopt("swiglu.tiled", {"rows": 32, "cols": 32}) is None  # not legal
    assert (
        space.adopt("no.such", {}) is None and space.adopt("swiglu.tiled", {"nonsense": 1}) is None
    )
    assert space.adopt("swiglu.tiled", {}) == space.defaults()[0]
    with pytest.raises(UsageError, match="no schedule supports"):
        JointSpace(parse_workload("rms_norm:t=1,d=8"), HW, schedules())


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_propose_each_candidate_once(name: str) -> None:
    from toy_schedules import Other

    space = JointSpace(SMALL, HW, [Other()])
    strategy = make_strategy(name, Setting(space, np.random.default_rng(1), space.defaults()))
    asked = []
    while batch := strategy.ask(4):
        assert len(batch) <= 4
        asked += batch
        strategy.tell([Observation(c, float(c.config["rows"])) for c in batch])
    assert asked[0] == space.defaults()[0]
    assert sorted(c.key for c in asked) == sorted(c.key for c in space)
    with pytest.raises(UsageError, match="unknown strategy"):
        make_strategy("annealing", Setting(space, np.random.default_rng(1)))


def test_banned_schedules_are_left_alone() -> None:
    space = JointSpace(LARGE, HW, schedules())
    for name in STRATEGIES:
        strategy = make_strategy(name, Setting(space, np.random.default_rng(1), space.defaults()))
        strategy.ban("swiglu.tiled")
        asked = [c for _ in range(4) for c in strategy.ask(8)]
        assert {c.schedule for c in asked} == {"swiglu.other"} and len(asked) == 6


def test_an_algorithm_near_the_best_is_searched_too() -> None:
    """Offspring of the leader alone would leave it at its default, which is not its best here."""
    space = JointSpace(LARGE, HW, schedules())
    default = space.defaults()[1]
    for seed in range(3):
        setting = Setting(space, np.random.default_rng(seed), space.defaults())
        strategy = make_strategy("evolutionary", setting)
        asked: list[Candidate] = []
        while len(asked) < 40:
            asked += (batch := strategy.ask(8))
            strategy.tell(
                [
                    Observation(
                        c, 1.0 if c.schedule == "swiglu.tiled" else 1.2 - 0.4 * (c != default)
                    )
                    for c in batch
                ]
            )
        assert sum(c.schedule == "swiglu.other" for c in asked) > 3


class Confirms(ReplayMeasurer):
    """Remembers what is compared at the end, when the machine is faster than while searching."""

    def __init__(self, records) -> None:
        super().__init__(records)
        self.compared: list[list[Candidate]] = []

    def measure(self, space, candidates, seed):
        for m in super().measure(space, candidates, seed):
            yield dataclasses.replace(m, latency_us=1.2 * m.latency_us) if m.latency_us else m

    def confirm(self, space, candidates, seed):
        self.compared.append(list(candidates))
        yield from super().confirm(space, candidates, seed)


def test_the_best_of_each_near_algorithm_is_compared_at_the_end(tmp_path: Path) -> None:
    rows = recorded(LARGE, bad=0.0)
    best = min(r.latency_us for r in rows if r.schedule == "swiglu.tiled")
    other = min(r.latency_us for r in rows if r.schedule == "swiglu.other")
    for factor, there in ((1.1, True), (1.5, False)):
        near = [
            msgspec.structs.replace(r, latency_us=r.latency_us * factor * best / other)
            if r.schedule == "swiglu.other" else r
            for r in rows
        ]  # fmt: skip
        measurer = Confirms(near)
        with Database(tmp_path / f"{factor}.db") as db:
            result = tune(db, measurer, trials=96)
        names = [c.schedule for c in measurer.compared[0]]
        assert ("swiglu.other" in names[3:]) == there
        assert names[:3].count("swiglu.tiled") == 3
        # what won was compared
        (w,) = result.workloads
        assert w.best is not None
        last = {tuple(sorted(c.config.items())) for some in measurer.compared for c in some}
        assert tuple(sorted(w.best.record.config.items())) in last


def test_an_algorithm_read_in_a_slow_minute_is_compared_at_the_end(tmp_path: Path) -> None:
    """A machine that is slower while one algorithm is read hides that it is the faster one."""
    rows = recorded(LARGE, bad=0.0)
    best = min(r.latency_us for r in rows if r.schedule == "swiglu.tiled")
    truth = [
        msgspec.structs.replace(r, latency_us=0.9 * best) if r.schedule == "swiglu.other" else r
        for r in rows
    ]

    class Drifts(Confirms):
        def measure(self, space, candidates, seed):
            for m in super().measure(space, candidates, seed):
                quick = m.latency_us and m.candidate.schedule == "swiglu.tiled"
                yield dataclasses.replace(m, latency_us=0.5 * m.latency_us) if quick else m

    measurer = Drifts(truth)
    with Database(tmp_path / "db") as db:
        result = tune(db, measurer, trials=96)
    assert "swiglu.other" not in {c.schedule for c in measurer.compared[0]}
    (w,) = result.workloads
    assert w.best is not None and w.best.record.schedule == "swiglu.other"


def test_leaders_that_all_fail_in_the_comparison_end_no_search(tmp_path: Path) -> None:
    class Spoilt(Confirms):
        def confirm(self, space, candidates, seed):
            for m in super().confirm(space, candidates, seed):
                fails = len(self.compared) == 1
                yield dataclasses.replace(m, verdict=Verdict.WRONG, latency_us=None) if fails else m

    measurer = Spoilt(recorded(LARGE, bad=0.0))
    with Database(tmp_path / "db") as db:
        result = tune(db, measurer)
    first, second = measurer.compared[:2]
    assert not {c.key for c in first} & {c.key for c in second}
    (w,) = result.workloads
    assert w.best is not None and w.best.record.key not in {c.key for c in first}


@pytest.mark.parametrize("verdict", [Verdict.WRONG, Verdict.TIMEOUT])
def test_one_that_fails_in_the_comparison_does_not_spare_the_others(
    tmp_path: Path, verdict: Verdict
) -> None:
    class Stops(Confirms):
        bad = ""

        def confirm(self, space, candidates, seed):
            self.bad = self.bad or candidates[0].key
            for m in super().confirm(space, candidates, seed):
                if m.candidate.key == self.bad:
                    yield dataclasses.replace(m, verdict=verdict, latency_us=None)
                    return
            yield from super().confirm(space, candidates, seed)

        def of(self, number: int) -> set[str]:
            return {c.key for c in self.compared[number]}

    measurer = Stops(recorded(LARGE, bad=0.0))
    with Database(tmp_path / "db") as db:
        result = tune(db, measurer)
        confirmed = {r.key for r in db if r.phase == "confirm" and r.ok}
    assert measurer.of(0) - {measurer.bad} <= measurer.of(1) and measurer.bad not in measurer.of(1)
    assert len(confirmed) >= 3
    (w,) = result.workloads
    assert w.best is not None and w.best.record.key in confirmed


def test_the_past_is_searched_for_a_model_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(front, "find_prior", interrupted)
    monkeypatch.setattr(front, "runnable_here", lambda _: True)
    monkeypatch.setattr(front, "Measurer", lambda *_, **__: opened.append(True))
    with Database(tmp_path / "db") as db, pytest.raises(KeyboardInterrupt):
        tune_workloads({LARGE: 1.0}, HW, db=db, schedules=schedules(), device=DEVICE, trials=8)
    assert not opened


# -- the tuner on recorded spaces --------------------------------------------------------------


def test_replayed_search_finds_the_optimum_and_repeats_itself(tmp_path: Path) -> None:
    rows = recorded(LARGE)
    best = min(r.latency_us for r in rows if r.ok)
    orders = []
    for name in "ab":
        measurer = ReplayMeasurer(rows)
        with Database(tmp_path / f"{name}.db") as db:
            result = tune(db, measurer, seed=7, trials=160)
            stored = [r.key for r in db if r.phase == "search"]
        (w,) = result.workloads
        assert w.best is not None and w.best.latency_us <= 1.02 * best
        assert w.default is not None and w.default.record.config["rows"] == 1
        assert w.speedup == pytest.approx(w.default.latency_us / w.best.latency_us)
        assert measurer.asked[0] == JointSpace(LARGE, HW, schedules()).defaults()[0]
        assert len(stored) == len(set(stored)) == w.new_trials == len(measurer.asked)
        orders.append(stored)
    assert orders[0] == orders[1]


def test_evolution_beats_random(tmp_path: Path) -> None:
    rows = recorded(LARGE, bad=0.0)
    found = {}
    for name in ("evolutionary", "random"):
        reached = []
        for seed in range(3):
            with Database(tmp_path / f"{name}{seed}.db") as db:
                result = tune(db, ReplayMeasurer(rows), strategy=name, seed=seed, trials=64)
            reached.append(result.best[str(LARGE)].latency_us)
        found[name] = sorted(reached)[1]
    assert found["evolutionary"] < found["random"]


def test_resume_measures_nothing_twice(tmp_path: Path) -> None:
    rows = recorded(LARGE)
    with Database(tmp_path / "a.db") as db:
        first = tune(db, ReplayMeasurer(rows), trials=30)
        again = ReplayMeasurer(rows)
        second = tune(db, again, trials=30)
        assert not again.asked and second.new_trials == 0 and second.trials == first.trials == 30
        assert second.best[str(LARGE)].latency_us == first.best[str(LARGE)].latency_us
        more = ReplayMeasurer(rows)
        third = tune(db, more, trials=50)
        assert third.new_trials == 20 and third.trials == 50
        keys = [r.key for r in db if r.phase == "search"]
        assert len(keys) == len(set(keys)) == 50


def test_budget_goes_where_the_gain_is(tmp_path: Path) -> None:
    rows = recorded(LARGE, scale=10.0) + recorded(SMALL)
    with Database(tmp_path / "a.db") as db:
        result = tune(db, ReplayMeasurer(rows), {SMALL: 2.0, LARGE: 1.0}, trials=96)
    trials = {str(w.workload): w.trials for w in result.workloads}
    assert sum(trials.values()) == 96 and trials[str(LARGE)] > 2 * trials[str(SMALL)] > 0


def test_search_ends_when_all_is_known(tmp_path: Path) -> None:
    from toy_schedules import Other

    with Database(tmp_path / "a.db") as db:
        result = tune_workloads(
            {SMALL: 1.0}, HW, trials=1000, db=db, measurer=ReplayMeasurer(recorded(SMALL, bad=0)),
            schedules=[Other()], device=DEVICE,
        )  # fmt: skip
    assert result.stopped == "exhausted" and result.trials == 6


def test_interruption_keeps_everything(tmp_path: Path) -> None:
    class Interrupted(ReplayMeasurer):
        def measure(self, space, candidates, seed):
            for m in super().measure(space, candidates, seed):
                if len(self.asked) == 20:
                    raise KeyboardInterrupt
                yield m

    with Database(tmp_path / "a.db") as db:
        result = tune(db, Interrupted(recorded(LARGE)))
        assert result.interrupted and result.new_trials == 19 == len(db)
        assert result.best[str(LARGE)].latency_us < math.inf


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is heeded, also where the tests run in the background of a script, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_while_a_record_is_stored_waits_until_it_is_counted(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db") as db:
        add, left = db.add, iter(range(11))

        def interrupted(*records: object) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGINT)
            add(*records)

        db.add = interrupted  # type: ignore[method-assign]
        result = tune(db, ReplayMeasurer(recorded(LARGE)))
        assert result.interrupted and result.new_trials == 12 == len(db)


@pytest.mark.usefixtures("interruptible")
def test_a_second_interruption_does_not_wait() -> None:
    passed = []
    with pytest.raises(KeyboardInterrupt), finish_first():
        os.kill(os.getpid(), signal.SIGINT)
        passed.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        passed.append(2)
    assert passed == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_database_that_takes_no_more_ends_the_search_with_what_was_found(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db") as db:
        add, left = db.add, iter(range(19))

        def until_full(*records: object) -> None:
            if next(left, None) is None:
                raise InputError("the disk is full", file=db.path)
            add(*records)

        db.add = until_full
        result = tune(db, ReplayMeasurer(recorded(LARGE)))
        assert result.stopped == "database" and "the disk is full" in str(result.failure)
        assert result.new_trials == 19 == len(db)
        assert result.best[str(LARGE)].latency_us < math.inf


def test_crashing_schedules_are_quarantined(tmp_path: Path) -> None:
    from dataclasses import replace

    class Crashing(ReplayMeasurer):
        def measure(self, space, candidates, seed):
            for m in super().measure(space, candidates, seed):
                tiled = m.candidate.schedule == "swiglu.tiled"
                yield replace(m, verdict=Verdict.CRASH, latency_us=None) if tiled else m

    with Database(tmp_path / "a.db") as db:
        result = tune(db, Crashing(recorded(LARGE)), trials=64)
    (w,) = result.workloads
    assert w.verdicts["crash"] <= 12  # the batch in which it happened
    assert w.best is not None and w.best.record.schedule == "swiglu.other" and w.default is None


def test_all_candidates_fail(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db") as db:
        result = tune(db, ReplayMeasurer([]), trials=40)
    (w,) = result.workloads
    assert w.best is None and w.verdicts == {"build_failed": 40} and result.best == {}
    assert result.to_json()["workloads"][0]["best"] is None


def test_energy_objective_stays_within_the_latency_limit(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db") as db:
        result = tune(
            db, ReplayMeasurer(recorded(LARGE)), objective="energy@latency:1.05", trials=120
        )
        (w,) = result.workloads
        fastest = min(r.latency_us for r in w.results)
        assert w.best is not None and w.best.latency_us <= 1.05 * fastest
        cheaper = [
            r
            for r in w.results
            if r.latency_us <= 1.05 * fastest and r.modelled_mj < w.best.modelled_mj
        ]
        assert not cheaper and w.pareto[0].latency_us == fastest


class Listener:
    """Proposes in the order of the space and keeps what it is told."""

    said: list[dict[str, float]] = []  # noqa: RUF012  one for each strategy made, newest scores

    def __init__(self, setting: Setting) -> None:
        self.space = iter(setting.space)
        self.scores: dict[str, float] = {}
        Listener.said.append(self.scores)

    def ask(self, count: int) -> list[Candidate]:
        return list(itertools.islice(self.space, count))

    def tell(self, observations: list[Observation]) -> None:
        self.scores.update((o.candidate.key, o.score) for o in observations)

    def ban(self, schedule: str) -> None:
        raise AssertionError(schedule)


def with_joules(rows: list[Record], meters: Sequence[str | None]) -> list[Record]:
    """Give records joules by the meters in turn, ranked the other way round than modelled ones."""
    return [
        msgspec.structs.replace(r, energy_mj=1e6 / r.modelled_mj, energy_source=meter)
        if r.ok and meter
        else r
        for r, meter in zip(rows, itertools.cycle(meters), strict=False)
    ]


@pytest.mark.parametrize(
    ("meters", "wanted"),
    [
        ((None,), None),  # nothing was measured: modelled joules guide
        (("replay",), "replay"),
        ((None, None, "replay"), "replay"),  # some readings failed, the first of all too
        (("rapl", None, "replay"), "replay"),  # another meter's joules do not count either
        (("rapl",), None),
    ],
)
@pytest.mark.parametrize("objective", ["energy", "edp", "energy@latency:1.5"])
def test_measured_and_modelled_joules_never_guide_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meters, wanted: str | None, objective: str
) -> None:
    monkeypatch.setitem(STRATEGIES, "listener", Listener)
    Listener.said.clear()
    rows = with_joules(recorded(SMALL), meters)
    goal = parse_objective(objective)
    with Database(tmp_path / "a.db") as db:
        db.add(*rows[:3])  # of an earlier run
        meter = ReplayMeter([])
        result = tune(
            db, ReplayMeasurer(rows), {SMALL: 1.0}, objective=objective, meter=meter,
            strategy="listener",
        )  # fmt: skip
        stored: dict[str, list[Record]] = {}
        for r in db.records(SMALL):
            stored.setdefault(r.key, []).append(r)
    (told,) = Listener.said
    space = JointSpace(SMALL, HW, schedules())
    times = {k: r.latency_us for k, (r, *_) in stored.items() if r.ok}
    checked = Counter()
    assert len(stored) > 6
    for key, some in stored.items():
        c = space.adopt(some[0].schedule, some[0].config)
        assert c is not None
        joules = [r.energy_mj for r in some if wanted and r.energy_source == wanted]
        failed = any(r.phase in ("energy", "confirm") for r in some) and not joules
        score = told[c.key]

        def scores(mj: float, key: str = key) -> set[float]:
            return {goal.score((times[key], mj), best) for best in times.values()}

        if key not in times:
            assert score == math.inf
        elif wanted is None:
            assert score in scores(some[0].modelled_mj)
        elif joules:
            assert score in scores(joules[0])
            checked["measured"] += 1
        elif failed:
            assert score == math.inf
        else:  # not worth a reading
            assert score not in {s for s in scores(some[0].modelled_mj) if s < BEHIND}
            checked["passed over"] += 1
    (w,) = result.workloads
    if wanted is not None:
        assert checked["measured"] > 1
        assert w.best is not None and w.best.measured_mj is not None  # not one that was predicted


def test_without_a_meter_recorded_joules_do_not_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRATEGIES, "listener", Listener)
    Listener.said.clear()
    rows = with_joules(recorded(SMALL, bad=0.0), ("rapl",))
    with Database(tmp_path / "a.db") as db:
        tune(
            db, ReplayMeasurer(rows), {SMALL: 1.0}, objective="energy", strategy="listener",
            meter="modelled",
        )  # fmt: skip
    (told,) = Listener.said
    assert len(told) > 6 and set(told.values()) <= {r.modelled_mj for r in rows}


def test_similar_shapes_give_the_first_candidates(tmp_path: Path) -> None:
    near = parse_workload("swiglu:t=64,f=2048")
    with Database(tmp_path / "a.db") as db:
        tune(db, ReplayMeasurer(recorded(LARGE)), trials=160)
        measurer = ReplayMeasurer(recorded(near))
        tune(db, measurer, {near: 1.0}, trials=8)
        best = min(r.latency_us for r in db.records(LARGE) if r.ok)
        assert min(r.latency_us for r in db.records(near) if r.ok) <= best * 1.001
    assert distance(LARGE, near) == 1.0 and distance(LARGE, LARGE) == 0.0


def test_bad_requests(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db") as db:
        with pytest.raises(UsageError, match="nothing to tune"):
            tune_workloads([], HW, db=db)
        with pytest.raises(UsageError, match="not positive"):
            tune(db, ReplayMeasurer([]), trials=0)
        with pytest.raises(UsageError, match="needs a meter"):
            tune(db, ReplayMeasurer([]), joules=5)
        with pytest.raises(UsageError, match="cannot run here"):
            tune_workloads({SMALL: 1.0}, PRESETS["sapphirerapids"], db=db, trials=4)
        with pytest.raises(UsageError, match="unknown objective"):
            tune(db, ReplayMeasurer([]), objective="speed")


# -- budget, objective, progress ---------------------------------------------------------------


def test_clock() -> None:
    now = [100.0]
    clock = Clock(Budget(trials=5, seconds=10), None, lambda: now[0])
    assert clock.reached(4) == "" and clock.reached(5) == "trials" and clock.joules is None
    now[0] = 108.0
    assert clock.reached(0) == "" and clock.reached(0, reserve_s=100) == "seconds"
    now[0] = 110.0
    assert clock.reached(0) == "seconds"
    counted = Clock(Budget(joules=2), ReplayMeter([1000.0, 2500.0, 3001.0]), lambda: 0.0)
    assert counted.reached(0) == "" and counted.reached(0) == "joules"


def test_shares() -> None:
    shares = [Share(1.0, 5.0), Share(1.0, 1.0)]
    mark_heavy(shares)
    assert next_share(shares) == 0  # before the first round: the larger roofline
    shares[0].learn(4, 5.5)  # close to its roofline: little to gain
    assert next_share(shares) == 1
    shares[1].learn(4, 100.0)
    shares[1].learn(4, 100.0)
    assert next_share(shares) == 1
    shares[0].learn(4, 100.0)
    shares[0].best_us = 100.0
    for _ in range(3):
        shares[0].learn(4, 100.0)
    assert shares[0].stale == 4
    shares[0].learn(4, 90.0)
    assert shares[0].stale == 0 and shares[0].best_us == 90.0 and shares[0].trials == 24
    shares[0].exhausted = shares[1].exhausted = True
    assert next_share(shares) is None


def test_gain_is_counted_by_the_objective() -> None:
    share = Share(1.0, 5.0)
    share.learn(4, 10.0, 8.0)
    share.learn(4, 10.0, 4.0)  # no faster, but better
    assert share.stale == 0 and share.recent == 0.5 and share.best_us == 10.0
    share.learn(4, 8.0, 4.0)  # faster, and no better
    assert share.stale == 1 and share.best_us == 8.0
    share.learn(4, 8.0, 9.0)  # joules of the meter in the place of modelled ones
    assert share.stale == 0 and share.best_score == 9.0
    share.learn(4, 8.0, 9.0)
    assert share.stale == 1


def test_large_spaces_are_given_up_later() -> None:
    assert [patience(n, 8) for n in (6, 640, 1158, 10**6)] == [4, 4, 8, 16]


def test_a_search_without_gain_ends_early(tmp_path: Path) -> None:
    """All candidates alike: nothing can be found, and most of the budget is left."""
    rows = [msgspec.structs.replace(r, latency_us=30.0) for r in recorded(LARGE, bad=0.0)]
    with Database(tmp_path / "a.db") as db:
        result = tune(db, ReplayMeasurer(rows), trials=1000)
    enough = 8 * patience(JointSpace(LARGE, HW, schedules()).size, 8)
    assert result.stopped == "exhausted"
    assert enough - 8 <= result.trials <= enough + 16


def test_a_budget_of_joules_ends_a_search(tmp_path: Path) -> None:
    class Draining:
        """Each look at the counter finds a tenth of a joule more."""

        name, step_s = "replay", 0.1

        def __init__(self) -> None:
            self.mj = 0.0

        def read_mj(self) -> float:
            self.mj += 100.0
            return self.mj

    with Database(tmp_path / "a.db") as db:
        result = tune(
            db, ReplayMeasurer(recorded(LARGE)), joules=3.0, meter=Draining(), trials=None
        )
    assert result.stopped == "joules" and result.joules is not None and 2.0 < result.joules <= 3.1
    assert 8 <= result.new_trials < 96 and result.best


def test_a_budget_of_energy_for_one_kernel() -> None:
    whole = parse_objective("latency@energy:10mJ")
    one = whole.for_one(4.0)
    assert str(one) == "latency@energy:2.5mJ" and parse_objective("edp").for_one(4.0).limit is None
    points = [(10.0, 3.0), (12.0, 2.5), (11.0, 2.6), (15.0, 1.0)]
    assert one.choose(points, lambda p: p) == (12.0, 2.5)
    assert one.choose([(1.0, 5.0), (2.0, 4.0)], lambda p: p) == (2.0, 4.0)  # none keeps it
    assert one.score((1.0, 5.0)) > BEHIND > one.score((1e9, 2.0))
    assert whole.choose(points, lambda p: p) == (15.0, 1.0)  # of several: energy times time


def test_one_kernel_is_searched_within_its_energy(tmp_path: Path) -> None:
    rows = recorded(LARGE, bad=0.0)
    energies = sorted(r.modelled_mj for r in rows)
    limit = 4 * energies[len(energies) // 8]
    with Database(tmp_path / "a.db") as db:
        result = tune(
            db, ReplayMeasurer(rows), {LARGE: 4.0}, objective=f"latency@energy:{limit}mJ", trials=64
        )
    (w,) = result.workloads
    assert result.objective == parse_objective(f"latency@energy:{limit}mJ"), "as it was asked for"
    assert w.best is not None and w.best.modelled_mj is not None
    assert 4 * w.best.modelled_mj <= limit * 1.0001
    within = [r.latency_us for r in w.results if 4 * r.modelled_mj <= limit]
    assert w.best.latency_us == min(within)


def test_only_joules_of_one_meter_are_compared() -> None:
    def of(us: float, mj: float | None, meter: str, modelled: float) -> Result:
        return Result(recorded(SMALL)[0], us, mj, meter, modelled)

    some = [of(10, 5.0, "rapl", 1.0), of(11, None, "", 0.1), of(12, 4.0, "rapl", 2.0)]
    energy = parse_objective("energy")
    assert meter_of(some) == "rapl" and best(some, energy) == some[2]
    assert pareto(some) == [some[0], some[2]]
    mixed = [*some, of(13, 0.1, "nvml", 3.0)]
    assert meter_of(mixed) == "" and best(mixed, energy) == some[1]
    assert meter_of(mixed, "rapl") == "rapl" and best(mixed, energy, "rapl") == some[2]
    bare = [of(10, None, "", 2.0), of(11, None, "", 1.0)]
    assert meter_of(bare, "rapl") == "" and best(bare, energy) == bare[1]


@pytest.mark.parametrize(
    "text",
    [
        "latency",
        "energy",
        "edp",
        "ed2p",
        "pareto",
        "energy@latency:1.05",
        "latency@energy:12J",
        "latency@energy:3mJ",
    ],
)
def test_objectives_round_trip(text: str) -> None:
    goal = parse_objective(text)
    assert parse_objective(str(goal)) == goal


@pytest.mark.parametrize(
    "text",
    [
        "",
        "speed",
        "energy@latency:0.9",
        "energy@latency:1.1J",
        "latency@energy:5",
        "energy@latency",
    ],
)
def test_bad_objectives(text: str) -> None:
    with pytest.raises(UsageError, match="unknown objective"):
        parse_objective(text)


def test_choice_by_objective() -> None:
    points = [(10.0, 8.0), (10.4, 6.0), (20.0, 2.0), (11.0, 9.0)]
    pick = {
        t: parse_objective(t).choose(points, lambda p: p)
        for t in ("latency", "energy", "edp", "ed2p", "energy@latency:1.05")
    }
    assert pick == {
        "latency": points[0], "energy": points[2], "edp": points[2], "ed2p": points[1],
        "energy@latency:1.05": points[1],
    }  # fmt: skip
    assert parse_objective("edp").choose([(3.0, None), (2.0, None)], lambda p: p) == (2.0, None)


def test_plain_progress_writes_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show = PlainProgress(every_s=0)
    show(Event("start", total=8, text="1 workloads"))
    show(Event("measured", "swiglu:t=1,f=2", 3, 8, 2.5, 5.0))
    show(Event("measured", "swiglu:t=1,f=2", 4, 8))
    show(Event("done", trials=8, total=8, text="stopped: trials"))
    out = capsys.readouterr()
    assert out.out == "" and "tune 3/8  swiglu:t=1,f=2  best 2.5 us, 2.00x default" in out.err
    assert len(out.err.splitlines()) == 4


def test_displays_without_predictions_cost_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Learner, "expected_us", lambda _, key: asked.append(key))
    events: list[Event] = []
    rows = recorded(LARGE)
    for name, progress in (("a", PlainProgress(io.StringIO())), ("b", events.append)):
        with Database(tmp_path / name) as db:
            tune(db, ReplayMeasurer(rows), trials=24, progress=progress)
        assert bool(asked) == (name == "b")
    measured = [e for e in events if e.kind == "measured"]
    assert len(asked) == len(measured), "comparisons are of what was learned from"
    best = math.inf
    for e in measured:
        assert e.record is not None
        best = min(best, e.record.latency_us or math.inf)
        assert e.best_us == (best if math.isfinite(best) else None)
    assert measured[-1].default_us is not None


def test_models_are_fitted_as_what_is_known_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    fit = LatencyModel.fit
    monkeypatch.setattr(
        LatencyModel, "fit", lambda self, s: (sizes.append(len(s)), fit(self, s))[1]
    )
    with Database(tmp_path / "db") as db:
        rows = [*recorded(LARGE, bad=0.0), *recorded(SMALL, bad=0.0)]
        tune(db, ReplayMeasurer(rows), {LARGE: 1.0, SMALL: 1.0}, trials=160)
    assert len(sizes) > 5 and sizes[-1] > 110
    assert all(b >= a + max(4, a // 10) for a, b in itertools.pairwise(sizes))


def test_tuner_uses_the_learned_model(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db") as db:
        tuner = Tuner(
            HW, db, ReplayMeasurer(recorded(LARGE)), parse_objective("latency"), seed=0, device=DEVICE,
            options=Options(epsilon=0.2),
        )  # fmt: skip
        tuner.add(LARGE, 1.0, schedules())
        tuner.run(Clock(Budget(trials=64), None))
        model = tuner.learner.latency
        assert model.trained and model.samples >= 48
        space = tuner.tasks[0].space
        some = [c for c, _ in zip(space, range(40), strict=False)]
        spread = tuner.learner.spread(space, some)
        assert spread is not None and len(spread) == 40 and all(0 <= s < 2 for s in spread)
        assert len(set(spread)) > 3
