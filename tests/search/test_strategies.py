"""Strategies and their models on spaces that are known as a whole: no clock, no compiler."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import HW, LARGE, SMALL, recorded, recording, schedules
from toy_schedules import Tile, Tiled

from mimo_compile.errors import InputError, MimoError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Schedule, Space
from mimo_compile.search.explain import rank_correlation
from mimo_compile.search.grid import Grid
from mimo_compile.search.measure.recording import Recording
from mimo_compile.search.objective import BEHIND
from mimo_compile.search.space import Candidate, JointSpace
from mimo_compile.search.strategies import (
    STRATEGIES,
    Observation,
    Options,
    Setting,
    evolutionary,
    make_strategy,
)
from mimo_compile.search.strategies.evolutionary import EvolutionarySearch
from mimo_compile.search.strategies.surrogate import (
    Encoder,
    Surrogate,
    expected_gain,
    flattened,
    one_thread,
)

pytestmark = pytest.mark.compile
SPACE = JointSpace(LARGE, HW, schedules())


def times(space: JointSpace = SPACE) -> dict[str, float]:
    """Score of each candidate, infinite for one in twenty."""
    rows = {(r.schedule, tuple(sorted(r.config.items()))): r for r in recorded(LARGE)}
    found = {c.key: rows[c.schedule, c.knobs] for c in space}
    return {k: r.latency_us if r.ok else math.inf for k, r in found.items()}


def search(
    strategy: object, scores: dict[str, float], trials: int, count: int = 8
) -> list[Candidate]:
    asked: list[Candidate] = []
    while len(asked) < trials and (batch := strategy.ask(count)):
        assert len(batch) <= count
        asked += batch
        strategy.tell([Observation(c, scores[c.key]) for c in batch])
    return asked


def make(name: str, seed: int, space: JointSpace = SPACE, **more) -> object:
    return make_strategy(
        name, Setting(space, np.random.default_rng(seed), space.defaults(), **more)
    )


# -- moves -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_moves_stay_legal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    legal, grid = {c.key for c in SPACE}, Grid(SPACE)
    first, second = grid.sample(rng, 2)
    moved = [grid.mutate(first, rng), grid.crossover(first, second, rng), *grid.neighbours(first)]
    for number in (first, second, *moved):
        if number is not None:
            c = grid.known(number)
            assert c.key in legal and SPACE.adopt(c.schedule, c.config) == c
            assert grid.number(c) == number
    a = grid.known(first)
    near = [grid.known(n) for n in grid.neighbours(first)]
    assert len({c.key for c in near}) == len(near)
    assert all(sum(a.config[k] != c.config[k] for k in a.config) == 1 for c in near)
    one = {
        c.key
        for c in SPACE
        if c.schedule == a.schedule and sum(a.config[k] != c.config[k] for k in a.config) == 1
    }
    assert {c.key for c in near} == one


def test_numbers_stand_for_the_space() -> None:
    grid = Grid(SPACE)
    legal = [n for n in range(grid.size) if grid.candidate(n) is not None]
    assert [grid.known(n) for n in legal] == list(SPACE) and grid.legal(grid.size) == legal
    assert grid.legal(grid.size - 1) is None and grid.size == SPACE.size
    again = Grid(SPACE)  # numbers do not depend on what was asked before
    assert [again.number(c) for c in SPACE] == legal
    rng = np.random.default_rng(0)
    shares = Counter(grid.known(n).schedule for n in grid.sample(rng, 300))
    assert len(shares) == 2 and min(shares.values()) > 30  # the small schedule is not drowned


def test_numbers_that_mean_the_same_are_one() -> None:
    class Settled(Tiled):
        """Prefetches and unrolls in layout b only."""

        def space(self, workload: Workload, hardware: Hardware) -> Space:
            def make(**values: Any) -> Tile:
                plain = {"prefetch": 0, "unroll": 1} if values["layout"] == "a" else {}
                return Tile(**{**values, **plain})

            return dataclasses.replace(super().space(workload, hardware), make=make)

    space = JointSpace(LARGE, HW, [Settled()])
    different = {c.key for c in space}
    grid, rng = Grid(space), np.random.default_rng(0)
    drawn = grid.sample(rng, 400)
    assert len({grid.known(n).key for n in drawn}) == len(set(drawn)) < 300
    for number in drawn[:50]:
        near = grid.neighbours(number)
        assert len({grid.known(n).key for n in (number, *near)}) == 1 + len(near)
        assert grid.mutate(number, rng) != number
    whole = grid.legal(grid.size)
    assert whole is not None and len(whole) == len(different) < grid.size / 2
    assert all(grid.number(grid.known(n)) == n for n in whole)
    strategy = make("evolutionary", 0, space)
    asked = search(strategy, {k: 1.0 + int(k[:4], 16) / 2**16 for k in different}, 64)
    assert len({c.key for c in asked}) == len(asked) >= 64
    assert not {c.key for c in asked} & {strategy.grid.known(n).key for n in strategy._pool()}


def test_a_default_outside_the_knobs_has_a_number_and_neighbours() -> None:
    class Odd(Tiled):
        def space(self, workload: Workload, hardware: Hardware) -> Space:
            return dataclasses.replace(super().space(workload, hardware), default=Tile(rows=3))

    space = JointSpace(LARGE, HW, [Odd()])
    grid = Grid(space)
    (odd,) = space.defaults()
    number = grid.number(odd)
    assert number >= grid.size and grid.known(number) == odd
    near = [grid.known(n) for n in grid.neighbours(number)]
    inside = {c.key for c in space}
    assert near and {c.key for c in near} <= inside
    moved = grid.mutate(number, np.random.default_rng(0))
    assert moved is not None and grid.known(moved).key in inside
    (row,) = Encoder(grid).rows([number])
    encoder = Encoder(grid)
    rows = encoder.names.index("rows")
    assert row[rows] == len(encoder.tables[rows]) - 1, "no value of the knob"
    asked = search(make("evolutionary", 0, space), dict.fromkeys((*inside, odd.key), 1.0), 24)
    assert asked[0] == odd and len({c.key for c in asked}) == len(asked)


def test_configs_that_come_out_the_same_are_proposed_once() -> None:
    def make_tile(**knobs: object) -> Tile:
        return Tile(**{**knobs, "unroll": 1})  # whatever was asked for

    class Blunt(Tiled):
        def space(self, workload: Workload, hardware: Hardware) -> Space:
            return dataclasses.replace(super().space(workload, hardware), make=make_tile)

    space = JointSpace(LARGE, HW, [Blunt()])
    distinct = {c.key for c in space}
    assert len(distinct) < len(list(space))
    asked = search(make("evolutionary", 0, space), dict.fromkeys(distinct, 1.0), 10**6)
    assert len(asked) == len(distinct) == len({c.key for c in asked})


# -- strategies --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_repeat_themselves_and_never_propose_twice(name: str) -> None:
    scores = times()
    first, again, other = (
        [c.key for c in search(make(name, seed), scores, 40)] for seed in (3, 3, 4)
    )
    assert first == again and len(set(first)) == len(first) >= 40
    assert name == "grid" or first != other


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_ban_in_the_middle_of_a_search_holds(name: str) -> None:
    scores = times()
    strategy = make(name, 5)
    search(strategy, scores, 24)
    strategy.ban("swiglu.tiled")
    assert {c.schedule for c in search(strategy, scores, 40)} <= {"swiglu.other"}


def test_what_was_reported_is_not_proposed() -> None:
    scores = times()
    for name in STRATEGIES:
        strategy = make(name, 1)
        known = [c for i, c in enumerate(SPACE) if i % 2]
        strategy.tell([Observation(c, scores[c.key]) for c in known])
        assert not {c.key for c in known} & {c.key for c in search(strategy, scores, 16)}


def test_evolution_finds_the_optimum_in_few_trials() -> None:
    scores = times()
    best = min(scores.values())
    needed = []
    for seed in range(3):
        asked = search(make("evolutionary", seed), scores, 60)
        near = [i for i, c in enumerate(asked) if scores[c.key] <= 1.02 * best]
        needed.append(near[0] if near else math.inf)
    assert sorted(needed)[1] <= 40 < len(scores)


def test_failures_alone_do_not_stop_a_search() -> None:
    asked = search(make("evolutionary", 0), dict.fromkeys(times(), math.inf), 10**6)
    assert len(asked) == len({c.key for c in asked}) == len(list(SPACE))


def model(error: float, seed: int) -> Callable[[Sequence[Candidate]], list[float]]:
    """A learned model that is off by a factor with standard deviation ``error`` of its logarithm."""
    scores = {k: v if math.isfinite(v) else 1e3 for k, v in times().items()}
    rng = np.random.default_rng(seed)
    off = {k: math.exp(error * rng.standard_normal()) for k in scores}
    return lambda candidates: [scores[c.key] * off[c.key] for c in candidates]


def test_a_good_model_is_trusted_and_a_bad_one_is_not() -> None:
    scores = times()
    trust = {}
    for error in (0.01, 1.0):
        strategy = make("evolutionary", 0, predict=model(error, 1))
        assert isinstance(strategy, EvolutionarySearch)
        search(strategy, scores, 48)
        trust[error] = strategy._trust.of_surrogate()
    assert trust[0.01] < 0.5 and trust[1.0] > 0.7


def test_a_right_model_errs_by_nothing_from_the_first_round_on() -> None:
    scores = {k: 1e4 * v for k, v in times().items()}
    exact = model(0.0, 0)
    strategy = make("evolutionary", 0, predict=lambda cs: [1e4 * s for s in exact(cs)])
    assert isinstance(strategy, EvolutionarySearch)
    search(strategy, scores, 24)
    errors = strategy._trust._errors
    # worse than e^2 times the best are all predicted alike
    assert errors["model"] and max(errors["model"]) < 1e-9 < max(errors["surrogate"])


def test_predictions_are_judged_by_scores_and_not_by_what_stands_for_missing_joules() -> None:
    """A candidate that was timed is told to lie behind until its joules were read."""
    scores = times()
    strategy = make("evolutionary", 0, predict=model(0.0, 0))
    assert isinstance(strategy, EvolutionarySearch)
    for _ in range(6):
        batch = strategy.ask(8)
        strategy.tell([Observation(c, BEHIND * 1.5) for c in batch])
        strategy.tell([Observation(c, scores[c.key]) for c in batch])
    errors = strategy._trust._errors["model"]
    assert len(errors) > 5 and max(errors) < 1e-9


def test_predictions_of_what_was_not_proposed_are_forgotten() -> None:
    scores = times()
    strategy = make("evolutionary", 0, predict=model(0.1, 0))
    assert isinstance(strategy, EvolutionarySearch)
    search(strategy, scores, 64)
    assert len(strategy._trust._said) <= 96, "those of the last round alone"
    strategy._trust.begin(1.0)
    assert not strategy._trust._said, "all that was proposed was measured"


def test_a_stock_has_a_limit() -> None:
    strategy = make("evolutionary", 0, options=Options(enumerate_below=0))
    assert isinstance(strategy, EvolutionarySearch)
    with mock.patch.multiple(evolutionary, _STOCK=24, _FRESH=8):
        search(strategy, times(), 64)
        assert 0 < len(strategy._stock) <= 24


def test_each_algorithm_near_the_best_gets_its_part() -> None:
    """Four are equally good but for the leader; models that see no hope in them do not stop it."""
    rivals = ("swiglu.second", "swiglu.third", "swiglu.fourth")
    named: list[Schedule] = [Tiled()]
    for name in rivals:
        schedule = Tiled()
        schedule.name = name
        named.append(schedule)
    space = JointSpace(LARGE, HW, named)
    scores = {c.key: 1.0 if c.schedule == "swiglu.tiled" else 1.1 for c in space}
    hopeless = {"swiglu.tiled": 0.5, **dict.fromkeys(rivals, 5.0)}
    strategy = make(
        "evolutionary", 0, space, predict=lambda cs: [hopeless[c.schedule] for c in cs],
        options=Options(epsilon=0.0),
    )  # fmt: skip
    asked = Counter(c.schedule for c in search(strategy, scores, 96))
    assert all(asked[name] >= 96 / 8 - 1 for name in rivals)


def test_a_models_own_doubt_draws_the_search() -> None:
    """Where the model gives equal scores, the candidates of which it is unsure come first."""
    scores = dict.fromkeys(times(), 1.0)

    def unsure(candidates: Sequence[Candidate]) -> list[float]:
        return [2.0 if c.config["prefetch"] == 4 else 1e-6 for c in candidates]

    share = {}
    for name, spread in (("told", unsure), ("not", None)):
        strategy = make(
            "evolutionary", 0, predict=lambda cs: [1.0] * len(cs), spread=spread,
            options=Options(epsilon=0.0),
        )  # fmt: skip
        asked = search(strategy, scores, 26)
        share[name] = sum(c.config["prefetch"] == 4 for c in asked[2:])
    assert share["told"] > share["not"]


# -- the surrogate -----------------------------------------------------------------------------


def test_encoder() -> None:
    grid = Grid(SPACE)
    encoder = Encoder(grid)
    everything = grid.legal(grid.size)
    assert everything is not None
    rows = encoder.rows(everything)
    assert rows.shape == (len(everything), len(encoder.tables))
    assert len({tuple(r) for r in rows}) == len(everything)
    for table in encoder.tables:
        assert (table == table.T).all() and (np.diag(table) == 0).all() and table.max() == 1.0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_gradient_of_the_likelihood_is_the_numeric_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    encoder = Encoder(Grid(SPACE))
    draws = encoder.grid.sample(rng, 12)
    s = Surrogate(encoder.tables)
    y = rng.standard_normal(len(draws))
    s.fit(encoder.rows(draws), y, rng.standard_normal(len(draws)) if seed % 2 else None)
    loss = s.loss_of(y)
    theta = s._start + 0.5 * rng.standard_normal(len(s._start))
    value, gradient = loss(theta)
    for i in range(len(theta)):
        step = np.zeros(len(theta))
        step[i] = 1e-5
        numeric = (loss(theta + step)[0] - loss(theta - step)[0]) / 2e-5
        assert gradient[i] == pytest.approx(numeric, rel=1e-3, abs=1e-5 * (1 + abs(value)))


def test_the_surrogate_knows_what_it_saw_and_learns_from_it() -> None:
    scores = {k: v for k, v in times().items() if math.isfinite(v)}
    grid = Grid(SPACE)
    times_of = {grid.number(c): scores[c.key] for c in SPACE if c.key in scores}
    rng = np.random.default_rng(0)
    order = rng.permutation(list(times_of)).tolist()
    seen, rest = order[:48], order[48:]
    encoder = Encoder(grid)
    s = Surrogate(encoder.tables)
    y = np.log([times_of[n] for n in seen])
    s.fit(encoder.rows(seen), y)
    near = s.predict(encoder.rows(seen))
    assert np.abs(near.mean - y).max() < 0.3
    truth = np.log([times_of[n] for n in rest])
    away = s.predict(encoder.rows(rest))
    assert np.corrcoef(away.mean, truth)[0, 1] > 0.6
    assert away.variance.mean() > near.variance.mean()
    shared = away.shared(3)
    assert shared[3] == pytest.approx(away.variance[3], rel=1e-6)
    assert (shared[3] + 1e-9 >= shared).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_drift_is_trusted_at_first_and_corrected_by_what_is_seen(seed: int) -> None:
    encoder = Encoder(Grid(SPACE))
    rng = np.random.default_rng(seed)
    rows = encoder.rows(sorted(set(encoder.grid.sample(rng, 60))))
    drift = rng.standard_normal(len(rows))
    s = Surrogate(encoder.tables)
    s.fit(rows[:1], np.array([2.0]), drift[:1])
    one = s.predict(rows[1:], drift[1:])
    assert rank_correlation(one.mean.tolist(), drift[1:].tolist()) == pytest.approx(1.0)
    own = s.predict(rows[1:])  # whose slope nothing says: less is unsure
    assert (one.variance + 1e-12 >= own.variance).all()
    half = len(rows) // 2
    s.fit(rows[:half], -drift[:half], drift[:half])  # it is the wrong way round
    assert (
        rank_correlation(s.predict(rows[half:], drift[half:]).mean.tolist(), drift[half:].tolist())
        < 0
    )
    together = s.predict(rows[half:], drift[half:])
    shared = together.shared(2)
    assert shared[2] == pytest.approx(together.variance[2], rel=1e-6)


def test_the_best_foretold_is_tried_early() -> None:
    scores = times()
    best = min(scores, key=lambda k: scores[k])
    asked: list[Candidate] = []

    def foretell(candidates: Sequence[Candidate]) -> list[float]:
        asked.extend(candidates)
        return [1e30 if math.isinf(scores[c.key]) else scores[c.key] for c in candidates]

    strategy = make("evolutionary", 3, foretell=foretell)
    tried = search(strategy, scores, 12)
    assert best in [c.key for c in tried]
    assert len(asked) == len({c.key for c in asked})  # each is asked of once


def test_covariances_are_those_of_the_formula() -> None:
    encoder = Encoder(Grid(SPACE))
    s = Surrogate(encoder.tables)
    rng = np.random.default_rng(1)
    s.theta = s._start + 0.3 * rng.standard_normal(len(s._start))
    a, b = (encoder.rows(encoder.grid.sample(rng, n)) for n in (5, 7))
    got = s.covariance(a, s.marks(b))
    *w, together, alone, _ = np.exp(s.theta)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            d = [t[p, q] for t, p, q in zip(encoder.tables, x, y, strict=True)]
            far = sum(v * u for v, u in zip(w, d, strict=True))
            each = sum(math.exp(-2.0 * u) for u in d) / len(d)
            assert got[i, j] == pytest.approx(together * math.exp(-far) + alone * each, rel=1e-9)


def test_weights_are_fitted_again_as_observations_grow_beyond_those_given() -> None:
    encoder = Encoder(Grid(SPACE))
    s = Surrogate(encoder.tables)
    rng = np.random.default_rng(0)
    rows, y = encoder.rows([encoder.grid.number(c) for c in list(SPACE)[:40]]), rng.random(40)
    s.fit(rows, y, told=200)
    first = s.theta.copy()
    s.fit(rows, y[::-1].copy(), told=220)
    assert np.array_equal(s.theta, first)
    s.fit(rows, y[::-1].copy(), told=250)
    assert not np.array_equal(s.theta, first)


def test_linear_algebra_is_kept_on_one_thread_only_while_a_search_ranks() -> None:
    from threadpoolctl import threadpool_info

    def threads() -> list[int]:
        return [p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"]

    with one_thread():
        inside = threads()
    before = threads()
    seen: list[list[int]] = []

    def looks(candidates: Sequence[Candidate]) -> list[float]:
        seen.append(threads())
        return [1.0] * len(candidates)

    search(make("evolutionary", 0, predict=looks), times(), 16)
    assert inside and set(inside) == {1}
    assert seen and all(set(s) == {1} for s in seen) and threads() == before


def test_searches_beside_each_other_share_the_limit_of_threads() -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    def threads() -> set[int]:
        return {p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"}

    with threadpool_limits(2, "blas"):
        first, second = one_thread(), one_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert threads() == {1}, "the second still ranks"
        second.__exit__(None, None, None)
        assert threads() == {2}


def test_values_that_compare_equal_are_kept_apart() -> None:
    class Flag(Tiled):
        name = "swiglu.flag"

        def space(self, workload: Workload, hardware: Hardware) -> Space:
            return Space(Tile, {"rows": (1, 2), "prefetch": (False, True)}, Tile())

    grid = Grid(JointSpace(LARGE, HW, [Tiled(), Flag()]))
    encoder = Encoder(grid)
    column = encoder.names.index("prefetch")
    numbers, flags = ({n for n in range(p.start, p.start + p.space.size)} for p in grid.parts)
    codes = [set(encoder.rows(sorted(n))[:, column].tolist()) for n in (numbers, flags)]
    assert [len(c) for c in codes] == [4, 2] and not codes[0] & codes[1]
    assert len(encoder.tables[column]) == 7


def test_flattened_scores_and_expected_gain() -> None:
    y = flattened([1.0, 1.1, 3.0, 1e6])
    assert y[0] == 0 and y[1] == pytest.approx(math.log(1.1)) and (np.diff(y) > 0).all()
    assert y[3] < 2.5
    mean, deviation = np.array([0.0, -0.1, 0.5]), np.array([0.1, 0.1, 1e-6])
    rng = np.random.default_rng(0)
    draws = mean + deviation * rng.standard_normal((200_000, 3))
    expected = np.maximum(0.05 - draws, 0).mean(axis=0)
    assert expected_gain(mean, deviation, 0.05) == pytest.approx(expected, abs=1e-3)


# -- recordings --------------------------------------------------------------------------------


def test_a_recording_survives_its_file(tmp_path: Path) -> None:
    written = recording()
    path = tmp_path / "small.jsonl.xz"
    assert written.save(path) == path.stat().st_size < 100 * len(written.records)
    read = Recording.load(path)
    assert read == written and read.best_us == written.best_us
    live, replayed = JointSpace(SMALL, HW, schedules()), read.space()
    assert {c.key for c in live} == {c.key for c in replayed}
    assert live.defaults() == replayed.defaults() and list(live.spaces) == list(replayed.spaces)
    some = list(replayed)
    assert read.measurer().describe(replayed, some) == [
        live.schedules[c.schedule].work(SMALL, live.config(c), HW) for c in some
    ]
    within = [r for r in written.records if r.ok and r.latency_us <= 1.5 * written.best_us]
    assert read.share_within(1.5) == len(within) / len(written.records)
    with pytest.raises(MimoError, match="generates no code"):
        s = replayed.schedules["swiglu.tiled"]
        s.lower(SMALL, some[0].knobs, HW)


def test_damaged_recordings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.xz"
    recording().save(path)
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"x" + whole):
        path.write_bytes(data)
        with pytest.raises(InputError):
            Recording.load(path)
    with pytest.raises(InputError, match="cannot read"):
        Recording.load(tmp_path / "none")
    sound = recording()
    for changes, words in (
        ({"traits": sound.traits[:-1]}, f"{len(sound.records)} records and the traits of"),
        ({"records": (), "traits": ()}, "0 records and the traits of 0"),
        ({"knobs": {}}, "without the knobs of swiglu"),
    ):
        dataclasses.replace(sound, **changes).save(path)
        with pytest.raises(InputError, match=words):
            Recording.load(path)
