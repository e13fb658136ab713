"""What a running search tells, and two ways to show it: a live display on a terminal, else plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from mimo_compile.search.records import Record

EventKind = Literal["start", "measured", "workload", "confirm", "done"]


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a search. Counts are of this run and of records it resumed from, together."""

    kind: EventKind
    workload: str = ""
    trials: int = 0
    total: int | None = None
    """Trials in all, when the budget says so."""
    best_us: float | None = None
    default_us: float | None = None
    record: Record | None = None
    """The record just stored (durably) for ``measured`` and ``confirm``."""
    text: str = ""
    simulated: bool = False
    """True when the times are a model's."""


Progress = Callable[[Event], None]


def _speed(event: Event) -> str:
    if event.best_us is None:
        return "no correct kernel yet"
    gain = f", {event.default_us / event.best_us:.2f}x default" if event.default_us else ""
    return f"best {event.best_us:.4g} us{' simulated' if event.simulated else ''}{gain}"


class PlainProgress:
    """One line now and then, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 2.0) -> None:
        """Write to ``stream`` (standard error)."""
        self._out = stream or sys.stderr
        self._every = every_s
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        """Show an event."""
        now = time.monotonic()
        if event.kind == "measured" and now - self._last < self._every:
            return
        self._last = now
        of = f"/{event.total}" if event.total else ""
        if event.kind == "measured":
            print(
                f"tune {event.trials}{of}  {event.workload}  {_speed(event)}",
                file=self._out,
                flush=True,
            )
        elif event.kind != "confirm":
            name = f"{event.workload}  {_speed(event)}" if event.workload else event.text
            print(f"tune {event.trials}{of}  {name}", file=self._out, flush=True)

    def close(self) -> None:
        """Nothing to end."""


class RichProgress:
    """A bar with the workload under work and its speed-up."""

    def __init__(self, console: Any = None) -> None:
        """Draw on standard error."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import Progress as Bar

        self._bar = Bar(
            SpinnerColumn(), TextColumn("tune"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("{task.description}"),
            console=console or Console(stderr=True), transient=False,
        )  # fmt: skip
        self._task: Any = None

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=event.total)
        text = f"{event.workload}  {_speed(event)}" if event.workload else event.text
        self._bar.update(self._task, completed=event.trials, description=text)
        if event.kind == "done":
            self.close()

    def close(self) -> None:
        """End the display."""
        self._bar.stop()


def make_progress(stream: TextIO | None = None) -> PlainProgress | RichProgress:
    """Return the display that fits standard error (or ``stream``)."""
    out = stream or sys.stderr
    if out.isatty():
        try:
            return RichProgress()
        except ModuleNotFoundError:
            pass
    return PlainProgress(out)
