"""Every system keeps the contract by its own lists; each system's own promises are in the other files."""

from __future__ import annotations

import contract
import numpy as np
import pytest
from contract import OP
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import PLENTY, SMALL, case, choose, layer

from mimo_compile.ir.caches import slot_of
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.policies import Geometry, parse_policy

draws = st.tuples(
    st.sampled_from([1, 3]), st.integers(4, 40), st.integers(0, 2**31), st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 3]), st.sampled_from([0, 1]),
)  # fmt: skip


def drawn_layer(draw):
    t, length, seed, kv, group, sink = draw
    return layer(t, length, seed, kv=kv, group=group, sink=sink)


@pytest.mark.parametrize("text", SMALL)
def test_contract_with_its_own_lists(text) -> None:
    @settings(max_examples=4)
    @given(draws)
    def run(draw) -> None:
        made = case(text, drawn_layer(draw))
        for check in contract.CHECKS:
            check(OP.reference, made)
        if made.p["sink"]:
            contract.check_sink(OP.reference, made)

    run()


@pytest.mark.parametrize("text", PLENTY)
def test_nothing_to_drop_is_dense(text) -> None:
    @settings(max_examples=8)
    @given(draws)
    def run(draw) -> None:
        made = case(text, drawn_layer(draw))
        full = contract.dense(contract.everything(made))
        got = OP.reference(made.workload, made.inputs)
        np.testing.assert_allclose(got["out"], full[0], atol=1e-12)
        np.testing.assert_allclose(got["lse"], full[1], atol=1e-12)

    run()


@pytest.mark.parametrize("text", [t for t in SMALL if not t.startswith("sale")])
def test_selection_is_causal(text) -> None:
    """Other keys behind a token change neither its list nor its output.

    A tile of SALE peeks by design: it chooses, but attention itself is causal whatever it chooses
    (`check_future_is_unseen`).
    """

    @settings(max_examples=8)
    @given(draws.filter(lambda d: d[0] > 1))
    def run(draw) -> None:
        whole = drawn_layer(draw)
        g, policy = whole.g, parse_policy(text)
        other = whole.changed_behind(g.length - g.t)
        one, two = choose(policy, whole), choose(policy, other)
        np.testing.assert_array_equal(one["idx"][0], two["idx"][0])
        first, second = (case(text, x) for x in (whole, other))
        out = [OP.reference(c.workload, c.inputs)["out"][0] for c in (first, second)]
        np.testing.assert_array_equal(*out)

    run()


@pytest.mark.parametrize("text", [t for t in SMALL if not t.startswith("hysparse:")])
def test_a_token_sees_itself(text) -> None:
    @settings(max_examples=8)
    @given(draws)
    def run(draw) -> None:
        whole = drawn_layer(draw)
        seen = contract.visible(case(text, whole))
        own = np.arange(whole.g.length - whole.g.t, whole.g.length)
        assert seen[np.arange(whole.g.t), :, own].all()

    run()


@settings(max_examples=15)
@given(draws)
def test_tailorkv_lists_sinks_the_last_tokens_and_each_once(draw) -> None:
    whole = drawn_layer(draw)
    lists = choose(parse_policy("tailorkv:channels=2,budget=9,sink=2,recent=3,span=4"), whole)
    for t, p in enumerate(range(whole.g.length - whole.g.t, whole.g.length)):
        for row, count in zip(lists["idx"][t], lists["cnt"][t], strict=True):
            seen = row[:count].tolist()
            assert {0, min(1, p), p, max(p - 1, 0), max(p - 2, 0)} <= set(seen)
            assert len(set(seen)) == len(seen) == min(9, p + 1)


def test_a_larger_budget_of_exact_probabilities_drops_less() -> None:
    whole = layer(1, 40, 3)
    dropped = []
    for budget in (4, 8, 16, 40):
        made = case(f"hysparse:block=4,budget={budget}", whole)
        prob = contract.dense(contract.everything(made))[2]
        dropped.append(np.where(contract.visible(made), 0, prob).sum(-1).max())
    assert dropped == sorted(dropped, reverse=True) and dropped[-1] == 0 < dropped[0]


