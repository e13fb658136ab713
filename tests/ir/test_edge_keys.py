"""Bounds of caches whose kernels may round refuse a result without one key at an edge, at any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mimo_compile.ir import kv_groups, kv_rounding
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.batches import further
from mimo_compile.ir.ops.block_lists import listed_keys
from mimo_compile.ir.ops.cached_attention import attend_seen
from mimo_compile.ir.ops.edge_keys import (
    edges_of_lists,
    edges_of_range,
    largest,
    weights_of_edges,
)
from mimo_compile.ir.ops.numerics import bf16_to_f32
from mimo_compile.ir.ops.pages import row_of

DENSE, SPARSE = get_op("cached_attention"), get_op("sparse_attention")
LENGTHS = [64, 1024, pytest.param(16384, marks=pytest.mark.slow)]
HEADS = "t=1,h=8,kv=4,d=32,dv=16"


def made(op, text):
    """Return the workload's parameters, inputs, reference and bound."""
    workload = parse_workload(text)
    inputs = op.make_inputs(workload, np.random.default_rng(3))
    want = op.reference(workload, inputs)
    return op.full(workload), inputs, want["out"], op.bound(workload, inputs, want)["out"]


def attended(p, inputs, k, v, seen):
    """Return what the one query finds among keys that it sees, in float64."""
    q = torch.from_numpy(inputs["q"]).double()
    v = torch.where(seen[0][:, None, None], v.double(), 0)
    return attend_seen(q, k.double(), v, seen, 1, None, p["d"] ** -0.5).numpy()


def refuses(p, inputs, want, bound, k, v, seen, keys):
    """Assert that all keys give the reference, and that each of `keys` is missed."""
    assert np.allclose(attended(p, inputs, k, v, seen), want)
    for key in keys:
        assert seen[0, key]
        less = seen.clone()
        less[0, key] = False
        off = np.abs(attended(p, inputs, k, v, less) - want) / bound
        assert off.max() > 1.1, f"without key {key}: {off.max():.3g} of the bound"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("windowed", [False, True])
def test_bfloat16(length, windowed):
    shape = f"cap={length + 70},window={length},len={3 * length}" if windowed else f"cap={length}"
    p, inputs, want, bound = made(DENSE, f"cached_attention:{HEADS},c=bf16,{shape}")
    query = int(inputs["pos"][0])
    visible = np.arange(query - length + 1, query + 1) if windowed else np.arange(length)
    k, v = (torch.from_numpy(bf16_to_f32(inputs[n])[visible % p["cap"]]) for n in
            ("k_cache", "v_cache"))  # fmt: skip
    refuses(
        p, inputs, want, bound, k, v, torch.ones((1, length), dtype=torch.bool), [0, length - 1]
    )
    if windowed:  # a key too many
        more = np.r_[visible[0] - 1, visible]
        k, v = (torch.from_numpy(bf16_to_f32(inputs[n])[more % p["cap"]]) for n in
                ("k_cache", "v_cache"))  # fmt: skip
        got = attended(p, inputs, k, v, torch.ones((1, length + 1), dtype=torch.bool))
        assert (np.abs(got - want) > bound).any()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("c", sorted(kv_groups.GROUPED))
def test_groups(length, c):
    text = f"cached_attention:{HEADS},c={c},cap={2 * length},len={length + 21}"
    p, inputs, want, bound = made(DENSE, text)
    states = {n: torch.from_numpy(inputs[n]) for n in kv_groups.STATES}
    pos = torch.from_numpy(inputs["pos"])
    k, v, seen = kv_groups.visible(states, pos, 1, kv_groups.GROUPED[c], torch.float64)
    keys = [0, length - 1, length, length + 20]
    refuses(p, inputs, want, bound, k, v, seen, keys)


@pytest.mark.parametrize(
    "c", ["i2", *(pytest.param(c, marks=pytest.mark.slow) for c in ("i4", "i8"))]
)
def test_a_group_without_codes_among_hundreds_is_refused(c):
    # of a kernel that does all else right, exactly or by integers
    text = f"cached_attention:t=1,h=4,kv=2,d=64,dv=64,c={c},cap=32768"
    p, inputs, want, bound = made(DENSE, text)
    for wrong in ("k_cache", "v_cache"):
        codes = inputs[wrong].copy()
        codes[64 * 200 : 64 * 201] = 0
        other, fmt = {**inputs, wrong: codes}, kv_groups.GROUPED[c]
        given = {n: torch.from_numpy(a) for n, a in other.items()}
        exact = DENSE.reference(parse_workload(text), other)["out"]
        rounded = kv_rounding.attend_rounded(given, p["d"] ** -0.5, fmt, None).numpy()
        for got in (exact, rounded):
            assert (np.abs(got - want) > bound).any()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("lists", ["block=16", "block=64,window=40", "block=1,hs=1"])
