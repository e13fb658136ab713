"""The whole-model choice: exact against brute force, honest about where numbers come from."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import DEVICE, HW, LARGE, SMALL, recorded, schedules

from mimo_compile.errors import MimoError, UsageError
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.base import Space
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import known_results
from mimo_compile.search.objective import pareto_front, parse_objective
from mimo_compile.search.plan import Infeasible, Knapsack, make_plan
from mimo_compile.search.records import Record, Verdict, record_key, versions
from mimo_compile.search.space import JointSpace

pytestmark = pytest.mark.compile


def brute(times, energies, links, goal):
    """Best (time, energy) by trying everything."""
    best, fastest = None, None
    choices = []
    for pick in itertools.product(*(range(len(t)) for t in times)):
        if any(len({names[pick[i]] for i, names in group}) > 1 for group in links):
            continue
        t = sum(row[i] for row, i in zip(times, pick, strict=True))
        e = sum(row[i] for row, i in zip(energies, pick, strict=True))
        choices.append((t, e))
    if not choices:
        return None
    fastest = min(t for t, _ in choices)
    value = {
        "latency": lambda t, e: t, "energy": lambda t, e: e, "edp": lambda t, e: t * e,
        "ed2p": lambda t, e: t * t * e,
        "energy@latency": lambda t, e: e if t <= goal.limit * fastest + 1e-9 else np.inf,
        "latency@energy": lambda t, e: t if e <= (goal.limit or 0) + 1e-9 else np.inf,
    }[goal.kind]  # fmt: skip
    best = min(value(t, e) for t, e in choices)
    return (best, value) if np.isfinite(best) else None


@given(data=st.data())
@settings(max_examples=40)
def test_knapsack_equals_brute_force(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = int(rng.integers(1, 5))
    sizes = rng.integers(1, 5, rows)
    times = [rng.integers(1, 60, n).astype(float).tolist() for n in sizes]
    energies = [rng.integers(1, 60, n).astype(float).tolist() for n in sizes]
    links = []
    if rows > 1 and rng.random() < 0.7:
        members = sorted(rng.permutation(rows)[: int(rng.integers(2, rows + 1))].tolist())
        links = [[(i, [str(x) for x in rng.choice(["a", "b"], sizes[i])]) for i in members]]
    text = data.draw(
        st.sampled_from(
            ["latency", "energy", "edp", "ed2p", "energy@latency:1.2", "latency@energy:70mJ"]
        )
    )
    goal = parse_objective(text)
    expected = brute(times, energies, links, goal)
    knapsack = Knapsack(times, energies, links)
    try:
        t, e = knapsack.sums(knapsack.choose(goal))
    except Infeasible:
        assert expected is None
        return
    assert expected is not None
    best, value = expected
    assert value(t, e) == pytest.approx(best, rel=2e-3 if "ed" in text else 1e-9)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.one_of(st.none(), st.integers(1, 20))), max_size=30)
)
def test_pareto_front_has_no_dominated_member(points: list[tuple[float, float | None]]) -> None:
    def full(p):
        return p[0], float("inf") if p[1] is None else p[1]

    front = pareto_front(points, lambda p: p)
    for p in points:
        beaten = [f for f in front if full(f)[0] <= full(p)[0] and full(f)[1] <= full(p)[1]]
        assert beaten
    for f in front:
        assert not any(
            full(p) != full(f) and full(p)[0] <= full(f)[0] and full(p)[1] <= full(f)[1]
            for p in points
        )
    assert [full(f) for f in front] == sorted({full(f) for f in front})


def test_defaults_without_records() -> None:
    plan = make_plan({SMALL: 2.0, LARGE: 1.0}, HW, schedules=schedules(), device=DEVICE)
    assert {c.option.source for c in plan.choices.values()} == {"default"}
    assert plan.choices[SMALL].option.candidate.schedule == "swiglu.tiled"  # the preferred one
    assert plan.choices[SMALL].config == schedules()[0].space(SMALL, HW).default
    assert plan.energy_source == "modelled" and plan.to_json()["choices"][0]["source"] == "default"


def test_measured_records_decide_and_layouts_agree(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db") as db:
        db.add(*recorded(LARGE, bad=0))
        # The small workload was measured with layout a only.
        db.add(*(r for r in recorded(SMALL, bad=0) if r.config["layout"] == "a"))
        both = {SMALL: 1.0, LARGE: 1.0}
        free = make_plan(both, HW, db=db, schedules=schedules(), device=DEVICE)
        assert free.choices[LARGE].option.layouts == (("x", "b"),)
        assert free.choices[SMALL].option.layouts == (("x", "a"),)
        assert {c.option.source for c in free.choices.values()} == {"measured"}
        group = [[(SMALL, "x"), (LARGE, "x")]]
        tied = make_plan(both, HW, db=db, schedules=schedules(), shared=group, device=DEVICE)
        names = {c.option.layouts for c in tied.choices.values()}
        assert names == {(("x", "a"),)} and tied.latency_us == free.latency_us + 2.5
        assert {c.option.source for c in tied.choices.values()} == {"measured"}
        heavy = make_plan(
            {SMALL: 1.0, LARGE: 100.0},
            HW,
            db=db,
            schedules=schedules(),
            shared=group,
            device=DEVICE,
        )
        assert heavy.choices[SMALL].option.source == "modelled"  # now the untried layout pays
        assert (
            heavy.choices[SMALL].option.layouts
            == heavy.choices[LARGE].option.layouts
            == (("x", "b"),)
        )
        cheap = make_plan(
            both, HW, db=db, objective="energy@latency:1.05", schedules=schedules(), device=DEVICE
        )
        assert (
            cheap.latency_us <= 1.05 * free.latency_us * (1 + 1e-9)
            and cheap.energy_mj <= free.energy_mj
        )
        budget = f"latency@energy:{cheap.energy_mj:.6f}mJ"
        frugal = make_plan(both, HW, db=db, objective=budget, schedules=schedules(), device=DEVICE)
        assert frugal.energy_mj <= cheap.energy_mj * 1.00001
        with pytest.raises(UsageError, match="larger budget"):
            make_plan(
                both,
                HW,
                db=db,
                objective="latency@energy:0.000001mJ",
                schedules=schedules(),
                device=DEVICE,
            )
        with pytest.raises(UsageError, match="pareto"):
            make_plan(both, HW, objective="pareto")


@pytest.mark.parametrize(("recorded_with", "planned_for"), [(2, 1), (1, 2)])
def test_records_of_another_number_of_threads(
    tmp_path: Path, recorded_with: int, planned_for: int
) -> None:
    """What was fastest there is taken, in parallel as here it should; not what happens to fit."""
    schedule = get_schedule("swiglu.x86")
    there, here = HW.with_threads(recorded_with), HW.with_threads(planned_for)
    rows = []
    for config in schedule.space(LARGE, there):
        values = schedule.config_to_json(config)
        t = 40.0 / recorded_with if values["parallel"] == (recorded_with > 1) else 60.0
        t += 0.2 * values["unroll"] if t < 50 else -0.2 * values["unroll"]
        key = record_key(
            str(LARGE), schedule.name, schedule.version, values, there, "cold", versions()
        )
        rows.append(
            Record(
                key=key, workload=str(LARGE), schedule=schedule.name, config=values,
                schedule_version=schedule.version, hardware=there.id, threads=recorded_with,
                features=tuple(sorted(there.features)), cache="cold", versions=versions(),
                verdict=Verdict.OK, latency_us=t,
            )
        )  # fmt: skip
    with Database(tmp_path / "a.db") as db:
        db.add(*rows)
        space = JointSpace(LARGE, here)
        assert all(r.latency_us < 50 for _, r in known_results(space, db))
        (choice,) = make_plan({LARGE: 1.0}, here, db=db, device=DEVICE).choices.values()
        config = choice.option.candidate.config
        assert config == {"parallel": planned_for > 1, "unroll": 1}
        assert choice.option.source == "modelled"


def test_no_common_layout(tmp_path: Path) -> None:
    from toy_schedules import Tile, Tiled

    class Fixed(Tiled):
        def space(self, workload, hardware):
            layout = "a" if workload == SMALL else "b"
            return Space(Tile, {"rows": (1, 2), "layout": (layout,)}, Tile(layout=layout))

    with pytest.raises(MimoError, match="no layout in common"):
        make_plan(
            {SMALL: 1.0, LARGE: 1.0},
            HW,
            schedules=[Fixed()],
            shared=[[(SMALL, "x"), (LARGE, "x")]],
            device=DEVICE,
        )
