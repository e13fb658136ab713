"""Which action runs next, where, and on how many units: decided from events, without clocks or I/O.

An action (one build, one measurement) waits, runs on one node and ends. The queue is ordered by

    key = estimated seconds * units / weight  +  ageing * time of arrival,

shortest weighted work first, where an action that has waited long comes before all that arrived much later
(with estimates that do not change the order of two actions never changes, so none starves). The first action
that fits nowhere reserves the node on which it can start earliest; others are filled in there only if by
their estimates that does not delay it. Units that nobody waits for go to elastic actions which are about to
start, one by one, to the one that gains most.

An exclusive action has a device to itself; on a *quiet* node the whole node, since whatever else ran there
would disturb its clock.

Sources: ARL-Tangram (arXiv 2603.13019) for actions as the unit of scheduling; EASY backfilling (Lifka 1995).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from mimo_compile.search.farm.estimates import Estimates
from mimo_compile.search.records import NODES_VANISHED

LIVES = 2
"""Workers that an action may lose before it is given up, and its content with it."""
NODE_LOSSES = 4
"""Nodes that may vanish below an action, which is seldom its fault, before it is given up."""


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work and what it needs."""

    id: int
    kind: str
    """Such as ``build`` or ``measure``."""
    label: str = ""
    """What durations are learned by, besides the kind: the workload."""
    content: str = ""
    """Identity of the candidate; what kills its workers each time is not tried again."""
    task: str = ""
    low: int = 1
    """Units (CPUs) that it needs at least."""
    high: int = 1
    """Units that it can use."""
    parallel: float = 0.0
    """Part of its work that more units speed up, until that is learned."""
    exclusive: bool = False
    weight: float = 1.0
    affinity: str = ""
    """Node that it prefers among those on which it can start now."""
    timeout_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Node:
    """One machine."""

    name: str
    units: int
    devices: tuple[str, ...] = ()
    quiet: bool = True
    """True when an exclusive action wants the whole node, as one that times code on the CPU does."""
    kinds: frozenset[str] | None = None
    """Kinds of actions that it takes; None: all."""
    tasks: frozenset[str] | None = None
    """Tasks that it works for; None: all."""
    label: str = ""
    """What its user calls it."""


