"""Device batches end to end, with a stand-in for the GPU's driver: propose, compile, run, merge, go on.

The side with the GPU is the real command in a process of its own, whose driver's library is the stand-in.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_stand_in import MISSING, compile_driver

from mimo_compile.errors import InputError, UsageError
from mimo_compile.ir.hardware import CUDA
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules.cuda.nvcc import find_tool
from mimo_compile.search.database import Database
from mimo_compile.search.device_batch.files import Folder
from mimo_compile.search.measure import Limits, Measurer, Timing
from mimo_compile.search.records import Record, Verdict
from mimo_compile.search.result import TuningResult
from mimo_compile.search.space import JointSpace
from mimo_compile.search.tune import tune_workloads

pytestmark = [
    pytest.mark.slow,
    pytest.mark.compile,
    pytest.mark.skipif(
        MISSING or find_tool("nvcc") is None, reason="nvcc, cuda.h or gcc is not installed"
    ),
]
H200, WORKLOAD = CUDA["cuda:sm_90a"], parse_workload("swiglu:t=3,f=50")
QUICK = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.05)
SMALL = """
import sys
for name in ("tvm", "tvm_ffi", "torch", "xgboost", "scipy", "networkx", "safetensors", "psutil", "rich",
             "tokenizers", "threadpoolctl", "cloudpickle", "pynvml"):
    sys.modules[name] = None
