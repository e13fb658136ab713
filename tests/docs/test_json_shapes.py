"""The objects that ``--json`` prints have exactly the keys that docs/command-line.md gives them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import runtime_samples

from mimo_compile.bench.contest import Contestant, Row
from mimo_compile.bench.model import ModelRow
from mimo_compile.bench.summary import Cell
from mimo_compile.cli import main
from mimo_compile.cli.compile import summary
from mimo_compile.ir.workload import Workload
from mimo_compile.search import Database, Record, TuningResult, Verdict, parse_objective
from mimo_compile.search.lookup import summarise
from mimo_compile.search.result import WorkloadResult
from mimo_compile.verify import EndToEnd, KernelCheck, Perplexity, Verification

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "command-line.md").read_text()


def documented(verb: str) -> set[str]:
    """Return the names between backquotes in what the page says about a verb's JSON."""
    found = re.search(rf"^## {verb}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found
    text = found[1] if verb == "db" else found[1][found[1].index("\nJSON") :]
    return set(re.findall(r"`(\w+)`", text))


def names(value: dict[str, Any], free: set[str]) -> set[str]:
    """Return all keys of an object and of objects in it; those below ``free`` ones are data."""
    out = set(value)
    for key, inner in value.items():
        rows = inner if isinstance(inner, list | tuple) else [inner]
        for row in rows if key not in free else []:
            if isinstance(row, dict):
                out |= names(row, free)
    return out


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runtime_samples.decoder().save(tmp_path_factory.mktemp("json") / "decoder.mimo")


@pytest.fixture
def printed(capsys, monkeypatch, tmp_path):
    """Return what a command prints as JSON."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        main([str(a) for a in arguments] + ["--json"])
        return json.loads(capsys.readouterr().out)

    return call


DATA = {"config", "calls", "members", "programs", "states", "versions", "presets", "verdicts"}


def test_run_and_inspect(printed, artifact: Path) -> None:
    found = printed("run", artifact, "--prompt", "ab", "--max-new-tokens", 2)
    assert found["ok"], found
    assert set(found) <= documented("run")
    found = printed("inspect", artifact)
    assert found["ok"], found
    assert names(found, DATA) <= documented("inspect") | documented("compile")
    name = found["plan"][0]["kernel"] if found["plan"] else None
    if name is not None:
        known = documented("compile") | {"why"}
        assert set(printed("inspect", artifact, "--kernel", name)) <= known


def test_experts(printed, tmp_path: Path) -> None:
    from mimo_compile.experts.synthetic import steady

    steady(40, 2, 4, 64).save(tmp_path / "load.safetensors")
    found = printed("experts", tmp_path / "load.safetensors", "--window", 10, "--devices", 2)
    assert found["ok"], found
    assert names(found, set()) <= documented("experts")


def test_inspect_of_a_workload(printed) -> None:
    found = printed("inspect", "--op", "swiglu:t=1,f=64")
    assert found["ok"], found
    assert found["candidates"]
    assert names(found, {"config", "spaces", "necessary", "work"}) <= documented("inspect")
    assert {*found["why"]["work"], *found["why"]["bound"]} <= documented("inspect")
    assert set(found["necessary"]) <= documented("inspect")


def test_targets_and_errors(printed) -> None:
    found = printed("targets", "--formats")
    assert found["ok"], found
    assert found["formats"]
    free = {"presets", "gpus", "versions", "kernels", "tokens", "calibration"}
    assert names(found, free) <= documented("targets")
    error = printed("run", "nowhere.mimo", "--prompt", "x")
    assert set(error) == {"ok", "error", "exit_code"}
    assert '{"ok": false, "error": ..., "exit_code": ...}' in PAGE


def record(**changes: Any) -> Record:
    """Return a sound record."""
    fixed = {
        "key": "0" * 64, "workload": "swiglu:t=1,f=8", "schedule": "swiglu.x86", "schedule_version": 1,
        "config": {"unroll": 4}, "hardware": "cpu.2c", "features": ("avx2",), "threads": 2,
        "cache": "cold", "versions": {}, "verdict": Verdict.OK, "latency_us": 2.0, "modelled_mj": 0.1,
    }  # fmt: skip
    return Record(**{**fixed, **changes})


def test_db(printed, tmp_path: Path) -> None:
    path, lines = tmp_path / "a.db", tmp_path / "a.jsonl"
    with Database(path) as db:
        db.add(record())
    for arguments in (
        ("export", lines), ("import", lines), ("merge", lines), ("prune", "--failures"), ("check",),
    ):  # fmt: skip
        found = printed("db", *arguments, "--db", path)
        assert found["ok"], found
    assert names(found, {"verdicts"}) <= documented("db") | {"ok", "action"}
    assert set(printed("db", "salvage", path, "-o", tmp_path / "b.db")) <= documented("db")
    found = printed("report", path, "-o", tmp_path / "r.html")
    assert found["ok"], found
    assert set(found) <= documented("report")


def test_compile_and_tune() -> None:
    manifest = runtime_samples.decoder().manifest
    keys = names(summary(manifest), DATA | {"choices"})
    assert keys | {"ok", "path", "bytes", "seconds"} <= documented("compile")
    (result,) = summarise([record()])
    workload = WorkloadResult(
        Workload.parse("swiglu:t=1,f=8"), 1.0, 8, (result,), result, result, 1, 1, {}, ()
    )
    tuned = TuningResult((workload,), parse_objective("latency"), "trials", 1.0, None)
    assert names(tuned.to_json(), DATA) | {"ok", "db"} <= documented("tune")


def test_verify_and_bench() -> None:
    found = Verification(
        "x.mimo",
        [KernelCheck("w", "s", "k", 0.5)],
        EndToEnd(1, 0, 0, 0, 1, 1, 1.0),
        Perplexity(9, 2.0, 2.0),
    )
    assert names(found.to_json(), set()) | {"exit_code"} <= documented("verify")
    contestant = Contestant("op", "mimo", 1, "hot", print, [()], 1.0, 1.0)
    rows = {*Row(contestant, 1.0, 1.0, 1.0).json(), *ModelRow("mimo", 1, [1.0], [1.0]).json()}
    assert rows | {"ok", "machine", "rows", "prompt_tokens", "new_tokens"} <= documented("bench")
    assert set(Cell(Row(contestant, 1.0, 1.0, 1.0), None).json()) <= documented("bench")
