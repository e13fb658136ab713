"""MetaSchedule as a contestant: its spaces are right, its replay counts, its table says what lines say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mimo_compile.ir.hardware import local_cpu

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VNNI = pytest.mark.skipif(not local_cpu().has_vnni, reason="its integer spaces need AVX-512 VNNI")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@VNNI
@pytest.mark.parametrize("name", ["matmul_f32", "gemm_int8", "gemv_w4", "gemm_w4", "gemm_f32"])
def test_every_sketch_computes_the_op(tool: Any, name: str) -> None:
    from mimo_compile.ir.ops import get_op, parse_workload
    from mimo_compile.search.measure.verify import judge

    spaces, tune = tool("metaschedule_spaces"), tool("metaschedule_tune")
    against = tool("against_metaschedule")
    tool("metaschedule_integer").register_intrinsics()
    case, hardware = spaces.cases(smoke=True)[name], local_cpu().with_threads(2)
    workload = parse_workload(case.op)
    op = get_op(workload.op)
    inputs = op.make_inputs(workload, np.random.default_rng(1))
    expected = op.reference(workload, inputs)
    bound = op.bound(workload, inputs, expected)
    first = spaces.tvm.s_tir.Schedule(
        spaces.tvm.IRModule({"main": case.func()}), seed=7, debug_mask="all"
    )
    sketches = case.space(first)
    assert len(sketches) == len(case.sketches)
    for sketch in sketches:
        theirs = against.Theirs(
            case, tune.as_json(sketch.trace), inputs, expected["y"].shape, hardware
        )
        theirs(theirs.tensors)
        worst, message = judge(op.args(workload), {"y": theirs.y}, expected, bound, inputs)
        assert not message and worst <= 1


def test_our_side_of_the_shared_space_is_that_space(tool: Any) -> None:
    from mimo_compile.bench.runnable import Runnable
    from mimo_compile.ir.ops import get_op, parse_workload

    spaces = tool("metaschedule_spaces")
    case = spaces.cases(smoke=True)["matmul_f32"]
    workload, hardware = parse_workload(case.op), local_cpu()
    schedule = spaces.SharedSketches()
    assert schedule.supports(workload, hardware)
    assert not schedule.supports(parse_workload("mpgemm:m=1,n=16,k=16,w=w4g16,a=a8"), hardware)
    space = schedule.space(workload, hardware)
    configs = list(space)
    assert space.default in configs
    inputs = get_op(workload.op).make_inputs(workload, np.random.default_rng(1))
    for number, _ in enumerate(case.sketches):
        config = schedule.config(number, 2, 4, 2, 2, 4)
        assert config in configs
        values = schedule.config_to_json(config)
        assert Runnable(workload, schedule, values, hardware, inputs).check() <= 1
    # what MetaSchedule samples is one of our configs
    tvm, drawn = spaces.tvm, set()
    for seed in range(1, 9):
        first = tvm.s_tir.Schedule(tvm.IRModule({"main": case.func()}), seed=seed)
        for number, sketch in enumerate(case.space(first)):
            i, b, a = ([int(x) for x in d] for d in sketch.trace.decisions.values())
            drawn.add(schedule.config(number, *i[1:], *b[1:], *a[1:]))
    assert len(drawn) > 8 and drawn <= set(configs)


def test_the_replay_counts_what_was_asked_and_ends_when_the_lookup_does(
    tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "search" / "zoo"))
    from recordings import recording

    replay, quality = tool("metaschedule_replay"), tool("search_quality")
    monkeypatch.setitem(replay.ROUNDS, "quick", (32, 64))
    found = recording()
    trials = []
    for seed in (0, 0):
        lookup = quality.Lookup(found, 96)
        with pytest.raises(quality.Enough):
            replay.search(lookup, seed, "quick", quality.Enough)
        legal = {(r.schedule, tuple(sorted(r.config.items()))) for r in found.records}
        assert lookup.seen <= legal and len(lookup.seen) <= lookup.asked
        assert len(lookup.seen) in (lookup.reached[-1], 96)
        trials.append((lookup.reached, lookup.seen))
    assert trials[0] == trials[1]


def lines() -> list[dict[str, Any]]:
    shared = {"kernel": "gemv_w4", "threads": 2, "seconds": 1.0, "seed": 0, "smoke": False}
    ours = {"us": 10.0, "schedule": "mpgemm.x86_planes", "config": {}}
    return [
        {"kind": "search", "side": "ours", "took": 1.0, "trials": 9, "ok": 9, "errors": {}, "best": [ours],
         **shared},
        {"kind": "search", "side": "metaschedule", "took": 1.0, "trials": 5, "ok": 3, "best": [],
         "errors": {"build: TypeError: `x`": 2}, **shared},
        {"kind": "contest", "op": "mpgemm:m=1,n=2,k=3", "ours_us": 10.0, "metaschedule_us": 20.0,
         "ratio": [2.0, 1.5, 2.5], "ratios": [1.5, 2.0, 2.5], **shared},
    ]  # fmt: skip


def test_the_table_says_what_the_lines_say(tool: Any) -> None:
    made = tool("metaschedule_table")
    text = made.table(lines())
    assert "| 10.0 | 20.0 | 2.00x, 1.50 to 2.50 | 9 in 1 s | 5 (2) in 1 s |" in text
    assert "all: **2.00x** (1.60 to 2.40)" in text and "2 times: `build: TypeError: x`" in text
    nothing = [*lines()[:2], {"kind": "contest", "op": "a:b", "ours_us": 1.0, **lines()[0]}]
    nothing[2]["kind"] = "contest"
    assert "nothing right" in made.table(nothing)
    two = [{"ratio": [4.0], "ratios": [4.0, 4.0]}, {"ratio": [1.0], "ratios": [1.0, 1.0, 9.0]}]
    assert made.summary(two) == pytest.approx((2.0, 2.0, 2.0))


def test_a_line_without_its_end_is_done_again(tool: Any, tmp_path: Path) -> None:
    pages, path = tool("pages"), tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"b": ')
    assert pages.read_lines(path) == [{"a": 1}]
    pages.add_line(path, {"c": 2})
    assert path.read_text() == '{"a": 1}\n{"c": 2}\n'


@VNNI
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_a_small_run_from_the_search_to_the_table(tmp_path: Path) -> None:
    out = tmp_path / "smoke.jsonl"
    command = [
        sys.executable, str(BENCHMARKS / "against_metaschedule.py"), "gemv_w4", "--smoke", "--seconds", "3",
        "--rounds", "3", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(x["kind"], x.get("side")) for x in found] == [
        ("search", "ours"), ("search", "metaschedule"), ("contest", None),
    ]  # fmt: skip
    assert found[1]["ok"] > 0 and found[2]["ratio"][0] > 0
    assert max(found[2]["error_over_bound"].values()) <= 1
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0 and "gemv w4" in again.stdout
    assert len(out.read_text().splitlines()) == 3
