"""Carries out what the scheduler decides: starts actions, takes in how they end, watches nodes and limits.

Everything happens inside `Farm.next`, in the caller's thread: while the caller works, nothing new starts. So
a tuner that computes between two results disturbs no clock on its own machine.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from mimo_compile.errors import DeviceLost, MimoError
from mimo_compile.search.farm.scheduling import Action, Node, Refuse, Scheduler, Start
from mimo_compile.search.farm.tally import Tally
from mimo_compile.search.farm_runs import Worker

_LOG = logging.getLogger(__name__)
GRACE_S = 60.0
"""Seconds that actions wait for a node which could run them, after the last such node has gone."""
_POLL_S = 1.0
_AT_ONCE_S = 0.05
"""Seconds of waiting that say that nothing had ended before."""
_UNSURE = 0.1
"""Part of an action's time that may be unknown where durations are learned."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one start of an action ended.

    ``done``: ``value`` is the answer. ``lost``: the worker died, and its node lives. ``vanished``: the node
    has gone. ``broken``: the node cannot do its work (``error`` says why), whatever the action was.
    """

    action: int
    status: Literal["done", "lost", "vanished", "broken"]
    value: Any = None
    error: MimoError | None = None
    seconds: float | None = None
    """How long the worker was at it, where it says so."""


class Executor(Protocol):
    """Where actions run."""

    home: str
    """The node on which the caller runs; "" where that is none of them."""

    def nodes(self) -> Mapping[str, Node]:
        """Return the nodes that are there now."""
        ...

    def start(self, start: Start, payload: Any) -> None:
        """Begin an action; its end is told by `wait`."""
        ...

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Return what has ended; when nothing has, wait up to ``timeout_s`` for the first."""
        ...

    def kill(self, action: int) -> None:
        """End a running action and its worker; `wait` does not tell of it any more."""
        ...

    def exclude(self, node: str) -> None:
        """Give a node no more work: it is broken."""
        ...

    def close(self) -> None:
        """End everything."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """How an action ended for good."""

    action: Action
    status: Literal["done", "crash", "timeout", "refused"]
    value: Any = None
    message: str = ""
    node: str = ""
    worker: str = ""
    """The same for people: the node's label and the device; of an action that was given up, the last."""


@dataclass(slots=True)
class Statistics:
    """What a farm did so far. Times are seconds."""

    ended: Counter[str] = field(default_factory=Counter)
    """Actions by how they ended."""
    rerun: int = 0
    """Starts that came to nothing because a worker or a node was lost."""
    overlapped: int = 0
    """Builds started while a device was in use."""


