"""Generate code in a child process: a kernel that makes LLVM abort ends the child, not the user's program.

The child is a fork that compiles and leaves. That costs some milliseconds, where a new process would load
the compiler and read every kernel again (about 3 s for a hundred). A fork has only the thread that called
it; that is enough here, because nothing in code generation waits for another one. Should it hang all the
same (a lock that another thread of the program held), it is noticed by its standing still.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimo_compile.errors import MimoError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.compile import compile_kernels

STILL_S = 120.0
"""Seconds without any CPU time after which a child counts as hung."""
_FAILED = 3
_TAIL = 400


@dataclass(frozen=True, slots=True)
class Origin:
    """What a kernel was made from, for messages."""

    workload: str
    schedule: str
    config: str


def compile_isolated(
    kernels: Sequence[Kernel], origins: Sequence[Origin], hardware: Hardware
) -> bytes:
    """Compile kernels into one object as `compile_kernels` does, in a child process.

    Args:
        kernels: At least one.
        origins: Where each kernel comes from.
        hardware: What to generate code for.

    Raises:
        MimoError: code generation failed, crashed or hangs; names workload, schedule and config.
    """
    with tempfile.TemporaryDirectory(prefix="mimo-") as name:
        folder = Path(name)
        whole = folder / "kernels.o"

        def everything() -> None:
            whole.write_bytes(compile_kernels(kernels, hardware))

        reason = _run(everything, folder)
        if reason is None:
            return whole.read_bytes()
        mark = folder / "mark"

        def one_by_one() -> None:
            for index, kernel in enumerate(kernels):
                mark.write_text(str(index))
                compile_kernels([kernel], hardware)

        alone = _run(one_by_one, folder)
        if alone is None:
            raise MimoError(
                f"code generation {reason}",
                where=f"{len(kernels)} kernels together, each alone compiles",
            )
        origin = origins[int(mark.read_text())]
        raise MimoError(
            f"code generation for {origin.workload} {alone}",
            where=f"schedule {origin.schedule}, config {origin.config}",
            remedy=f"Search for kernels that can be built: mimo-compile tune --op {origin.workload}",
        )


def _run(work: Callable[[], None], folder: Path) -> str | None:
    """Do work in a forked child; return None, or what happened to it in words."""
    output = folder / "output"
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    ours, theirs = os.pipe()  # closed at the child's end, however that comes
    with warnings.catch_warnings():  # newer Pythons warn of forks in a program with threads
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(ours)
        _child(work, output, parent)
    os.close(theirs)
    try:
        status = _wait(child, ours)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(ours)
    if status is None:
        return f"hangs: no progress for {STILL_S:g} s"
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return None
    text = output.read_text(errors="replace").strip()
    if code == _FAILED:
        return f"failed: {json.loads(text.splitlines()[-1])[-_TAIL:]}"
    how = (
        f"crashed with {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
    )
    return f"{how}: {_telling_line(text)}" if text else how


def _child(work: Callable[[], None], output: Path, parent: int) -> None:
    """Work and leave, without anything that a Python program does at its end."""
    code = _FAILED
    try:
        _bind_to(parent)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
        for number in (
            signal.SIGTERM,
            signal.SIGABRT,
            signal.SIGSEGV,
            signal.SIGILL,
            signal.SIGBUS,
        ):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        work()
        code = 0
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            os.write(2, b"\n" + json.dumps(text).encode())
    finally:
        os._exit(code)


def _bind_to(parent: int) -> None:
    """Die with the parent, whatever it dies of."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _wait(child: int, pipe: int) -> int | None:
    """Wait until the child closes its end of the pipe; return its status, None if it had to be killed."""
    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    step = min(5.0, STILL_S / 4)
    still, spent = 0.0, -1.0
    while not poller.poll(step * 1000):
        now = _cpu_seconds(child)
        still = still + step if now <= spent else 0.0
        spent = max(spent, now)
        if still >= STILL_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
    return os.waitpid(child, 0)[1]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _telling_line(text: str) -> str:
    """Return the line of a crash's output that says most: LLVM's own, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line for line in lines if "LLVM ERROR" in line or "Assertion" in line]
    return (marked or lines)[-1 if not marked else 0][:_TAIL]
