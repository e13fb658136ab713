"""Measuring children: whatever one does, its parent goes on, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mimo_compile.errors import DeviceLost, MimoError
from mimo_compile.ir.hardware import CUDA, gpu_of, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search.measure import Measurement, Measurer, Timing, worker
from mimo_compile.search.measure import measurer as measurer_module
from mimo_compile.search.measure.cases import Scratch, make_case, sweep
from mimo_compile.search.measure.clock import spread
from mimo_compile.search.measure.runner import failed
from mimo_compile.search.measure.strays import MARK, kill_marked, marked
from mimo_compile.search.measure.worker import Pool, Reply
from mimo_compile.search.records import Verdict
from mimo_compile.search.space import Candidate, JointSpace

pytestmark = [pytest.mark.compile, pytest.mark.fault]


def space_of(*faults: str) -> tuple[JointSpace, list[Candidate]]:
    from zoo_schedules import Zoo, ZooConfig

    space = JointSpace(parse_workload("embed:t=4,v=24,d=32"), local_cpu(), [Zoo()])
    return space, [space.candidate("embed.zoo", ZooConfig(f)) for f in faults]


def run(measurer: Measurer, *faults: str) -> dict[str, Measurement]:
    space, candidates = space_of(*faults)
    return {str(m.candidate.config["fault"]): m for m in measurer.measure(space, candidates, 3)}


def test_a_candidate_that_prints_without_end(measurer: Measurer) -> None:
    found = run(measurer, "floods", "honest")
    assert found["floods"].verdict is Verdict.CRASH, found["floods"]
    assert "printed more than 64 MiB" in found["floods"].message
    assert len(found["floods"].message) < 3000
    assert found["honest"].verdict is Verdict.OK


def test_processes_that_detach_themselves_are_found(measurer: Measurer) -> None:
    found = run(measurer, "detaches", "honest")
    assert found["detaches"].verdict is Verdict.WRONG and "process" in found["detaches"].message
    assert found["honest"].verdict is Verdict.OK
    alive = [
        p for w in (*measurer.runner.pool.workers, *measurer.builder.pool.workers) if (p := w.pid)
    ]
    assert set(marked(f"{measurer._scratch.path}#")) == set(alive)


def test_signals_that_ask_do_not_count(measurer: Measurer) -> None:
    found = run(measurer, "ignores_term", "honest")
    assert found["ignores_term"].verdict is Verdict.TIMEOUT
    assert found["honest"].verdict is Verdict.OK


def test_files_that_a_candidate_writes_end_with_the_search(measurer: Measurer) -> None:
    before = set(os.listdir("."))
    found = run(measurer, "writes_file")
    assert found["writes_file"].verdict is Verdict.OK
    assert (measurer._scratch.path / "mimo_zoo_was_here").exists()
    assert set(os.listdir(".")) == before


def test_memory_that_a_candidate_wants_is_limited(measurer: Measurer) -> None:
    found = run(measurer, "eats_memory", "honest")
    assert found["eats_memory"].verdict in (Verdict.OOM, Verdict.CRASH), found
    assert found["honest"].verdict is Verdict.OK


@pytest.mark.parametrize("role", ["build", "run"])
def test_a_child_killed_while_it_starts_is_started_again(role: str, tmp_path: Path) -> None:
    pool = Pool(role, 1, memory=24 << 30, env={"TMPDIR": str(tmp_path)})
    child = pool.workers[0]
    try:
        child.send({"do": "drop" if role == "run" else "describe"})
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        while not (ended := Pool._wait([child], 60)):
            pass
        assert child.starts == 2
        assert ended[0][1].status == ("ok" if role == "run" else "error")  # nothing to describe
    finally:
        pool.close()


def test_a_child_that_never_starts_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool("run", 1, memory=1 << 20, env={"TMPDIR": str(tmp_path)})
    with pytest.raises(MimoError, match="does not start"):
        pool.call({"do": "drop"}, 5)
    monkeypatch.setattr(worker.sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(MimoError, match="cannot start a measuring process"):
        pool.call({"do": "drop"}, 5)


def test_a_device_that_is_gone_when_a_child_starts_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    said = "CudaError: the NVIDIA driver answers cuInit with CUDA_ERROR_NO_DEVICE (100)"
    python.write_text(f"#!/bin/sh\necho Traceback\necho '{said}'\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(worker.sys, "executable", str(python))
    with pytest.raises(DeviceLost, match="CUDA_ERROR_NO_DEVICE") as caught:
        Pool("gpu", 1, memory=0, env={"TMPDIR": str(tmp_path)}).call({"do": "drop"}, 5)
    assert caught.value.exit_code == 6 and "Traceback" not in str(caught.value)


def test_gpus_are_measured_on_their_like(monkeypatch: pytest.MonkeyPatch) -> None:
    target = CUDA["cuda:sm_90a"]

    def here(**changed: Any) -> str:
        memory = {"memory_bytes_per_s": changed.pop("memory", gpu_of(target).memory_bytes_per_s)}
        mine = replace(target, name="NVIDIA here", gpu=replace(gpu_of(target), **memory), **changed)
        monkeypatch.setattr(measurer_module, "local_cuda", lambda: mine)
        return measurer_module.unfit_gpu(target)

    assert here() == here(memory=4.917e12) == here(l3_bytes=52 << 20) == ""
    assert "NVIDIA here, has 3.35 TB/s of memory, cuda:sm_90a has 4.8" in here(memory=3.35e12)
    assert "has 30 MiB of L2" in here(l3_bytes=30 << 20)
    assert "with 114 SMs" in here(cores=114, threads=114)


def test_what_dead_searches_left_running_is_killed(tmp_path: Path) -> None:
    stale = tmp_path / "mimo-measure-1-gone"
    stale.mkdir()
    (stale / "lock").touch()
    pid = os.posix_spawn("/bin/sleep", ["sleep", "600"], {MARK: f"{stale}#run-1-0-0."}, setsid=True)
    other = os.posix_spawn("/bin/sleep", ["sleep", "600"], {MARK: f"{tmp_path}/else#run."})
    try:
        while not marked(f"{stale}#"):  # until it has become sleep
            time.sleep(0.01)
        assert sweep(tmp_path) == 1
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert os.waitpid(other, os.WNOHANG) == (0, 0)
    finally:
        assert kill_marked(f"{tmp_path}/else#") == 1
        os.waitpid(other, 0)


def test_no_space_for_inputs_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mimo_compile.search.measure.cases import CaseStore

    space, (candidate, *_) = space_of("honest")
    scratch = Scratch(tmp_path)
    store, case = CaseStore(scratch), make_case(space.workload, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(MimoError, match=r"measuring needs space for ids: No space.*Free some"):
        store.files(case, space.schedules[candidate.schedule], space.config(candidate))
    scratch.close()


def test_what_is_verified_besides_counts_towards_the_limit_of_what_is_kept(tmp_path: Path) -> None:
    from mimo_compile.search.measure.cases import CaseStore

    workload = parse_workload("cached_attention:t=1,h=2,kv=1,d=8,dv=8,cap=64,b=2")
    scratch = Scratch(tmp_path)
    store = CaseStore(scratch, 5 * make_case(workload, 0).nbytes)
    newest = [store.case(workload, seed) for seed in range(5)][-1]
    assert len(store._cases) == 5
    more = store.further(newest)
    assert more is not None and more is store.further(newest)
    assert [seed for _, seed in store._cases] == [1, 2, 3, 4]
    scratch.close()


def test_verdicts_of_replies() -> None:
    _, (candidate,) = space_of("honest")

    def verdict(during: str = "run", **reply: str) -> Verdict:
        return failed(
            candidate, Reply(**{"status": "error", "value": {}, **reply}), 1, during
        ).verdict  # type: ignore[arg-type]

    assert verdict(kind="MemoryError") is Verdict.OOM
    assert verdict(message="std::bad_alloc", during="build") is Verdict.OOM
    assert (
        verdict(status="crash", message="killed by SIGKILL, the machine is out of memory")
        is Verdict.OOM
    )
    assert verdict(status="crash", message="killed by SIGKILL") is Verdict.CRASH
    assert verdict(status="timeout") is Verdict.TIMEOUT
    assert verdict(during="build") is Verdict.BUILD_FAILED
    assert verdict(message="CUDA_ERROR_NO_DEVICE: no CUDA-capable device") is Verdict.DEVICE_LOST
    assert verdict(message="CUDA_ERROR_ILLEGAL_ADDRESS") is Verdict.CRASH


def test_a_lost_device_ends_the_search_and_keeps_the_record(
    measurer: Measurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, candidates = space_of("honest", "honest_parallel")
    lost = Reply("error", {}, "Unable to determine the device handle: GPU is lost")
    monkeypatch.setattr(measurer.runner, "call", lambda request, limit_s: lost)
    results = measurer.measure(space, candidates, 3)
    assert next(results).verdict is Verdict.DEVICE_LOST
    with pytest.raises(DeviceLost, match="run again"):
        next(results)


@pytest.mark.parametrize("during", ["load", "time"])
def test_a_device_lost_while_leaders_are_compared(
    measurer: Measurer, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    space, candidates = space_of("honest", "honest_parallel")
    lost = Reply("error", {}, "Unable to determine the device handle: GPU is lost")
    real = measurer.runner.call

    def call(request: dict[str, Any], limit_s: float) -> Reply:
        return lost if request["do"] == during else real(request, limit_s)

    monkeypatch.setattr(measurer.runner, "call", call)
    found = []
    with pytest.raises(DeviceLost, match=r"GPU is lost.*run again"):
        found.extend(measurer.confirm(space, candidates, 5))
    monkeypatch.undo()
    results = measurer.confirm(space, candidates, 5)
    assert [m.verdict for m in results] == [Verdict.OK, Verdict.OK]  # it is back


@pytest.mark.parametrize(
    ("kind", "message", "ours"),
    [
        ("OSError", "[Errno 28] No space left on device", True),
        ("OSError", "[Errno 12] Cannot allocate memory", False),
        ("MemoryError", "", False),
    ],
)
def test_memory_refused_to_a_candidate_is_not_our_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, message: str, ours: bool
) -> None:
    pool = Pool("run", 1, memory=24 << 30, env={"TMPDIR": str(tmp_path)})
    _, (candidate,) = space_of("honest")
    monkeypatch.setattr(worker.Worker, "poll", lambda self: Reply("error", {}, message, kind))
    try:
        if ours:
            with pytest.raises(MimoError, match="measuring failed: OSError"):
                pool.call({"do": "drop"}, 5)
        else:
            reply = pool.call({"do": "drop"}, 5)
            assert failed(candidate, reply, 1, "run").verdict is Verdict.OOM
    finally:
        pool.close()


def test_noisy_batches_are_timed_again(measurer: Measurer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spread([1.0, 1.0, 9.0]) == pytest.approx(4.0) and spread([1.0] * 8 + [9.0]) == 0.0
    replies = [[1.0, 2.0, 3.0], [1.5, 1.5, 1.5, 1.5, 1.5], [1.5, 1.5, 1.5]]
    asked: list[list[float]] = []

    def call(request: object, limit_s: float) -> Reply:
        asked.append(replies[len(asked)])
        return Reply("ok", {"seconds": [asked[-1]], "calls": [len(asked[-1])]})

    runner = measurer.runner
    monkeypatch.setattr(runner, "call", call)
    monkeypatch.setattr(runner, "clock", replace(runner.clock, timing=Timing(repeats=5)))
    reply = runner.time(["a"])
    assert asked == replies[:2] and reply.value["seconds"] == [replies[0] + replies[1]]
    assert reply.value["calls"] == [8]
    asked.clear()
    assert runner.time(["a"], stop_above_us=0.5e6).value["seconds"] == [replies[0]]  # hopeless
    asked.clear()
    monkeypatch.setattr(runner, "clock", replace(runner.clock, timing=Timing(repeats=0)))
    assert runner.time(["a"]).value["seconds"] == [replies[0]]
