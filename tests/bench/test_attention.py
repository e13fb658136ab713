"""Attention beside PyTorch's: every form is right, long contexts are judged in parts, memory is counted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.bench import oracle as oracles
from mimo_compile.bench.draws import copies
from mimo_compile.bench.kernels import contestants, picks
from mimo_compile.bench.memory import needed_bytes, too_large
from mimo_compile.bench.oracle import Oracle, visible_keys
from mimo_compile.bench.peers import FORMS, Ask, get_peer, parse_peers, peer_names, torch_attention
from mimo_compile.bench.roof import roof_counts
from mimo_compile.bench.runner import Settings, bench_workload
from mimo_compile.bench.suites import suite
from mimo_compile.cli import main
from mimo_compile.cli.bench_table import short_names
from mimo_compile.errors import VerificationError
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload

EAGER = [name for name in FORMS if name != "torch-flex"]
CHUNK = "cached_attention:t=9,h=4,kv=2,d=24,dv=16,cap=40"


def ask(text: str, memory_bytes: int = 1 << 26) -> Ask:
    workload = parse_workload(text)
    inputs = get_op(workload.op).make_inputs(workload, np.random.default_rng(0))
    return Ask(workload, local_cpu().with_threads(1), inputs, "hot", 0, memory_bytes)


@st.composite
def attentions(draw: st.DrawFn) -> str:
    """Draw prompts, chunks and single tokens; full caches, partly filled ones, pages and rings."""
    t, kv, group = draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    d, dv = draw(st.sampled_from([(16, 16), (24, 16), (16, 24)]))
    text = f"cached_attention:t={t},h={kv * group},kv={kv},d={d},dv={dv}"
    text += draw(st.sampled_from(["", ",c=bf16"]))
    text += draw(st.sampled_from(["", "", ",b=2,even=1", ",b=3,even=1"]))
    if draw(st.booleans()):
        window = draw(st.integers(1, 20))
        cap = window + t - 1 + draw(st.integers(0, 5))
        text += f",cap={cap},window={window},len={t + draw(st.integers(0, 60))}"
        return text + f",sink={draw(st.integers(0, 1))}"
    keys = t + draw(st.integers(0, 40))
    text += draw(st.sampled_from(["", ",page=16,pool=16"]))
    return text + f",cap={keys + draw(st.integers(0, 8))},len={keys}"


@settings(max_examples=25, deadline=None)
@given(attentions())
def test_every_form_of_torch_computes_the_op_in_both_types(text: str) -> None:
    asked = ask(text)
    sink = asked.params["sink"]
    for name in EAGER:
        field, out = get_peer(name).enter(asked)
        if sink and name != "torch-matmul":
            assert {o.reason for o in out} == {"knows no sink"}
            continue
        assert out == []
        assert [c.impl.split()[:2] for c in field] == [[name, "fp32"], [name, "bf16"]]
        for c, width in zip(field, (4, 2), strict=True):
            p = asked.params
            stored = visible_keys(p) * p["kv"] * (p["d"] + p["dv"]) * width
            assert c.bits_per_weight is not None
            assert c.bits_per_weight >= 8 * width
            assert c.bytes >= stored


@pytest.mark.parametrize(
    "more",
    ["c=i8", "c=i4", "c=i2", "c=i1", "c=i4,page=64,pool=9", "c=i4,b=2,even=1",
     "c=i4,b=2,even=1,page=64,pool=9"],
)  # fmt: skip
def test_forms_of_torch_take_the_numbers_that_codes_stand_for(more: str) -> None:
    asked = ask(f"cached_attention:t=1,h=4,kv=2,d=16,dv=80,cap=192,len=150,{more}")
    field, out = get_peer("torch-matmul").enter(asked)
    assert out == [] and len(field) == 2


def test_a_key_that_is_missed_is_found() -> None:
    asked = ask(CHUNK)
    peer = torch_attention.TorchSdpaFolded()
    variant = next(iter(peer.variants(asked)))
    k, v = variant.make()
    right = variant.result((k, v))
    oracle = Oracle(asked.workload, asked.inputs)
    assert oracle.distance(right) < torch_attention.ERRORS["fp32"]
    k[:, :, 3] = -k[:, :, 3]
    assert oracle.distance(variant.result((k, v))) > torch_attention.ERRORS["bf16"]


@pytest.mark.parametrize(
    "text",
    [
        CHUNK,
        "cached_attention:t=90,h=8,kv=1,d=16,dv=16,cap=140,window=40,sink=1,len=300",
        "cached_attention:t=70,h=6,kv=2,d=16,dv=24,cap=100,len=80",
        "cached_attention:t=1,h=6,kv=3,d=16,dv=16,cap=100,c=bf16",
        "cached_attention:t=70,h=4,kv=2,d=16,dv=16,cap=192,c=i8",
    ],
)
def test_parts_say_what_the_whole_says(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(text)
    whole = Oracle(asked.workload, asked.inputs)
    (all_of_it,) = whole.parts
    monkeypatch.setattr(oracles, "WHOLE_BYTES", 0)
    parted = Oracle(asked.workload, asked.inputs)
    assert len(parted.parts) > 1
    out = {"out": np.array(all_of_it.expected["out"])}
    seen = np.zeros(out["out"].shape[:2], bool)
    for part in parted.parts:
        np.testing.assert_allclose(part.expected["out"], part.of(out)["out"], atol=1e-12)
        seen[part.index] = True
    assert seen[[0, -1]].all()
    assert seen.any(axis=0).all()
    assert parted.judge(out) == (pytest.approx(0, abs=1e-3), "")
    token, head = np.argwhere(seen)[-1]
    out["out"][token, head, 1] += 20.0
    worst, message = parted.judge(out)
    assert worst > 1
    assert "within tokens and heads" in message
    assert parted.distance(out["out"]) > 1e-3
    out["out"][token, head, 1] -= 20.0
    if not seen.all():
        out["out"][tuple(np.argwhere(~seen)[0])] = np.nan
        assert "not finite" in parted.judge(out)[1]


def test_kernels_are_judged_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracles, "WHOLE_BYTES", 0)
    asked = ask(CHUNK)
    oracle = Oracle(asked.workload, asked.inputs)
    chosen = picks(asked.workload, asked.hardware, None)
    given = (asked.workload, asked.hardware, chosen, asked.inputs, ["hot"], 0, 1 << 26)
    (ours,) = contestants(*given, oracle)
    assert ours.bits_per_weight is not None
    assert ours.bits_per_weight >= 32
    for part in oracle.parts:
        part.expected["out"][...] += 1
    with pytest.raises(VerificationError, match="within tokens and heads"):
        contestants(*given, oracle)


def test_forms_share_their_keys_and_values() -> None:
    asked = ask(CHUNK)
    cold = Ask(
        asked.workload, asked.hardware, asked.inputs, "cold", 1 << 16, 1 << 26, shared=asked.shared
    )
    first, second = (get_peer(n).enter(cold)[0][0] for n in ("torch-sdpa", "torch-sdpa-folded"))
    assert len(first.sets) == len(second.sets) > 1
    for a, b in zip(first.sets, second.sets, strict=True):
        assert [t.data_ptr() for t in a] == [t.data_ptr() for t in b]
    assert len({a[0].data_ptr() for a in first.sets}) == len(first.sets)


def test_scores_that_fill_the_memory_are_left_out_by_name() -> None:
    asked = ask(CHUNK, memory_bytes=1024)
    for name in ("torch-sdpa-folded", "torch-matmul"):
        field, out = get_peer(name).enter(asked)
        assert field == []
        assert all("it knows no blocks of keys" in o.reason for o in out)
    assert len(get_peer("torch-sdpa").enter(asked)[0]) == 2


def test_flex_without_a_compiler_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch_attention.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "no-such-c++")
    absent = get_peer("torch-flex").missing()
    assert absent is not None
    assert "no-such-c++" in absent.reason
    assert "install g++" in absent.remedy
    field, out = get_peer("torch").enter(ask(CHUNK))
    assert len(field) == 6
    assert [o.impl for o in out] == ["torch-flex"]
    line = ["bench", "attention", "--op", CHUNK, "--peers", "flexattention", "--cache", "hot"]
    assert main([*line, "--rounds", "1", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [m["impl"] for m in found["missing"]] == ["torch-flex"]
    mine = found["rows"][0]
    assert mine["impl"] == "mimo"
    assert mine["bits_per_weight"] >= 32
    assert mine["roof_share"] > 0
    assert {r["impl"] for r in found["rows"][1:]} == {"roof: read", "roof: fma_f32"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "cached_attention:t=1,h=4,kv=2,d=32,dv=32,cap=200,len=150",
        "cached_attention:t=60,h=4,kv=2,d=32,dv=16,cap=60",
        "cached_attention:t=70,h=4,kv=4,d=32,dv=32,cap=150,window=64,len=400",
    ],
)
def test_flex_computes_the_op(text: str) -> None:
    peer = get_peer("torch-flex")
    if absent := peer.missing():
        pytest.skip(absent.reason)
    field, out = peer.enter(ask(text))
    assert out == []
    assert len(field) == 2


def test_names_of_forms() -> None:
    assert parse_peers("torch-sdpa,flexattention,sdpa") == ["torch-sdpa", "torch-flex"]
    assert parse_peers("torch-flex,torch") == ["torch"]
    assert not set(FORMS) & set(peer_names())


def test_what_does_not_fit_is_left_out_before_anything_is_made() -> None:
    long = parse_workload("cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=131072")
    caches = 131072 * 8 * 256 * 4
    alone = needed_bytes(long, [], 0, 1 << 30)
    assert 3 * caches < alone <= needed_bytes(long, ["torch"], 1 << 28, 1 << 30) < 12 * caches
    short = long.replace(cap=32768)
    assert needed_bytes(short, [], 1 << 28, 1 << 30) < needed_bytes(
        short, ["torch"], 1 << 28, 1 << 30
    )
    refused = too_large(alone, 4e9)
    assert refused is not None
    assert "4.0 GB are free" in refused.reason
    assert too_large(alone, 1e12) is None
    assert needed_bytes(parse_workload("mpgemm:m=1,n=64,k=64"), ["torch"], 0, 1 << 30) == 0
    found = bench_workload(long, local_cpu(), None, Settings(available_bytes=2e9))
    assert found.rows == []
    assert [o.impl for o in found.left_out] == ["every implementation"]


def test_cold_arguments_that_exceed_the_caches_alone_are_not_copied() -> None:
    assert copies(1 << 30, 1 << 28, 1 << 33) == 1
    assert copies(1 << 27, 1 << 28, 1 << 33) == 3


def test_the_roof_is_of_the_unit_that_the_caches_allow() -> None:
    workload = parse_workload(CHUNK)
    plain, halves = roof_counts(workload), roof_counts(workload.replace(c="bf16"))
    assert plain.ops["fma_f32"] == halves.ops["dot_bf16"] > 0
    assert plain.flops == halves.flops
    assert "fma_f32" not in halves.ops
    assert plain.bytes["dram"] > halves.bytes["dram"]


@pytest.mark.parametrize("c", ["f32", "bf16"])
def test_the_roof_of_int8_arithmetic_is_that_of_dots_of_bytes(c):
    text = f"cached_attention:t=32,h=4,kv=2,d=64,dv=32,cap=32,c={c}"
    whole, half = (roof_counts(parse_workload(f"{text},arith={a}")) for a in ("int8", "int8half"))
    pairs = 4 * 32 * 33 / 2
    assert whole.ops["dot_i8"] == pairs * (64 + 32) and "fma_f32" not in whole.ops
    assert half.ops["dot_i8"] == pairs * 64
    assert half.ops["fma_f32" if c == "f32" else "dot_bf16"] == pairs * 32


def test_suites_have_the_cells_that_matter() -> None:
    decode = [parse_workload(t) for t in suite("attention", "decode")]
    assert {w["cap"] for w in decode} >= {4096, 16384, 32768, 65536, 131072}
    heads = {(w["h"], w["kv"], w["d"], w["dv"]) for w in decode}
    caches = [get_op("cached_attention").full(w)["c"] for w in decode]
    assert caches.count("f32") == caches.count("bf16") == 28
    batches = [get_op("cached_attention").full(w) for w in decode if "b" in dict(w.params)]
    assert {(p["b"], p["even"], p["cap"]) for p in batches} == {(4, 1, 4096), (4, 1, 32768)}
    assert heads >= {(32, 8, 64, 64), (32, 8, 128, 128), (32, 8, 192, 128), (32, 1, 128, 128)}
    assert suite("attention", "decode:d=128,kv=8,cap=32768")[0] == (
        "cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=32768"
    )
    prefill = [parse_workload(t) for t in suite("attention", "prefill")]
    assert {w["t"] for w in prefill if w["t"] == w["cap"]} == {1024, 2048, 4096, 8192}
    assert {w["t"] for w in prefill if w["t"] != w["cap"]} == {256, 512}
    for name in ("quick", "decode", "prefill", "window"):
        entries = suite("attention", name)
        assert len(set(entries)) == len(entries)
    window = [
        get_op("cached_attention").full(parse_workload(t)) for t in suite("attention", "window")
    ]
    assert {p["window"] for p in window} == {128}
    assert {p["sink"] for p in window} == {0, 1}


def test_long_names_are_told_once() -> None:
    common, names = short_names(["a:t=1,h=2,cap=3", "a:t=1,h=4,cap=3", "a:t=1,h=2,cap=3"])
    assert common == "a:t=1,cap=3"
    assert names == {"a:t=1,h=2,cap=3": "h=2", "a:t=1,h=4,cap=3": "h=4"}
    assert short_names(["a:t=1"]) == ("", {"a:t=1": "a:t=1"})
    assert short_names(["a:t=1", "a:t=1,u=2"])[1]["a:t=1"] == "a:t=1"
    assert short_names(["a:t=1", "b:t=1"])[0] == ""