from mimo_compile.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command where none of these can be imported."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """A folder with the stand-in."""
    return compile_driver(tmp_path_factory.mktemp("driver")).parent


@pytest.fixture(autouse=True, scope="module")
def kept(tmp_path_factory) -> None:
    """Compile each text once for all tests here."""
    os.environ["MIMO_TEST_CACHE"] = str(tmp_path_factory.mktemp("kept"))


@pytest.fixture(autouse=True)
def same_cache(monkeypatch, own_folders) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ["MIMO_TEST_CACHE"])


class Sides:
    """Both sides of a batch, with a folder of their own each."""

    def __init__(self, here: Path, driver: Path) -> None:
        self.home, self.away, self.db = here / "home", here / "away", here / "records.db"
        self.env = {**os.environ, "LD_LIBRARY_PATH": str(driver)}

    def tune(self, **more: Any) -> TuningResult:
        from cuda_zoo import CudaZoo

        more = {"schedules": [CudaZoo()], "timing": QUICK, "strategy": "grid"} | more
        with Database(self.db) as db:
            return tune_workloads({WORKLOAD: 2.0}, H200, db=db, device_batch=self.home, **more)

    def records(self) -> list[Record]:
        with Database(self.db, read_only=True) as db:
            return list(db)

    def command(self, *more: str) -> list[str]:
        return [
            sys.executable,
            "-c",
            SMALL,
            "tune",
            "--run-batch",
            str(self.away),
            *more,
        ]

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command("--json"), env=self.env, capture_output=True, text=True, check=False
        )

    def there(self) -> None:
        shutil.copytree(self.home, self.away, dirs_exist_ok=True)

    def back(self) -> None:
        shutil.copytree(self.away, self.home, dirs_exist_ok=True)

    @property
    def results(self) -> Path:
        return next(self.away.glob("results.*.jsonl"))


@pytest.fixture
def sides(tmp_path, driver) -> Sides:
    return Sides(tmp_path, driver)


def test_batches_until_nothing_is_left(sides) -> None:
    first = sides.tune()
    told = first.device_batch
    assert first.stopped == "batch" and first.new_trials == 0
    assert (told.number, told.units, told.open, told.merged) == (1, 8, 8, 0)
    again = sides.tune()  # nothing came back: the batch stays what it is
    assert again.device_batch == told
    sides.there()
    done = sides.run()
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert (value["new"], value["open"], value["units"]) == (8, 0, 8) and value["failed"] == 2
    assert "swiglu.cuda_zoo(fault=, threads=1024): 15.62 us" in done.stderr
    assert json.loads(sides.run().stdout)["new"] == 0, "nothing is run twice"
    sides.back()

    second = sides.tune()
    told = second.device_batch
    assert (told.number, told.merged, second.new_trials) == (2, 8, 8)
    rows = {(r.config["fault"], r.config["threads"]): r for r in sides.records()}
    assert len(rows) == 8
    for (fault, threads), r in rows.items():
        assert r.device == "Stand-in" and r.hardware == H200.id and r.cache == "cold"
        if fault == "":
            assert r.verdict is Verdict.OK and 0 < r.error_ratio < 1 and r.calls > 0
            assert r.latency_us == pytest.approx(15.625 if threads == 1024 else 62.5, rel=0.01)
        elif fault == "half":
            assert r.verdict is Verdict.WRONG and "nan" in r.message and r.latency_us is None
        else:
            assert r.verdict is Verdict.CRASH and "ILLEGAL_ADDRESS" in r.message
    # what is left, and the leaders against each other
    batch = Folder(sides.home).read()
    assert [u.phase for u in batch.units] == ["search", "confirm"]
    sides.there()
    assert sides.run().returncode == 0
    sides.back()
    last = sides.tune()
    assert last.stopped == "exhausted" and last.device_batch.open == 0
    assert last.best[str(WORKLOAD)].record.config == {"threads": 1024, "fault": ""}
    confirmed = [r for r in sides.records() if r.phase == "confirm"]
    assert len(confirmed) == 3 and all(r.ok for r in confirmed)
    before = len(sides.records())
    assert sides.tune().device_batch.merged == 0 and len(sides.records()) == before


def test_trials_are_kept_and_other_searches_refused(sides) -> None:
    told = sides.tune(trials=2).device_batch
    assert told.units == 2
    other = {parse_workload("swiglu:t=4,f=50"): 1.0}
    from cuda_zoo import CudaZoo

    with Database(sides.db) as db, pytest.raises(UsageError, match="is for swiglu:t=3,f=50"):
        tune_workloads(other, H200, db=db, device_batch=sides.home, schedules=[CudaZoo()])
    with Database(sides.db) as db, pytest.raises(UsageError, match="no limit of time or joules"):
        tune_workloads(other, H200, seconds=3.0, db=db, device_batch=sides.home)
    sides.there()
    assert sides.run().returncode == 0
    sides.back()
    assert sides.tune(trials=2).stopped in ("batch", "trials")
    assert sides.tune(trials=2).trials == 2


def test_killed_at_any_byte_and_gone_on_with(sides) -> None:
    sides.tune()
    sides.there()
    rng, seen = random.Random(5), 0
    for _ in range(3):
        running = subprocess.Popen(sides.command(), env=sides.env, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while time.monotonic() < until and running.poll() is None:
            lines = (
                sides.results.read_bytes().count(b"\n") if [*sides.away.glob("results.*")] else 0
            )
            if lines > seen:
                break
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.wait()
        data = sides.results.read_bytes()
        start = data.rstrip(b"\n").rfind(b"\n") + 1
        sides.results.write_bytes(data[: rng.randrange(start, len(data))])  # its last line is torn
        seen = sides.results.read_bytes().count(b"\n")
    assert sides.run().returncode == 0
    batch = Folder(sides.away).read()
    found, _ = Folder(sides.away).results(batch)
    assert set(found) == set(range(len(batch.units)))
    sides.back()
    assert sides.tune().device_batch.merged == len(batch.units)


def test_torn_transfers_are_named_and_nothing_is_lost(sides) -> None:
    sides.tune()
    sides.there()
    manifest = sides.away / "batch.jsonl"
    whole = manifest.read_bytes()
    for broken in (
        whole[:-40],
        whole.replace(b"threads", b"thr3ads", 1),
        whole[: whole.rfind(b"\n", 0, -1)],
    ):
        manifest.write_bytes(broken)
        done = sides.run()
        assert done.returncode == 1 and "Transfer the folder again" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    manifest.write_bytes(whole)
    cubins = sorted(sides.away.glob("files/*.cubin"))
    data = cubins[0].read_bytes()
    cubins[0].write_bytes(data[: len(data) // 2])
    done = sides.run()
    assert done.returncode == 1 and f"{cubins[0].name} is not whole" in done.stderr
    found, _ = Folder(sides.away).results(Folder(sides.away).read())
    assert 0 < len(found) < 8, "what is whole was run"
    sides.there()
    assert json.loads(sides.run().stdout)["new"] == 8 - len(found)
    sides.back()

    arrays = {n for r in Folder(sides.home).results(Folder(sides.home).read())[0].values()
              for s in r.steps for n in s.files.values()}  # fmt: skip
    victim = sides.home / "files" / sorted(arrays)[0]
    victim.write_bytes(b"torn")
    with pytest.raises(InputError, match="results of this device batch are damaged"):
        sides.tune()
    stored = len(sides.records())
    sides.back()
    assert 0 < stored < 8 and sides.tune().device_batch.number == 2
    assert len({r.key for r in sides.records()}) == 8 == len(sides.records())


def test_other_gpus_and_none_are_refused(sides) -> None:
    sides.tune(trials=1)
    sides.there()
    done = subprocess.run(sides.command(), capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "no NVIDIA driver" in done.stderr
    done = subprocess.run(
        sides.command("--op", "x"), env=sides.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "takes all from its folder" in done.stderr
    empty = subprocess.run(
        [*sides.command()[:-1], str(sides.home.parent)], env=sides.env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert empty.returncode == 1 and "there is no device batch in this folder" in empty.stderr


def test_the_side_with_the_gpu_loads_neither_compiler_nor_torch() -> None:
    code = (
        "import sys, mimo_compile.search.device_batch.runner, mimo_compile.search.measure.gpu_worker;"
        "print([m for m in ('torch', 'tvm', 'xgboost', 'scipy', 'networkx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_gpu_here_is_measured_like_any_device(driver, monkeypatch, tmp_path) -> None:
    from cuda_zoo import CRASH, WRONG, CudaZoo, ZooConfig

    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))  # which children find
    space = JointSpace(WORKLOAD, H200, [CudaZoo()])
    faults = ("", *WRONG, *CRASH, "hangs", "honest")
    candidates = [space.candidate("swiglu.cuda_zoo", ZooConfig(fault=f)) for f in faults]
    with Measurer(H200, timing=QUICK, limits=Limits(run_s=3), builders=1, scratch=tmp_path) as m:
        found = {str(r.candidate.config["fault"]): r for r in m.measure(space, candidates, 3)}
        both = [candidates[0], space.candidate("swiglu.cuda_zoo", ZooConfig(threads=1024))]
        slow, fast = (r.latency_us for r in m.confirm(space, both, 4))
    verdicts = {f: r.verdict for f, r in found.items()}
    expected = dict.fromkeys(WRONG, Verdict.WRONG) | dict.fromkeys(CRASH, Verdict.CRASH)
    assert verdicts == expected | {"": Verdict.OK, "honest": Verdict.OK, "hangs": Verdict.TIMEOUT}
    assert "beyond y" in found["beyond"].message and "SIGABRT" in found["dies"].message
    assert found[""].device == "Stand-in" and found[""].requires == ("cuda",)
    assert slow == pytest.approx(4 * fast, rel=0.01)


PYNVML = """
import time