class Farm:
    """One queue for all nodes; see the module."""

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler | None = None,
        *,
        grace_s: float = GRACE_S,
        clock: Callable[[], float] = time.monotonic,
        broken: Mapping[str, MimoError] | None = None,
    ) -> None:
        """Take the nodes in that are there.

        Args:
            executor: Where actions run; it is closed with the farm.
            scheduler: What decides (None: a new one).
            grace_s: How long actions wait for a node that could run them.
            clock: Seconds.
            broken: Nodes that get no work from the beginning, and what is wrong with them.
        """
        self.executor = executor
        self.scheduler = scheduler or Scheduler()
        self.statistics = Statistics()
        self.tally = Tally()
        self.judge: Callable[[Action, Any], tuple[int, int]] = lambda action, value: (1, 0)
        """Says of a done action's value how many candidates came out right, and how many did not."""
        self._grace_s = grace_s
        self._clock = clock
        self._payloads: dict[int, Any] = {}
        self._done: deque[Result] = deque()
        self._unwanted: set[int] = set()
        """Running actions whose results nobody waits for any more."""
        self._broken: dict[str, MimoError] = {}
        self._broken_nodes: dict[str, Node] = {}
        self._waited = self._began = self._left = self._clock()
        """When the last wait ended, the farm was opened, and `poll` was left."""
        self._away_s = 0.0
        self._losses: dict[int, tuple[float, str]] = {}
        """Actions that were lost: since when they wait again, and the worker."""
        self._stranded_since = math.inf
        self._serial = 0
        for name, error in (broken or {}).items():
            self._break(name, error)
        self._look()

    # -- the caller's side -----------------------------------------------------------------------

    def number(self) -> int:
        """Return the id of a new action."""
        self._serial += 1
        return self._serial

    def submit(self, action: Action, payload: Any) -> None:
        """Queue an action with what its worker needs to know."""
        self._payloads[action.id] = payload
        self.scheduler.arrived(action, self._clock())

    def cancel(self, action: int) -> None:
        """Forget an action: one that runs goes on to its end, and its result is dropped."""
        if self.scheduler.cancelled(action):
            self._forget(action)
        elif action in self.scheduler.running:
            self._unwanted.add(action)
        else:
            self._done = deque(r for r in self._done if r.action.id != action)

    def next(self) -> Result:
        """Start what can start and return the next result.

        Raises:
            DeviceLost: no node is left that could measure.
            MimoError: no node is left for what waits, or there is nothing to wait for.
        """
        while (result := self.poll(_POLL_S)) is None:
            pass
        return result

    def poll(self, timeout_s: float) -> Result | None:
        """Do what `next` does, but come back without a result when there was none for so long."""
        self._away_s += self._clock() - self._left
        try:
            return self._poll(timeout_s)
        finally:
            self._left = self._clock()

    def _poll(self, timeout_s: float) -> Result | None:
        if self._done and self._measures_here() and not self._clock_runs_here():
            return self._done.popleft()  # before another clock is started
        self._look()
        self._obey()
        if self._done and not self._clock_runs_here():
            return self._done.popleft()
        if not self.scheduler.running and not self.scheduler.waiting:
            raise MimoError("nothing is left to wait for")
        self._check_stranded()
        before, last = self._clock(), self._waited
        outcomes = self.executor.wait(timeout_s)
        self._waited = self._clock()
        # what is found at once may have ended at any time since the last look
        unseen = (last if self._waited - before < _AT_ONCE_S else before, before)
        for outcome in outcomes:
            self._take(outcome, unseen)
        for number in self.scheduler.overdue(self._clock()):
            self._overdue(number)
        return None

    def workers(self) -> list[Worker]:
        """Return what each worker did so far, and how its time went."""
        now = self._clock()
        running = [(r.start, r.since) for r in self.scheduler.running.values()]
        out = self.tally.workers(now, running)
        for worker in out:
            worker.seconds = now - self._began
            worker.tuner_s = self._away_s + now - self._left
        return out

    def close(self) -> None:
        """End everything that runs."""
        self.executor.close()

    # -- nodes -----------------------------------------------------------------------------------

    def _look(self) -> None:
        """Tell the scheduler which nodes came, changed and went."""
        there = self.executor.nodes()
        self._broken_nodes |= {k: n for k, n in there.items() if k in self._broken}
        present = {k: n for k, n in there.items() if k not in self._broken}
        for name in [n for n in self.scheduler.nodes if n not in present]:
            here = [i for i, r in self.scheduler.running.items() if r.start.node == name]
            for number in here:
                self.executor.kill(number)
                self._lost(number)
            self.tally.left(name, self._clock())
            self.statistics.rerun += len(here)
            self.scheduler.node_lost(name, counts=name not in self._broken)
            for number in self._unwanted.intersection(here):
                self._drop(number)
        for name, node in present.items():
            if self.scheduler.nodes.get(name) != node:
                self.scheduler.node_added(node)
                self.tally.joined(node, self._clock())

    def _break(self, name: str, error: MimoError) -> None:
        """Give a node no more work."""
        _LOG.warning("node %.8s gets no more work: %s", name, error)
        self._broken[name] = error
        self.executor.exclude(name)

    def _measures_here(self) -> bool:
        node = self.scheduler.nodes.get(self.executor.home)
        return node is not None and bool(node.devices)

    def _clock_runs_here(self) -> bool:
        """Say whether a measurement runs on the caller's own machine, which it should not disturb."""
        return any(
            r.start.action.exclusive and r.start.node == self.executor.home
            for r in self.scheduler.running.values()
        )

    def _check_stranded(self) -> None:
        """Give up when what waits has no node, nothing runs, and none has come for a while."""
        now = self._clock()
        stranded = self.scheduler.stranded()
        if self.scheduler.running or len(stranded) < len(self.scheduler.waiting) or self._done:
            self._stranded_since = math.inf
            return
        self._stranded_since = min(self._stranded_since, now)
        if not stranded:
            return
        for name, node in self._broken_nodes.items():
            if any(self.scheduler.suits(a, node) for a in stranded):
                raise self._broken[name]  # it was the last of its sort
        if now - self._stranded_since < self._grace_s:
            return
        what = "the last node that could measure has" if stranded[0].exclusive else "all nodes have"
        raise DeviceLost(
            f"{what} gone and none came within {self._grace_s:g} s",
            remedy="What was measured is kept: run again when the cluster is back",
        )

    # -- actions ---------------------------------------------------------------------------------

    def _obey(self) -> None:
        now = self._clock()
        for decision in self.scheduler.decide(now):
            number = decision.action.id
            if isinstance(decision, Refuse):
                status: Literal["crash", "refused"] = "crash" if decision.deadly else "refused"
                worker = self._losses.get(number, (0.0, ""))[1]
                self._finish(
                    Result(decision.action, status, message=decision.reason, worker=worker)
                )
                continue
            if not decision.action.exclusive:
                self.statistics.overlapped += any(
                    r.start.device for r in self.scheduler.running.values()
                )
            waiting = self.scheduler.running[number].waiting
            since = self._losses[number][0] if number in self._losses else waiting.arrived
            self.tally.started(decision, now - since)
            self.executor.start(decision, self._payloads[number])

    def _lost(self, number: int) -> None:
        """Count an action that will not answer."""
        running, now = self.scheduler.running[number], self._clock()
        self.tally.lost(running.start, now - running.since)
        worker = self.tally.name(running.start.node, running.start.device)
        self._losses[number] = now, worker

    def _take(self, outcome: Outcome, unseen: tuple[float, float]) -> None:
        """Take in how an action ended, perhaps while nobody looked."""
        number, now = outcome.action, self._clock()
        running = self.scheduler.running.get(number)
        if running is None:
            return
        node, action = running.start.node, running.start.action
        if outcome.status == "done":
            unsure_s = unseen[1] - max(unseen[0], running.since)
            self.scheduler.finished(number, now, learn=unsure_s <= _UNSURE * (now - running.since))
            held_s = now - running.since
            seconds = held_s if outcome.seconds is None else min(held_s, outcome.seconds)
            good, bad = self.judge(action, outcome.value)
            self.tally.ended(running.start, seconds, good=good, bad=bad)
            worker = self.tally.name(node, running.start.device)
            self._finish(Result(action, "done", outcome.value, node=node, worker=worker))
        elif outcome.status in ("lost", "vanished"):
            self.statistics.rerun += 1
            self._lost(number)
            if outcome.status == "lost":
                self.scheduler.failed(number)
            else:
                self.scheduler.displaced(number)
            if number in self._unwanted:
                self._drop(number)
        else:
            assert outcome.error is not None
            self._break(node, outcome.error)
            self._look()

    def _overdue(self, number: int) -> None:
        running = self.scheduler.running[number]
        limit, start = running.start.action.timeout_s, running.start
        self.executor.kill(number)
        self._lost(number)
        self.scheduler.timed_out(number)
        message = f"no answer from its worker within {limit:g} s"
        worker = self.tally.name(start.node, start.device)
        self._finish(
            Result(start.action, "timeout", message=message, node=start.node, worker=worker)
        )

    def _finish(self, result: Result) -> None:
        number = result.action.id
        self.statistics.ended[result.status] += 1
        self._forget(number)
        if number in self._unwanted:
            self._unwanted.discard(number)
        else:
            self._done.append(result)

    def _drop(self, number: int) -> None:
        """Do not repeat what nobody waits for."""
        if self.scheduler.cancelled(number):
            self._unwanted.discard(number)
            self._forget(number)

    def _forget(self, number: int) -> None:
        self._payloads.pop(number, None)
        self._losses.pop(number, None)
