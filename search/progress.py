"""What a running search tells, and how to show it: plain lines, or on a terminal a live table."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TextIO

from mimo_compile.search.records import Record

if TYPE_CHECKING:
    from mimo_compile.search.live import LiveProgress

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
    predicted_us: float | None = None
    """What was predicted of the record before it was measured (``measured``)."""
    weight: float = 0.0
    """Calls of the workload in one run of the model."""
    gain_us: float | None = None
    """What the workload's next round is expected to save in one run of the model."""
    own_trials: int = 0
    """Candidates of this workload, those of earlier runs included."""
    workloads: int = 0
    """``start``: how many workloads are searched."""


Progress = Callable[[Event], None]
"""Called with each event. One with an attribute ``predicted`` that is false gets no `Event.predicted_us`."""


def _speed(event: Event) -> str:
    if event.best_us is None:
        return "no correct kernel yet"
    gain = f", {event.default_us / event.best_us:.2f}x default" if event.default_us else ""
    return f"best {event.best_us:.4g} us{' simulated' if event.simulated else ''}{gain}"


class PlainProgress:
    """One line now and then, for logs and pipes."""

    predicted = False
    """Shows no predictions, which take time to make (a display without this attribute is given them)."""

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


def make_progress(
    stream: TextIO | None = None, *, seconds: float | None = None
) -> PlainProgress | LiveProgress:
    """Return the display that fits standard error (or ``stream``).

    A terminal that can move its cursor and shows UTF-8 gets the live table, all else plain lines.

    Args:
        stream: Where to show; None: standard error.
        seconds: The search's limit of time, if it has one.
    """
    out = stream or sys.stderr
    if not out.isatty() or os.environ.get("TERM", "") in ("", "dumb", "unknown"):
        return PlainProgress(out)
    if (getattr(out, "encoding", "") or "").lower().replace("-", "") != "utf8":
        return PlainProgress(out)
    try:
        from mimo_compile.search.live import LiveProgress
    except ModuleNotFoundError:  # rich comes with the [compile] extra
        return PlainProgress(out)
    return LiveProgress(out, seconds=seconds)
