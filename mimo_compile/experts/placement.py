"""On which device each expert lies: round robin, greedy packing by load, or what is used together together.

A layer ends when its busiest device does, so loads should be equal; a token whose experts lie on one device
travels to one device. Both are wanted from the same placement: greedy packing sees loads alone, the
partition of the co-activation graph keeps together what it can without a busier device.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import UsageError
from mimo_compile.experts.coactivation import Counts, Ids, bisected, graph_of, passing, together
from mimo_compile.experts.trace import Floats, LoadTrace

Devices = npt.NDArray[np.int64]
_SEEDS = 2
"""Of random beginnings of Kernighan and Lin's algorithm for each layer."""


@dataclass(frozen=True)
class Placement:
    """A device for each expert."""

    name: str
    device: Devices
    """``[L, E]``, from 0 to ``devices - 1``; in each layer at most ``ceil(E / devices)`` experts on one."""
    devices: int


@dataclass(frozen=True)
class Judged:
    """What a placement gives for some load. Busiest over mean device, 1 is even."""

    predicted: float
    """Of the forecast shares, mean over layers."""
    replayed: float
    """Of all tokens that came after, mean over layers."""
    by_step: float
    """Of each step that came after: the tokens of busiest devices over those of mean ones, in all steps."""
    fan_out: float | None
    """Devices that a token's experts of a layer lie on, mean; None where only counts are known."""
    crossing: float | None
    """Part of the pairs (expert of a token in a layer, one in the next) on two devices."""


