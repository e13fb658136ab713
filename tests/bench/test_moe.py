"""Experts beside PyTorch's forms and transformers' block: all are right, cold is cold, loads are compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.bench.draws import draws_of
from mimo_compile.bench.kernels import contestants, picks
from mimo_compile.bench.memory import needed_bytes, too_large
from mimo_compile.bench.oracle import Oracle
from mimo_compile.bench.peers import Ask, LeftOut, get_peer
from mimo_compile.bench.peers.base import Variant
from mimo_compile.bench.roof import roof_counts
from mimo_compile.bench.skew import bench_cell, cells
from mimo_compile.bench.suites import suite
from mimo_compile.cli import main
from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.moe import LOADS, Moe
from mimo_compile.ir.ops.mpgemm import weight_bytes

SMALL = "moe:t=5,e=6,k=2,d=64,f=32,w=w4g32,a=a8"
TYPES = ("fp32", "bf16")
EAGER = {f"{form} {t}" for form in ("loop", "sorted", "grouped", "gathered") for t in TYPES}
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    EAGER |= {"sorted packed bf16"}
BLOCKS = {f"{form} {t}" for form in ("eager", "batched_mm", "grouped_mm") for t in TYPES}


def ask(text: str = SMALL, memory_bytes: int = 1 << 26, cache: str = "hot") -> Ask:
    workload = parse_workload(text)
    inputs = get_op("moe").make_inputs(workload, np.random.default_rng(0))
    cold = 1 << 17 if cache == "cold" else 0
    return Ask(workload, local_cpu().with_threads(1), inputs, cache, cold, memory_bytes)


def labels(peer: str, field) -> set[str]:
    return {" ".join(c.impl.removeprefix(f"{peer} ").split()[:-1]) for c in field}


@settings(max_examples=4, deadline=None)
@given(st.data())
def test_every_form_computes_the_op(data: st.DataObject) -> None:
    w = data.draw(st.sampled_from(["f32", "bf16,a=abf16", "w8,a=a8", "w4g32,a=a8", "w2g32", "w8"]))
    e = data.draw(st.integers(1, 7))
    t, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, e))
    load = data.draw(st.sampled_from(LOADS))
    d, f = (32 * data.draw(st.integers(1, 3)) for _ in range(2))
    asked = ask(f"moe:t={t},e={e},k={k},d={d},f={f},w={w},load={load}")
    own = {
        "w8,a=a8": {"sorted int8-int-mm", "sorted int8-weight-only"},
        "w8": {"sorted int8-weight-only"},
        "w4g32,a=a8": {"sorted int4-weight-only-g32"},
    }.get(w, set())
    for name, offered in (("torch", EAGER | own), ("transformers", BLOCKS)):
        if get_peer(name).missing():
            continue
        field, out = get_peer(name).enter(asked)
        assert out == []
        assert labels(name, field) == offered
        for c in field:
            bits = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
            least = next(v for word, v in bits.items() if word in c.impl)
            assert c.bits_per_weight is not None
            assert least <= c.bits_per_weight < 2 * least


def test_an_expert_that_is_left_out_is_found() -> None:
    from mimo_compile.bench.peers.expert_forms import ERRORS, experts

    asked = ask("moe:t=5,e=6,k=2,d=64,f=32,w=bf16,a=abf16")
    for variant in experts(asked):
        if isinstance(variant, LeftOut):
            continue
        x, ids, share, *weights = variant.make()
        assert variant.result is not None and variant.oracle is not None
        right = variant.oracle.distance(variant.result((x, ids, share, *weights)))
        dtype = variant.label.split()[-1]
        assert right < ERRORS[dtype]
        expert = int(ids[-1, -1])
        if len(weights) == 2:
            weights[1] = weights[1].clone()
            weights[1][expert] = 0
        else:  # packed, one by one
            none = torch.zeros(64, 32, dtype=torch.bfloat16)
            weights[6 + expert] = torch.ops.mkldnn._reorder_linear_weight(none, None)
        assert variant.oracle.distance(variant.result((x, ids, share, *weights))) > 0.05


def test_bfloat16_is_packed_before_the_clock_starts() -> None:
    from mimo_compile.bench.peers.expert_forms import experts

    for variant in experts(ask("moe:t=5,e=6,k=2,d=64,f=32,w=bf16,a=abf16")):
        assert isinstance(variant, Variant) or "AVX-512" in variant.reason
        if isinstance(variant, Variant) and "packed" in variant.label:
            weights = variant.make()[3:]
            assert len(weights) == 12 and all(w.is_mkldnn for w in weights)


def test_copies_that_fill_the_memory_are_left_out_by_name() -> None:
    small = 5 * 2 * 3 * 64 * 32 * 2  # bfloat16 fits, float32 does not
    for name, form in (("torch", "gathered"), ("transformers", "batched_mm")):
        if get_peer(name).missing():
            continue
        field, out = get_peer(name).enter(ask(memory_bytes=small))
        assert [o.impl for o in out] == [f"{name} {form} fp32"]
        assert "copies of each token's experts" in out[0].reason
        assert f"{form} bf16" in labels(name, field)


def test_peers_share_their_weights() -> None:
    asked = ask()
    field = get_peer("torch").enter(asked)[0]
    real = [c for c in field if "fp32" in c.impl]
    assert len({c.sets[0][3].data_ptr() for c in real}) == 1
    assert len(real) == 4


@pytest.mark.slow
def test_compiled_forms_compute_the_op() -> None:
    peer = get_peer("torch-compile")
    if absent := peer.missing():
        pytest.skip(absent.reason)
    for text in (SMALL, "moe:t=1,e=4,k=2,d=64,f=32,w=bf16,a=abf16"):
        field, out = peer.enter(ask(text))
        assert [o.impl for o in out] == ["torch-compile grouped fp32"]
        forms = ("loop", "grouped", "gathered")
        offered = {f"{form} {dtype}" for form in forms for dtype in TYPES}
        assert labels("torch-compile", field) == offered - {"grouped fp32"}


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 12), st.sampled_from(LOADS))
@settings(max_examples=30, deadline=None)
def test_draws_hit_other_experts_each_time(e: int, k: int, t: int, load: str) -> None:
    k = min(e, k)
    workload = parse_workload(f"moe:t={t},e={e},k={k},d=1,f=1,load={load}")
    ids = Moe().draw_ids(workload, np.random.default_rng(0))
    draws = draws_of(workload, {"ids": ids})
    hits = [np.unique(d["ids"]) for d in draws.inputs]
    assert np.array_equal(draws.inputs[0]["ids"], ids)
    assert len(np.unique(np.concatenate(hits))) == sum(len(h) for h in hits) <= e
    assert len(draws.inputs) == e // len(hits[0])
    assert draws.share == len(hits[0]) / e
    for d in draws.inputs:  # the same tokens share experts
        assert d["ids"].dtype == np.int32 and d["ids"].ctypes.data % 64 == 0
        same = d["ids"].reshape(-1, 1) == d["ids"].reshape(1, -1)
        assert np.array_equal(same, ids.reshape(-1, 1) == ids.reshape(1, -1))
    assert draws.place(len(draws.inputs))[0] == 1


def test_cold_sets_go_through_experts_before_they_copy_weights() -> None:
    asked = ask("moe:t=1,e=8,k=2,d=64,f=32,w=bf16,a=abf16", cache="cold")
    each = 2 * 3 * 64 * 32 * 2
    wanted = -(-asked.cold_bytes // each) + 1
    chosen = picks(asked.workload, asked.hardware, None)
    (ours,) = contestants(
        asked.workload, asked.hardware, chosen, asked.inputs, ["cold"], asked.cold_bytes, 1 << 26
    )
    theirs = next(c for c in get_peer("torch").enter(asked)[0] if "loop bf16" in c.impl)
    assert len(ours.sets) == len(theirs.sets) == wanted
    kept = {s[3].data_ptr() for s in theirs.sets}
    assert len(kept) == -(-wanted // 4)
    experts = [tuple(np.unique(s[1].numpy())) for s in theirs.sets]
    assert len(set(experts)) == 4
    assert experts[:3] == experts[4:7]
    places = {(s[1].numpy().tobytes(), torch.from_dlpack(s[3]).data_ptr()) for s in ours.sets}
    assert len(places) == wanted


def test_roofs_count_the_experts_that_are_hit() -> None:
    workload = parse_workload("moe:t=40,e=16,k=2,d=64,f=32,w=w8,a=a8")
    w8 = parse_weight_format("w8")
    each = weight_bytes(w8, 64, 64) + weight_bytes(w8, 64, 32)
    for load, hit in (("same", 2), ("even", 16)):
        own = parse_workload(f"{workload},load={load}")
        ids = Moe().draw_ids(own, np.random.default_rng(1))
        counts = roof_counts(own, {"ids": ids})
        assert counts.bytes["dram"] == hit * each + 8.0 * 40 * 64
        assert counts.ops == roof_counts(workload).ops
    assert Moe().counts(parse_workload(f"{workload},load=same")).bytes == {
        "dram": 2 * each + 8.0 * 40 * 64
    }


def test_memory_is_counted_before_anything_is_made() -> None:
    layer = parse_workload("moe:t=1,e=64,k=8,d=2048,f=768,w=bf16,a=abf16")
    numbers = 3 * 64 * 2048 * 768
    alone = needed_bytes(layer, [], 1 << 28, 1 << 30)
    beside = needed_bytes(layer, ["transformers"], 1 << 28, 1 << 30)
    assert 4 * numbers < alone < beside
    assert beside >= 2 * 2 * numbers + 6 * numbers  # canonical and packed; theirs in both types
    assert beside < 9 * 2 * numbers
    assert needed_bytes(layer, ["openvino"], 1 << 28, 1 << 30) == alone
    refused = too_large(beside, 2e9, "moe")
    assert refused is not None
    assert "fewer experts" in refused.remedy
    left = bench_cell(layer, local_cpu(), None, 1, available_bytes=1e9)
    assert isinstance(left, LeftOut)
    assert "1.0 GB are free" in left.reason


def test_suites_have_one_token_few_and_many() -> None:
    entries = [parse_workload(t) for t in suite("moe", "layers")]
    assert len(entries) == len(set(entries)) == 2 * 3 * 4
    assert {(w["e"], w["d"], w["f"]) for w in entries} == {(64, 2048, 768), (256, 1024, 512)}
    assert suite("moe", "layers:t=16,w=bf16,e=64") == [
        "moe:t=16,e=64,k=8,d=2048,f=768,w=bf16,a=abf16"
    ]
    assert {w["t"] for w in cells("skew")} == {16, 128, 512}
    assert [str(w) for w in cells("skew:t=512,w=w8,e=256")] == [
        "moe:t=512,e=256,k=8,d=1024,f=512,w=w8,a=a8"
    ]
    with pytest.raises(UsageError, match="suite skew has no workload with t=1"):
        cells("skew:t=1")
    with pytest.raises(UsageError, match="layers, skew"):
        suite("moe", "skewed")


def test_loads_are_compared_with_the_even_one() -> None:
    workload = parse_workload("moe:t=32,e=8,k=2,d=64,f=32,w=w4g32,a=a8")
    found = bench_cell(workload, local_cpu().with_threads(1), None, 2, memory_bytes=1 << 24)
    assert not isinstance(found, LeftOut)
    by = {m.load: m for m in found}
    assert list(by) == list(LOADS)
    assert by["even"].time == (1.0, 1.0, 1.0)
    assert by["same"].hit == 2 and by["same"].busiest == 4
    assert by["even"].hit == 8
    assert 1 < by["even"].busiest < by["zipf"].busiest < 4
    for m in found:
        figures = m.json()
        assert figures["load"] == m.load and figures["median_us"] > 0
        assert figures["roof_share"] > 0
        assert not m.row.contestant.sets
    assert by["same"].row.contestant.bytes < by["even"].row.contestant.bytes


def test_bench_moe_from_the_command_line(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    line = ["bench", "moe", "--threads", "1", "--rounds", "1", "--json"]
    given_ = ["--op", SMALL, "--peers", "torch,transformers", "--cache", "cold"]
    assert main([*line, *given_]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {r["peer"] for r in found["rows"]} - {None}
    assert "torch" in names
    (cell,) = found["summary"]
    assert cell["best_peer"] and cell["ratio"] > 0
    assert main([*line, "--suite", "skew:t=2"]) == 2
    assert "use t=16+128+512" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given_", "named"),
    [
        (["--op", SMALL], "--op"), (["--peers", "torch"], "--peers"), (["--cache", "cold"], "--cache"),
        (["--all"], "--all"), (["--calibrate", "rtn"], "--calibrate"), (["tiny"], "SRC"),
        (["--target", "x86-64-v4"], "--target"),
    ],
)  # fmt: skip
def test_suites_of_their_own_refuse_what_they_do_not_look_at(capsys, given_, named) -> None:
    for kind, name in (("moe", "skew"), ("attention", "sparse")):
        assert main(["bench", kind, *given_, "--suite", name]) == 2
        assert f"--suite {name} is a run of its own, without {named}." in capsys.readouterr().err


def test_float_activations_are_judged_as_such() -> None:
    asked = ask()
    oracle = Oracle(asked.workload, asked.inputs)
    floats = oracle.in_floats
    assert str(floats.workload) == SMALL.removesuffix(",a=a8")
    assert floats.in_floats is floats
    off = floats.distance(np.asarray(oracle.parts[0].expected["y"]))
    assert 1e-4 < off < 0.1
