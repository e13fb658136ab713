"""A kernel on which code generation fails, crashes or hangs ends with an error that names it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimo_compile.errors import MimoError
from mimo_compile.ir.hardware import PRESETS
from mimo_compile.ir.ops import parse_workload
from mimo_compile.pipeline import isolate
from mimo_compile.pipeline.isolate import Origin, compile_isolated
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.compile import compile_kernels

pytestmark = pytest.mark.compile
NEW, OLD = PRESETS["x86-64-v4"].with_threads(1), PRESETS["x86-64-v3"].with_threads(1)


def lowered(name: str, spec: str, hardware):
    workload, schedule = parse_workload(spec), get_schedule(name)
    config = schedule.space(workload, hardware).default
    values = str(schedule.config_to_json(config))
    return schedule.lower(workload, config, hardware), Origin(str(workload), name, values)


@pytest.fixture(scope="module")
def pair():
    """A kernel for any CPU, and its origin, twice."""
    return list(
        zip(*(lowered("swiglu.x86", f"swiglu:t={t},f=32", OLD) for t in (1, 2)), strict=True)
    )


def test_the_same_bytes_as_in_this_process(pair) -> None:
    assert compile_isolated(*pair, OLD) == compile_kernels(pair[0], OLD)


@pytest.mark.fault
def test_llvm_aborts(pair) -> None:
    """Instructions that the target lacks: LLVM calls abort(), which nothing in the process can catch."""
    kernel, origin = lowered("mpgemm.x86_vnni", "mpgemm:m=1,n=64,k=64,w=w8,a=a8", NEW)
    kernels, origins = (
        [*part[:1], new, *part[1:]] for part, new in zip(pair, (kernel, origin), strict=True)
    )
    with pytest.raises(MimoError, match=r"SIGABRT: LLVM ERROR: ") as caught:
        compile_isolated(kernels, origins, OLD)
    text = str(caught.value)
    assert "\n" not in text and "mpgemm:m=1,n=64,k=64" in text and origin.config in text
    assert "schedule mpgemm.x86_vnni" in text and "tune --op mpgemm:m=1" in text


def misbehave(monkeypatch, pair, act) -> None:
    """Do something instead of compiling the second kernel, together with others or alone."""
    bad = pair[0][1]
    monkeypatch.setattr(isolate, "compile_kernels", lambda ks, hw: act() if bad in ks else b"")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: ctypes.string_at(0), "crashed with SIGSEGV"),
        (lambda: os.kill(os.getpid(), signal.SIGILL), "crashed with SIGILL"),
        (lambda: sys.exit("no\nidea"), "failed: SystemExit: no idea"),
        (lambda: {}["missing"], "failed: KeyError: 'missing'"),
        (lambda: os._exit(5), "left with exit code 5"),
    ],
)
def test_ways_to_fail(monkeypatch, pair, act, words: str, capfd) -> None:
    misbehave(monkeypatch, pair, act)
    with pytest.raises(MimoError, match=words) as caught:
        compile_isolated(*pair, OLD)
    assert "swiglu:t=2,f=32" in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "what the child prints stays with the error"


@pytest.mark.fault
def test_kernels_that_only_fail_together(monkeypatch, pair) -> None:
    def act(kernels, hardware):
        if len(kernels) > 1:
            os.abort()

    monkeypatch.setattr(isolate, "compile_kernels", act)
    with pytest.raises(MimoError, match=r"SIGABRT.*2 kernels together, each alone compiles"):
        compile_isolated(*pair, OLD)


@pytest.mark.fault
def test_a_child_that_stands_still(monkeypatch, pair) -> None:
    monkeypatch.setattr(isolate, "STILL_S", 0.4)
    misbehave(monkeypatch, pair, lambda: time.sleep(100))
    with pytest.raises(MimoError, match="hangs: no progress"):
        compile_isolated(*pair, OLD)


INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
from mimo_compile.pipeline import isolate
def work(kernels, hardware):
    Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(100)
isolate.compile_kernels = work
isolate.compile_isolated([None], [None], None)
"""


@pytest.mark.fault
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_child_is_left_behind(tmp_path, how) -> None:
    note = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(note)])
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(note.read_text())
    parent.send_signal(how)
    parent.wait(timeout=30)
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")