def capacity(experts: int, devices: int) -> int:
    """Return how many experts of a layer a device may hold.

    Raises:
        UsageError: There is no device, or there are more of them than experts.
    """
    if not 1 <= devices <= experts:
        raise UsageError(
            f"{experts} experts cannot be placed on {devices} devices",
            remedy=f"Give 1 to {experts} --devices.",
        )
    return -(-experts // devices)


def device_loads(loads: Floats, device: Devices, devices: int) -> Floats:
    """Return the load ``[..., D]`` of each device of one layer, of loads ``[..., E]``."""
    return np.asarray(loads @ (device[:, None] == np.arange(devices)).astype(np.float64))


def round_robin(layers: int, experts: int, devices: int) -> Placement:
    """Deal experts out in their order."""
    capacity(experts, devices)
    row = np.arange(experts, dtype=np.int64) % devices
    return Placement("round robin", np.tile(row, (layers, 1)), devices)


def greedy(loads: Floats, devices: int) -> Placement:
    """Pack each layer by load ``[L, E]``: the heaviest expert left goes to the lightest device with room.

    Then experts change places while that makes the busiest device less busy. Where dealing them out is
    better, they are dealt out, so that no layer is worse than with `round_robin`.
    """
    layers, experts = loads.shape
    room = capacity(experts, devices)
    dealt = round_robin(layers, experts, devices).device
    out = dealt.copy()
    for layer, load in enumerate(loads):
        heap = [(0.0, 0, d) for d in range(devices)]
        for expert in np.argsort(-load, kind="stable"):
            total, held, at = heapq.heappop(heap)
            out[layer, expert] = at
            if held + 1 < room:
                heapq.heappush(heap, (total + float(load[expert]), held + 1, at))
        starts = [_levelled(load, row, devices) for row in (out[layer], dealt[layer])]
        out[layer] = min(starts, key=lambda row: device_loads(load, row, devices).max())
    return Placement("greedy", out, devices)


def _levelled(load: Floats, device: Devices, devices: int, enough: float = 0.0) -> Devices:
    """Let experts of the busiest device change places with others while that helps and it is not enough."""
    device = device.copy()
    for _ in range(10 * len(load)):
        totals = device_loads(load, device, devices)
        busy = int(totals.argmax())
        if totals[busy] <= enough:
            break
        mine, others = np.flatnonzero(device == busy), np.flatnonzero(device != busy)
        if not len(others):
            break
        less = load[mine, None] - load[None, others]
        after = np.maximum(totals[busy] - less, totals[device[others]][None] + less)
        i, j = np.unravel_index(int(after.argmin()), after.shape)
        if after[i, j] >= totals[busy] * (1 - 1e-12):
            break
        a, b = mine[i], others[j]
        device[a], device[b] = device[b], device[a]
    return device


def partition(
    loads: Floats, ids: Ids, devices: int, slack: float = 0.05, seed: int = 0
) -> Placement:
    """Divide each layer's co-activation graph, without making the busiest device much busier.

    Beginning with `greedy`, and with bisections of the graph by Kernighan and Lin that are levelled to the
    limit, pairs of experts change places as long as more co-activations come to lie on one device and no
    device's load exceeds the limit. Then the parts of each layer are assigned to devices by the tokens that
    come from the layer before: a matching of most weight.

    Args:
        loads: ``[L, E]`` that a placement is for.
        ids: Choices ``[N, L, k]`` of tokens that are like those to come.
        devices: D.
        slack: The busiest device may have so much more than the mean, or what `greedy` gives it; never more
            than `round_robin` does.
        seed: Of the bisections.
    """
    layers, experts = loads.shape
    packed = greedy(loads, devices).device
    dealt = round_robin(layers, experts, devices).device
    pairs, moves = together(ids, experts), passing(ids, experts)
    out = packed.copy()
    for layer in range(layers):
        load, weights = loads[layer], pairs[layer]
        most, least = (
            float(device_loads(load, rows[layer], devices).max()) for rows in (dealt, packed)
        )
        limit = max(least, min(most, (1 + slack) * load.sum() / devices)) * (1 + 1e-12)
        starts = [packed[layer]]
        sizes = np.bincount(packed[layer], minlength=devices).tolist()
        for turn in range(_SEEDS):
            parts = bisected(graph_of(weights), sizes, seed + turn)
            row = np.empty(experts, np.int64)
            for device, part in enumerate(parts):
                row[part] = device
            starts.append(_levelled(load, row, devices, limit))
        fit = [s for s in starts if device_loads(load, s, devices).max() <= limit]
        refined = [_gathered(load, weights, row, devices, limit) for row in fit]
        out[layer] = max(refined, key=lambda row: _inside(weights, row))
        if layer:
            out[layer] = _assigned(moves[layer - 1], out[layer - 1], out[layer], devices)
    return Placement("partition", out, devices)


def _inside(weights: Counts, device: Devices) -> int:
    """Return the co-activations, twice each, of pairs on one device."""
    return int(weights[device[:, None] == device[None]].sum())


def _gathered(
    load: Floats, weights: Counts, device: Devices, devices: int, limit: float
) -> Devices:
    """Let pairs of experts change places, the best ones first, while more lies together within the limit."""
    device = device.copy()
    rows = np.arange(len(load))
    for _ in range(10 * len(load)):
        near = weights @ (device[:, None] == np.arange(devices))  # of each expert with each device
        own = near[rows, device]
        gain = near[:, device] - own[:, None]
        gain = gain + gain.T - 2 * weights
        totals = device_loads(load, device, devices)[device]
        more = load[None] - load[:, None]
        after = (
            totals[:, None] + more
        )  # of the first one's device; that of the other one's is after.T
        fits = (np.maximum(after, after.T) <= limit) & (device[:, None] != device[None])
        gain = np.where(fits, gain, 0)
        i, j = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[i, j] <= 0:
            break
        device[i], device[j] = device[j], device[i]
    return device


def _assigned(moves: Counts, before: Devices, part: Devices, devices: int) -> Devices:
    """Name the parts of a layer so that as many tokens as possible stay where they are."""
    import networkx as nx

    side = np.arange(devices)
    stay = (before[:, None] == side).T.astype(np.int64) @ moves @ (part[:, None] == side)
    graph = nx.Graph()
    graph.add_nodes_from((("part", int(p)) for p in side), bipartite=0)
    graph.add_weighted_edges_from(
        (("part", int(p)), ("device", int(d)), -int(stay[d, p])) for p in side for d in side
    )
    match = nx.bipartite.minimum_weight_full_matching(graph, [("part", int(p)) for p in side])
    names = np.array([match["part", int(p)][1] for p in side], np.int64)
    return names[part]


def judge(placement: Placement, forecast: Floats, later: LoadTrace) -> Judged:
    """Return what a placement gives: by the forecast ``[L, E]``, and for what really came."""
    devices = placement.devices
    predicted, replayed, by_step = [], [], []
    for layer, row in enumerate(placement.device):
        counts = later.counts[:, layer].astype(np.float64)
        steps = device_loads(counts, row, devices)
        predicted.append(_uneven(device_loads(forecast[layer], row, devices)))
        replayed.append(_uneven(steps.sum(0)))
        total = steps.sum()
        by_step.append(float(steps.max(-1).sum() * devices / total) if total else math.nan)
    fan_out = crossing = None
    if later.ids is not None and len(later.ids):
        places = np.stack([row[later.ids[:, i]] for i, row in enumerate(placement.device)], 1)
        ordered = np.sort(places, -1)
        fan_out = float((1 + (np.diff(ordered, axis=-1) != 0).sum(-1)).mean())
        if places.shape[1] > 1:
            crossing = float((places[:, :-1, :, None] != places[:, 1:, None, :]).mean())
    return Judged(
        float(np.mean(predicted)), float(np.nanmean(replayed)), float(np.nanmean(by_step)), fan_out, crossing
    )  # fmt: skip


def _uneven(loads: Floats) -> float:
    return float(loads.max() * len(loads) / loads.sum()) if loads.sum() else math.nan
