"""The whole-model choice: layouts agree, budgets are kept, and it is honest about where numbers come from."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recordings import DEVICE, HW, LARGE, SMALL, recorded, schedules

from mimo_compile.errors import MimoError, UsageError
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.base import Space
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import known_results
from mimo_compile.search.objective import pareto_front
from mimo_compile.search.plan import Planner, make_plan
from mimo_compile.search.plan_options import nearest_with
from mimo_compile.search.records import Record, Verdict, record_key, versions
from mimo_compile.search.space import JointSpace

pytestmark = pytest.mark.compile


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
        planner = Planner(both, HW, db=db, schedules=schedules(), device=DEVICE)
        with pytest.raises(UsageError, match="larger budget") as small:
            planner.plan("latency@energy:0.000001mJ")
        least = re.search(r"latency@energy:\S+mJ(?= or more)", str(small.value))
        assert least, "the least possible energy is named"
        cheapest = planner.plan("energy")
        assert planner.plan(least[0]).energy_mj == pytest.approx(cheapest.energy_mj, rel=1e-3)
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


def test_one_planner_answers_for_every_objective(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db") as db:
        db.add(*recorded(LARGE, bad=0), *recorded(SMALL, bad=0))
        both = {SMALL: 3.0, LARGE: 1.0}
        group = [[(SMALL, "x"), (LARGE, "x")]]
        planner = Planner(both, HW, db=db, schedules=schedules(), shared=group, device=DEVICE)
        for text in ("latency", "energy", "edp", "ed2p", "energy@latency:1.05"):
            alone = make_plan(
                both, HW, db=db, objective=text, schedules=schedules(), shared=group, device=DEVICE
            )
            again = planner.plan(text)
            assert again.to_json() == alone.to_json() and str(again.objective) == text
            assert len({c.option.layouts for c in again.choices.values()}) == 1
            assert again.seconds > 0 and planner.seconds > 0


def test_measured_and_modelled_joules_never_meet(tmp_path: Path) -> None:
    """One workload read by a meter, the other not: all are ranked by the model."""
    with Database(tmp_path / "a.db") as db:
        db.add(
            *(
                msgspec.structs.replace(r, energy_mj=1e6, energy_source="rapl")
                for r in recorded(LARGE, bad=0)
            )
        )
        alone = make_plan({LARGE: 1.0}, HW, db=db, schedules=schedules(), device=DEVICE)
        assert alone.energy_source == "rapl" and alone.energy_mj == 1e6
        db.add(*recorded(SMALL, bad=0))
        both = make_plan({LARGE: 1.0, SMALL: 1.0}, HW, db=db, schedules=schedules(), device=DEVICE)
        assert both.energy_source == "modelled" and both.energy_mj < 1e3


def test_stand_ins_are_not_compared_by_a_meters_joules(tmp_path: Path) -> None:
    """Both were read by a meter, but one of them only in a layout that the other does not have."""

    def read(records, layout):
        return [
            msgspec.structs.replace(r, energy_mj=1e6, energy_source="rapl")
            for r in records
            if r.config["layout"] == layout
        ]

    with Database(tmp_path / "a.db") as db:
        db.add(*read(recorded(LARGE, bad=0), "b"), *read(recorded(SMALL, bad=0), "a"))
        both = {LARGE: 1.0, SMALL: 1.0}
        free = Planner(both, HW, db=db, schedules=schedules(), device=DEVICE)
        assert free.plan("energy").energy_source == "rapl"
        group = [[(SMALL, "x"), (LARGE, "x")]]
        tied = Planner(both, HW, db=db, schedules=schedules(), shared=group, device=DEVICE)
        meters = {o.energy_source for options in tied.options.values() for o in options}
        assert meters == {"modelled"} and tied.plan("energy").energy_mj < 1e5


def test_the_stand_in_for_a_layout_is_near_the_default() -> None:
    """The first config of the space with that layout may be anything, as here: prefetch comes last."""
    from toy_schedules import Tile, Tiled

    class Late(Tiled):
        def space(self, workload, hardware):
            knobs = {"layout": ("b", "a"), "rows": (1, 2, 4, 8, 16), "prefetch": (0, 2, 4)}
            return Space(Tile, knobs, Tile(rows=8, prefetch=4), lambda c: c.rows > 1)

        def layouts(self, workload, config):
            return {"x": f"{config.layout}{config.rows}"}

    space = JointSpace(SMALL, HW, [Late()])
    found = {c.config["layout"] + str(c.config["rows"]): c.config for c in nearest_with(
        space, "x", {"b8", "b4", "a8", "a1", "nowhere"}
    )}  # fmt: skip
    assert set(found) == {"b8", "b4", "a8"}, "a1 is not legal"
    assert all(c["prefetch"] == 4 for c in found.values()), "no knob changes without need"
