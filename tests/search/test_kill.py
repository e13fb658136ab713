"""kill -9 of a search and of its children at random moments: no record is lost, nothing is left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimo_compile.search.database import Database
from mimo_compile.search.exchange import check
from mimo_compile.search.measure.cases import sweep
from mimo_compile.search.records import Verdict

pytestmark = [pytest.mark.compile, pytest.mark.fault]


class Zygote:
    """Starts searches that have nothing left to import."""

    def __init__(self) -> None:
        script = str(Path(__file__).parent / "zoo" / "tuner_zygote.py")
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def start(self, folder: Path, seed: int, trials: int) -> tuple[int, str]:
        """Return process id and mark of a new search."""
        (folder / "scratch").mkdir(exist_ok=True)
        mark = uuid.uuid4().hex
        order = {
            "db": str(folder / "records.db"), "scratch": str(folder / "scratch"), "mark": mark,
            "log": str(folder / f"log.{mark}"), "seed": seed, "trials": trials,
        }  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), mark


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    z = Zygote()
    yield z
    z.process.communicate()
    assert z.process.returncode == 0


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


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def wait_until_gone(mark: str, seconds: float = 60.0) -> list[int]:
    end = time.monotonic() + seconds
    while (left := processes_with(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def wait_for_end(pid: int, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while alive(pid):
        assert time.monotonic() < end, "the search does not end"
        time.sleep(0.05)


def wait_for_lines(folder: Path, mark: str, count: int, pid: int) -> None:
    while alive(pid) and len(stored(folder, mark)) < count:
        time.sleep(0.02)


def log_of(folder: Path, mark: str = "") -> str:
    return "".join(p.read_text() for p in folder.glob(f"log.{mark or '*'}"))


def stored(folder: Path, mark: str = "") -> list[str]:
    """Return the keys that were acknowledged."""
    lines = [line.split() for line in log_of(folder, mark).splitlines()]
    return [words[2] for words in lines if words[:2] == ["stored", "search"]]


def keys_of(folder: Path) -> list[str]:
    with Database(folder / "records.db") as db:
        return [r.key for r in db if r.phase == "search"]


def kill_tuners(zygote: Zygote, folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    for attempt in range(kills):
        pid, mark = zygote.start(folder, attempt, 10**6)
        if attempt % 2:  # in the midst of measuring; else anywhere, its start included
            wait_for_lines(folder, mark, rng.randint(1, 4), pid)
            time.sleep(rng.random() * 0.3)
        else:
            time.sleep(rng.random() * 2.5)
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
        assert wait_until_gone(mark) == [], "children outlived the killed process"
    acknowledged, found = stored(folder), keys_of(folder) if kills else []
    assert set(acknowledged) <= set(found)
    assert len(found) == len(set(found)), "a candidate was measured twice"
    assert check(folder / "records.db").ok
    # It goes on where it was, and the next one finds nothing to clear away.
    before = len(found)
    pid, mark = zygote.start(folder, kills, before + 5)
    wait_for_end(pid)
    assert f"finished {before + 5} 5 trials" in log_of(folder, mark), log_of(folder, mark)[-2000:]
    found = keys_of(folder)
    assert len(found) == len(set(found)) == before + 5
    assert wait_until_gone(mark) == []
    assert list((folder / "scratch").iterdir()) == [], "files were left behind"
    assert sweep(folder / "scratch") == 0
    print(f"\n{kills} kills, {len(acknowledged)} records acknowledged before, 0 lost")


@pytest.mark.slow
def test_killed_tuners_resume(zygote: Zygote, tmp_path: Path) -> None:
    kill_tuners(zygote, tmp_path, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_killed_tuners(zygote: Zygote, tmp_path: Path) -> None:
    kill_tuners(zygote, tmp_path, kills=50, seed=2)


def kill_children(zygote: Zygote, folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    pid, mark = zygote.start(folder, seed, 10**6)
    wait_for_lines(folder, mark, 4, pid)
    done = 0
    while done < kills:
        if done % 2:  # lest no child ever gets ready
            wait_for_lines(folder, mark, len(stored(folder)) + 1, pid)
        time.sleep(rng.random() * 0.5)
        assert alive(pid), log_of(folder)[-2000:]
        if children := [p for p in processes_with(mark) if p != pid]:
            try:
                os.kill(rng.choice(children), signal.SIGKILL)
            except ProcessLookupError:
                continue
            done += 1
    after = len(stored(folder))
    wait_for_lines(folder, mark, after + 16, pid)  # behind the batches that were being built or run
    assert alive(pid), log_of(folder)[-2000:]
    os.kill(pid, signal.SIGINT)
    wait_for_end(pid)
    assert "interrupted" in log_of(folder).splitlines()[-1], log_of(folder)[-2000:]
    assert wait_until_gone(mark) == [] and list((folder / "scratch").iterdir()) == []
    with Database(folder / "records.db") as db:
        rows = list(db)
    verdicts = Counter(r.verdict for r in rows)
    assert set(stored(folder)) <= {r.key for r in rows} and check(folder / "records.db").ok
    assert set(verdicts) <= {Verdict.OK, Verdict.CRASH, Verdict.BUILD_FAILED}
    assert verdicts.total() - verdicts[Verdict.OK] <= kills
    assert all("SIGKILL" in r.message for r in rows if r.verdict is not Verdict.OK)
    assert all(r.verdict is Verdict.OK for r in rows[-3:])
    print(f"\n{kills} children killed, verdicts {dict(verdicts)}")


@pytest.mark.slow
def test_a_search_outlives_its_children(zygote: Zygote, tmp_path: Path) -> None:
    kill_children(zygote, tmp_path, kills=3, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_killed_children(zygote: Zygote, tmp_path: Path) -> None:
    for seed in range(4, 9):  # one search is done with its workloads before fifty are dead
        (folder := tmp_path / str(seed)).mkdir()
        kill_children(zygote, folder, kills=10, seed=seed)


def test_interrupted_tuner_ends_cleanly(zygote: Zygote, tmp_path: Path) -> None:
    pid, mark = zygote.start(tmp_path, 0, 10**6)
    wait_for_lines(tmp_path, mark, 1, pid)
    os.kill(pid, signal.SIGINT)
    wait_for_end(pid)
    last = log_of(tmp_path).splitlines()[-1].split()
    assert last[0] == "finished" and last[3] == "interrupted"
    assert len(set(keys_of(tmp_path))) == int(last[1])
    assert wait_until_gone(mark) == [] and list((tmp_path / "scratch").iterdir()) == []
