"""Selection against plain walks over sorted lists, and what every rule promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.block_lists import check_lists, outside_tie_band, to_lists, to_mask
from mimo_compile.ir.ops.select_blocks import SUMS, select_blocks

OP = get_op("select_blocks")


@st.composite
def draws(draw, rules=("topk", "threshold", "mass")):
    """Draw a workload with inputs full of ties; padding tokens; lengths below and above what is asked."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    block = pick(1, 2, 5, 8)
    length = draw(st.integers(1, 60))
    rule = draw(st.sampled_from(rules))
    p = dict(
        t=draw(st.integers(1, min(6, length))), hs=pick(1, 2, 3), cap=length + pick(0, 1, 17),
        block=block, k=draw(st.integers(0, 14)), rule=rule, rows=pick(1, 1, 2, 4),
        first=pick(0, 0, 1, 3), last=pick(0, 1, 2), len=length,
    )  # fmt: skip
    if rule != "mass":
        p["positive"] = pick(0, 1)
    if rule == "topk":
        p |= dict(share=pick(0.0, 0.25, 1.0), merge=pick("none", "rank"))
    elif draw(st.booleans()):
        p["kmax"] = OP.most_forced(OP.full(OP.workload(**p))) + draw(st.integers(1, 5))
    workload = OP.workload(**p)
    inputs = OP.make_inputs(workload, np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    inputs["pos"][1] = draw(st.integers(1, p["t"]))
    return workload, inputs


def ranked(score, barred):
    """Return candidate ids, best first, ties by id; without those at -inf and barred ones."""
    ids = [b for b in range(len(score)) if score[b] > -math.inf and b not in barred]
    return sorted(ids, key=lambda b: (-score[b], b))


def walk(workload, inputs):
    """Return the chosen sets by row and head, written as the rules are told."""
    p, kmax = OP.full(workload), OP.list_length(OP.full(workload))
    if p["positive"]:  # the grid of scores has zeros
        inputs = inputs | {"score": np.where(inputs["score"] > 0, inputs["score"], -np.inf)}
    start, valid = inputs["pos"].tolist()
    out = []
    for r in range(inputs["score"].shape[0]):
        begin, end = start + r * p["rows"], start + min((r + 1) * p["rows"], valid) - 1
        heads = [[] for _ in range(p["hs"])]
        if r * p["rows"] < valid:
            seen = end // p["block"] + 1
            forced = {b for b in range(seen) if b < p["first"]}
            if p["last"]:
                forced |= set(range(max(0, begin // p["block"] - p["last"] + 1), seen))
            for h in range(p["hs"]):
                score = inputs["score"][r, h, :seen].astype(np.float64)
                free = ranked(score, forced)
                if p["rule"] == "topk":
                    n = max(p["k"], math.ceil(p["share"] * seen))
                    heads[h] = sorted(forced) + free[: max(0, n - len(forced))]
                    continue
                best = ranked(score, set())
                if p["rule"] == "threshold":
                    taken = [b for b in best if score[b] >= inputs["value"][h]]
                else:
                    total, taken, mass = score.sum(), [], 0.0
                    for b in best:
                        if mass >= float(inputs["value"][h]) * total:
                            break
                        taken.append(b)
                        mass += score[b]
                taken = set(taken) | set(best[: p["k"]])
                heads[h] = (sorted(forced) + [b for b in free if b in taken])[:kmax]
            if p["merge"] == "rank":
                score = inputs["score"][r, :, :seen].astype(np.float64)
                tops = [ranked(s, forced) for s in score]
                merged = []
                for place in range(seen):
                    for top in tops:
                        if place < len(top) and top[place] not in merged:
                            merged.append(top[place])
                n = max(p["k"], math.ceil(p["share"] * seen))
                heads = [sorted(forced) + merged[: max(0, n - len(forced))]]
        out.append([set(h) for h in (heads[:1] if p["merge"] == "rank" else heads)])
    return out


@settings(max_examples=150)
@given(draws())
def test_choice_equals_the_walk(drawn) -> None:
    workload, inputs = drawn
    got = OP.reference(workload, inputs)
    idx, cnt = torch.from_numpy(got["idx"]), torch.from_numpy(got["cnt"])
    p = OP.full(workload)
    check_lists(idx, cnt, inputs["score"].shape[2])
    judged = OP.bound(workload, inputs, got)["cnt"] == 0
    for (r, h), want in np.ndenumerate(np.array(walk(workload, inputs), object)):
        if judged[r, h]:
            assert set(got["idx"][r, h, : cnt[r, h]].tolist()) == want, (str(workload), r, h, p)


@settings(max_examples=40)
@given(draws(rules=("topk",)))
def test_enough_is_everything(drawn) -> None:
    workload, inputs = drawn
    p = OP.full(workload)
    inputs["score"] = np.where(np.isinf(inputs["score"]), 0, inputs["score"]).astype(np.float32)
    whole = OP.workload(**{**p, "k": inputs["score"].shape[2], "positive": 0})
    got = OP.reference(whole, inputs)
    for r in range(got["cnt"].shape[0]):
        last = min((r + 1) * p["rows"], inputs["pos"][1]) - 1
        seen = (
            (inputs["pos"][0] + last) // p["block"] + 1 if r * p["rows"] < inputs["pos"][1] else 0
        )
        assert (got["cnt"][r] == seen).all()


@settings(max_examples=40)
@given(draws())
def test_blocks_behind_the_row_do_not_matter(drawn) -> None:
    """Scores of later blocks may hold anything, NaN too."""
    workload, inputs = drawn
    p, got = OP.full(workload), OP.reference(workload, inputs)
    start, valid = inputs["pos"].tolist()
    other = inputs["score"].copy()
    for r in range(other.shape[0]):
        end = start + min((r + 1) * p["rows"], valid) - 1
        other[r, :, end // p["block"] + 1 :] = 1e30
    again = OP.reference(workload, inputs | {"score": other})
    np.testing.assert_array_equal(got["idx"], again["idx"])


def test_ties_go_to_the_lower_block_and_the_lower_head() -> None:
    workload = parse_workload("select_blocks:t=1,hs=2,cap=8,block=1,k=3")
    even = {"score": np.zeros((1, 2, 8), np.float32), "pos": np.array([7, 1], np.int32)}
    assert OP.reference(workload, even)["idx"].tolist() == [[[0, 1, 2]] * 2]
    merged = parse_workload("select_blocks:t=1,hs=2,cap=8,block=1,k=3,merge=rank")
    apart = even | {"score": np.array([[[0, 0, 0, 0, 0, 0, 2, 1], [3, 2, 0, 0, 0, 0, 0, 0]]], "f4")}
    # rank 0: 6 (head 0), 0 (head 1); rank 1: 7 before 1
    assert OP.reference(merged, apart)["idx"].tolist() == [[[0, 6, 7]]]
    assert OP.reference(merged, even)["idx"].tolist() == [[[0, 1, 2]]]  # heads agree wholly


def test_probabilities_that_underflowed_are_not_chosen() -> None:
    """Zeros and subnormal numbers, which kernels may flush; the least normal number may be chosen."""
    least = float(np.finfo(np.float32).tiny)
    score = np.array([[[0.0, 1e-45, least, -0.0, 0.5, least / 2, np.nan, -np.inf]]], np.float32)
    inputs = {"score": score, "pos": np.array([7, 1], np.int32)}
    text = "select_blocks:t=1,hs=1,cap=8,block=1,k=6"
    got = OP.reference(parse_workload(f"{text},positive=1"), inputs)
    assert got["idx"].tolist() == [[[2, 4, -1, -1, -1, -1]]] and got["cnt"].tolist() == [[2]]
    forced = OP.reference(parse_workload(f"{text},positive=1,first=1,last=1"), inputs)
    assert forced["idx"].tolist() == [[[0, 2, 4, 7, -1, -1]]]
    assert OP.reference(parse_workload(text), inputs)["cnt"].tolist() == [[6]]


def test_tie_band() -> None:
    score = torch.tensor([[[4.0, 3.0, 2.9, 1.0]]], dtype=torch.float64)
    free = torch.ones_like(score, dtype=torch.bool)
    band = torch.full_like(score, 0.06)
    swapped, wrong = torch.tensor([[[1, 0, 1, 0]]]).bool(), torch.tensor([[[1, 0, 0, 1]]]).bool()
    assert not outside_tie_band(swapped, free, score, band).any()
    assert outside_tie_band(swapped, free, score, band / 2).all()
    assert outside_tie_band(wrong, free, score, band).all()
    idx, cnt = to_lists(swapped, 3)
    assert idx.tolist() == [[[0, 2, -1]]] and torch.equal(to_mask(idx, cnt, 4), swapped)


def test_mass_that_rounding_may_move_is_judged_by_both_cuts() -> None:
    workload = parse_workload("select_blocks:t=1,hs=2,cap=4,block=1,rule=mass")
    score = np.array([[[0.5, 0.25, 0.25, 0], [0.5, 0.25, 0.25, 0]]], np.float32)
    inputs = {"score": score, "pos": np.array([3, 1], np.int32)}
    inputs["value"] = np.array([0.75, 0.7], np.float32)
    got = OP.reference(workload, inputs)
    assert got["cnt"].tolist() == [[2, 2]] and got["idx"].tolist() == [[[0, 1, -1, -1]] * 2]
    bound = OP.bound(workload, inputs, got)
    assert bound["cnt"].tolist() == [[1, 0]]  # two blocks, or the third one, too
    assert bound["idx"].tolist() == [[[0, 0, 3, 0], [0, 0, 0, 0]]]


@pytest.mark.parametrize("blocks", [1024, 8192])
def test_mass_of_many_blocks_is_judged(blocks) -> None:
    """Float32 sums in lanes are within the bound; what is no choice at all is not."""
    text = f"select_blocks:t=1,hs=32,cap={16 * blocks},block=16,rule=mass"
    workload = parse_workload(text)
    inputs = OP.make_inputs(workload, np.random.default_rng(0))
    inputs["score"] = np.random.default_rng(1).random(inputs["score"].shape, dtype=np.float32)
    want = OP.reference(workload, inputs)
    bound = OP.bound(workload, inputs, want)
    assert (bound["cnt"] <= 3).all() and (bound["idx"] <= blocks).all()
    assert (bound["idx"][0, :, 0] < 20).all()  # early ids hardly move
    for h, (score, cnt) in enumerate(zip(inputs["score"][0], want["cnt"][0], strict=True)):
        best = np.argsort(-score, kind="stable")
        total = score.reshape(-1, SUMS).cumsum(0, dtype=np.float32)[-1].sum(dtype=np.float32)
        masked = np.zeros(blocks, np.float32)
        masked[best[:cnt]] = score[best[:cnt]]
        part = masked.reshape(-1, SUMS).cumsum(0, dtype=np.float32)[-1].sum(dtype=np.float32)
        count = cnt + int(part < inputs["value"][h] * total)
        got = np.full(blocks, -1)
        got[:count] = np.sort(best[:count])
        assert abs(count - cnt) <= bound["cnt"][0, h]
        assert (abs(got - want["idx"][0, h]) <= bound["idx"][0, h]).all()


def test_fake_rule() -> None:
    args = (torch.randn(2, 3, 9), torch.tensor([16, 2], dtype=torch.int32), None)
    for merge in ("none", "rank"):
        rest = ("topk", 4, 0.0, 2, 1, 1, 1, merge, 5, merge == "none")
        torch.library.opcheck(
            select_blocks, (*args, *rest), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rule=best", "no rule=best"), ("merge=sum", "merge=sum"), ("share=1.5", "above 1"),
        ("merge=rank,rule=mass", "goes with rule=topk"), ("first=4,kmax=2", "cannot hold"),
        ("len=99", "between t and cap"),
    ],
)  # fmt: skip
def test_bad_workloads(change, message) -> None:
    with pytest.raises(UsageError, match=message):
        parse_workload("select_blocks:t=1,hs=2,cap=64,block=4,k=3," + change)
