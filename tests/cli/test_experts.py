"""``experts``, and what ``run`` records and replays of routing."""

from __future__ import annotations

import json

import expert_samples
import numpy as np
import pytest
import routed_samples

from mimo_compile.experts.synthetic import drifting
from mimo_compile.runtime.pregate import Gate, PreGates
from mimo_compile.runtime.routing import RoutingLog


@pytest.fixture(scope="module")
def routed_file(tmp_path_factory):
    return routed_samples.routed().save(tmp_path_factory.mktemp("routed") / "routed.mimo")


def test_run_writes_a_log_and_replays_it(cli, routed_file, tmp_path):
    log = tmp_path / "r.safetensors"
    asked = ("run", routed_file, "--prompt", "abcdef", "--max-new-tokens", 12, "--ignore-eos")
    done = cli(*asked, "--route-log", log, "--json")
    assert done.code == 0, done.err
    first = json.loads(done.out)
    assert first["route_log"] == {"path": str(log), "tokens": 17, "dropped": 0}
    assert first["route_replay"] is None and "routing of 17 tokens" in done.err
    done = cli(*asked, "--route-replay", log, "--json")
    again = json.loads(done.out)
    assert again["text"] == first["text"] and again["route_log"] is None
    assert again["route_replay"] == {"path": str(log), "forced": 34, "changed": 0, "own": 0}
    done = cli(*asked, "--route-replay", log, "--route-log", log)
    assert done.code == 2 and "would replace" in done.error
    done = cli("run", routed_file, "--prompt", "a", "--prompt", "b", "--route-log", log)
    assert done.code == 0 and set(RoutingLog.load(log).sequence.tolist()) == {0, 1}


def test_run_refuses_what_has_no_routers(cli, decoder_file, tmp_path):
    done = cli("run", decoder_file, "--prompt", "a", "--route-log", tmp_path / "r.safetensors")
    assert done.code == 2 and "has no experts" in done.error
    done = cli("run", decoder_file, "--prompt", "a", "--route-log", tmp_path / "r.txt")
    assert done.code == 2 and "should end in .safetensors" in done.error
    (tmp_path / "bad").write_text("hello")
    done = cli("run", decoder_file, "--prompt", "a", "--route-replay", tmp_path / "bad")
    assert done.code == 1 and "bad" in done.error


def test_experts_of_a_log(cli, tmp_path):
    draw = np.random.default_rng(0)
    ids = draw.random((300, 2, 8)).argsort(-1)[..., :2].astype(np.int16)
    at = np.arange(300, dtype=np.int32)
    RoutingLog(ids, at * 0, at, at, ("layers.1", "layers.2"), 8).save(tmp_path / "r.safetensors")
    out = tmp_path / "placed.json"
    asked = ("experts", tmp_path / "r.safetensors", "--tokens", 4, "--window", 10, "--horizon", 20)
    done = cli(*asked, "--devices", 4, "-o", out, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["steps"], found["experts"], found["choices_per_step"]) == (75, 8, 8.0)
    assert [one["layer"] for one in found["load"]] == ["layers.1", "layers.2"]
    (row,) = found["forecasts"]
    assert row["predictor"] == "average" and row["error"] > row["floor"] > 0
    placed = {one["placement"]: one for one in found["placements"]}
    assert list(placed) == ["round robin", "greedy", "partition"]
    assert placed["greedy"]["predicted"] <= placed["round robin"]["predicted"]
    assert placed["partition"]["fan_out"] <= placed["greedy"]["fan_out"]
    written = json.loads(out.read_text())
    assert written["devices"] == 4 and len(written["placements"]["partition"]["layers.2"]) == 8
    done = cli(*asked, "--devices", 4)
    assert done.code == 0 and "round robin" in done.out and "75 steps of 8 choices" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["none.safetensors"], 1, "cannot be read"),
        (["load.safetensors", "--tokens", "3"], 2, "cannot be divided"),
        (["load.safetensors", "--horizon", "500"], 2, "cannot be forecast 500 steps"),
        (["load.safetensors", "--predictors", "oracle"], 2, "no predictor 'oracle'"),
        (["load.safetensors", "--devices", "17"], 2, "16 experts cannot be placed on 17"),
        (["load.safetensors", "-o", "x.json"], 2, "--devices"),
    ],
)
def test_what_experts_refuses(cli, tmp_path, monkeypatch, arguments, code, text):
    monkeypatch.chdir(tmp_path)
    drifting(300, 1, 16, 64).save("load.safetensors")
    done = cli("experts", *arguments)
    assert done.code == code and text in done.error


@pytest.fixture(scope="module")
def expert_file(tmp_path_factory):
    return expert_samples.experts().save(tmp_path_factory.mktemp("experts") / "experts.mimo")


def test_run_with_limited_expert_memory(cli, expert_file):
    asked = ("run", expert_file, "--prompt", "abcdef", "--max-new-tokens", 12, "--ignore-eos")
    whole = json.loads(cli(*asked, "--json").out)
    assert whole["expert_memory"] is None
    done = cli(*asked, "--expert-memory", "8KiB", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    facts = found["expert_memory"]
    assert found["text"] == whole["text"] and facts["budget_bytes"] == 8192
    assert facts["slots"] == 8192 // 3072 and facts["experts"] == 18
    assert facts["hits"] + facts["late"] + facts["misses"] == facts["needs"] > 0
    assert f"2 of 18 experts in 6 KiB: of {facts['needs']} needs {facts['hits']} hits" in done.err
    assert f"{facts['misses']} misses" in done.err


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ("5KiB", "is too little: the experts that a layer of one token needs take 6144 bytes"),
        ("plenty", "'plenty' is no size"),
        ("4096", "'4096' is no size"),
    ],
)
def test_run_refuses_memory_that_is_none_or_too_little(cli, expert_file, size, text):
    done = cli("run", expert_file, "--prompt", "a", "--expert-memory", size)
    assert done.code == 2 and text in done.error and "--expert-memory" in done.error


def test_run_with_trained_gates(cli, expert_file, tmp_path):
    rng, path = np.random.default_rng(2), tmp_path / "g.safetensors"
    layers = tuple(f"{layer}.experts" for layer in expert_samples.LAYERS)
    shape = expert_samples.EXPERTS, expert_samples.WIDTH
    made = [Gate(rng.standard_normal(shape, np.float32), np.zeros(shape[0], np.float32))] * 2
    PreGates(layers, dict(zip([(0, 1), (1, 2)], made, strict=True))).save(path)
    asked = ("run", expert_file, "--prompt", "abcdef", "--max-new-tokens", 12, "--ignore-eos")
    whole = json.loads(cli(*asked, "--json").out)
    given = ("--expert-memory", "20KiB", "--pre-gates", path, "--json")
    found = json.loads(cli(*asked, *given).out)
    assert found["text"] == whole["text"] and found["expert_memory"]["loaded_ahead"] > 0
    done = cli(*asked, "--pre-gates", path)
    assert done.code == 2 and "without --expert-memory all experts are mapped" in done.error
    done = cli(*asked, "--expert-memory", "20KiB", "--pre-gates", expert_file)
    assert done.code == 1 and str(expert_file) in done.error
