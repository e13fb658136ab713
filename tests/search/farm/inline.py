"""An executor without processes: actions run when they are waited for, in the order of their start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from toy_schedules import latency_us

from mimo_compile.search.farm.coordinator import Outcome
from mimo_compile.search.farm.hosts import Built
from mimo_compile.search.farm.scheduling import Node, Start
from mimo_compile.search.measure.base import Measurement
from mimo_compile.search.measure.worker import Reply
from mimo_compile.search.records import Verdict

Answer = tuple[str, Any]
"""Of a host here: no clock is read, the coordinator's own counts."""


class Inline:
    """Hosts are functions from an order to an answer, by kind of action."""

    def __init__(self, nodes: list[Node], hosts: Mapping[str, Callable[[Any], Answer]]) -> None:
        self.present = {n.name: n for n in nodes}
        self.home = nodes[0].name
        self.hosts = dict(hosts)
        self.queue: list[tuple[Start, Any]] = []
        self.log: list[tuple[str, str, str]] = []
        """What was started: kind, node, content."""
        self.deaths: Counter[tuple[str, str]] = Counter()
        """Times that workers of a kind and content still die."""
        self.vanishing: Counter[str] = Counter()
        """Times that the node vanishes below a content."""
        self.stuck: set[str] = set()
        """Contents that never end."""
        self.broken: dict[str, Exception] = {}
        self.killed: list[int] = []
        self.closed = False
        self.on_wait: Callable[[], None] = lambda: None

    def nodes(self) -> Mapping[str, Node]:
        return dict(self.present)

    def start(self, start: Start, payload: Any) -> None:
        assert start.node in self.present
        for other, _ in self.queue:
            alone = start.action.exclusive or other.action.exclusive
            assert not (alone and other.node == start.node and self.present[start.node].quiet)
        self.queue.append((start, payload))
        self.log.append((start.action.kind, start.node, start.action.content))

    def wait(self, timeout_s: float) -> list[Outcome]:
        self.on_wait()
        for at, (start, payload) in enumerate(self.queue):
            if start.action.content in self.stuck:
                continue
            del self.queue[at]
            return [self._end(start, payload)]
        return []

    def _end(self, start: Start, payload: Any) -> Outcome:
        number, key = start.action.id, (start.action.kind, start.action.content)
        if start.node in self.broken:
            return Outcome(number, "broken", error=self.broken[start.node])
        if self.vanishing[start.action.content] > 0:
            self.vanishing[start.action.content] -= 1
            return Outcome(number, "vanished")
        if self.deaths[key] > 0:
            self.deaths[key] -= 1
            return Outcome(number, "lost")
        status, value = self.hosts[start.action.kind](payload)
        assert status == "ok"
        return Outcome(number, "done", value)

    def kill(self, action: int) -> None:
        self.killed.append(action)
        self.queue = [(s, p) for s, p in self.queue if s.action.id != action]

    def exclude(self, node: str) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def build(order: Any) -> Answer:
    """Stand in for a compiler."""
    if order.candidate.config.get("rows") == 32:
        return "ok", Built(Reply("error", {}, "no such tile", "ValueError"))
    return "ok", Built(Reply("ok", {"code_hash": order.candidate.key}), b"code")


def measure(order: Any) -> Answer:
    """Stand in for a device."""
    out = []
    for candidate, built in zip(order.candidates, order.built, strict=True):
        assert built.code == b"code"
        us = latency_us(candidate.schedule, candidate.config)
        out.append(
            Measurement(
                candidate, Verdict.OK, seed=order.seed, latency_us=us, p10_us=us, p90_us=us, cv=0.0,
                calls=9, error_ratio=0.1, code_hash=candidate.key, modelled_mj=us,
            )
        )  # fmt: skip
    return "ok", out


HOSTS = {"build": build, "measure": measure}
