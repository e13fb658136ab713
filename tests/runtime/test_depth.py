"""The number of drafts follows what is accepted and what passes take."""

from __future__ import annotations

import numpy as np
import pytest

from mimo_compile.runtime.depth import Depth

SEEDS = 20


def settle(rates, plain, verify, head, passes=400, seed=0, room=9, cold=1.0):
    """Return how often each depth was taken in the second half of some passes with these rates and costs.

    ``verify``: cost of a pass with drafts, or costs by their number; ``cold``: times its cost that what the
    last pass did not run takes.
    """
    rng, depth = np.random.default_rng(seed), Depth(len(rates))
    taken, before = np.zeros(len(rates) + 1, int), -1
    for number in range(passes):
        drafts = depth.choose(room)
        kept = 0
        while kept < drafts and rng.random() < rates[kept]:
            kept += 1
        slow = 20.0 if rng.random() < 0.02 else 1.0  # others take the processor now and then
        slow *= cold if before < 0 or (before > 0) != (drafts > 0) else 1.0
        heads = [head * (1.0 if k < before else cold) for k in range(drafts)]
        costs = (plain, *(verify if isinstance(verify, tuple) else [verify] * len(rates)))
        depth.learn(drafts, kept, slow * costs[drafts], heads)
        before = drafts
        taken[drafts] += number >= passes // 2
    return taken / taken.sum()


@pytest.mark.parametrize(
    ("rates", "plain", "verify", "head", "best"),
    [
        ((0.9, 0.9, 0.9), 1.0, 1.2, 0.1, 3),
        ((0.9, 0.3, 0.3), 1.0, 1.2, 0.3, 1),
        ((0.1, 0.1, 0.1), 1.0, 1.2, 0.1, 0),
        ((0.95, 0.95, 0.95), 1.0, 5.0, 0.1, 0),
        ((0.6, 0.5, 0.3), 1.0, (1.2, 2.0, 2.3), 0.05, 1),  # experts: each token reads more
        ((0.9, 0.9, 0.2), 1.0, (1.8, 1.9, 2.6), 0.05, 2),
        ((0.3, 0.3, 0.3), 1.0, (1.5, 1.9, 2.3), 0.05, 0),
    ],
)
@pytest.mark.parametrize("cold", [1.0, 6.0])
def test_the_depth_that_pays_is_found(rates, plain, verify, head, best, cold):
    costs = (plain, *(verify if isinstance(verify, tuple) else [verify] * len(rates)))
    tokens = 1 + np.cumsum([0.0, *np.cumprod(rates)])
    worth = tokens / (np.array(costs) + head * np.arange(len(costs)))
    assert worth.argmax() == best
    for seed in range(SEEDS):
        taken = settle(rates, plain, verify, head, cold=cold, seed=seed)
        assert taken.argmax() == best
        reached = (taken @ tokens) / (taken @ (tokens / worth))
        # tries of what costs much more add up; of what costs little more there may be many
        assert taken[best] > 0.9 or reached > 0.98 * worth[best], (seed, taken)


def test_a_bad_beginning_is_forgiven():
    """Deeper heads, seen only where nothing was kept, are taken up again once the first one keeps."""
    depth, taken = Depth(3), []
    for number in range(60):
        drafts = depth.choose(9)
        kept = drafts if number > 3 else 0
        depth.learn(drafts, kept, (1.0, 1.15, 1.16, 1.17)[drafts], [0.13] * drafts)
        taken.append(drafts)
    assert taken[12:48] == [3] * 36, taken


@pytest.mark.parametrize("slow", [0.05, 20.0])
@pytest.mark.parametrize(
    ("rates", "costs", "best", "once"),
    [
        ((0.6, 0.5, 0.3), (1.0, 1.2, 2.0, 2.3), 1, 1),
        ((0.9, 0.9, 0.2), (1.0, 1.8, 1.9, 2.6), 2, 2),
        ((0.9, 0.9, 0.9), (1.0, 1.1, 1.2, 1.3), 3, 3),
        ((0.3, 0.3, 0.3), (1.0, 1.5, 1.9, 2.3), 0, 2),
    ],
)
def test_one_wrong_time_is_forgiven(rates, costs, best, once, slow):
    """The first time of a depth is wrong, too long or too short, and no other."""
    rng, depth, taken, before, wrong = np.random.default_rng(1), Depth(3), [], -1, False
    for _ in range(600):
        drafts = depth.choose(9)
        kept = 0
        while kept < drafts and rng.random() < rates[kept]:
            kept += 1
        wrong_now = drafts == once and (before > 0) == (drafts > 0) and before >= 0 and not wrong
        wrong = wrong or wrong_now
        depth.learn(drafts, kept, costs[drafts] * (slow if wrong_now else 1.0), [0.05] * drafts)
        before = drafts
        taken.append(drafts)
    assert wrong and np.mean([k == best for k in taken[300:]]) > 0.9


def test_a_depth_between_is_timed_while_the_greatest_is_taken():
    """What was never timed is thought to take longer than it does, so that the greatest looks better."""
    depth, taken = Depth(3), []
    for _ in range(400):
        drafts = depth.choose(9)
        depth.learn(drafts, drafts, (1.0, 1.0, 2.3, 2.3)[drafts], [0.2] * drafts)
        taken.append(drafts)
    assert 3 in taken[10:40]
    assert np.mean([k == 1 for k in taken[200:]]) > 0.9


def test_a_try_that_does_not_pay_puts_off_no_other():
    """The first tries of three depths come one after the other, the next ones twice as much later."""
    depth, taken = Depth(3), []
    for _ in range(400):
        drafts = depth.choose(9)
        depth.learn(drafts, 0, 3.0 if drafts else 1.0, [0.1] * drafts)
        taken.append(drafts)
    tries = [[n for n, k in enumerate(taken) if n > 10 and k == tried] for tried in (1, 2, 3)]
    assert [len(passes) for passes in tries] == [6, 6, 6], tries
    assert all(passes[0] < 60 and 96 < passes[2] < 160 for passes in tries), tries


def test_drafts_that_did_not_pay_are_found_to_pay_later():
    """One try of what was left out for long, which takes times as long at first, is enough."""
    depth, taken = Depth(3), []
    for number in range(1200):
        drafts = depth.choose(9)
        kept = drafts if number > 300 else 0
        slow = 6.0 if taken and (taken[-1] > 0) != (drafts > 0) else 1.0
        heads = [0.1 if k < (taken or [0])[-1] else 0.6 for k in range(drafts)]
        depth.learn(drafts, kept, slow * (1.5 if drafts else 1.0), heads)
        taken.append(drafts)
    assert np.mean([k == 0 for k in taken[100:300]]) > 0.9
    assert np.mean([k == 3 for k in taken[900:]]) > 0.9


def test_depths_without_times_are_not_taken():
    depth = Depth(2)
    for _ in range(20):
        depth.choose(9)
        depth.learn(0, 0, 1.0, [])  # no head has anything to say
    assert depth.choose(9) == 0


def test_what_is_learned_is_forgotten():
    depth = Depth(1)
    for kept in (1,) * 60 + (0,) * 200:
        depth.learn(1, kept, 1.0, [0.1])
    assert depth.expected(1) == pytest.approx(1.0, abs=0.01)


def test_no_more_drafts_than_there_is_room_for():
    for fixed in (None, 3):
        depth = Depth(3, fixed)
        assert [depth.choose(room) for room in (0, 1, 2, 3, 9)] == [0, 1, 2, 3, 3]
    assert Depth(3, 2).choose(9) == 2
