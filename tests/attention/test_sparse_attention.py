"""The contract of sparse attention, kept by the op's reference and its eager torch op."""

from __future__ import annotations

import contract
import numpy as np
import pytest
import torch
from contract import OP, Case, cases
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.ops.cached_attention import attend as plain_attend
from mimo_compile.ir.ops.sparse_attention import sparse_attention


def eager(workload, inputs):
    """Run the float32 torch op."""
    p = OP.full(workload)
    t = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items()}
    if p["c"] == "bf16":
        t |= {name: t[name].view(torch.bfloat16) for name in ("k_cache", "v_cache")}
    out, lse = torch.ops.mimo.sparse_attention(
        t["q"], t["k_cache"], t["v_cache"], t["pos"], t["idx"], t["cnt"],
        t["sink"] if p["sink"] else None, p["block"], p["rows"], OP.softmax_scale(p), p["window"], 0,
        t.get("pages"), p["cap"], p["page"],
    )  # fmt: skip
    return {"out": out.numpy(), "lse": lse.numpy()}


IMPLEMENTATIONS = {"reference": OP.reference, "eager": eager}


@pytest.mark.parametrize("attend", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda c: c.__name__[6:])
def test_contract(check, attend) -> None:
    @settings(max_examples=20)
    @given(st.sampled_from(["f32", "bf16"]).flatmap(lambda c: cases(c=c)))
    def run(case: Case) -> None:
        check(attend, case)

    run()


@pytest.mark.parametrize("attend", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_sink_identity_and_bad_lists(attend) -> None:
    @settings(max_examples=20)
    @given(cases(sink=True))
    def run(case: Case) -> None:
        contract.check_sink(attend, case)
        contract.check_bad_lists_are_refused(attend, case)

    run()


@settings(max_examples=25)
@given(cases())
def test_full_lists_equal_cached_attention(case: Case) -> None:
    """Dense attention is the special case, by the op that models use for it."""
    full = contract.everything(contract.unpaged(case) if case.p["page"] else case)
    got, i = OP.reference(full.workload, full.inputs), full.inputs
    sink = torch.from_numpy(i["sink"]) if full.p["sink"] else None
    q, k, v = (torch.from_numpy(i[n]).double() for n in ("q", "k_cache", "v_cache"))
    want = plain_attend(q, k, v, torch.from_numpy(i["pos"]), sink, full.p["d"] ** -0.5, 0)
    np.testing.assert_allclose(got["out"], want.numpy(), atol=1e-12)


@settings(max_examples=25)
@given(cases())
def test_bound_refuses_a_missing_block_and_a_sink_added_twice(case: Case) -> None:
    want = OP.reference(case.workload, case.inputs)
    bound = OP.bound(case.workload, case.inputs, want)["lse"]
    finite = np.isfinite(want["lse"])
    prob = contract.dense(case)[2]
    short = case.inputs["cnt"] - 1
    if (short < 0).any() or case.p["window"]:
        return
    idx = np.where(np.arange(case.p["kmax"]) < short[..., None], case.inputs["idx"], -1)
    less = OP.reference(case.workload, case.inputs | {"idx": idx, "cnt": short})["lse"]
    seen = contract.visible(case.having(IDX=idx, CNT=short))
    matters = finite & (np.where(seen, 0.0, prob).sum(-1) > 1e-3)
    with np.errstate(invalid="ignore"):
        assert (np.abs(less - want["lse"])[matters] > bound[matters]).all()
    if case.p["sink"]:
        twice = np.logaddexp(want["lse"], case.inputs["sink"])
        share = np.exp(case.inputs["sink"] - np.where(finite, want["lse"], np.inf))
        assert (np.abs(twice - want["lse"]) > bound)[finite & (share > 1e-3)].all()


def test_fake_rule_and_export() -> None:
    workload = parse_workload("sparse_attention:t=2,h=4,kv=2,d=8,dv=4,cap=32,hs=2,block=4,kmax=3")
    i = {
        n: torch.from_numpy(a)
        for n, a in OP.make_inputs(workload, np.random.default_rng(0)).items()
    }
    args = (i["q"], i["k_cache"], i["v_cache"], i["pos"], i["idx"], i["cnt"], None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(sparse_attention, (*args, 4, 1, 0.5, 0), test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("h=3", "not a multiple of kv"), ("hs=3", "none of 1, kv and h"), ("len=40", "between t and"),
        ("page=5", "page=5 is not a multiple of 16"), ("block=0", "block=0 is below 1"),
    ],
)  # fmt: skip
def test_bad_workloads(change, message) -> None:
    good = dict(t="1", h="4", kv="2", d="8", dv="8", cap="32", hs="2", block="4", kmax="3")
    good[change.split("=")[0]] = change.split("=")[1]
    with pytest.raises(UsageError, match=message):
        parse_workload("sparse_attention:" + ",".join(f"{k}={v}" for k, v in good.items()))


def broken(how):
    """Return an implementation with one mistake."""

    def attend(workload, inputs):
        changed = dict(inputs)
        if how == "sees one key of the future":
            room = int(inputs["pos"].sum() < inputs["k_cache"].shape[0])
            changed["pos"] = inputs["pos"] + np.array([room, 0], np.int32)
        elif how == "forgets the last listed block":
            changed["cnt"] = np.maximum(inputs["cnt"] - 1, 0)
            keep = np.arange(inputs["idx"].shape[2]) < changed["cnt"][..., None]
            changed["idx"] = np.where(keep, inputs["idx"], -1)
        elif how == "takes the first list for all heads":
            changed["idx"] = np.repeat(inputs["idx"][:, :1], inputs["idx"].shape[1], 1)
            changed["cnt"] = np.repeat(inputs["cnt"][:, :1], inputs["cnt"].shape[1], 1)
        got = OP.reference(workload, changed)
        if how == "multiplies poison by zero":
            got["out"] = got["out"] + 0 * inputs["v_cache"].mean()
        elif how == "gives an lse to base 2":
            got["lse"] = got["lse"] / np.log(2)
        elif how == "marks empty rows by 0":
            got["lse"] = np.where(np.isinf(got["lse"]), 0.0, got["lse"])
        return got

    return attend


@pytest.mark.parametrize(
    "how",
    [
        "sees one key of the future", "forgets the last listed block", "gives an lse to base 2",
        "takes the first list for all heads", "multiplies poison by zero", "marks empty rows by 0",
    ],
)  # fmt: skip
def test_the_contract_catches(how) -> None:
    attend = broken(how)

    def passes(check) -> bool:
        @settings(max_examples=12, database=None, phases=[Phase.generate], derandomize=True)
        @given(cases())
        def run(case: Case) -> None:
            check(attend, case)

        try:
            run()
        except (AssertionError, ExceptionGroup):
            return False
        return True

    assert not all(passes(check) for check in contract.CHECKS)
