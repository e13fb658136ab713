"""The knapsack of a whole-model plan: exact for every objective, linked rows, ties and budgets included."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import MimoError
from mimo_compile.search.knapsack import Infeasible, Knapsack
from mimo_compile.search.objective import parse_objective

pytestmark = pytest.mark.compile

OBJECTIVES = (
    "latency", "energy", "edp", "ed2p", "energy@latency:1", "energy@latency:1.2", "latency@energy:70mJ",
)  # fmt: skip


def every_choice(times, energies, links):
    """All (time, energy) that respect the links."""
    for pick in itertools.product(*(range(len(t)) for t in times)):
        if all(len({names[pick[i]] for i, names in group}) == 1 for group in links):
            t = sum(row[i] for row, i in zip(times, pick, strict=True))
            yield t, sum(row[i] for row, i in zip(energies, pick, strict=True))


def best_of(choices, goal):
    """The best value of an objective, then of what decides among equals; None: no choice keeps it."""
    fastest = min(t for t, _ in choices)
    kept = {
        "energy@latency": lambda t, e: t <= goal.limit * fastest + 1e-9,
        "latency@energy": lambda t, e: e <= goal.limit + 1e-9,
    }.get(goal.kind, lambda t, e: True)
    value = {
        "latency": lambda t, e: (t, e), "latency@energy": lambda t, e: (t, e),
        "energy": lambda t, e: (e, t), "energy@latency": lambda t, e: (e, t),
        "edp": lambda t, e: (t * e,), "ed2p": lambda t, e: (t * t * e,),
    }[goal.kind]  # fmt: skip
    return min((value(t, e) for t, e in choices if kept(t, e)), default=None), value


@st.composite
def problems(draw):
    """Up to four rows of up to four options; few distinct numbers, so that ties are common."""
    numbers = st.integers(1, draw(st.sampled_from([3, 60])))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    times = [[float(draw(numbers)) for _ in range(n)] for n in sizes]
    energies = [[float(draw(numbers)) for _ in range(n)] for n in sizes]
    links = []
    for _ in range(draw(st.integers(0, 2)) if len(sizes) > 1 else 0):
        members = draw(
            st.lists(st.integers(0, len(sizes) - 1), min_size=2, max_size=len(sizes), unique=True)
        )
        links.append([(i, [draw(st.sampled_from("ab")) for _ in range(sizes[i])]) for i in members])
    return times, energies, links


@given(problems(), st.sampled_from(OBJECTIVES))
@settings(max_examples=120, deadline=None)
def test_equals_brute_force(problem, text) -> None:
    times, energies, links = problem
    goal = parse_objective(text)
    choices = list(every_choice(times, energies, links))
    knapsack = Knapsack(times, energies, links)
    if not choices:
        with pytest.raises(Infeasible) as conflict:
            knapsack.choose(goal)
        assert conflict.value.layouts
        return
    expected, value = best_of(choices, goal)
    if expected is None:
        with pytest.raises(Infeasible) as small:
            knapsack.choose(goal)
        assert not small.value.layouts
        assert small.value.least_mj == pytest.approx(min(e for _, e in choices))
        return
    picks = knapsack.choose(goal)
    for group in links:
        assert len({names[picks[i]] for i, names in group}) == 1
    assert value(*knapsack.sums(picks)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("power", [1, 2])
def test_products_of_many_kernels_are_exact(power: int) -> None:
    """Against the true front by dynamic programming, where brute force has 5 ** 30 choices to look at."""
    rng = np.random.default_rng(power)
    times = rng.integers(1, 40, (30, 5))
    energies = rng.integers(1, 400, (30, 5))
    least = {0: 0}  # least energy at each total time
    for row_t, row_e in zip(times.tolist(), energies.tolist(), strict=True):
        new: dict[int, int] = {}
        for (t, e), (a, b) in itertools.product(least.items(), zip(row_t, row_e, strict=True)):
            new[t + a] = min(new.get(t + a, 1 << 60), e + b)
        least = new
    expected = min(e * t**power for t, e in least.items())
    knapsack = Knapsack(times.astype(float).tolist(), energies.astype(float).tolist())
    t, e = knapsack.sums(knapsack.choose(parse_objective("edp" if power == 1 else "ed2p")))
    assert e * t**power == pytest.approx(expected, rel=1e-9)


def test_a_budget_is_never_passed_by_the_solvers_tolerance() -> None:
    """HiGHS takes 1e-6 over a limit for nothing; we do not."""
    cap = 1000.0
    times = [[1.0, 2.0], [1.0, 2.0]]
    energies = [[cap / 2 * (1 + 3e-7), 10.0], [cap / 2 * (1 + 3e-7), 20.0]]
    knapsack = Knapsack(times, energies)
    picks = knapsack.choose(parse_objective("latency@energy:1000mJ"))
    time, energy = knapsack.sums(picks)
    assert energy <= cap and time == 3.0


def test_many_small_rows_beside_a_large_one_keep_a_budget() -> None:
    """Every choice of the small rows lies within the solver's tolerance of the budget, few within it."""
    times, energies = [[3e5]] + [[2.0, 2.02]] * 40, [[1e5]] + [[1.0, 0.9]] * 40
    knapsack = Knapsack(times, energies)
    assert knapsack.choose(parse_objective("energy@latency:1")) == [0] * 41
    fastest = 3e5 + 80
    slack = (fastest + 0.05) / fastest  # room for two slower kernels
    picks = knapsack.choose(parse_objective(f"energy@latency:{slack!r}"))
    assert sum(picks) == 2
    assert knapsack.choose(parse_objective("latency@energy:100036mJ")) == [0] + [1] * 40
    assert sum(knapsack.choose(parse_objective("latency@energy:100038mJ"))) == 20


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_a_choice_that_is_there_is_never_refused(seed: int) -> None:
    """Linked rows of a thousandth to a millionth of the whole, caps at sums that exist."""
    rng = np.random.default_rng(seed)
    small = 10.0 ** rng.integers(-3, 2)
    times = [[3e5], *(2 * small + small * rng.random((6, 3))).tolist()]
    energies = [[1e5], *(2 * small + small * rng.random((6, 3))).tolist()]
    links = [[(1, ["a", "b", "a"]), (2, ["b", "a", "b"])]]
    choices = list(every_choice(times, energies, links))
    cap = sorted(e for _, e in choices)[int(rng.integers(0, 40))]
    knapsack = Knapsack(times, energies, links)
    for text in (f"latency@energy:{cap!r}mJ", "energy@latency:1", "energy@latency:1.000005"):
        goal = parse_objective(text)
        time, energy = knapsack.sums(knapsack.choose(goal))
        expected, _ = best_of(choices, goal)
        if goal.kind == "latency@energy":
            assert energy <= cap * (1 + 1e-9) and time <= expected[0] * (1 + 1e-9)
        else:
            assert time <= min(t for t, _ in choices) * goal.limit * (1 + 1e-9)
            assert energy <= expected[0] * (1 + 1e-9)


def test_a_solver_that_stops_early(monkeypatch) -> None:
    """What it has found is taken and marked; with nothing found, that is no conflict of layouts."""
    import scipy.optimize

    def stopped(x):
        return lambda *_, **__: scipy.optimize.OptimizeResult(status=1, x=x, message="Time limit")

    links = [[(0, ["a", "b"]), (1, ["b", "a"])]]
    knapsack = Knapsack([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]], links)
    assert sum(knapsack.choose(parse_objective("latency"))) == 1 and knapsack.proved
    monkeypatch.setattr(scipy.optimize, "milp", stopped(np.array([0.0, 1, 1, 0, 0, 1])))
    assert knapsack.choose(parse_objective("latency")) == [1, 0] and not knapsack.proved
    monkeypatch.setattr(scipy.optimize, "milp", stopped(None))
    with pytest.raises(MimoError, match="no plan within"):
        knapsack.choose(parse_objective("latency"))
    free = Knapsack([[1.0, 2.0], [3.0, 4.0]], [[2.0, 1.0], [4.0, 3.0]])
    assert free.choose(parse_objective("energy@latency:1.5")) == [0, 0] and not free.proved
