"""Which nodes of a cluster build and which measure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mimo_compile.ir.hardware import PRESETS, Hardware
from mimo_compile.search.farm.hosts import Facts
from mimo_compile.search.farm.scheduling import Node

MARK = "mimo_device"
"""Ray resource that marks measuring nodes: ``ray start --resources='{"mimo_device": 1}'``."""
LABEL = "mimo_worker"
"""Ray label that gives a node a name in records: ``ray start --labels mimo_worker=NAME``."""
BOTH_MOST = 4
"""Builds at a time on a node that measures too, as a local search has them."""
_MOST = 32
_BUILD = frozenset({"build"})
_MEASURE = frozenset({"measure"})


@dataclass(frozen=True, slots=True)
class Member:
    """A node as the cluster describes it, with what it says of itself."""

    name: str
    cpus: int
    """CPUs that the cluster may use there."""
    marked: bool = False
    facts: Facts | None = None
    """None while it has not answered, or when it cannot (no mimo_compile there)."""
    label: str = ""
    """What its user calls it."""


def misfit(facts: Facts, hardware: Hardware) -> str:
    """Say why a node is not the target ("": it is).

    A preset such as ``x86-64-v3`` is any machine that has its features.
    """
    there = facts.hardware
    if missing := there.missing(hardware.features):
        return f"{there.name} lacks {', '.join(sorted(missing))}"
    if there.cores < hardware.threads:
        return f"it has {there.cores} cores for {hardware.threads} threads"
    if hardware.name in PRESETS:
        return ""
    if (there.id, there.features) != (hardware.id, hardware.features):
        more = sorted(there.features - hardware.features)
        return f"it is {there.name} with {there.cores} cores" + (
            f" and has {', '.join(more)} besides" if more else ""
        )
    return ""


def stranger(facts: Facts, own: Facts) -> str:
    """Say in which versions a node differs from the tuner's ("": in none)."""
    found = {
        k: (facts.versions.get(k), own.versions.get(k))
        for k in sorted({*facts.versions, *own.versions})
    }
    return ", ".join(
        f"{k} {there or 'absent'} instead of {here or 'absent'}"
        for k, (there, here) in found.items()
        if there != here
    )


def problems(members: Collection[Member], hardware: Hardware, own: Facts) -> dict[str, str]:
    """Return why nodes cannot do what they are there for, by name."""
    out = {}
    for m in members:
        if m.facts is None:
            continue
        if text := stranger(m.facts, own):
            out[m.name] = f"{m.facts.host} has {text}"
        elif m.marked and (text := misfit(m.facts, hardware)):
            out[m.name] = f"{m.facts.host} is marked to measure, but is not the target: {text}"
    return out


def assign(
    members: Collection[Member],
    hardware: Hardware,
    own: Facts,
    home: str,
    measuring: Collection[str] = (),
) -> dict[str, Node]:
    """Give each node its role.

    Nodes marked with `MARK` measure. Where none is marked the tuner's own node does if it is the target,
    else the first that is, and goes on doing so while it is there (``measuring``: who did before). All others
    build. Measuring nodes build too only where there is nobody else for it.
    """
    usable = {m.name: m for m in members if m.facts is not None and not stranger(m.facts, own)}
    fit = [n for n, m in usable.items() if m.facts is not None and not misfit(m.facts, hardware)]
    chosen = {n for n in fit if usable[n].marked}
    if not chosen and not any(m.marked for m in members) and fit:
        chosen = {n for n in fit if n in measuring} or {home if home in fit else min(fit)}
    builders = [n for n, m in usable.items() if n not in chosen and m.cpus > 0]
    nodes: dict[str, Node] = {
        n: Node(n, min(_MOST, usable[n].cpus), kinds=_BUILD, label=usable[n].label)
        for n in builders
    }
    for n in chosen:
        units = max(1, min(BOTH_MOST, usable[n].cpus))
        kinds = _MEASURE if builders else None
        nodes[n] = Node(n, units, ("cpu",), kinds=kinds, label=usable[n].label)
    return nodes


def measuring_nodes(nodes: Mapping[str, Node]) -> list[str]:
    """Return the names of nodes with a device."""
    return sorted(n for n, node in nodes.items() if node.devices)
