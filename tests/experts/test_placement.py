"""Placements of experts: partitions within capacity, even where loads allow, together where choices are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.experts.coactivation import bisected, graph_of, passing, together
from mimo_compile.experts.placement import (
    capacity,
    device_loads,
    greedy,
    judge,
    partition,
    round_robin,
)
from mimo_compile.experts.trace import LoadTrace


def busiest(placement, loads):
    rows = zip(loads, placement.device, strict=True)
    return np.array([device_loads(load, row, placement.devices).max() for load, row in rows])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_expert_has_a_device_with_room(data):
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    devices, k = data.draw(st.integers(1, experts)), data.draw(st.integers(1, min(experts, 4)))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    loads = draw.random((layers, experts)) ** data.draw(st.sampled_from([0, 1, 6]))
    loads[draw.random(loads.shape) < data.draw(st.sampled_from([0, 0.5]))] = 0
    ids = draw.random((30, layers, experts)).argsort(-1)[..., :k].astype(np.int16)
    dealt = round_robin(layers, experts, devices)
    slack = data.draw(st.sampled_from([0, 0.05, 1]))
    for found in (dealt, greedy(loads, devices), partition(loads, ids, devices, slack)):
        assert found.device.shape == (layers, experts)
        assert found.device.min() >= 0 and found.device.max() < devices
        held = np.stack([np.bincount(row, minlength=devices) for row in found.device])
        assert held.max() <= capacity(experts, devices) and (held.sum(-1) == experts).all()
        assert (busiest(found, loads) <= busiest(dealt, loads) * (1 + 1e-9)).all()


def test_equal_loads_are_even():
    for devices in (1, 3, 4, 16):
        found = greedy(np.ones((2, 16)), devices)
        held = np.bincount(found.device[0], minlength=devices)
        assert held.max() - held.min() <= 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20), st.integers(2, 12), st.integers(2, 4))
def test_no_two_experts_of_a_greedy_placement_should_change_places(seed, experts, devices):
    devices = min(devices, experts)
    load = np.random.default_rng(seed).random(experts)
    found = greedy(load[None], devices).device[0]
    before = device_loads(load, found, devices).max()
    for i in range(experts):
        for j in range(i):
            other = found.copy()
            other[i], other[j] = found[j], found[i]
            assert device_loads(load, other, devices).max() >= before * (1 - 1e-9)


def test_pairs_and_passages_are_counted():
    ids = np.array([[[0, 1], [2, 3]], [[1, 0], [2, 0]], [[2, 3], [1, 0]]], np.int16)
    pairs, moves = together(ids, 4), passing(ids, 4)
    assert pairs[0].tolist() == [[0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert pairs[1][2].tolist() == [1, 0, 0, 1]
    assert moves[0][0].tolist() == [1, 0, 2, 1] and moves.sum() == 12
    graph = graph_of(pairs[0])
    assert sorted(graph.edges(data="weight")) == [(0, 1, 2), (2, 3, 1)] and len(graph) == 4


@pytest.mark.parametrize(
    "sizes", [[4, 4], [3, 3, 2], [2] * 4, [1, 3, 1, 3], [8], [0, 8], [0, 3, 5]]
)
def test_parts_have_their_sizes(sizes):
    weights = np.random.default_rng(0).integers(0, 9, (8, 8))
    parts = bisected(graph_of(weights + weights.T), sizes, 0)
    assert [len(part) for part in parts] == sizes
    assert sorted(e for part in parts for e in part) == list(range(8))


def test_what_is_chosen_together_lies_together_and_stays_where_it_is():
    """Groups of four experts, shuffled in every layer; a token stays with one group, of even load."""
    draw = np.random.default_rng(1)
    names = np.stack([draw.permutation(16) for _ in range(3)])
    groups = np.arange(960) % 4
    pairs = np.array([(i, j) for i in range(4) for j in range(i)])
    inside = np.stack([pairs[(np.arange(960) // 4 + i) % 6] for i in range(3)], 1)
    ids = np.take_along_axis(
        np.broadcast_to(names, (960, 3, 16)), groups[:, None, None] * 4 + inside, -1
    ).astype(np.int16)
    counts = np.stack([[np.bincount(ids[:, i].ravel(), minlength=16) for i in range(3)]])
    trace = LoadTrace(counts.astype(np.int64), ("a", "b", "c"), 2, ids)
    shares = trace.shares()[0]
    found = judge(partition(shares, ids[:480], 4), shares, trace)
    assert (found.fan_out, found.crossing) == (1.0, 0.0)
    packed = judge(greedy(shares, 4), shares, trace)
    assert packed.fan_out > 1.4 and packed.crossing > 0.5
    assert packed.predicted == found.predicted == found.replayed == pytest.approx(1)


def test_the_busiest_device_of_each_step_counts():
    counts = np.array([[[4, 0, 0, 0]], [[0, 0, 0, 4]]], np.int64)
    found = judge(round_robin(1, 4, 2), np.full((1, 4), 0.25), LoadTrace(counts, ("a",)))
    assert (found.predicted, found.replayed, found.by_step) == (1.0, 1.0, 2.0)
    assert found.fan_out is None and found.crossing is None


def test_devices_must_fit():
    with pytest.raises(UsageError, match="4 experts cannot be placed on 5 devices"):
        greedy(np.ones((1, 4)), 5)
