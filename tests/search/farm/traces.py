"""Random queues and machines for tests of the scheduler."""

from __future__ import annotations

import random
from dataclasses import replace

from mimo_compile.search.farm.scheduling import Action, Node
from mimo_compile.search.farm.simulation import Change, Job

KINDS = ("build", "measure", "check")


def nodes(rng: random.Random) -> list[Node]:
    """One to four nodes; the first takes everything, and is the largest."""
    out = [Node("n0", 8, ("d0",), quiet=rng.random() < 0.7)]
    for i in range(1, rng.randint(1, 4)):
        devices = tuple(f"d{j}" for j in range(rng.randint(0, 2)))
        kinds = frozenset({"build"}) if not devices and rng.random() < 0.5 else None
        out.append(Node(f"n{i}", rng.randint(1, 6), devices, rng.random() < 0.5, kinds))
    return out


def job(rng: random.Random, number: int, spread_s: float = 30.0) -> Job:
    """An action that the first node can run."""
    kind = rng.choice(KINDS)
    low = rng.choice((1, 1, 1, 2, 4))
    exclusive = kind == "measure"
    action = Action(
        number,
        kind,
        label=f"w{rng.randint(0, 3)}",
        content=f"c{number}",
        task=f"t{number % 3}",
        low=low,
        high=low if exclusive else rng.choice((low, 8)),
        parallel=rng.choice((0.0, 0.5, 0.95)),
        exclusive=exclusive,
        weight=rng.choice((0.5, 1.0, 2.0)),
        affinity=rng.choice(("", "n0", "n1")),
    )
    return Job(action, rng.uniform(0, spread_s), rng.choice((0.2, 1.0, 4.0)) * rng.uniform(0.5, 2))


def jobs(rng: random.Random, count: int, spread_s: float = 30.0) -> list[Job]:
    """So many of them."""
    return [job(rng, i, spread_s) for i in range(1, count + 1)]


def changes(rng: random.Random, machine: list[Node]) -> list[Change]:
    """Nodes but the first go, come back and change their size."""
    out = []
    for node in machine[1:]:
        if rng.random() < 0.5:
            gone = rng.uniform(1, 20)
            out.append(Change(gone, node, gone=True))
            size = replace(node, units=rng.randint(1, 8))
            out.append(Change(gone + rng.uniform(0.5, 10), size))
    return out
