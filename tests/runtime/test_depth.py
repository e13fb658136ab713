"""The number of drafts follows what is accepted and what passes take."""

from __future__ import annotations

import numpy as np
import pytest

from mimo_compile.runtime.depth import Depth


def settle(rates, plain, verify, head, passes=400, seed=0, room=9):
    """Return how often each depth was taken in the second half of some passes with these rates and costs."""
    rng, depth = np.random.default_rng(seed), Depth(len(rates))
    taken = np.zeros(len(rates) + 1, int)
    for number in range(passes):
        drafts = depth.choose(room)
        kept = 0
        while kept < drafts and rng.random() < rates[kept]:
            kept += 1
        slow = 20.0 if rng.random() < 0.02 else 1.0  # others take the processor now and then
        depth.learn(drafts, kept, slow * (verify if drafts else plain), [head] * drafts)
        taken[drafts] += number >= passes // 2
    return taken / taken.sum()


@pytest.mark.parametrize(
    ("rates", "plain", "verify", "head", "best"),
    [
        ((0.9, 0.9, 0.9), 1.0, 1.2, 0.1, 3),
        ((0.9, 0.3, 0.3), 1.0, 1.2, 0.3, 1),
        ((0.1, 0.1, 0.1), 1.0, 1.2, 0.1, 0),
        ((0.95, 0.95, 0.95), 1.0, 5.0, 0.1, 0),
    ],
)
def test_the_depth_that_pays_is_found(rates, plain, verify, head, best):
    taken = settle(rates, plain, verify, head)
    assert taken[best] > 0.9, taken


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
