"""Schedulers in simulated time: the decisions of a farm on made-up durations, within milliseconds."""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mimo_compile.search.farm.scheduling import Action, Node, Refuse, Scheduler, Start, _Waiting


@dataclass(frozen=True, slots=True)
class Job:
    """An action with what the scheduler does not know: how long it takes."""

    action: Action
    at: float
    """When it arrives. Unit: seconds."""
    seconds: float
    """On one unit; `Action.parallel` says what more units do to it."""
    lost: int = 0
    """Times that its worker dies half-way."""

    def lasts(self, units: int) -> float:
        """Return the seconds it takes on so many units."""
        p = self.action.parallel
        return self.seconds * (1.0 - p + p / units)


@dataclass(frozen=True, slots=True)
class Change:
    """A node that comes (or changes), or goes."""

    at: float
    node: Node
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """One start of an action, to its end or to the loss of its worker."""

    start: Start
    arrived: float
    began: float
    ended: float
    complete: bool


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened."""

    spans: tuple[Span, ...]
    refused: tuple[Refuse, ...]

    @property
    def done(self) -> list[Span]:
        """Starts that came to their end."""
        return [s for s in self.spans if s.complete]

    def completion_s(self) -> list[float]:
        """Return each action's time from arrival to end."""
        return [s.ended - s.arrived for s in self.done]

    @property
    def mean_s(self) -> float:
        """Mean action completion time."""
        return statistics.fmean(self.completion_s())

    @property
    def p95_s(self) -> float:
        """The time within which 95 of 100 actions were complete."""
        return statistics.quantiles(self.completion_s(), n=20, method="inclusive")[-1]

    @property
    def makespan_s(self) -> float:
        """When the last action ended."""
        return max(s.ended for s in self.done)

    def idle(self, devices: int) -> float:
        """Return the share of devices' time, up to the makespan, in which they were not in use."""
        busy = sum(s.ended - s.began for s in self.spans if s.start.device)
        return 1.0 - busy / (devices * self.makespan_s)


class Fifo(Scheduler):
    """First come, first served, with the same backfilling; no action gets more units than it needs."""

    def key(self, waiting: _Waiting) -> tuple[float, int]:
        """Return the time of arrival."""
        return waiting.arrived, waiting.action.id

    def _spread(self, *_: object) -> None:
        pass


React = Callable[[Span], Iterable[Job]]


def simulate(
    jobs: Sequence[Job],
    nodes: Sequence[Node],
    scheduler: Scheduler,
    *,
    changes: Sequence[Change] = (),
    react: React | None = None,
) -> Trace:
    """Run jobs to the end.

    Args:
        jobs: What arrives by itself.
        nodes: There from the start.
        scheduler: A new one.
        changes: Nodes that come and go.
        react: Called with each completed span; returns jobs that arrive then (``at`` is not before).
    """
    order = itertools.count()
    events: list[tuple[float, int, int, object]] = []

    def push(at: float, rank: int, what: object) -> None:
        heapq.heappush(events, (at, rank, next(order), what))

    known: dict[int, Job] = {}
    lives: dict[int, int] = {}
    current: dict[int, Span] = {}
    spans: list[Span] = []
    refused: list[Refuse] = []

    def begin(start: Start, now: float) -> None:
        job = known[start.action.id]
        whole = job.lasts(start.units)
        fails = lives.get(start.action.id, job.lost) > 0
        end = now + (whole / 2 if fails else whole)
        span = current[start.action.id] = Span(start, job.at, now, end, not fails)
        push(end, 0, span)

    def happen(what: object, now: float) -> None:
        if isinstance(what, Job):
            known[what.action.id] = what
            scheduler.arrived(what.action, now)
        elif isinstance(what, Change):
            if not what.gone:
                scheduler.node_added(what.node)
                return
            for number, span in list(current.items()):
                if span.start.node == what.node.name:
                    del current[number]
                    spans.append(Span(span.start, span.arrived, span.began, now, False))
            scheduler.node_lost(what.node.name)
        elif isinstance(what, Span) and current.get(what.start.action.id) is what:
            number = what.start.action.id
            del current[number]
            spans.append(what)
            if not what.complete:
                lives[number] = lives.get(number, known[number].lost) - 1
                scheduler.failed(number)
                return
            scheduler.finished(number, now)
            for job in react(what) if react is not None else ():
                push(max(job.at, now), 2, job)

    for node in nodes:
        scheduler.node_added(node)
    for change in changes:
        push(change.at, 1, change)
    for job in jobs:
        push(job.at, 2, job)
    while events:
        now = events[0][0]
        while events and events[0][0] == now:
            happen(heapq.heappop(events)[3], now)
        for decision in scheduler.decide(now):
            if isinstance(decision, Refuse):
                refused.append(decision)
            else:
                begin(decision, now)
    return Trace(tuple(spans), tuple(refused))
