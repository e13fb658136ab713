"""A process for each implementation: its memory is its own, and a crash ends nothing else.

Parent and child speak JSON lines over the child's standard input and output. The child ends when its input
does, so none is left over when the parent is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import tempfile
from importlib import import_module
from types import TracebackType
from typing import Any

from mimo_compile.bench.models.entrant import Entrant
from mimo_compile.errors import MimoError

ANSWER_S = 1800.0
"""Seconds that an implementation may take over one request; then it hangs, and its process is ended."""
_ROLLUP = "/proc/self/smaps_rollup"


class Worker:
    """The process that runs one entrant."""

    def __init__(self, entrant: Entrant, environment: dict[str, str] | None = None) -> None:
        """Start it; the first request waits until its libraries are imported.

        Args:
            entrant: Whom to run.
            environment: Variables that are set for it.
        """
        self.entrant = entrant
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, entrant.runner, json.dumps(entrant.arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip

    def __enter__(self) -> Worker:
        """Return the worker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self.close()

    def close(self) -> None:
        """End the process, and wait for it."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()

    def ask(self, what: str, *arguments: Any) -> dict[str, Any]:
        """Send a request (``load``, ``run``, ``memory``) and return the answer.

        Raises:
            MimoError: it failed, did not answer, or the process died; says what it said last.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([what, *arguments]).encode() + b"\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], ANSWER_S)[0]:
                self._process.kill()
                raise MimoError(f"no answer to {what!r} in {ANSWER_S:g} s: its process was ended")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise MimoError(self._death())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MimoError(str(answer["error"]))
        return answer

    def _death(self) -> str:
        code = self._process.wait()
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - 4096))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process ended with {how}" + (f": {lines[-1][:200]}" if lines else "")


def memory() -> dict[str, int]:
    """Return what this process holds in memory now, in bytes.

    ``rss_bytes`` is all that is resident; of it ``anonymous_bytes`` is its own, and the rest, such as mapped
    files, is ``mapped_bytes``. ``peak_bytes`` is the most that ever was resident. Empty where the kernel does
    not tell.
    """
    try:
        with open(_ROLLUP) as rollup, open("/proc/self/status") as status:
            found = dict(re.findall(r"^(\w+):\s+(\d+) kB", rollup.read() + status.read(), re.M))
        rss, own = int(found["Rss"]) * 1024, int(found["Anonymous"]) * 1024
        peak = int(found["VmHWM"]) * 1024
    except (OSError, KeyError):
        return {}
    return {
        "rss_bytes": rss, "anonymous_bytes": own, "mapped_bytes": rss - own,
        "peak_bytes": max(peak, rss),
    }  # fmt: skip


def main(runner: str, arguments: str) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not stand among the answers
    module, _, name = runner.partition(":")
    made: Any = None
    failure = ""
    try:
        made = getattr(import_module(module), name)(**json.loads(arguments))
    except Exception as error:  # whatever another library does
        failure = _line(error)
    for line in sys.stdin:
        what, *values = json.loads(line)
        try:
            if made is None:
                answer: dict[str, Any] = {"error": failure}
            else:
                answer = memory() if what == "memory" else getattr(made, what)(*values)
        except Exception as error:  # likewise
            answer = {"error": _line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _line(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0][:200]
    return first if isinstance(error, MimoError) else f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    main(*sys.argv[1:])
