"""Why a kernel was chosen: ranks, bounds and held-out predictions are what they claim to be."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import DEVICE, HW, LARGE, recorded, schedules

from mimo_compile.cli.why import show_why
from mimo_compile.cost_models.learned import Sample
from mimo_compile.ir.counts import Counts
from mimo_compile.search.database import Database
from mimo_compile.search.explain import bound_of, explain
from mimo_compile.search.held_out import held_out_us, rank_correlation, what_matters
from mimo_compile.search.lookup import summarise
from mimo_compile.search.objective import parse_objective
from mimo_compile.search.space import JointSpace

pytestmark = pytest.mark.compile
LATENCY = parse_objective("latency")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory):
    """A recorded space with its explanation."""
    space = JointSpace(LARGE, HW, schedules())
    with Database(tmp_path_factory.mktemp("why") / "a.db") as db:
        db.add(*recorded(LARGE)[::4])
        yield space, db, explain(space, db, DEVICE, LATENCY)


def test_the_chosen_one_leads_and_the_others_are_told_apart(found) -> None:
    _, _, why = found
    times = [k.result.latency_us for k in why.known]
    assert why.rank == 1 and times == sorted(times) and why.chosen.result.latency_us == times[0]
    assert why.origin.startswith("measured on x86-64-v3") and "your records" in why.origin
    (loser,) = why.losers
    assert loser.candidate.schedule == "swiglu.other"
    ratio = loser.measured_us / times[0]
    assert f"{ratio:.2f} x the time" in loser.reason and "bound by" in loser.reason
    # the bowl is nothing that a roofline knows of, but a model learns it
    assert why.learned_rho > 0.8 > abs(why.analytic_rho or 0.0)
    assert 1 <= why.learned_rank <= 40 and why.analytic_rank
    names = [name for name, _ in why.matters]
    assert any("rows" in n for n in names) and any("cols" in n for n in names)
    value = why.to_json()
    assert value["rank"] == 1 and value["roof_share"] == pytest.approx(why.roofline_us / times[0])


def test_a_loser_by_another_objective_is_told_its_joules(found) -> None:
    """What lost for its energy may well be the faster one."""
    space, _, _ = found
    (result,) = summarise(recorded(LARGE, bad=0)[:1])
    extra = {
        next(c for c in space if (c.schedule == "swiglu.other") == other): replace(
            result, latency_us=us, modelled_mj=mj, measured_mj=None
        )
        for other, us, mj in ((True, 10.0, 9.0), (False, 20.0, 1.0))
    }
    why = explain(space, None, DEVICE, parse_objective("energy"), extra=extra)
    assert why.rank == 1 and why.chosen.result.modelled_mj == 1.0
    (loser,) = [x for x in why.losers if x.candidate.schedule == "swiglu.other"]
    assert "9.00 x the energy, modelled" in loser.reason and "0.50 x the time" in loser.reason
    plain = explain(space, None, DEVICE, LATENCY, why.candidate, extra=extra)
    assert not any("the energy" in x.reason for x in plain.losers)


def test_what_was_measured_elsewhere_is_called_so(found) -> None:
    _, db, why = found
    assert not why.elsewhere
    other = JointSpace(LARGE, HW.with_threads(1), schedules())
    there = explain(other, db, DEVICE, LATENCY)
    assert there.known and there.elsewhere
    said = []
    show_why(SimpleNamespace(say=said.append), there)
    assert any("measured elsewhere, none on this target" in line for line in said)


def test_any_candidate_can_be_explained(found) -> None:
    space, db, why = found
    third = why.known[2].candidate
    again = explain(space, db, DEVICE, LATENCY, third)
    assert again.rank == 3 and again.candidate == third
    new = next(c for c in space if c not in {k.candidate for k in why.known})
    unknown = explain(space, db, DEVICE, LATENCY, new)
    assert unknown.rank is None and "never measured" in unknown.origin


def test_without_records_models_answer() -> None:
    space = JointSpace(LARGE, HW, schedules())
    why = explain(space, None, DEVICE, LATENCY)
    assert why.candidate == space.defaults()[0] and why.chosen is None and not why.known
    assert why.losers[0].measured_us is None and "not measured" in why.losers[0].reason
    assert why.to_json()["measured_us"] is None
    kept = recorded(LARGE, bad=0)[:40]
    results = {space.adopt(r.record.schedule, r.record.config): r for r in summarise(kept)}
    held = explain(space, None, DEVICE, LATENCY, extra=results)
    assert len(held.known) == 40 and "the artifact's records" in held.origin


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20))
@settings(max_examples=30, deadline=None)
def test_rank_correlation_is_spearmans(pairs) -> None:
    from scipy.stats import spearmanr

    a, b = ([float(p[i]) for p in pairs] for i in (0, 1))
    mine = rank_correlation(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert mine is None
    else:
        assert mine == pytest.approx(spearmanr(a, b).statistic)


def test_held_out_predictions_have_not_seen_their_candidate() -> None:
    """Times that are noise cannot be predicted; a model that had seen them would know them by heart."""
    rng = np.random.default_rng(0)
    noise = np.exp(rng.normal(3.0, 1.0, 120))
    rows = [{"roof.analytic": 3.0, "knobs.a": float(x)} for x in rng.normal(size=120)]
    samples = [Sample((row,), float(t), "w") for row, t in zip(rows, noise, strict=True)]
    predicted = held_out_us(samples)
    assert abs(rank_correlation(predicted, noise.tolist())) < 0.35
    assert held_out_us(samples[:10]) is None
    told = [Sample((row,), float(np.exp(3 + row["knobs.a"])), "w") for row in rows]
    predicted = held_out_us(told)
    assert rank_correlation(predicted, [s.value for s in told]) > 0.9
    assert [n for n, _ in what_matters(told)] == ["knobs.a"]


def test_bounds_are_those_of_the_analytic_model() -> None:
    light = Counts({"fma_f32": 1.0}, {"dram": 1.0})
    heavy = Counts({"fma_f32": 1e9, "exp_f32": 1.0}, {"dram": 1e3, "l1": 1.0})
    far = Counts({"fma_f32": 1e3}, {"dram": 1e9, "l1": 1e6})
    kinds = [bound_of(c, HW, DEVICE) for c in (light, heavy, far)]
    assert [b.kind for b in kinds] == ["launch", "compute", "memory"]
    assert kinds[1].operation == "fma_f32" and kinds[2].level == "dram"
    for counts, bound in zip((light, heavy, far), kinds, strict=True):
        assert bound.total_us == pytest.approx(DEVICE.latency_us(counts, HW))
        assert str(bound).startswith(f"bound by {bound.kind}")
