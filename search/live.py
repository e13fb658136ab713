"""The live table of a search on a terminal: one line for each kernel, refreshed in place."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mimo_compile.search.progress import Event
from mimo_compile.search.records import Record

_RECENT = 32
"""Candidates over which a kernel's prediction error is taken, and the search's speed."""
_COLUMNS = (
    # title, least width of the terminal, width
    ("best us", 0, 8),
    ("vs default", 52, 10),
    ("trials", 62, 6),
    ("mJ", 76, 10),
    ("off by", 88, 7),
    ("to gain", 102, 8),
)


@dataclass(slots=True)
class _Row:
    """What is known of one kernel."""

    workload: str
    trials: int = 0
    weight: float = 0.0
    best_us: float | None = None
    default_us: float | None = None
    gain_us: float | None = None
    best: Record | None = None
    """The record of the fastest candidate of this run."""
    errors: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """Of the latest candidates: logarithm of measured over predicted time."""

    @property
    def cost_us(self) -> float:
        return self.weight * (self.best_us or 0.0)

    def take(self, event: Event) -> None:
        self.weight = event.weight or self.weight
        self.trials = event.own_trials or self.trials
        self.best_us = event.best_us if event.best_us is not None else self.best_us
        self.default_us = event.default_us if event.default_us is not None else self.default_us
        self.gain_us = event.gain_us if event.gain_us is not None else self.gain_us
        record = event.record
        if record is None or not record.ok or record.latency_us is None:
            return
        if event.kind == "measured" and event.predicted_us:  # later readings were learned from
            self.errors.append(math.log(record.latency_us / event.predicted_us))
        if self.best is None or record.latency_us <= (self.best.latency_us or 0.0):
            self.best = record

    def cells(self, total_us: float, measured: bool) -> dict[str, str]:
        """Return the texts of the columns; ``measured``: joules by a meter only, else modelled ones."""
        best, record = self.best_us, self.best
        faster = self.default_us / best if best and self.default_us else None
        energy = ""
        if record is not None and measured and record.energy_mj is not None:
            energy = f"{record.energy_mj:.3g} {record.energy_source}"
        elif record is not None and not measured and record.modelled_mj is not None:
            energy = f"{record.modelled_mj:.3g} mod"
        gain = 100 * self.gain_us / total_us if self.gain_us is not None and total_us else None
        error = statistics.median(abs(e) for e in self.errors) if self.errors else None
        return {
            "best us": f"{best:.4g}" if best else "-",
            "vs default": f"{faster:.2f}x" if faster else "-",
            "trials": str(self.trials),
            "mJ": energy or "-",
            "off by": f"{math.exp(error):.2f}x" if error is not None else "-",
            "to gain": "-" if gain is None else "done" if gain < 0 else f"{gain:.1f} %",
        }  # fmt: skip


class LiveProgress:
    """A table that is redrawn in place, and taken away at the end: the command then prints its own.

    ``vs default``: how much faster the best is than what is used without tuning. ``mJ``: of the best, by
    its meter; ``mod``, modelled, until any kernel has joules by a meter. ``off by``: factor between the
    latest candidates' times and what was predicted of them (median). ``to gain``: what the next round is
    expected to save, of the model's time.
    """

    def __init__(self, stream: TextIO | None = None, *, seconds: float | None = None) -> None:
        """Draw on a stream (standard error); ``seconds``: the search's limit of time."""
        self.console = Console(file=stream) if stream is not None else Console(stderr=True)
        self._limit_s = seconds
        self._lock = threading.Lock()
        self._rows: dict[str, _Row] = {}
        self._last = Event("start")
        self._active = ""
        self._begin = time.monotonic()
        self._times: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self._workloads = 0
        self._live = Live(
            console=self.console, get_renderable=self.render, refresh_per_second=4, transient=True,
            redirect_stdout=False, vertical_overflow="crop",
        )  # fmt: skip

    def __call__(self, event: Event) -> None:
        """Show an event."""
        with self._lock:
            self._last = event
            self._workloads = event.workloads or self._workloads
            if event.workload:
                self._active = event.workload
                self._rows.setdefault(event.workload, _Row(event.workload)).take(event)
            self._times.append((time.monotonic(), event.trials))
        if event.kind == "done":
            self.close()
        elif not self._live.is_started:
            self._live.start(refresh=True)

    def close(self) -> None:
        """Take the table away and give the cursor back."""
        self._live.stop()

    # -- drawing -------------------------------------------------------------------------------

    def render(self) -> Any:
        """Return what the terminal shows now, cut to its size."""
        width, height = self.console.size
        with self._lock:
            rows = sorted(self._rows.values(), key=lambda r: -r.cost_us)
            active, total_us = self._active, sum(r.cost_us for r in rows)
            head = self._head()
        space = max(1, height - 5)
        measured = any(r.best is not None and r.best.energy_mj is not None for r in rows)
        shown = rows[:space]
        if active and active not in {r.workload for r in shown}:
            shown = shown[:-1] + [r for r in rows if r.workload == active]
        columns = [c for c in _COLUMNS if width >= c[1]]
        names = width - sum(c[2] + 2 for c in columns) - 4
        table = Table(box=None, padding=(0, 1), pad_edge=False, show_edge=False, expand=False)
        table.add_column("kernel", no_wrap=True, min_width=min(6, max(1, names)))
        for title, _, size in columns:
            table.add_column(title, justify="right", no_wrap=True, min_width=min(size, len(title)))
        for row in shown:
            mark = "> " if row.workload == active else "  "
            cells = row.cells(total_us, measured)
            style = "bold" if row.workload == active else ""
            table.add_row(
                Text(mark + _middle(row.workload, max(4, names))),
                *(Text(cells[title]) for title, _, _ in columns), style=style,
            )  # fmt: skip
        parts: list[Any] = [Text(head, no_wrap=True, overflow="ellipsis"), table]
        hidden = max(self._workloads, len(rows)) - len(shown)
        if hidden > 0:
            parts.append(Text(f"  and {hidden} more kernels", style="dim", no_wrap=True))
        return Group(*parts)

    def _head(self) -> str:
        last = self._last
        elapsed = time.monotonic() - self._begin
        of = f"/{last.total}" if last.total else ""
        kind = "simulated" if last.simulated else "trials"
        parts = [f"tune  {last.trials}{of} {kind}", f"{_clock(elapsed)} gone"]
        if (left := self._left_s(elapsed)) is not None:
            parts.append(f"{_clock(left)} left")
        return ", ".join(parts)

    def _left_s(self, elapsed: float) -> float | None:
        """Return the seconds until the first limit, as far as that can be told."""
        left = [self._limit_s - elapsed] if self._limit_s is not None else []
        if self._last.total is not None and len(self._times) > 1:
            (t0, n0), (t1, n1) = self._times[0], self._times[-1]
            if n1 > n0:
                left.append((self._last.total - n1) * (t1 - t0) / (n1 - n0))
        return max(0.0, min(left)) if left else None


def _middle(text: str, width: int) -> str:
    """Shorten a name in the middle: its beginning says the operator, its end the formats."""
    if len(text) <= width:
        return text
    if width < 8:
        return text[: max(0, width - 1)] + "…"
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def _clock(seconds: float) -> str:
    """Return ``0:42``, ``12:05`` or ``1:02:03``."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
