"""kill -9 of a tuning process at random moments: nothing acknowledged is lost, nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from mimo_compile.search.database import Database
from mimo_compile.search.exchange import check
from mimo_compile.search.measure.cases import sweep

pytestmark = [pytest.mark.compile, pytest.mark.fault]

TUNE = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from zoo_schedules import Honest
from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search.database import Database
from mimo_compile.search.measure import Measurer, Timing
from mimo_compile.search.tuner import tune_workloads

hardware = local_cpu()
device = DeviceModel.guess(hardware)
timing = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.05)

def show(event):
    if event.record is not None:
        print("stored", event.record.phase, event.record.key, flush=True)

with Database(sys.argv[2]) as db, Measurer(
    hardware, device=device, timing=timing, builders=1, scratch=Path(sys.argv[3])
) as measurer:
    result = tune_workloads(
        {parse_workload("embed:t=4,v=24,d=32"): 1.0}, hardware, trials=12, db=db, device=device,
        measurer=measurer, schedules=[Honest()], progress=show, seed=int(sys.argv[4]),
    )
    print("finished", result.trials, result.new_trials, flush=True)
"""


def processes_with(mark: str) -> list[int]:
    out = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    out.append(int(folder.name))
            except OSError:
                continue
    return out


def start(folder: Path, mark: str, seed: int) -> subprocess.Popen[str]:
    zoo = str(Path(__file__).parent / "zoo")
    arguments = [zoo, str(folder / "records.db"), str(folder / "scratch"), str(seed)]
    return subprocess.Popen(
        [sys.executable, "-c", TUNE, *arguments], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "MIMO_TEST_MARK": mark},
    )  # fmt: skip


def stored_lines(text: str) -> list[str]:
    return [line.split()[2] for line in text.splitlines() if line.startswith("stored search")]


def wait_until_gone(mark: str, seconds: float = 10.0) -> list[int]:
    end = time.monotonic() + seconds
    while (left := processes_with(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    (folder / "scratch").mkdir()
    acknowledged: list[str] = []
    for attempt in range(kills):
        mark = uuid.uuid4().hex
        child = start(folder, mark, attempt)
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(rng.randint(0, 3))]
        time.sleep(rng.random() * (3.0 if not lines else 0.3))
        child.send_signal(signal.SIGKILL)
        lines.append(child.stdout.read())
        child.wait()
        acknowledged += stored_lines("".join(lines))
        assert wait_until_gone(mark) == [], "children outlived the killed process"
    if (folder / "records.db").exists():
        with Database(folder / "records.db") as db:
            found = [r.key for r in db if r.phase == "search"]
        assert set(acknowledged) <= set(found)
        assert len(found) == len(set(found)), "a candidate was measured twice"
        assert check(folder / "records.db").ok
    mark = uuid.uuid4().hex
    child = start(folder, mark, kills)
    out, _ = child.communicate(timeout=200)
    assert child.returncode == 0 and "finished 12 " in out
    assert not set(stored_lines(out)) & set(acknowledged)
    with Database(folder / "records.db") as db:
        found = [r.key for r in db if r.phase == "search"]
    assert len(found) == len(set(found)) == 12
    assert wait_until_gone(mark) == []
    assert list((folder / "scratch").iterdir()) == [], "files were left behind"
    assert sweep(folder / "scratch") == 0


def test_killed_tuner_resumes(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=2, seed=1)


@pytest.mark.slow
def test_killed_tuner_resumes_ten_times(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=10, seed=2)


def test_interrupted_tuner_ends_cleanly(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    mark = uuid.uuid4().hex
    child = start(tmp_path, mark, 0)
    assert child.stdout is not None
    first = child.stdout.readline()
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=100)
    assert child.returncode == 0 and first.startswith("stored")
    total = int(out.splitlines()[-1].split()[1])
    with Database(tmp_path / "records.db") as db:
        assert len({r.key for r in db}) == total < 12
    assert wait_until_gone(mark) == [] and list((tmp_path / "scratch").iterdir()) == []
