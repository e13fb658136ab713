"""Peers: found by name, named when absent, checked against float64, compared at their bits per weight."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.bench import peers
from mimo_compile.bench.peers import (
    Ask,
    LeftOut,
    Peer,
    Variant,
    get_peer,
    ggml,
    parse_peers,
    peer_names,
)
from mimo_compile.bench.peers.base import (
    check,
    dequantise,
    groups_of,
    int8_error,
    nearest_bits,
    quantise,
    random_weights,
    relative,
)
from mimo_compile.bench.peers.onnx_runtime import pack_bits
from mimo_compile.bench.runner import Settings, bench_workload, missing_peers
from mimo_compile.cli import main
from mimo_compile.errors import EnvironmentMismatch, UsageError
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload

SMALL = "mpgemm:m=3,n=64,k=256,w=w4g64,a=a8"


def ask(text: str = SMALL, threads: int = 1) -> Ask:
    """Return what peers are asked for a workload."""
    workload = parse_workload(text)
    inputs = get_op(workload.op).make_inputs(workload, np.random.default_rng(0))
    return Ask(workload, local_cpu().with_threads(threads), inputs, "hot", 0, 1 << 26)


class Fake(Peer):
    """Multiplies with numpy, and does what ``fault`` says."""

    name = "fake"
    fault = ""

    def variants(self, ask: Ask):
        _, n, k = ask.shape
        w = random_weights(n, k).copy()

        def result(stored: Any) -> np.ndarray:
            y = ask.inputs["x"] @ stored.T
            if self.fault == "half":
                y = ask.inputs["x"][:, : k // 2] @ stored[:, : k // 2].T
            elif self.fault == "nan":
                y[-1, -1] = np.nan
            elif self.fault == "shape":
                y = y.T
            elif self.fault == "raise":
                raise ZeroDivisionError("none of\nyour business")
            return y

        yield Variant("numpy", w.copy, result, w.nbytes, 32.0, result, lambda rows: w[rows])
        yield LeftOut("cube", "only squares")


class Absent(Fake):
    name = "absent"
    packages = ("a-package-that-nobody-made",)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the peers of this module."""
    monkeypatch.setattr(peers, "PEERS", {**peers.PEERS, "fake": Fake, "absent": Absent})


def test_every_name_stands_for_a_peer_whether_or_not_its_package_is_installed() -> None:
    assert peer_names()[:4] == ["torch", "onnxruntime", "openvino", "llama.cpp"]
    for name in peer_names():
        peer = get_peer(name)
        assert peer.name == name
        try:
            installed = bool([version(p) for p in peer.packages])
        except PackageNotFoundError:
            installed = False
        absent = peer.missing()
        assert (absent is None) == installed
        assert absent is None or (absent.impl == name and absent.remedy.startswith("pip install "))


def test_lists_of_peers() -> None:
    assert parse_peers("none") == []
    assert parse_peers("torch,openvino,torch") == ["torch", "openvino"]
    assert parse_peers("all") == peer_names()
    with pytest.raises(UsageError, match="abacus"):
        parse_peers("torch,abacus")


