"""The live table: fits any terminal, tells what events told, and leaves the terminal as it was."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import signal
import statistics
import subprocess
import sys
import textwrap
import time

import pytest

from mimo_compile.search.progress import Event, PlainProgress, make_progress
from mimo_compile.search.records import Record, Verdict

pytest.importorskip("rich")

from rich.console import Console

from mimo_compile.search.live import LiveProgress

pytestmark = pytest.mark.compile
NAMES = [
    f"mpgemm:m={m},n={n},k=2048,w=w4g64,a=a8" for m in (1, 4, 16) for n in (2048, 8192, 128256)
]
BIG = "cached_attention:t=1,h=32,kv=8,d=64,dv=64,cap=4096"


def record(workload: str, us: float, **changes) -> Record:
    fields = {
        "key": "0", "workload": workload, "schedule": "s", "schedule_version": 1, "config": {},
        "hardware": "h", "features": (), "threads": 2, "cache": "cold", "versions": {},
        "verdict": Verdict.OK, "latency_us": us, "modelled_mj": us / 64,
    }  # fmt: skip
    return Record(**{**fields, **changes})


def view(width: int, height: int, seconds: float | None = None) -> LiveProgress:
    """A table that is drawn on demand, without a terminal."""
    live = LiveProgress(io.StringIO(), seconds=seconds)
    live.console = Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None
    )
    live._live = type("Off", (), {"is_started": True, "stop": lambda self: None})()
    return live


def shown(live: LiveProgress) -> list[str]:
    live.console.print(live.render())
    text = live.console.file.getvalue()
    live.console.file.seek(0)
    live.console.file.truncate()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).rstrip("\n").split("\n")


def feed(live: LiveProgress) -> None:
    live(Event("start", total=100, workloads=40))
    for i, name in enumerate([*NAMES, BIG], 1):
        for us in (80.0, 40.0):
            event = Event(
                "measured", name, 2 * i, 100, us, 80.0, record(name, us), predicted_us=us / 1.25,
                weight=float(i), gain_us=10.0, own_trials=2,
            )  # fmt: skip
            live(event)


def test_a_wide_terminal_shows_every_column() -> None:
    live = view(120, 30)
    feed(live)
    lines = shown(live)
    assert lines[0].startswith("tune  20/100 trials, 0:00 gone")
    (row,) = (line for line in lines if BIG in line)
    assert row.startswith("> "), "the kernel under work is marked"
    assert row.split()[2:] == ["40", "2.00x", "2", "0.625", "mod", "1.25x", "0.5", "%"]
    assert "and 30 more kernels" in lines[-1]
    assert lines[1].split() == "kernel best us vs default trials mJ off by to gain".split()


@pytest.mark.parametrize("width", [8, 20, 34, 52, 61, 75, 88, 101, 140])
@pytest.mark.parametrize("height", [3, 9, 40])
def test_no_terminal_is_too_small(width: int, height: int) -> None:
    live = view(width, height)
    feed(live)
    lines = shown(live)
    assert all(len(line) <= width for line in lines), lines
    assert len(lines) <= max(height, 4)
    if width >= 34:
        assert any("40" in line and line.startswith("> ") for line in lines), lines


def test_joules_are_shown_with_their_source() -> None:
    live = view(120, 30)
    read = record(BIG, 40.0, energy_mj=7.5, energy_source="rapl")
    live(Event("measured", BIG, 1, None, 40.0, None, read))
    (row,) = (line for line in shown(live) if BIG in line)
    assert "7.5 rapl" in row and "mod" not in row and row.count(" - ") >= 1


def test_predictions_of_what_was_learned_from_are_not_counted() -> None:
    live = view(120, 30)
    for kind, predicted in (("measured", 20.0), ("confirm", 40.0), ("confirm", 40.0)):
        live(Event(kind, BIG, 1, None, 40.0, None, record(BIG, 40.0), predicted_us=predicted))
    (row,) = (line for line in shown(live) if BIG in line)
    assert "2.00x" in row and "1.00x" not in row


def test_a_limit_of_time_counts_down() -> None:
    live = view(100, 20, seconds=90)
    live(Event("measured", BIG, 1, None, 40.0))
    assert re.search(r"1:(30|29|28) left", shown(live)[0])


def test_plain_lines_where_there_is_no_terminal(monkeypatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_progress(io.StringIO()), PlainProgress)
    assert isinstance(make_progress(Terminal()), LiveProgress)
    Terminal.encoding = "ascii"
    assert isinstance(make_progress(Terminal()), PlainProgress)
    Terminal.encoding = "utf-8"
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(Terminal()), PlainProgress)


SCRIPT = textwrap.dedent(
    """
    import sys, time
    from mimo_compile.cli.console import Console
    from mimo_compile.cli.options import show_progress
    from mimo_compile.search.progress import Event

    with show_progress(Console(json="--json" in sys.argv), tuning=True) as progress:
        progress(Event("start", total=10))
        progress(Event("measured", "swiglu:t=1,f=64", 1, 10, 5.0, 6.0))
        time.sleep(0.6)
        print("READY", file=sys.stderr, flush=True)
        time.sleep(30)
    """
)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_interruption_gives_the_cursor_back(flags: list[str]) -> None:
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *flags], stdin=slave, stdout=subprocess.PIPE, stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"},
    )  # fmt: skip
    os.close(slave)
    seen, deadline = b"", time.monotonic() + 60
    try:
        while b"READY" not in seen and time.monotonic() < deadline:
            seen += os.read(master, 65536)
        child.send_signal(signal.SIGINT)
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            seen += data
    finally:
        child.kill()
        out = child.communicate()[0]
        os.close(master)
    assert b"\x1b[?25l" in seen, "it was drawn in place"
    assert seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l"), "the cursor shows again"
    assert b"swiglu:t=1,f=64" in seen and out == b"", "nothing of it on standard output"


def test_a_search_tells_what_the_table_shows(tmp_path) -> None:
    from recordings import DEVICE, HW, LARGE, SMALL, recorded, schedules

    from mimo_compile.search import tune_workloads
    from mimo_compile.search.database import Database
    from mimo_compile.search.measure.replay import ReplayMeasurer

    events: list[Event] = []
    with Database(tmp_path / "a.db") as db:
        tune_workloads(
            {LARGE: 2.0, SMALL: 1.0}, HW, trials=96, db=db, device=DEVICE, schedules=schedules(),
            measurer=ReplayMeasurer([*recorded(LARGE), *recorded(SMALL)]), progress=events.append,
        )  # fmt: skip
    assert events[0].kind == "start" and events[0].workloads == 2
    measured = [e for e in events if e.kind == "measured"]
    large = [e for e in measured if e.workload == str(LARGE)]
    assert [e.own_trials for e in large] == list(range(1, len(large) + 1))
    assert {e.weight for e in large} == {2.0}
    assert all(e.predicted_us > 0 for e in measured if e.record.ok)
    assert any(e.gain_us is not None and e.gain_us > 0 for e in measured)
    missed = [abs(math.log(e.record.latency_us / e.predicted_us)) for e in large if e.record.ok]
    assert statistics.median(missed[-12:]) < statistics.median(missed[:8]), "it learns"