NVML_TEMPERATURE_GPU = NVML_CLOCK_SM = 0
class NVMLError(Exception): pass
def nvmlInit(): pass
def nvmlDeviceGetHandleByUUID(uuid): return {"GPU-00112233-4455-6677-8899-aabbccddeeff": 0}[uuid]
def nvmlDeviceGetTotalEnergyConsumption(h): return 300e3 * (time.time() // 0.01 * 0.01)
def nvmlDeviceGetPowerUsage(h): return 300000
def nvmlDeviceGetTemperature(h, kind): return 41
def nvmlDeviceGetClockInfo(h, kind): return 1980
def nvmlDeviceGetComputeRunningProcesses(h): return [1]
def nvmlDeviceGetCurrentClocksEventReasons(h): return 0
"""


def test_joules_come_back_too(sides, tmp_path) -> None:
    from cuda_zoo import Honest

    how = {
        "schedules": [Honest()], "trials": 2, "objective": "energy",
        "timing": Timing(warm_up_s=0.001, batches=3, batch_s=0.001, energy_window_s=0.7),
    }  # fmt: skip
    sides.tune(**how)
    sides.there()
    without = sides.run()
    assert without.returncode == 2 and "nvidia-ml-py is not installed" in without.stderr
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "pynvml.py").write_text(PYNVML)
    # the stand-in's calls take the time of a busy host, which varies more than a GPU's
    lenient = "from mimo_compile.search.meters.nvml import NvmlMeter\nNvmlMeter.max_spread = 9.0\n"
    small = SMALL.replace(', "pynvml"', "").replace("sys.exit", f"{lenient}sys.exit")
    command = [small if c is SMALL else c for c in sides.command("--json")]
    env = sides.env | {"PYTHONPATH": str(tmp_path / "more")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["open"] == 0, done.stderr
    sides.back()
    sides.tune(**how)
    rows = sides.records()
    assert len(rows) == 2 and all(r.ok for r in rows), rows
    for r in rows:
        assert (r.energy_source, r.device) == ("nvml", "Stand-in, 1980 MHz, 41 °C"), r
        assert r.energy_mj > 0 and r.energy_spread_mj >= 0 and r.energy_window_s >= 0.7


SEARCH = """
import json, sys
from cuda_zoo import Honest
from mimo_compile.ir.hardware import local_cuda
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search.database import Database
from mimo_compile.search.measure import Timing
from mimo_compile.search.tune import tune_workloads

if __name__ == "__main__":
    quick = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.05)
    with Database(sys.argv[1]) as db:
        found = tune_workloads(
            {parse_workload("swiglu:t=3,f=50"): 1.0}, local_cuda(), trials=3, db=db, schedules=[Honest()],
            timing=quick,
        )
    print(json.dumps(found.to_json()))
"""


def test_a_search_on_the_gpu_of_this_machine(driver, tmp_path) -> None:
    zoo = str(Path(__file__).parent / "zoo")
    env = {**os.environ, "LD_LIBRARY_PATH": str(driver), "PYTHONPATH": zoo}
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, str(tmp_path / "records.db")], env=env, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["workloads"]
    assert found["trials"] == 3 and found["verdicts"] == {"ok": 3}
    assert found["best"]["config"] == {"threads": 1024, "fault": ""} and found["speedup"] > 3