def test_a_missing_package_is_named_with_its_pip_line(fakes: None, capsys, monkeypatch, tmp_path):
    (absent,) = missing_peers(["absent", "fake"])
    assert absent == LeftOut(
        "absent",
        "package a-package-that-nobody-made is not installed",
        "pip install 'mimo-compile[peers]'",
    )
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    line = [
        "bench",
        "mpgemm",
        "--op",
        SMALL,
        "--peers",
        "absent,fake",
        "--cache",
        "hot",
        "--rounds",
        "1",
    ]
    assert main([*line, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "missing: absent: package a-package-that-nobody-made is not installed (pip" in out
    assert "left out: fake cube: only squares" in out
    assert "Ours beside the fastest peer" in out
    assert main([*line, "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"][0]["remedy"] == "pip install 'mimo-compile[peers]'"
    assert {"op": SMALL, "impl": "fake cube", "reason": "only squares", "remedy": ""} in found[
        "left_out"
    ]
    (cell,) = found["summary"]
    assert cell["best_peer"] == "fake numpy"
    assert cell["peer_bits_per_weight"] == 32
    assert found["slower"] == ([cell] if cell["ratio"] < 1 else [])


def test_a_peer_takes_part_with_its_bits_and_its_ratio(fakes: None) -> None:
    given_ = ask()
    found = bench_workload(
        given_.workload, given_.hardware, None, Settings(["fake"], ["hot", "cold"], 3, 1e-3)
    )
    for cache in ("hot", "cold"):
        ours, other = [r for r in found.rows if r.contestant.cache == cache and r.ratio is not None]
        assert (ours.contestant.impl, other.contestant.impl) == ("mimo", "fake numpy")
        assert ours.ratio == (1.0, 1.0, 1.0)
        assert ours.contestant.bits_per_weight == pytest.approx(4.25, rel=0.2)
        assert other.contestant.bits_per_weight == 32
        assert other.ratio is not None
        assert other.ratio[1] <= other.ratio[0] <= other.ratio[2]
        assert other.json()["ratio_p90"] == other.ratio[2]
    assert found.left_out == [LeftOut("fake cube", "only squares")]
    assert not any(r.contestant.sets for r in found.rows)  # memory is free for the next workload


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("half", "from float64"),
        ("nan", "not finite"),
        ("shape", "instead of"),
        ("raise", "fails with ZeroDivisionError: none of"),
    ],
)
def test_a_peer_that_is_wrong_does_not_take_part(fault: str, text: str) -> None:
    peer = Fake()
    peer.fault = fault
    field, out = peer.enter(ask())
    assert field == []
    assert [text in entry.reason for entry in out] == [True, False]


def test_cold_sets_are_of_memory_of_their_own() -> None:
    cold = ask()
    size = 64 * 256 * 4
    cold = Ask(cold.workload, cold.hardware, cold.inputs, "cold", 4 * size, 1 << 30)
    (entry,), _ = Fake().enter(cold)
    assert len(entry.sets) == 5
    assert len({s.ctypes.data for s in entry.sets}) == 5
    (entry,), _ = Fake().enter(
        Ask(cold.workload, cold.hardware, cold.inputs, "cold", 1 << 30, 3 * size)
    )
    assert len(entry.sets) == 3  # the limit of memory


@given(
    st.sampled_from([0, 32, 64, None]),
    st.integers(1, 4),
    st.sampled_from([64, 96, 200]),
    st.integers(0, 99),
)
@settings(max_examples=30)
def test_the_allowed_error_is_that_of_quantised_activations(block, m, k, seed) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)).astype(np.float32)
    x[:, 1] *= 8
    if block is None:
        step = np.full((m, k), (max(x.max(), 0) - min(x.min(), 0)) / 127)
    else:
        size = min(block or k, k)
        top = np.abs(np.pad(x, ((0, 0), (0, -k % size)))).reshape(m, -1, size).max(axis=2)
        step = np.repeat(top / 127, size, axis=1)[:, :k]
    rounded = np.rint(x / step) * step
    assert relative(rounded - x, x) <= int8_error(x, block)
    assert int8_error(x, block) < 0.5


@given(st.sampled_from([2, 4, 8]), st.sampled_from([16, 32, 48]), st.integers(1, 9))
@settings(max_examples=20)
def test_random_weights_survive_quantisation_and_packing(bits: int, group: int, n: int) -> None:
    k = 96 + 16
    codes, scale = quantise(n, k, bits, group)
    assert codes.max() < 1 << bits
    step = np.repeat(scale, group, axis=1)[:, :k]
    # half a step, and what float16 rounds off a scale as often as the largest code counts it
    assert (
        np.abs(dequantise(codes, scale, bits, group) - random_weights(n, k))
        <= (0.5 + 2.0 ** (bits - 12)) * step
    ).all()
    rows = pack_bits(codes, bits)
    each = 8 // bits
    back = (rows[:, :, None] >> (bits * np.arange(each, dtype=np.uint8))) & ((1 << bits) - 1)
    assert (back.reshape(n, k) == codes).all()


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("w1g64", 2),
        ("w1.58", 2),
        ("w2g64", 2),
        ("w3g64", 4),
        ("w4g64", 4),
        ("w8", 8),
        ("bf16", None),
    ],
)
def test_the_fewest_bits_that_hold_the_codes(text: str, bits: int | None) -> None:
    assert nearest_bits(parse_weight_format(text), (2, 4, 8)) == bits


def test_the_workloads_own_group_comes_first() -> None:
    assert groups_of(parse_weight_format("w4g64"), (32, 64, 128)) == [64, 32, 128]
    assert groups_of(parse_weight_format("w8"), (32, 128)) == [32, 128]


