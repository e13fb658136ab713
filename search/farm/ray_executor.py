"""Runs actions on a Ray cluster.

Ray carries orders and answers and says which nodes there are. What runs where is decided by our scheduler:
Ray's resources are admission tickets, they isolate nothing. Workers are actors that stay warm; a dead one is
replaced at the next start.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.errors import MimoError
from mimo_compile.search.farm.coordinator import Outcome
from mimo_compile.search.farm.ray_cluster import Cluster
from mimo_compile.search.farm.scheduling import Node, Start

POLL_S = 1.0
"""Seconds between two looks at the list of nodes."""
Factory = Callable[[str], tuple[type, tuple[Any, ...]]]
"""Kind of action -> class of the host that serves it, and what it is made from."""


def _alive() -> bool:
    return True


@dataclass(slots=True)
class _Host:
    actor: Any
    node: str
    role: str


class RayExecutor:
    """Starts actions on warm actors, one for each that runs at a time on a node."""

    def __init__(
        self,
        cluster: Cluster,
        describe: Callable[[], Mapping[str, Node]],
        factory: Factory,
        *,
        settle: Callable[[], list[Any]] = list,
    ) -> None:
        """Use a cluster, which is closed with this.

        Args:
            cluster: Where actors run.
            describe: Says which nodes there are and what each takes; it is asked every `POLL_S` seconds.
            factory: Host classes by kind; a host has ``run(order)``, which returns a `hosts.Answer`.
            settle: Returns references besides results to wait on (probes of nodes).
        """
        self._cluster = cluster
        self._ray = cluster.ray
        self._describe = describe
        self._factory = factory
        self._settle = settle
        self.home = cluster.home
        self._idle: dict[tuple[str, str], list[_Host]] = {}
        self._running: dict[Any, tuple[int, _Host]] = {}
        self._suspects: dict[Any, list[tuple[int, _Host]]] = {}
        """By the question whether their node lives: actions whose workers are dead."""
        self._looked = -POLL_S
        self._nodes: Mapping[str, Node] = {}

    def nodes(self) -> Mapping[str, Node]:
        """Return the nodes that are there now."""
        if self._looked < 0 or time.monotonic() - self._looked >= POLL_S:
            self._nodes = dict(self._describe())
            self._looked = time.monotonic()
            for node, role in [k for k in self._idle if k[0] not in self._nodes]:
                del self._idle[node, role]
        return self._nodes

    def start(self, start: Start, payload: Any) -> None:
        """Send an order to an idle actor of the node, or to a new one."""
        role = start.action.kind
        waiting = self._idle.setdefault((start.node, role), [])
        host = waiting.pop() if waiting else self.spawn(start.node, role)
        self._running[host.actor.run.remote(payload)] = (start.action.id, host)

    def spawn(self, node: str, role: str) -> _Host:
        """Create an actor on a node."""
        cls, args = self._factory(role)
        options = {
            "num_cpus": 0, "max_restarts": 0, "max_task_retries": 0,
            "scheduling_strategy": self._cluster.on(node),
        }  # fmt: skip
        return _Host(self._ray.remote(cls).options(**options).remote(*args), node, role)

    def adopt(self, host: _Host) -> None:
        """Use an actor that `spawn` made for something else before."""
        self._idle.setdefault((host.node, host.role), []).append(host)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Return what has ended within ``timeout_s``."""
        watched = [*self._running, *self._suspects, *self._settle()]
        if not watched:
            time.sleep(min(timeout_s, 0.1))
            return []
        ready, _ = self._ray.wait(watched, num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready:  # and whatever else has ended by now
            ready, _ = self._ray.wait(
                watched, num_returns=len(watched), timeout=0, fetch_local=False
            )
        out: list[Outcome] = []
        for ref in ready:
            if ref in self._running:
                out += self._outcome(ref)
            elif ref in self._suspects:
                out += self._cleared(ref)
            else:
                self._looked = -POLL_S  # a new node has answered
        return out

    def _outcome(self, ref: Any) -> list[Outcome]:
        number, host = self._running.pop(ref)
        errors = self._ray.exceptions
        try:
            status, value, seconds = self._ray.get(ref)
        except errors.RayTaskError as error:  # a defect of ours
            self._ray.kill(host.actor)
            last = str(error).strip().splitlines()[-1]
            return [Outcome(number, "broken", error=MimoError(f"a worker failed: {last}"))]
        except errors.RayError:  # the worker is dead, or with its node the answer
            with contextlib.suppress(Exception):
                self._ray.kill(host.actor)
            self._suspect(number, host)
            return []
        if status == "broken":
            self._ray.kill(host.actor)
            return [Outcome(number, "broken", error=value)]
        self.adopt(host)
        return [Outcome(number, "done", value, seconds=seconds)]

    def _suspect(self, number: int, host: _Host) -> None:
        """Ask whether a dead worker's node lives: Ray itself notices the end of a node only after a while.

        Idle workers of its kind may have died with it: whoever runs the action again is a new one.
        """
        for other in self._idle.pop((host.node, host.role), []):
            with contextlib.suppress(Exception):
                self._ray.kill(other.actor)
        for waiting in self._suspects.values():
            if waiting[0][1].node == host.node:
                waiting.append((number, host))
                return
        task = self._ray.remote(_alive).options(
            num_cpus=0, max_retries=0, scheduling_strategy=self._cluster.on(host.node)
        )
        self._suspects[task.remote()] = [(number, host)]

    def _cleared(self, ref: Any) -> list[Outcome]:
        waiting = self._suspects.pop(ref)
        self._looked = -POLL_S
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayError:
            return [Outcome(number, "vanished") for number, _ in waiting]
        return [Outcome(number, "lost") for number, _ in waiting]

    def kill(self, action: int) -> None:
        """End a running action and its actor."""
        for ref, (number, host) in list(self._running.items()):
            if number == action:
                del self._running[ref]
                with contextlib.suppress(Exception):
                    self._ray.kill(host.actor)
        for ref, waiting in list(self._suspects.items()):
            self._suspects[ref] = [w for w in waiting if w[0] != action]
            if not self._suspects[ref]:
                del self._suspects[ref]

    def exclude(self, node: str) -> None:
        """End the actors of a node."""
        for key in [k for k in self._idle if k[0] == node]:
            for host in self._idle.pop(key):
                with contextlib.suppress(Exception):
                    self._ray.kill(host.actor)

    def close(self) -> None:
        """End all actors and the connection."""
        hosts = [h for hs in self._idle.values() for h in hs]
        closing = [h.actor.close.remote() for h in hosts]
        with contextlib.suppress(Exception):  # they end in any case
            if closing:
                self._ray.wait(closing, num_returns=len(closing), timeout=5)
        for host in [*hosts, *(h for _, h in self._running.values())]:
            with contextlib.suppress(Exception):
                self._ray.kill(host.actor)
        self._idle.clear()
        self._running.clear()
        self._cluster.close()
