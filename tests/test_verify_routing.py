"""Eager models follow the experts of compiled ones where roundings decide, and nowhere else."""

from __future__ import annotations

from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.ops import load_all
from mimo_compile.verify.routing import Led, watched

load_all()
RULE = (2, "softmax", True, 1.0, 1, 1)


def run(led, logits, rule=RULE, bias=None, start=0):
    """Begin a step at a position, as a decoder does, and choose experts in its first layer."""
    pos = torch.tensor([start, len(logits)], dtype=torch.int32)
    with led:
        torch.ops.mimo.embed(torch.zeros(len(logits), dtype=torch.int32), torch.zeros(1, 1))
        torch.ops.mimo.rope_table(pos, torch.ones(1), len(logits))
        return torch.ops.mimo.route(logits, bias, *rule)


def noted(rows, layer=0, start=0):
    seen = defaultdict(deque)
    for at, row in enumerate(rows, start):
        seen[0, layer, at].append(np.asarray(row, np.float32))
    return seen


def test_only_the_slots_that_are_compared_are_watched():
    bound = []

    def bind(entry, slot=0):
        bound.append((entry, slot))
        return SimpleNamespace(calls=[], program=SimpleNamespace(calls=[]))

    choice = SimpleNamespace(workload="route:e=8,k=2,t=1", kernel="r")
    module = SimpleNamespace(
        manifest=SimpleNamespace(plan=[choice]),
        batch=256,
        bind=bind,
        entries=["step_1", "batch_256"],
    )
    with watched(module, (0, 9, 255)):
        assert bound == [("step_1", 0), ("step_1", 9), ("step_1", 255), ("batch_256", 0)]


def test_a_tie_that_rounding_breaks_is_followed_with_own_weights():
    mine = torch.tensor([[4.0, 1.000, 0.999, -3.0], [4.0, 1.0, 0.0, -3.0]])
    led = Led(noted([[4.0, 0.999, 1.000, -3.0], [4.0, 1.0, 0.0, -3.0]], start=7), 1e-3)
    ids, weights = run(led, mine, start=7)
    assert ids.tolist() == [[0, 2], [0, 1]]
    score = torch.softmax(mine, -1)
    torch.testing.assert_close(weights[0], score[0, [0, 2]] / score[0, [0, 2]].sum())
    assert (led.choices, led.followed, led.strayed) == (2, 1, 0)


@pytest.mark.parametrize(
    "theirs",
    [[4.0, 0.95, 1.0, -3.0], [4.0, 0.999, 1.0, 3.0]],
    ids=["far", "another is far"],
)
def test_logits_outside_of_the_bound_are_not_followed(theirs):
    led = Led(noted([theirs]), 1e-3)
    ids, _ = run(led, torch.tensor([[4.0, 1.000, 0.999, -3.0]]))
    assert ids.tolist() == [[0, 1]] and (led.followed, led.strayed) == (0, 1)


def test_nan_is_not_followed():
    led = Led(noted([[1.0, 2.0, float("nan")]]), 1e-3)
    ids, weights = run(led, torch.tensor([[3.0, 2.0, 1.0]]))
    assert ids.tolist() == [[0, 1]] and led.followed == 0 and weights.isfinite().all()


def test_rows_that_the_compiled_model_did_not_run_keep_their_own():
    led = Led(noted([[0.0, 1.0, 2.0]], start=5), 1e-3)
    ids, _ = run(led, torch.tensor([[3.0, 2.0, 1.0]]), start=4)
    assert ids.tolist() == [[0, 1]] and (led.choices, led.followed, led.strayed) == (1, 0, 0)


def test_a_position_that_is_run_again_has_logits_of_its_own():
    seen = noted([[1.0, 1.001, 1.002]])
    seen[0, 0, 0].append(np.array([1.002, 1.001, 1.0], np.float32))
    led, mine = Led(seen, 1e-2), torch.tensor([[1.001, 1.0, 1.001]])
    assert run(led, mine)[0].sort().values.tolist() == [[1, 2]]
    assert run(led, mine)[0].sort().values.tolist() == [[0, 1]]
    assert led.followed == 2


@settings(max_examples=40)
@given(
    st.integers(0, 2**31), st.sampled_from(["softmax", "sigmoid"]), st.booleans(),
    st.sampled_from([(1, 1), (4, 2)]), st.floats(0, 0.05),
)  # fmt: skip
def test_within_the_bound_the_experts_are_those_of_the_other_logits(
    seed, scoring, bias, groups, off
):
    """By every rule there is, and whatever is far off keeps its own."""
    draw = np.random.default_rng(seed)
    mine = draw.standard_normal((6, 16)).astype(np.float32)
    largest = np.abs(mine).max(-1, keepdims=True)
    theirs = mine + np.float32(off) * largest * draw.uniform(-1, 1, mine.shape).astype(np.float32)
    rule = (3, scoring, True, 2.5, *groups)
    added = torch.from_numpy(draw.standard_normal(16).astype(np.float32)) if bias else None
    led = Led(noted(theirs), 0.02)
    ids, weights = run(led, torch.from_numpy(mine), rule, added)
    near = np.abs(theirs - mine).max(-1) <= 0.02 * largest[:, 0]
    wanted = torch.from_numpy(np.where(near[:, None], theirs, mine))
    chosen = torch.ops.mimo.route(wanted, added, *rule)[0]
    assert torch.equal(ids.sort().values, chosen.sort().values)
    score = torch.from_numpy(mine).double()
    score = score.sigmoid() if scoring == "sigmoid" else score.softmax(-1)
    own = score.gather(1, ids.long())
    expected = (2.5 * own / own.sum(-1, keepdim=True)).float()
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