def test_lists(length, lists):
    size = int(lists.split(",")[0].split("=")[1])
    heads = "" if "hs" in lists else "hs=4,"
    text = f"sparse_attention:{HEADS},{heads}{lists},c=bf16,cap={2 * length},page=16"
    text += f",pool={length // 8 + 1}"
    p, inputs, want, bound = made(SPARSE, f"{text},kmax={length // size}")
    query = int(inputs["pos"][0])
    k, v = (bf16_to_f32(inputs[n]) for n in ("k_cache", "v_cache"))
    edges = edges_of_lists(inputs["idx"], inputs["cnt"], [(0, query)], size, p["window"])
    loud = 0
    for head in range(p["kv"]):
        mine = head * p["hs"] // p["kv"]
        ids = torch.from_numpy(inputs["idx"][0, mine][: inputs["cnt"][0, mine]])
        seen = listed_keys(ids, query, size, p["window"]).numpy()
        slots = row_of(inputs["pages"][0], 16, 1, seen)
        if np.abs(v[slots, head]).max() < 8:  # every other head has plain values alone
            continue
        loud += 1
        rows = slice(2 * head, 2 * head + 2)
        refuses(
            p, {"q": inputs["q"][:, rows]}, want[:, rows], bound[:, rows],
            *(torch.from_numpy(a[slots, head][:, None]) for a in (k, v)),
            torch.ones((1, len(seen)), dtype=torch.bool), np.searchsorted(seen, edges[mine]),
        )  # fmt: skip
        assert {0, len(seen) - 1} <= set(np.searchsorted(seen, edges[mine]).tolist())
    assert loud == 2


@pytest.mark.parametrize("c", ["bf16", "i8", "i4"])
def test_values_of_other_keys_between_the_edges_are_refused(c):
    text = f"cached_attention:t=1,h=4,kv=2,d=32,dv=16,c={c},cap=4096"
    _, inputs, want, bound = made(DENSE, text)
    other = {n: a.copy() for n, a in inputs.items()}
    for name in {"v_cache", "v_scale"} & set(inputs):
        other[name][1024:1088] = inputs[name][1088:1152]
    got = DENSE.reference(parse_workload(text), other)["out"]
    assert (np.abs(got - want) > bound).any()


def other_values(inputs, names, first, count):
    """Return inputs whose values at some positions are those of the next ones."""
    other = {n: a.copy() for n, a in inputs.items()}
    for name in names:
        other[name][first : first + count] = inputs[name][first + count : first + 2 * count]
    return other


@pytest.mark.parametrize("length", [4096, pytest.param(16384, marks=pytest.mark.slow)])
def test_a_single_head_shows_edges_and_what_lies_between_in_every_draw(length):
    """The bound of kernels that may round refuses a missed key, that of exact ones 16 values of others."""
    workload = parse_workload(f"cached_attention:t=1,h=2,kv=1,d=32,dv=17,c=bf16,cap={length}")
    p, halves = DENSE.full(workload), set()
    for seed in range(5):
        inputs = DENSE.make_inputs(workload, np.random.default_rng(seed))
        want = DENSE.reference(workload, inputs)
        exact, bound = (
            DENSE.exact_bound(workload, inputs, want),
            DENSE.bound(workload, inputs, want),
        )
        k, v = (torch.from_numpy(bf16_to_f32(inputs[n])) for n in ("k_cache", "v_cache"))
        seen = torch.ones((1, length), dtype=torch.bool)
        refuses(p, inputs, want["out"], bound["out"], k, v, seen, [0, length - 1])
        middle = length // 2
        got = DENSE.reference(workload, other_values(inputs, ["v_cache"], middle, 16))["out"]
        off = np.abs(got - want["out"]) / exact["out"]
        assert off.max() > 1.1, f"seed {seed}: {off.max():.3g} of the bound"
        halves.add(bool(off[..., :8].max() > off[..., 8:].max()))
    assert halves == {True, False}, "either half is heavy"


