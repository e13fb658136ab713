"""The parent's side of measuring children: start, ask, wait with a limit, kill, start again.

Each child leads its own process group (the whole group is killed, and what left the group too), dies with
its parent, has limits on its address space and on the size of files, no stdin, and an output of which only
the end is kept and which may not exceed a limit. Requests are JSON lines; nothing is ever unpickled. One
thread serves all children of a pool, so a child's parent thread lives as long as the pool is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mimo_compile.errors import DeviceLost, MimoError
from mimo_compile.search.measure.strays import MARK, kill_marked, oom_kills

OUTPUT_BYTES = 64 << 10
"""How much of a child's output is kept."""
OUTPUT_LIMIT = 64 << 20
"""How much a child may print while it serves one request."""
_READ = 1 << 16
_READS = 16
"""Reads at a time from a child that prints: one that never stops must not keep its parent from the clock."""
_REPLY_BYTES = 4 << 20
_START_S = 120.0
_STARTS = 5
"""Times that a child which is killed before it is ready is started for one request."""
_OURS = (
    "OSError",
    "FileNotFoundError",
    "PermissionError",
    "EnvironmentMismatch",
    "MissingExtra",
)
"""Failures of the harness, not of a candidate: disk full, package missing."""


def default_memory() -> int:
    """Return the address-space limit of a child: three quarters of the memory, at most 32 GiB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(32 << 30, total * 3 // 4)


@dataclass(frozen=True, slots=True)
class Reply:
    """How a request ended. ``value`` is the handler's answer when status is ``ok``."""

    status: Literal["ok", "error", "timeout", "crash"]
    value: dict[str, Any]
    message: str = ""
    kind: str = ""
    """Exception class for ``error``."""

    @property
    def out_of_memory(self) -> bool:
        """True when the failure was a refused allocation."""
        words = (
            "MemoryError",
            "bad_alloc",
            "Cannot allocate memory",
            "out of memory",
            "OutOfMemory",
            "OUT_OF_MEMORY",
        )
        return self._says(words)

    @property
    def device_lost(self) -> bool:
        """True when the device itself stopped answering, whatever the candidate did."""
        words = (
            "GPU is lost",
            "fallen off the bus",
            "CUDA_ERROR_NO_DEVICE",
            "CUDA_ERROR_DEVICE_UNAVAILABLE",
            "CUDA_ERROR_ECC_UNCORRECTABLE",
            "CUDA_ERROR_SYSTEM_NOT_READY",
            "no CUDA-capable device",
        )
        return self._says(words)

    def _says(self, words: Sequence[str]) -> bool:
        return self.status != "ok" and any(w in f"{self.kind} {self.message}" for w in words)