def test_workloads_of_published_sizes() -> None:
    g = Geometry(t=1, h=32, kv=8, d=128, dv=128, cap=65536)
    steps = parse_policy("quest").workloads(g)
    assert str(steps.score) == (
        "score_blocks:t=1,h=32,kv=8,d=128,cap=65536,kind=quest,agg=max,block=16"
    )
    assert str(steps.attend).endswith("cap=65536,hs=8,block=16,kmax=64")
    hysparse = parse_policy("hysparse").workloads(g)
    assert "kmax=16" in str(hysparse.attend) and "window=128" in str(hysparse.beside[0])
    assert "hs=1,block=1,kmax=2048" in str(parse_policy("lessismore").workloads(g).attend)
    assert "kmax=1152" in str(parse_policy("hysparse2").workloads(g).attend)
    full = parse_policy("full").workloads(g)
    assert full.score is None and str(full.attend).startswith("cached_attention:t=1")
    stream = parse_policy("stream").workloads(g)
    assert "window=1020" in str(stream.attend)
    assert str(stream.attend).endswith("len=65536,first=16")
    assert "cap=1040,hs=1,block=4,kmax=1,len=65536,first=16" in str(stream.beside[0])
    assert not parse_policy("stream:rolling=0").workloads(g).beside
    ring = str(parse_policy("window").workloads(g).attend)
    assert ring.endswith("cap=128,window=128,len=65536")


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(3, 40), st.integers(0, 2**31))
def test_stream_as_a_mask_is_banded_dense(t, length, seed) -> None:
    """The sinks are the only block of the list, the window is the op's own."""
    whole, a = layer(t, length, seed), layer(t, length, seed).arrays
    g = whole.g
    attend = parse_policy("stream:sink=4,recent=6,rolling=0").workloads(g).attend
    start = g.length - g.t
    inputs = {
        "q": a["q"], "pos": np.array([start, g.t], np.int32), "k_cache": a["k"], "v_cache": a["v"],
        "idx": np.zeros((g.t, 1, 1), np.int32), "cnt": np.ones((g.t, 1), np.int32),
    }  # fmt: skip
    made = contract.Case(attend.replace(cap=g.cap, first=0), inputs)
    i, j = start + np.arange(g.t)[:, None, None], np.arange(g.cap)
    band = np.broadcast_to((j <= i) & ((j < 4) | (j > i - 6)), (g.t, g.h, g.cap))
    out, lse, _ = contract.dense(made, band)
    p = OP.full(attend)
    slots = slot_of(np.arange(g.length), p["cap"], p["first"])  # a later position takes a slot over
    for name, all_of in (("k_cache", a["k"]), ("v_cache", a["v"])):
        inputs[name] = np.full((p["cap"], *all_of.shape[1:]), np.nan, np.float32)
        for position, slot in enumerate(slots):
            inputs[name][slot] = all_of[position]
    contract.agree(contract.Case(attend, inputs), OP.reference(attend, inputs), out, lse)


@settings(max_examples=10)
@given(st.integers(10, 30), st.integers(0, 2**31))
def test_branches_of_hysparse_overlap_by_design(length, seed) -> None:
    """A token in the list and in the window counts in both softmaxes; each branch has its own keys."""
    whole, other = layer(1, length, seed, sink=1), layer(1, length, seed + 1, sink=1)
    made = case("hysparse:block=4,budget=64,window=5", whole)
    listed = OP.reference(made.workload, made.inputs)
    beside = parse_policy("hysparse:block=4,budget=64,window=5").workloads(whole.g).beside[0]
    window = get_op(beside.op)
    ring = {n: np.zeros((5, 2, d), np.float32) for n, d in (("k_cache", 6), ("v_cache", 5))}
    for j in range(length - 5, length):
        ring["k_cache"][j % 5], ring["v_cache"][j % 5] = other.arrays["k"][j], other.arrays["v"][j]
    pos = np.array([length - 1, 1], np.int32)
    near = {"q": whole.arrays["q"], "pos": pos, "sink": other.arrays["sink"], **ring}
    got = window.reference(beside, near)["out"]
    plain = dict(made.inputs, k_cache=other.arrays["k"], v_cache=other.arrays["v"])
    seen = np.zeros((1, whole.g.h, whole.g.cap), bool)
    seen[..., length - 5 : length] = True
    alone = contract.Case(made.workload, plain).having(cap=whole.g.cap, SINK=other.arrays["sink"])
    np.testing.assert_allclose(got, contract.dense(alone, seen)[0], atol=1e-12)
    np.testing.assert_allclose(
        listed["out"], contract.dense(contract.everything(made))[0], atol=1e-12
    )
    assert not np.allclose(got, listed["out"])