@pytest.mark.parametrize(
    "c", ["i4", *(pytest.param(c, marks=pytest.mark.slow) for c in ("i2", "i8"))]
)
def test_a_single_head_of_groups_shows_a_group_in_every_draw(c):
    text = f"cached_attention:t=1,h=2,kv=1,d=32,dv=128,c={c},cap=4096"
    workload = parse_workload(text)
    for seed in range(3):
        inputs = DENSE.make_inputs(workload, np.random.default_rng(seed))
        want = DENSE.reference(workload, inputs)
        got = DENSE.reference(workload, other_values(inputs, ["v_cache", "v_scale"], 1024, 64))[
            "out"
        ]
        for bound in (DENSE.bound, DENSE.exact_bound):
            assert (np.abs(got - want["out"]) > bound(workload, inputs, want)["out"]).any()


@pytest.mark.parametrize(
    ("c", "cap"),
    [("i4", 2048), *(pytest.param(c, 32768, marks=pytest.mark.slow) for c in ("i2", "i8"))],
)
def test_what_is_verified_shows_both_of_a_single_head_with_one_scale(c, cap):
    """The first case of each seed refuses a missed key, the second one a group with values of another."""
    workload = parse_workload(f"cached_attention:t=1,h=4,kv=1,d=64,dv=64,c={c},cap={cap}")
    p = DENSE.full(workload)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        missed, wrong, values = [], [], []
        inputs = DENSE.make_inputs(workload, rng)
        for given in (inputs, further(DENSE, workload, inputs, rng)):
            want = DENSE.reference(workload, given)
            bound = DENSE.bound(workload, given, want)["out"]
            states = {n: torch.from_numpy(given[n]) for n in kv_groups.STATES}
            k, v, seen = kv_groups.visible(
                states, torch.from_numpy(given["pos"]), 1, kv_groups.GROUPED[c], torch.float64
            )
            less = seen.clone()
            less[0, 0] = False
            off = np.abs(attended(p, given, k, v, less) - want["out"]) / bound
            missed.append(bool(off.max() > 1))
            other = other_values(given, ["v_cache", "v_scale"], 640, 64)
            off = np.abs(DENSE.reference(workload, other)["out"] - want["out"]) / bound
            wrong.append(bool(off.max() > 1))
            values.append(float(v[seen[0]].abs().max()))
        assert missed[0] and wrong[1], f"seed {seed}: missed {missed}, wrong {wrong}"
        assert values[0] > 10 * values[1], f"seed {seed}: values of both are alike"


def test_parts_that_have_one_factor():
    rng = np.random.default_rng(0)
    numbers = rng.random((3, 4, 7), np.float32)
    assert (largest(numbers, 2) == numbers.max((0, 2), keepdims=True)).all()
    by_half = largest(numbers, 1)
    assert by_half.shape == (1, 4, 7)
    for part in (slice(3), slice(3, 7)):
        assert (by_half[..., part] == numbers[..., part].max((0, 2), keepdims=True)).all()
    for dv in (2, 7, 64):
        factors = weights_of_edges(1, dv, 100, rng)
        assert factors.shape == (1, dv) and set(np.unique(factors)) == {1.0, 40.0}
        assert abs(int((factors > 1).sum()) - dv / 2) <= 0.5
        assert (largest(factors[None], 1) == factors).all()


@pytest.mark.parametrize(
    ("dv", "first"), [(1, 0), (20, 0), (64, 0), (80, 64), (128, 64), (200, 64)]
)
def test_columns_that_share_a_scale_have_one_factor(dv, first):
    """Of a head with one scale all columns are heavy, or none."""
    seen = set()
    for seed in range(9):
        factors = weights_of_edges(1, dv, 100 + seed % 2, np.random.default_rng(seed), 64)
        wide = np.broadcast_to(factors, (1, dv))
        cuts = np.flatnonzero(np.diff(wide[0])) + 1
        assert cuts.tolist() == ([first] if first else [])
        assert (largest(wide[None], 1, 64) == wide).all()
        seen.add(float(wide[0, 0]) > 1)
        if not first:
            assert bool(wide[0, 0] > 1) == (seed % 2 == 0)
    assert seen == {True, False}


def test_edges():
    assert edges_of_range(0, 1, 0) == [0]
    assert edges_of_range(9, 1, 4) == [5, 6, 9]
    assert edges_of_range(8, 3, 0) == [0, 8, 9, 10]
    assert edges_of_range(70, 1, 0, 64) == [0, 63, 64, 70]
    idx = np.array([[[0, 2, 3, -1]]], np.int32)
    assert edges_of_lists(idx, np.array([[3]]), [(0, 14)], 4, 2) == [[0, 3, 8, 14]]