class Worker:
    """One child; `send` starts it when it is not running."""

    def __init__(self, role: str, memory: int, env: Mapping[str, str]) -> None:
        """Describe a child: ``role`` is the module ``<role>_worker`` of this package."""
        self.role = role
        self.memory = memory
        self.env = dict(env)
        self.starts = 0
        self.ready = False
        self.since = 0.0
        """When the child started, or since it is ready when the request began."""
        self._process: subprocess.Popen[bytes] | None = None
        self._to = self._from = -1
        self._tail = b""
        self._buffer = b""
        self._printed = 0
        self._request = b""
        self._stillborn = 0
        """Starts for this request that ended by a signal before the child was ready."""
        self._mark = ""
        self._oom_kills = 0

    @property
    def pid(self) -> int | None:
        """Process id (also its group's), or None when not running."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the child if it does not run."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self.kill()
        child_in, self._to = os.pipe()
        self._from, child_out = os.pipe()
        paths = [os.path.abspath(p) for p in sys.path if p and os.path.isdir(p)]
        folder = self.env.get("TMPDIR")
        self._mark = f"{folder}#{self.role}-{os.getpid()}-{id(self):x}-{self.starts}."
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONFAULTHANDLER": "1",
            **self.env,
            MARK: self._mark,
        }
        module = f"mimo_compile.search.measure.{self.role}_worker"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(child_in), str(child_out), str(os.getpid()),
                 str(self.memory)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=(child_in, child_out), start_new_session=True, env=env, cwd=folder,
            )  # fmt: skip
        except OSError as error:
            self._close_pipes()
            raise MimoError(f"cannot start a measuring process: {error}") from error
        finally:
            os.close(child_in)
            os.close(child_out)
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        os.set_blocking(self._from, False)
        self._tail = self._buffer = b""
        self._oom_kills = oom_kills()
        self.starts += 1
        self.ready = False

    def send(self, request: Mapping[str, Any]) -> None:
        """Send a request; a child that died meanwhile is noticed by `poll`."""
        self._request = json.dumps(request).encode() + b"\n"
        self._stillborn = 0
        self._send()

    def _send(self) -> None:
        self.start()
        self.since = time.monotonic()
        self._printed = 0
        data = self._request
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[os.write(self._to, data) :]

    def fds(self) -> list[int]:
        """Return the descriptors to wait on."""
        assert self._process is not None and self._process.stdout is not None
        out = self._process.stdout
        return [self._from] if out.closed else [self._from, out.fileno()]

    def poll(self) -> Reply | None:
        """Take in what has arrived; return the reply when it is complete or the child has died."""
        self._drain_output()
        if self._printed > OUTPUT_LIMIT:
            self.kill()
            return Reply("crash", {}, f"printed more than {OUTPUT_LIMIT >> 20} MiB")
        while True:
            try:
                data = os.read(self._from, _READ)
            except BlockingIOError:
                return None
            if not data:
                return self._died()
            self._buffer += data
            if len(self._buffer) > _REPLY_BYTES:
                self.kill()
                return Reply("crash", {}, "the reply is too long")
            if not self.ready and b"\n" in self._buffer:
                self._buffer = self._buffer.partition(b"\n")[2]
                self.ready, self.since = True, time.monotonic()
            if self._buffer.endswith(b"\n"):
                break
        line, self._buffer = self._buffer, b""
        try:
            reply = json.loads(line)
            if reply["ok"]:
                return Reply("ok", dict(reply["value"]))
            return Reply("error", {}, str(reply["message"]), str(reply["kind"]))
        except (ValueError, KeyError, TypeError):
            self.kill()
            return Reply("crash", {}, "the reply is not understood")

    def _drain_output(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        out = self._process.stdout
        for _ in range(_READS):
            if out.closed:
                return
            try:
                data = os.read(out.fileno(), _READ)
            except BlockingIOError:
                return
            if not data:
                out.close()
                return
            self._printed += len(data)
            self._tail = (self._tail + data)[-OUTPUT_BYTES:]

    def _died(self) -> Reply | None:
        """Conclude from the child's end; None when it was started once more."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it closed its pipe but lives on
            code = 0
        self._drain_output()
        reason = f"left with exit code {code}"
        if code < 0:
            names = {int(s): s.name for s in signal.Signals}
            reason = f"killed by {names.get(-code, f'signal {-code}')}"
        if code == -signal.SIGKILL and oom_kills() > self._oom_kills:
            reason += ", the machine is out of memory"
        text = self._tail.decode(errors="replace").strip()
        self.kill()
        if not self.ready:
            self._stillborn += 1
            if code < 0 and self._stillborn < _STARTS:  # the candidate has not been touched yet
                self._send()
                return None
            if Reply("crash", {}, text).device_lost:  # before it could begin
                raise DeviceLost(
                    "the device stopped answering",
                    where=text.splitlines()[-1],
                    remedy="What was measured is kept: run again when the device is back",
                )
            raise MimoError(
                f"the measuring process does not start: it was {reason}"
                if code < 0
                else f"the measuring process does not start: {text.splitlines()[-1] if text else reason}"
            )
        return Reply("crash", {}, f"{reason}: {text[-1200:]}" if text else reason)

    def kill(self) -> None:
        """Kill the child's whole group, and what it started that left the group; wait for the child."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            kill_marked(self._mark)
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None
        self._close_pipes()

    def _close_pipes(self) -> None:
        for fd in (self._to, self._from):
            if fd >= 0:
                os.close(fd)
        self._to = self._from = -1


class Pool:
    """Several children of one role."""

    def __init__(self, role: str, count: int, *, memory: int, env: Mapping[str, str]) -> None:
        """Describe the pool; children start with their first request."""
        self.workers = [Worker(role, memory, env) for _ in range(count)]

    def run(
        self, requests: Sequence[Mapping[str, Any]], timeout_s: float
    ) -> Iterator[tuple[int, Reply]]:
        """Serve requests by all children at once; yield (index of the request, reply) as they end.

        A child that exceeds ``timeout_s`` on one request, or dies, is replaced.
        """
        waiting = list(enumerate(requests))[::-1]
        busy: dict[Worker, int] = {}
        idle = list(self.workers)
        try:
            while waiting or busy:
                while waiting and idle:
                    worker, (index, request) = idle.pop(), waiting.pop()
                    worker.send(request)
                    busy[worker] = index
                for worker, reply in self._wait(list(busy), timeout_s):
                    idle.append(worker)
                    yield busy.pop(worker), reply
        finally:
            for worker in busy:  # left early: their answers are of no use
                worker.kill()

    @staticmethod
    def _wait(busy: Sequence[Worker], timeout_s: float) -> list[tuple[Worker, Reply]]:
        """Wait until something happens; a request's time runs from the moment its child is ready."""
        limits = {w: w.since + (timeout_s if w.ready else _START_S) for w in busy}
        poller = select.poll()
        for worker in busy:
            for fd in worker.fds():
                poller.register(fd, select.POLLIN)
        poller.poll(max(0.0, min(limits.values()) - time.monotonic()) * 1000 + 1)
        done = []
        for worker in busy:
            was_ready = worker.ready
            reply = worker.poll()
            if reply is None and worker.ready == was_ready and time.monotonic() > limits[worker]:
                worker.kill()
                if not was_ready:
                    raise MimoError(f"the measuring process does not start within {_START_S:g} s")
                reply = Reply("timeout", {}, f"no answer within {timeout_s:g} s")
            if reply is not None:
                if reply.kind in _OURS and not reply.out_of_memory:
                    raise MimoError(f"measuring failed: {reply.kind}: {reply.message}")
                done.append((worker, reply))
        return done

    def call(self, request: Mapping[str, Any], timeout_s: float) -> Reply:
        """Serve one request by the first child."""
        worker = self.workers[0]
        worker.send(request)
        try:
            while True:
                for _, reply in self._wait([worker], timeout_s):
                    return reply
        except BaseException:
            worker.kill()
            raise

    def replace(self) -> None:
        """Kill the children; the next request starts new ones."""
        self.close()

    def close(self) -> None:
        """Kill the children."""
        for worker in self.workers:
            worker.kill()
