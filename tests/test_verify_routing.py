"""Eager models follow the experts of compiled ones where roundings decide, and nowhere else."""

from __future__ import annotations

from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import ArtifactError
from mimo_compile.ir.ops import load_all
from mimo_compile.runtime.routers import Rule, routers_of
from mimo_compile.verify.end_to_end import with_choices
from mimo_compile.verify.found import EndToEnd
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
        manifest=SimpleNamespace(plan=[choice], decoder=None),
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
    assert (
        ids.tolist() == [[0, 1]]
        and (led.choices, led.unseen) == (0, 1)
        and led.followed == led.strayed == 0
    )


def test_a_position_that_is_run_again_has_logits_of_its_own():
    seen = noted([[1.0, 1.001, 1.002]])
    seen[0, 0, 0].append(np.array([1.002, 1.001, 1.0], np.float32))
    led, mine = Led(seen, 1e-2), torch.tensor([[1.001, 1.0, 1.001]])
    assert run(led, mine)[0].sort().values.tolist() == [[1, 2]]
    assert run(led, mine)[0].sort().values.tolist() == [[0, 1]]
    assert led.followed == 2


def test_experts_that_do_not_tie_keep_their_places():
    """Though all logits are within the bound, which is of the row's largest."""
    mine = torch.tensor([[4.0, 1.0, 0.97, 0.94, -3.0]])
    for theirs, wanted in (([0.97, 1.0, 0.94], [0, 2]), ([0.97, 0.96, 0.975], [0, 1])):
        led = Led(noted([[4.0, *theirs, -3.0]]), 1e-2)
        assert run(led, mine)[0].sort().values.tolist() == [wanted]
        assert (led.followed, led.strayed) == ((1, 0) if wanted == [0, 2] else (0, 1))


def test_noise_of_the_size_of_the_bound_is_not_right():
    draw = np.random.default_rng(0)
    mine = draw.standard_normal((512, 64)).astype(np.float32)
    largest = np.abs(mine).max(-1, keepdims=True)
    theirs = mine + 0.0495 * largest * draw.choice([-1, 1], mine.shape).astype(np.float32)
    led = Led(noted(theirs), 0.05)
    run(led, torch.from_numpy(mine), (8, "softmax", True, 1.0, 1, 1))
    found = EndToEnd(1, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    assert found.ok and not with_choices(found, [led]).ok


def test_a_router_without_logits_is_said():
    program = SimpleNamespace(calls=[SimpleNamespace(kernel="route", args=[])], buffers=[])
    with pytest.raises(ArtifactError, match="route chooses experts, but is given no logits"):
        routers_of(SimpleNamespace(program=program, name="step_1"), 0, {"route": Rule(1, 8, 2)})


@settings(max_examples=40)
@given(
    st.integers(0, 2**31), st.sampled_from(["softmax", "sigmoid"]), st.booleans(),
    st.sampled_from([(1, 1), (4, 2)]), st.floats(0, 0.05),
)  # fmt: skip
def test_experts_are_own_ones_or_those_of_the_other_logits(seed, scoring, bias, groups, off):
    """By every rule there is; which of both, by plain scores, a comparison of pairs says."""
    draw = np.random.default_rng(seed)
    mine = draw.standard_normal((6, 16)).astype(np.float32)
    largest = np.abs(mine).max(-1)
    theirs = mine + np.float32(off) * largest[:, None] * draw.uniform(-1, 1, mine.shape).astype(
        np.float32
    )
    rule = (3, scoring, True, 2.5, *groups)
    added = torch.from_numpy(draw.standard_normal(16).astype(np.float32)) if bias else None
    led = Led(noted(theirs), 0.02)
    ids, weights = run(led, torch.from_numpy(mine), rule, added)
    near = np.abs(theirs - mine).max(-1) <= 0.02 * largest
    own, other = (
        [set(row) for row in torch.ops.mimo.route(torch.from_numpy(x), added, *rule)[0].tolist()]
        for x in (mine, theirs)
    )
    followed = strayed = 0
    for i, row in enumerate(ids.tolist()):
        assert set(row) in (own[i], other[i]) and (near[i] or set(row) == own[i])
        followed += set(row) != own[i]
        strayed += set(row) != other[i]
        if not bias and groups == (1, 1) and near[i] and own[i] != other[i]:
            apart = mine[i, list(own[i] - other[i])].max() - mine[i, list(other[i] - own[i])].min()
            if abs(apart / largest[i] - 0.02) > 1e-5:
                assert (set(row) == other[i]) == (apart <= 0.02 * largest[i])
    assert (led.choices, led.followed, led.strayed) == (6, followed, strayed)
    score = torch.from_numpy(mine).double()
    score = score.sigmoid() if scoring == "sigmoid" else score.softmax(-1)
    taken = score.gather(1, ids.long())
    expected = (2.5 * taken / taken.sum(-1, keepdim=True)).float()
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
