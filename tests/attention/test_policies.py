"""Policies: their text, the plans that the papers give, what they keep and what they need."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.frontend.models.attend import Selecting
from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.ir.policies import POLICIES, LayerRole, get_policy, parse_policy
from mimo_compile.ir.policies.tailorkv import mass_outside

NOT_DEFAULT = [
    "model", "full", "window:size=512,every=4", "stream:sink=8,recent=100,rolling=0",
    "quest:budget=512,page=32,least=4,dense=0,per=head", "seer:threshold=0.004,block=16,block_pos=last",
    "lessismore:budget=1024,recent=0.5,sink=2,correct=20", "resa:p=0.2,block=32,f=64,heads=max",
    "sale:tau=0.004,bits=8,bq=32,bk=16,sink=16,local=64", "hysparse:every=4,budget=512,gate=head",
    "hysparse2:tokens=512,bridge=0", "tailorkv:channels=12,budget=960,quantised=2,bits=4",
    "nsa:n=8,window=256", "moba:block=128,k=12", "dsa:k=512,heads=4,width=32",
    "quest:budget=512+int8", "full+int8half",
]  # fmt: skip


def kinds(text, layers, **more):
    return [role.kind for role in parse_policy(text).plan(layers, **more)]


def where(text, layers, kind):
    return [i for i, k in enumerate(kinds(text, layers)) if k == kind]


def test_every_name_has_a_policy_whose_text_comes_back() -> None:
    assert {text.partition(":")[0].partition("+")[0] for text in NOT_DEFAULT} == set(POLICIES)
    for text in [*POLICIES, *NOT_DEFAULT]:
        policy = parse_policy(text)
        assert parse_policy(str(policy)) == policy
        assert get_policy(policy.name) is type(policy) and hash(policy) == hash(parse_policy(text))
    for text in POLICIES:
        assert str(parse_policy(text)) == text
    assert str(parse_policy("quest:page=16,budget=9")) == "quest:budget=9"
    assert parse_policy("quest+int8").arithmetic == "int8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quset", "unknown attention 'quset'.*choose from model, full"),
        ("quest:", "at ''"),
        ("quest:budget", "at 'budget'"),
        ("quest:size=3", "quest has no argument 'size'.*it takes budget, page"),
        ("full:size=3", "it takes none"),
        ("quest:budget=ten", "budget=ten is not a whole number"),
        ("resa:p=x", "p=x is not a number"),
        ("quest:budget=1,budget=2", "given twice"),
        ("quest:budget=0", "budget=0 is below 1"),
        ("quest:per=layer", "per=layer is unknown.*group, head"),
        ("quest+int4", "write \\+int8 or \\+int8half"),
        ("quest+float", "write \\+int8"),
        ("quest:arithmetic=int8", "no argument 'arithmetic'"),
        ("resa:p=1.5", "above 1"), ("lessismore:recent=2", "above 1"),
        ("resa:p=nan", "no number"), ("lessismore:recent=nan", "no number"), ("resa:p=inf", "above"),
        ("quest:budget=99999999999999999999999", "budget=9+ is above 268435456"),
        ("stream:recent=3000000000", "above"), ("stream:sink=3000000000", "above"),
        ("moba:block=3000000000", "above"), ("stream:rolling=5", "rolling=5 is above 1"),
        ("tailorkv:budget=60", "below sink \\+ recent = 64"),
        ("tailorkv:bits=3", "bits=3 is none of 1, 2, 4, 8"),
        ("tailorkv:classes=c.json,quantised=2", "quantised=2 does nothing beside classes=c.json"),
        ("sale:sink=40", "multiples of bk=32"), ("nsa:stride=12", "stride=12"),
    ],
)  # fmt: skip
def test_one_clear_error_for_each_mistake(text, message) -> None:
    with pytest.raises(UsageError, match=message):
        parse_policy(text)


@given(st.integers(1, 4000), st.integers(1, 100))
def test_quest_leaves_nothing_of_a_budget_out(budget, page) -> None:
    """A context as long as the budget is seen whole."""
    policy = parse_policy(f"quest:budget={budget},page={page}")
    assert policy.select is not None and policy.select.k >= -(-budget // page)
    assert policy.sees_all >= budget


# -- plans -------------------------------------------------------------------------------------


def test_plan_of_mimo_v2_flash() -> None:
    assert where("window", 48, "full") == [0, 5, 11, 17, 23, 29, 35, 41, 47]
    assert len(where("window", 48, "window")) == 39


def test_plans_of_hysparse() -> None:
    assert where("hysparse", 49, "select") == [0, 12, 24, 36, 48]
    plan = parse_policy("hysparse").plan(49)
    assert all(r.list_of == r.cache_of == i // 12 * 12 for i, r in enumerate(plan))
    assert [r.window for r in plan].count(128) == 44
    dense36 = where("hysparse:every=4", 36, "select")
    assert dense36 == [*range(0, 36, 4), 35] and len(dense36) == 10


def test_plan_of_hysparse2() -> None:
    plan = parse_policy("hysparse2").plan(49)
    assert [i for i, r in enumerate(plan) if r.kind == "full"] == [0, 12, 24]
    assert [i for i, r in enumerate(plan) if r.kind == "select"] == [25, 37, 48]
    assert {r.hidden_of for r in plan if r.kind == "select"} == {24}
    assert all(r.kind == "window" and r.window == 128 for r in plan[1:12])
    assert {(r.list_of, r.cache_of) for r in plan[26:37]} == {(25, 25)}
    assert where("hysparse2:bridge=0", 49, "select") == [0, 12, 24, 36, 48]


def test_plan_of_lessismore() -> None:
    plan = parse_policy("lessismore").plan(36)
    assert [r.kind for r in plan[:4]] == ["full", "full", "select", "reuse"]
    assert [i for i, r in enumerate(plan) if r.kind == "select"] == [2, 12]
    assert all(r.dense for r in plan if r.kind in ("full", "select"))
    assert [r.list_of for r in plan[2:]] == [2] * 10 + [12] * 24
    assert [r.cache_of for r in plan] == list(range(36))  # lists are shared, caches are not
    assert where("lessismore:correct=20", 10, "select") == [2]


def test_plans_of_layers_that_decide_alone() -> None:
    assert kinds("quest", 4) == ["full", "full", "select", "select"]
    assert kinds("tailorkv:quantised=2", 3) == ["quantised", "quantised", "select"]
    assert kinds("seer:start=1", 2) == ["full", "select"]
    assert kinds("full", 2) == kinds("model", 2) == ["full"] * 2
    assert kinds("stream", 2) == ["window"] * 2
    for name in ("resa", "sale", "moba", "nsa", "dsa"):
        assert kinds(name, 3) == ["select"] * 3
    hybrid = [0, 128, 128, 0]
    assert kinds("quest:dense=0", 4, windows=hybrid) == ["select", "window", "window", "select"]
    assert parse_policy("full").plan(4, hybrid)[1].window == 128


@pytest.mark.parametrize("text", ["lessismore", "hysparse", "hysparse2", "window"])
def test_shared_lists_refuse_windows_of_the_model(text) -> None:
    with pytest.raises(UsageError, match="layer 1 of this model has a window"):
        parse_policy(text).plan(3, [0, 64, 0])
    with pytest.raises(UsageError, match="needs layers"):
        parse_policy(text).plan(0)


@settings(max_examples=60)
@given(st.sampled_from(NOT_DEFAULT + list(POLICIES)), st.integers(1, 60))
def test_plans_are_causal(text, layers) -> None:
    """A layer follows only lists and caches of itself or of layers before it that have them."""
    plan = parse_policy(text).plan(layers)
    assert len(plan) == layers
    for i, role in enumerate(plan):
        assert role.cache_of <= i and (role.list_of is None) == (
            role.kind not in ("select", "reuse")
        )
        if role.list_of is not None:
            assert role.list_of <= i and plan[role.list_of].kind == "select"
        if role.kind == "reuse":
            assert role.list_of != i
        assert plan[role.cache_of].cache_of == role.cache_of
        assert role.hidden_of is None or role.hidden_of < i


# -- numbers of the papers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "share"), [("quest", 1 / 16), ("resa", 1 / 16), ("moba", 1 / (2 * 512))]
)
def test_descriptors_weigh_what_the_papers_say(text, share) -> None:
    spec, cap = LayerSpec(heads=32, kv_heads=8, d=128, dv=128), 32768
    keeps = Selecting(parse_policy(text), LayerRole("select", False, 0, 0), lends=False)
    kept = keeps.states(spec, cap, torch.float32)
    cache = cap * spec.kv_heads * (spec.d + spec.dv)
    assert sum(array.numel() for array in kept.values()) / cache == share


def test_resa_runs_the_right_tokens_again() -> None:
    """The last f positions whose keys exist; a token sampled in this step has none yet."""
    resa = parse_policy("resa:f=4")
    assert [resa.rectified(n, 10) for n in range(9)] == [None] * 4 + [(10, 14)] + [None] * 3 + [
        (14, 18)
    ]
    assert parse_policy("resa:f=1").rectified(1, 10) == (10, 11)
    assert parse_policy("resa:f=0").rectified(4, 10) is None


def test_lessismore_gives_up_sinks_that_do_not_fit() -> None:
    wide, narrow = (parse_policy(f"lessismore:{a}").select for a in ("budget=16", "budget=8"))
    assert (wide.first, wide.last) == (0, 4) and (narrow.first, narrow.last) == (0, 2)
    usual = parse_policy("lessismore").select
    assert (usual.first, usual.last, usual.k) == (4, 508, 2048)


def test_tailorkv_classifies_by_mass_outside_of_the_best() -> None:
    uniform, peaked = np.full((2, 32, 400), 1 / 400), np.zeros((2, 32, 400))
    peaked[..., 7] = 1
    assert mass_outside(uniform) == pytest.approx(0.95) and mass_outside(peaked) == 0
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(400, 0.05), (2, 32))
    shares = [mass_outside(weights, s) for s in (0.01, 0.05, 0.2, 1.0)]
    assert shares == sorted(shares, reverse=True) and shares[-1] == pytest.approx(0, abs=1e-12)
    mixed = [mass_outside((1 - part) * peaked + part * uniform) for part in (0.17, 0.25)]
    policy = replace(parse_policy("tailorkv:classes=c.json"), outside=tuple(mixed))
    assert [role.kind for role in policy.plan(2)] == ["select", "quantised"]  # both sides of 0.2
    assert policy.spread(1) == mixed[1] and parse_policy("tailorkv").spread(1) == 0
    with pytest.raises(UsageError, match="without any mass"):
        mass_outside(np.zeros((1, 1, 4)))


def test_parsing_is_light() -> None:
    code = """
import sys
from mimo_compile.ir.policies import parse_policy, POLICIES
for name in POLICIES:
    parse_policy(name).plan(8)
assert not {"torch", "tvm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