OFFERS = {
    "torch": {
        "w4g64": {"fp32", "bf16", "int8-dynamic", "int4-weight-only-g64"},
        "w8": {"fp32", "bf16", "int8-dynamic", "int8-int-mm", "int8-weight-only"},
    },
    "onnxruntime": {
        "w2g64": {f"MatMulNBits-2-g{g}" for g in (32, 64, 128)},
        "w4g64": {f"MatMulNBits-4-g{g}" for g in (32, 64, 128)},
        "w8": {f"MatMulNBits-8-g{g}" for g in (32, 64, 128)},
    },
    "openvino": {
        "w1g64": {"u2-g64-dyn-quant", "u2-g128-dyn-quant", "u2-g64-bf16"},
        "w4g64": {"i4-g64-dyn-quant", "i4-g128-dyn-quant", "i4-g64-bf16"},
        "w8": {"i8-row-dyn-quant", "i8-g128-dyn-quant", "i8-row-bf16"},
    },
    "llama.cpp": {
        "w1g64": {"Q1_0-plain", "TQ1_0-plain", "TQ2_0-plain"},
        "w1.58": {"TQ1_0-plain", "TQ2_0-plain", "Q2_K-plain"},
        "w4g64": {"Q4_0-plain", "Q4_K-plain"},
        "w8": {"Q8_0-plain"},
    },
}


@pytest.mark.parametrize(("name", "w"), [(name, w) for name, ws in OFFERS.items() for w in ws])
def test_installed_peers_compute_what_they_say(name: str, w: str) -> None:
    peer = get_peer(name)
    if absent := peer.missing():
        pytest.skip(absent.reason)
    asked = ask(f"mpgemm:m=3,n=64,k=256,w={w},a=a8")
    field, out = peer.enter(asked)
    assert out == []
    labels = {c.impl.removeprefix(f"{name} ").rsplit(" ", 1)[0] for c in field}
    assert labels >= OFFERS[name][w]
    for contestant in field:
        contestant.prepare()
        contestant.call(contestant.sets[0])
        assert contestant.bits_per_weight is not None
        assert contestant.bytes >= contestant.bits_per_weight * 64 * 256 / 8


def test_torch_multiplies_in_eight_bits_where_it_says_so() -> None:
    import torch

    variants = [v for v in get_peer("torch").variants(ask()) if isinstance(v, Variant)]
    (dynamic,) = (v for v in variants if v.label == "int8-dynamic")
    assert isinstance(dynamic.make(), torch.ao.nn.quantized.dynamic.Linear)


def test_a_bias_takes_part_where_a_peer_knows_it() -> None:
    asked = ask("mpgemm:m=2,n=64,k=256,w=w8,a=a8,bias=1")
    field, out = get_peer("torch").enter(asked)
    assert len(field) == 5
    assert out == []


def test_a_check_that_knows_no_weights_passes() -> None:
    assert check(Variant("any", list, len, 1.0), ask(), []) == ""


def test_other_ops_are_left_out_by_peers_without_a_kernel_for_them() -> None:
    asked = ask("cached_attention:t=1,h=4,kv=2,d=32,dv=32,cap=64")
    for name, op in (("onnxruntime", asked), ("torch-sdpa", ask())):
        if get_peer(name).missing() is None:
            field, out = get_peer(name).enter(op)
            reason = f"has no kernel for {op.workload.op}"
            assert (field, [o.reason for o in out]) == ([], [reason])


def test_a_crash_of_the_library_is_found_in_a_process_of_its_own(monkeypatch) -> None:
    if absent := get_peer("llama.cpp").missing():
        pytest.skip(absent.reason)
    assert ggml.survives("repack")
    assert not ggml.survives("no such memory")
    loaded = ggml.load()
    monkeypatch.setitem(loaded.memories, "amx", loaded.memories["repack"])
    monkeypatch.setattr(ggml, "survives", lambda memory: False)
    field, out = get_peer("llama.cpp").enter(ask())
    assert {o.reason for o in out} == {"crashes on this processor"}
    assert all("clang" in o.remedy for o in out)
    assert not any("amx" in c.impl for c in field)


def test_a_library_that_is_not_there_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(EnvironmentMismatch, match="ggml library cannot be used"):
        ggml.Ggml(tmp_path)
