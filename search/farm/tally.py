"""What each worker of a farm did and how its time went; the coordinator tells, no clock is read here."""

from __future__ import annotations

import msgspec

from mimo_compile.search.farm.scheduling import Node, Start
from mimo_compile.search.farm_runs import Worker

SHORT = 8
"""Letters of a node's name where its user gave it none, as in the log."""


class Tally:
    """Counts by worker: what bears one label is one worker, whichever node it is on."""

    def __init__(self) -> None:
        """Start without nodes."""
        self._rows: dict[str, Worker] = {}
        self._labels: dict[str, str] = {}
        """Node -> worker."""
        self._units: dict[str, int] = {}
        self._since: dict[str, float] = {}
        """Node -> when it came, while it is there."""
        self._present: dict[str, float] = {}
        """Worker -> seconds that its nodes were there, up to the last that went."""

    # -- nodes -----------------------------------------------------------------------------------

    def joined(self, node: Node, now: float) -> None:
        """A node came, or what it can do has changed."""
        self._since.setdefault(node.name, now)
        name = self._labels[node.name] = node.label or node.name[:SHORT]
        row = self._rows.setdefault(name, Worker(name=name))
        self._units[node.name] = node.units
        here = (n for n in self._since if self._labels[n] == name)
        row.cpus = max(row.cpus, sum(self._units[n] for n in here))
        row.devices = tuple(sorted({*row.devices, *node.devices}))

    def left(self, node: str, now: float) -> None:
        """A node has gone, or gets no more work."""
        if (since := self._since.pop(node, None)) is not None:
            name = self._labels[node]
            self._present[name] = self._present.get(name, 0.0) + now - since

    def name(self, node: str, device: str = "") -> str:
        """Return what records call a node, or a device of it: ``NAME`` or ``NAME/DEVICE``; "" of none."""
        label = self._labels.get(node, node[:SHORT])
        return f"{label}/{device}" if label and device else label

    # -- actions ---------------------------------------------------------------------------------

    def started(self, start: Start, waited_s: float) -> None:
        """An action began on a node after it had waited."""
        row = self._row(start)
        row.started += 1
        row.waited_s += max(0.0, waited_s)

    def ended(self, start: Start, seconds: float, *, good: int = 0, bad: int = 0) -> None:
        """An action ended with so many candidates that are right, and so many that are not."""
        row = self._row(start)
        row.busy_s += self._share(start) * max(0.0, seconds)
        row.failed += bad
        if start.action.exclusive:
            row.measured += good
        else:
            row.compiled += good

    def lost(self, start: Start, seconds: float) -> None:
        """An action will not answer."""
        row = self._row(start)
        row.busy_s += self._share(start) * max(0.0, seconds)
        row.lost += 1

    def workers(self, now: float, running: list[tuple[Start, float]]) -> list[Worker]:
        """Return what there is to tell now, by name; ``running``: actions with the time of their start."""
        rows = {name: msgspec.structs.replace(row) for name, row in self._rows.items()}
        for start, since in running:
            rows[self._labels[start.node]].busy_s += self._share(start) * (now - since)
        for name, row in rows.items():
            here = [s for node, s in self._since.items() if self._labels[node] == name]
            present = self._present.get(name, 0.0) + sum(now - s for s in here)
            row.idle_s = max(0.0, present - row.busy_s)
        return [rows[name] for name in sorted(rows)]

    def _row(self, start: Start) -> Worker:
        return self._rows[self._labels[start.node]]

    def _share(self, start: Start) -> float:
        """Return the part of its node that an action takes."""
        return min(1.0, start.units / max(1, self._units[start.node]))
