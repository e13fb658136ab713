"""Where words go: results to stdout, logs, progress and errors to stderr, with --json only JSON to stdout."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import floor, isfinite, log10
from typing import Any, TextIO

from mimo_compile.errors import ArtifactWarning, CheckpointWarning


class ReaderGone(BaseException):
    """Whoever read stdout has left (``mimo-compile ... | head``): stop quietly."""


class Console:
    """The two streams of one command."""

    def __init__(self, *, json: bool, verbosity: int = 0) -> None:
        """Take over stdout as it is now; ``json`` reserves it for one JSON object."""
        self.json = json
        self.verbosity = verbosity
        self._out: TextIO = sys.stdout
        self._wrote_json = False

    @contextlib.contextmanager
    def guard_stdout(self) -> Iterator[None]:
        """With --json, send what anything else prints to stderr."""
        with contextlib.redirect_stdout(sys.stderr) if self.json else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def notes_shown(self) -> Iterator[None]:
        """Print what is odd about a checkpoint or an artifact as plain lines to stderr."""
        with warnings.catch_warnings():
            usual = warnings.showwarning

            def show(
                message: Warning | str,
                category: type[Warning],
                filename: str,
                lineno: int,
                file: TextIO | None = None,
                line: str | None = None,
            ) -> None:
                if issubclass(category, (ArtifactWarning, CheckpointWarning)):
                    self.log(f"note: {message}")
                else:
                    usual(message, category, filename, lineno, file, line)

            for category in (ArtifactWarning, CheckpointWarning):
                warnings.simplefilter("always", category)
            warnings.showwarning = show
            yield

    def say(self, text: str = "", *, end: str = "\n") -> None:
        """Print part of the result for people; nothing with --json."""
        if not self.json:
            self._write(text + end)

    def stream(self, text: str) -> None:
        """Print a piece of a text that is still being made, at once; to nowhere with --json."""
        if not self.json:
            self._write(text)
            self.flush()

    def log(self, text: str, level: int = 0) -> None:
        """Print to stderr when the command is at least this verbose."""
        if self.verbosity >= level:
            with contextlib.suppress(OSError):
                print(text, file=sys.stderr, flush=True)

    def result(self, value: Mapping[str, Any]) -> None:
        """Print the result for programs; nothing without --json. Numbers that are not finite become null."""
        if not self.json:
            return
        import json

        self._wrote_json = True
        self._write(json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")
        self.flush()

    def fail(self, text: str, code: int) -> None:
        """Print the error line, and with --json an object that says so (unless one is out already)."""
        self.log(f"error: {text}")
        if self.json and not self._wrote_json:
            with contextlib.suppress(ReaderGone, OSError):
                self.result({"ok": False, "error": text, "exit_code": code})

    def interrupted(self, code: int) -> None:
        """Say with --json that a signal ended the verb, unless its result is out already."""
        if self.json and not self._wrote_json:
            with contextlib.suppress(ReaderGone, OSError):
                self.result({"ok": False, "error": "interrupted", "exit_code": code})

    def flush(self) -> None:
        """Flush stdout."""
        self._guarded(self._out.flush)

    def _write(self, text: str) -> None:
        def write() -> None:
            try:
                self._out.write(text)
            except UnicodeEncodeError as error:  # a terminal that is not in UTF-8
                self._out.write(
                    text.encode(error.encoding, "backslashreplace").decode(error.encoding)
                )

        self._guarded(write)

    def _guarded(self, action: Any) -> None:
        try:
            action()
        except BrokenPipeError as error:
            # the interpreter flushes stdout once more on its way out, which must not complain
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())
            raise ReaderGone from error


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [_plain(v) for v in items]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if isinstance(value, int) else str(value)


def table(rows: Sequence[Sequence[object]], header: Sequence[str], *, right: str = "") -> str:
    """Lay out rows in columns.

    Args:
        rows: Cells; None shows as a dash, floats with three significant digits.
        header: Column titles.
        right: One letter per column, ``r`` aligns it right (default: numbers right).
    """
    text = [[_cell(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *text]) for i in range(len(header))]
    if not right:
        flags = [
            all(isinstance(r[i], int | float | None) for r in rows) for i in range(len(header))
        ]
        right = "".join("r" if f and rows else "l" for f in flags)

    def line(cells: Sequence[str]) -> str:
        parts = [
            c.rjust(w) if side == "r" else c.ljust(w)
            for c, w, side in zip(cells, widths, right, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(list(header)), *(line(r) for r in text)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return number(value)
    return str(value)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with ``digits`` significant digits, never in exponent form below a million."""
    if value is None:
        return "-"
    if not isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        places = 0 if value == 0 else max(0, digits - 1 - floor(log10(abs(value))))
        return f"{value:,.{places}f}"
    return f"{value:.{digits - 1}e}"


def size(count: float) -> str:
    """Return bytes for people: ``12.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
