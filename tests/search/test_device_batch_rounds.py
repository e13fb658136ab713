"""What a round of a device batch makes of trouble: changed inputs, comparisons without times, failing builds.

Both sides are this process, with the stand-in for the driver.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cuda_zoo import Honest
from gpu_stand_in import MISSING, compile_driver

from mimo_compile._cuda import Driver
from mimo_compile.errors import InputError
from mimo_compile.ir.hardware import CUDA
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules.cuda.nvcc import find_tool
from mimo_compile.search.database import Database
from mimo_compile.search.device_batch import runner
from mimo_compile.search.device_batch.files import Folder, files_left
from mimo_compile.search.measure import Timing, cases, gpu_slot, slots
from mimo_compile.search.measure.builder import Builder
from mimo_compile.search.measure.worker import Reply
from mimo_compile.search.records import Record
from mimo_compile.search.result import DeviceBatch
from mimo_compile.search.tune import tune_workloads
from mimo_compile.search.tuner import CONFIRM_AGAIN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.compile,
    pytest.mark.skipif(
        MISSING or find_tool("nvcc") is None, reason="nvcc, cuda.h or gcc is not installed"
    ),
]
H200, WORKLOAD = CUDA["cuda:sm_90a"], parse_workload("swiglu:t=3,f=50")
QUICK = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.05)


class InPlace:
    """A pool of one child that is this process; ``fails`` names a request that ends badly."""

    fails = ""

    def __init__(self, on: Driver) -> None:
        def load(request: dict[str, Any]) -> dict[str, Any]:
            if old := slots.SLOTS.pop(request["slot"], None):
                old.close()
            slots.SLOTS[request["slot"]] = gpu_slot.GpuSlot(on, request)
            return {}

        self.handlers = slots.handlers(load)

    def call(self, request: Any, limit_s: float) -> Reply:
        sent = msgspec.json.decode(msgspec.json.encode(request))
        if sent["do"] == self.fails and len(sent.get("slots", ())) > 1:
            return Reply("timeout", {}, "no answer within 1 s")
        return Reply("ok", self.handlers[sent["do"]](sent))

    def close(self) -> None:
        slots.drop({})

    replace = close


class Search:
    """A search in steps, and its records."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def step(self) -> DeviceBatch:
        with Database(self.path / "records.db") as db:
            return tune_workloads(
                {WORKLOAD: 1.0}, H200, db=db, device_batch=self.path / "batch", schedules=[Honest()],
                timing=QUICK, strategy="grid",
            ).device_batch  # fmt: skip

    def run(self) -> runner.Summary:
        return runner.run_batch(self.path / "batch")

    @property
    def folder(self) -> Folder:
        return Folder(self.path / "batch")

    def records(self) -> list[Record]:
        with Database(self.path / "records.db", read_only=True) as db:
            return list(db)


@pytest.fixture(scope="module")
def on(tmp_path_factory) -> Driver:
    made = Driver(str(compile_driver(tmp_path_factory.mktemp("driver"))))
    made.enter()
    return made


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> str:
    """A folder in which compiled texts are kept for all tests here."""
    return str(tmp_path_factory.mktemp("kept"))


@pytest.fixture
def search(
    on: Driver, kept: str, own_folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Search:
    monkeypatch.setenv("XDG_CACHE_HOME", kept)
    monkeypatch.setattr(runner, "local_cuda", lambda: H200)
    monkeypatch.setattr(runner, "unfit_gpu", lambda hardware: "")
    monkeypatch.setattr(runner, "Pool", lambda *a, **k: InPlace(on))
    monkeypatch.setattr(InPlace, "fails", "")
    return Search(tmp_path)


def test_only_inputs_that_ran_are_judged(search: Search, monkeypatch, caplog) -> None:
    assert search.step().units == 3
    assert search.run().failed == 0
    drawing = cases._drawing

    def otherwise(workload: Any, seed: int) -> Any:
        made = drawing(workload, seed)
        made.random(9)
        return made

    with monkeypatch.context() as changed:
        changed.setattr(cases, "_drawing", otherwise)
        kept = search.path / "kept"
        shutil.copytree(search.path / "batch", kept)
        told = search.step()
        assert "inputs of swiglu:t=3,f=50 have changed" in caplog.text
    assert told.merged == 0 and search.records() == [], "right kernels, and none is called wrong"
    assert (told.number, told.units) == (2, 3), "and all are to be run again"
    shutil.rmtree(search.path / "batch")
    shutil.move(kept, search.path / "batch")
    assert search.step().merged == 3 and all(r.ok for r in search.records())


def test_what_a_kernel_wrote_may_be_lost(search: Search) -> None:
    search.step()
    search.run()
    found, _ = search.folder.results(search.folder.read())
    name = min(files_left(found[1]))
    search.folder.file(name).unlink()
    with pytest.raises(InputError, match="run the batch there again"):
        search.step()
    lost = sum(name in files_left(r) for r in found.values())
    assert (search.run().new, search.run().new) == (lost, 0)
    search.step()
    assert len({r.key for r in search.records()}) == 3


def test_comparisons_without_times_are_given_up(search: Search, monkeypatch) -> None:
    search.step()
    search.run()
    monkeypatch.setattr(InPlace, "fails", "time")
    for _ in range(1 + CONFIRM_AGAIN):
        told = search.step()
        assert told.open == 1 and [u.phase for u in search.folder.read().units] == ["confirm"]
        search.run()
    assert search.step().open == 0 == search.step().open
    assert all(r.phase == "search" and r.ok for r in search.records())


def test_more_is_asked_for_when_nothing_builds(search: Search, monkeypatch) -> None:
    build = Builder.build
    broken: list[str] = []

    def fails(self: Builder, space: Any, candidates: Any) -> list[Reply]:
        if broken:
            return build(self, space, candidates)
        broken.extend(c.key for c in candidates)
        return [Reply("error", {}, "no compiler", "CompileError") for _ in candidates]

    monkeypatch.setattr("mimo_compile.search.device_batch.flow.FIRST", 2)
    monkeypatch.setattr(Builder, "build", fails)
    told = search.step()
    assert len(broken) == 2 == len(search.records()) and told.open == 1