@dataclass(slots=True)
class Start:
    """Decision: run an action."""

    action: Action
    node: str
    units: int
    device: str = ""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Decision: this action will not run."""

    action: Action
    reason: str
    deadly: bool = False
    """True when workers or nodes were lost by it, false when nothing here could run it."""


Decision = Start | Refuse


@dataclass(slots=True)
class _Waiting:
    action: Action
    arrived: float
    node_losses: int = 0


@dataclass(slots=True)
class _Running:
    start: Start
    since: float
    waiting: _Waiting


@dataclass(slots=True)
class _Reservation:
    action: int
    node: str
    at: float = field(default=math.inf)


class Scheduler:
    """The queue, the nodes and the rule; see the module.

    Events are told by methods with the time at which they happened; `decide` then says what to do. The same
    events give the same decisions.
    """

    def __init__(self, *, ageing: float = 0.05, estimates: Estimates | None = None) -> None:
        """Start without nodes.

        Args:
            ageing: What a second of waiting counts, in seconds of one unit's work.
            estimates: What is known of durations.
        """
        self.ageing = ageing
        self.estimates = estimates or Estimates()
        self.nodes: dict[str, Node] = {}
        self.waiting: dict[int, _Waiting] = {}
        self.running: dict[int, _Running] = {}
        self.quarantined: set[str] = set()
        self._killed: Counter[tuple[str, str]] = Counter()
        """Workers that a content cost, by kind and content."""
        self._refused: list[Refuse] = []
        self._ever: list[Node] = []
        """Nodes that are or were there: what one of them could run waits for its like."""
        self._reserved: _Reservation | None = None

    # -- events ----------------------------------------------------------------------------------

    def node_added(self, node: Node) -> None:
        """Take a node in, or what has changed of one (actions on it go on)."""
        self.nodes[node.name] = node
        if node not in self._ever:
            self._ever.append(node)

    def node_lost(self, name: str, *, counts: bool = True) -> None:
        """A node has gone; what ran there waits again.

        Args:
            name: Which.
            counts: False when it is known that no action is to blame.
        """
        self.nodes.pop(name, None)
        for number, running in list(self.running.items()):
            if running.start.node == name:
                self._again(number, node=counts)

    def arrived(self, action: Action, now: float) -> None:
        """Queue an action; one that no node so far could run, or that is quarantined, is refused at once."""
        if action.content and action.content in self.quarantined:
            self._refused.append(Refuse(action, "it has killed its worker before", True))
        elif reason := self._impossible(action, self._ever):
            self._refused.append(Refuse(action, reason))
        else:
            self.waiting[action.id] = _Waiting(action, now)

    def finished(self, number: int, now: float, *, learn: bool = True) -> None:
        """An action ended, well or not, by itself: its time counts, if it is known when (``learn``)."""
        running = self.running.pop(number)
        action = running.start.action
        if learn:
            self.estimates.learn(
                action.kind, action.label, action.parallel, running.start.units, now - running.since
            )
        self._killed.pop((action.kind, action.content), None)

    def failed(self, number: int) -> None:
        """The worker of an action died: it is run once more, then it and its content are refused."""
        action = self.running[number].start.action
        at = (action.kind, action.content or f"#{number}")
        self._killed[at] += 1
        if self._killed[at] >= LIVES:
            self.running.pop(number)
            if action.content:
                self.quarantined.add(action.content)
            reason = f"its worker died {self._killed.pop(at)} times"
            self._refused.append(Refuse(action, reason, True))
        else:
            self._again(number)

    def displaced(self, number: int) -> None:
        """The node of an action has gone, and is about to be told of: the action waits again."""
        self._again(number, node=True)

    def timed_out(self, number: int) -> None:
        """An action was ended from outside because it took too long."""
        self.running.pop(number)

    def cancelled(self, number: int) -> bool:
        """Forget an action that still waits, or is about to be refused; return whether there is one."""
        kept = [r for r in self._refused if r.action.id != number]
        refused, self._refused = len(kept) < len(self._refused), kept
        return self.waiting.pop(number, None) is not None or refused

    def _again(self, number: int, *, node: bool = False) -> None:
        old = self.running.pop(number).waiting
        old.node_losses += node
        if node and old.node_losses >= NODE_LOSSES:
            self._refused.append(Refuse(old.action, f"{old.node_losses} {NODES_VANISHED}", True))
        else:
            self.waiting[number] = old

    # -- what is possible ------------------------------------------------------------------------

    @staticmethod
    def span(action: Action, node: Node) -> int:
        """Return the units that an action takes of a node at least."""
        return node.units if action.exclusive and node.quiet else action.low

    def suits(self, action: Action, node: Node) -> bool:
        """Say whether a node could run an action if it were empty."""
        return (
            (node.kinds is None or action.kind in node.kinds)
            and (node.tasks is None or action.task in node.tasks)
            and action.low <= node.units
            and (not action.exclusive or bool(node.devices))
        )

    def _impossible(self, action: Action, nodes: Collection[Node]) -> str:
        if any(self.suits(action, n) for n in nodes):
            return ""
        fit = [n for n in nodes if n.kinds is None or action.kind in n.kinds]
        if not fit:
            return f"no node takes {action.kind} actions"
        if action.exclusive and not any(n.devices for n in fit):
            return "it needs a device, and no node has one"
        most = max(n.units for n in fit)
        if action.low > most:
            return f"it needs {action.low} CPUs, and the largest node has {most}"
        return f"no node works for {action.task or 'it'}"

    def stranded(self) -> list[Action]:
        """Return waiting actions that none of the present nodes could run, even empty."""
        present = list(self.nodes.values())
        return [w.action for w in self.waiting.values() if self._impossible(w.action, present)]

    def overdue(self, now: float) -> list[int]:
        """Return running actions that have exceeded their time limit."""
        return [i for i, r in self.running.items() if now - r.since > r.start.action.timeout_s]

    def free(self, node: Node, at: float | None = None, now: float = 0.0) -> tuple[int, set[str]]:
        """Return the free units and devices of a node: now, or by estimate at a later time."""
        units, devices = node.units, set(node.devices)
        for r in self.running.values():
            if r.start.node == node.name and (at is None or self._end(r, now) > at):
                alone = node.quiet and r.start.action.exclusive
                units -= node.units if alone else r.start.units
                devices.discard(r.start.device)
        return units, devices

    def _end(self, r: _Running, now: float) -> float:
        return max(now, r.since + self._seconds(r.start.action, r.start.units))

    def _seconds(self, action: Action, units: int) -> float:
        return self.estimates.seconds(action.kind, action.label, action.parallel, units)

    # -- decisions -------------------------------------------------------------------------------

    def key(self, waiting: _Waiting) -> tuple[float, int]:
        """Return what the queue is sorted by."""
        action = waiting.action
        spans = [self.span(action, n) for n in self.nodes.values() if self.suits(action, n)]
        work = self._seconds(action, action.low) * min(spans, default=action.low) / action.weight
        return work + self.ageing * waiting.arrived, action.id

    def decide(self, now: float) -> list[Decision]:
        """Return what to start and what to refuse; what is to start counts as running from ``now`` on."""
        refused, self._refused = self._refused, []
        started: list[Start] = []
        reserved: _Reservation | None = None
        for waiting in sorted(self.waiting.values(), key=self.key):
            node = self._place(waiting.action, reserved, now)
            if node is not None:
                started.append(self._start(waiting, node, now))
            elif reserved is None:
                reserved = self._reserve(waiting.action, now)
        self._reserved = reserved
        self._spread(started, reserved)
        return [*refused, *started]

    def _start(self, waiting: _Waiting, node: Node, now: float) -> Start:
        action = waiting.action
        _, devices = self.free(node)
        device = min(devices) if action.exclusive else ""
        start = Start(action, node.name, self.span(action, node), device)
        del self.waiting[action.id]
        self.running[action.id] = _Running(start, now, waiting)
        return start

    def _place(self, action: Action, reserved: _Reservation | None, now: float) -> Node | None:
        """Return the node to start an action on: the preferred one, or that with most to spare."""
        best: tuple[bool, bool, int, str] | None = None
        for node in self.nodes.values():
            if not self.suits(action, node) or not self._fits(action, node, *self.free(node)):
                continue
            held = reserved is not None and reserved.node == node.name
            if held and not self._harmless(action, node, reserved, now):
                continue
            units, _ = self.free(node)
            rank = (
                node.name != action.affinity, bool(node.devices) and not action.exclusive, -units,
                node.name,
            )  # fmt: skip
            if best is None or rank < best:
                best = rank
        return None if best is None else self.nodes[best[-1]]

    def _fits(self, action: Action, node: Node, units: int, devices: Iterable[str]) -> bool:
        return self.span(action, node) <= units and (not action.exclusive or any(devices))

    def _harmless(self, action: Action, node: Node, held: _Reservation | None, now: float) -> bool:
        """Say whether starting an action leaves a reservation its time."""
        if held is None or now + self._seconds(action, action.low) <= held.at:
            return True
        units, devices = self.free(node, held.at, now)
        first = self.waiting[held.action].action
        left = units - self.span(action, node)
        spare = len(devices) - action.exclusive
        return left >= self.span(first, node) and spare >= first.exclusive

    def _reserve(self, action: Action, now: float) -> _Reservation | None:
        """Hold the node on which an action can start earliest; one that it holds already stays held."""
        times = {
            n.name: self._earliest(action, n, now)
            for n in self.nodes.values()
            if self.suits(action, n)
        }
        if not times:
            return None  # its nodes have gone; others may come
        old = self._reserved
        if old is not None and old.action == action.id and old.node in times:
            return _Reservation(action.id, old.node, times[old.node])
        name = min(times, key=lambda n: (times[n], n))
        return _Reservation(action.id, name, times[name])

    def _earliest(self, action: Action, node: Node, now: float) -> float:
        ends = sorted(self._end(r, now) for r in self.running.values() if r.start.node == node.name)
        for end in [now, *ends]:
            if self._fits(action, node, *self.free(node, end, now)):
                return end
        return math.inf  # the node has shrunk below what runs on it

    def _spread(self, started: list[Start], reserved: _Reservation | None) -> None:
        """Give units that nothing waits for to what starts now, where they gain most."""
        while True:
            best: Start | None = None
            most = 0.0
            for s in started:
                a, node = s.action, self.nodes[s.node]
                held = reserved is not None and reserved.node == s.node
                if a.exclusive or held or s.units >= a.high or self.free(node)[0] < 1:
                    continue
                gain = a.weight * self.estimates.gain(a.kind, a.label, a.parallel, s.units)
                if gain > most:
                    best, most = s, gain
            if best is None:
                return
            best.units += 1
