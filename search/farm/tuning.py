"""``tune --on``: from the name of a cluster to something that measures."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import MimoError, UsageError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.search.farm.coordinator import Farm
from mimo_compile.search.farm.hosts import BuildHost, Facts, MeasureHost, Setup, facts
from mimo_compile.search.farm.measurer import FarmMeasurer
from mimo_compile.search.farm.ray_cluster import Cluster, parse_on, require_ray
from mimo_compile.search.farm.ray_executor import RayExecutor
from mimo_compile.search.farm.roles import LABEL, MARK, Member, assign, measuring_nodes, problems
from mimo_compile.search.farm.scheduling import Node
from mimo_compile.search.measure.base import Limits, Timing
from mimo_compile.search.meters import AUTO, MODELLED
from mimo_compile.search.objective import parse_objective

_LOG = logging.getLogger(__name__)
PROBE_S = 60.0
"""Seconds that nodes have at the start to say what they are."""


class Membership:
    """Knows the nodes of a Ray cluster, asks new ones what they are, and gives each its role."""

    def __init__(self, cluster: Cluster, hardware: Hardware) -> None:
        """Ask all nodes that are there; nobody waits for the answers yet."""
        self._cluster = cluster
        self._hardware = hardware
        self.own = facts()
        self._asked: dict[Any, str] = {}
        self._known: dict[str, Facts | None] = {}
        self._measuring: list[str] = []
        self._alive: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        """Why nodes did not answer, by name."""
        self._told: set[str] = set()

    def questions(self) -> list[Any]:
        """Return references to answers that have not come."""
        return list(self._asked)

    def members(self) -> list[Member]:
        """Look who is there, ask those that are new, and return all."""
        self._alive = alive = self._cluster.nodes()
        for name in [n for n in self._known if n not in alive]:
            del self._known[name]
        ray = self._cluster.ray
        for name in alive:
            if name not in self._known:
                self._known[name] = None
                probe = ray.remote(facts).options(
                    num_cpus=0, max_retries=0, scheduling_strategy=self._cluster.on(name)
                )
                self._asked[probe.remote()] = name
        if self._asked:
            ready, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
            for ref in ready:
                name = self._asked.pop(ref)
                try:
                    answer = ray.get(ref)
                except ray.exceptions.RayError as error:
                    self.failures[name] = str(error).strip().splitlines()[-1]
                else:
                    if name in self._known:
                        self._known[name] = answer
        return [self._member(n) for n in alive]

    def _member(self, name: str) -> Member:
        resources = self._alive[name].get("Resources", {})
        cpus = int(resources.get("CPU", 0))
        label = self._alive[name].get("Labels", {}).get(LABEL, "")
        return Member(name, cpus, resources.get(MARK, 0) > 0, self._known.get(name), label)

    def __call__(self) -> dict[str, Node]:
        """Return the nodes with their roles; of each that cannot have one the log tells once."""
        members = self.members()
        unfit = problems(members, self._hardware, self.own)
        for name, why in {**self.failures, **unfit}.items():
            if name not in self._told:
                _LOG.warning("node %.8s of the cluster is left out: %s", name, why)
                self._told.add(name)
        nodes = assign(members, self._hardware, self.own, self._cluster.home, self._measuring)
        self._measuring = measuring_nodes(nodes)
        return nodes

    def settled(self) -> dict[str, Node]:
        """Wait until all nodes have answered, and return them.

        Raises:
            UsageError: no node is the target, or one that is marked to measure is not.
        """
        end = time.monotonic() + PROBE_S
        members = self.members()
        while self._asked and (left := end - time.monotonic()) > 0:
            self._cluster.ray.wait(self.questions(), num_returns=1, timeout=left)
            members = self.members()
        wrong = problems(members, self._hardware, self.own)
        marked = [m for m in members if m.marked]
        if refused := [wrong[m.name] for m in marked if m.name in wrong]:
            raise UsageError(
                "; ".join(refused), remedy=f"Mark other nodes with the resource {MARK}, or none"
            )
        nodes = self()
        if measuring_nodes(nodes):
            return nodes
        said = [f"{m.facts.host}: {m.facts.hardware.name}" for m in members if m.facts is not None]
        said += [*wrong.values(), *self.failures.values()]
        raise UsageError(
            f"no node of the cluster can measure for {self._hardware.name}, "
            f"{self._hardware.cores} cores",
            where="; ".join(dict.fromkeys(said)) or "no node answered",
            remedy="Start the search on a machine like the one that is to measure, and install the same "
            "mimo_compile on all nodes",
        )


def check_on(on: str, hardware: Hardware, objective: str, joules: float | None, meter: str) -> str:
    """Refuse what no farm can do, before anything is loaded; return what measuring nodes read joules with.

    As at home ``auto`` reads joules only where they decide.

    Raises:
        UsageError: ``on`` is not understood, the target is no CPU, or there is a budget in joules, which
            only a meter of this machine could keep.
        MissingExtra: Ray is not installed.
    """
    parse_on(on)
    if hardware.kind == "sim":
        raise UsageError(
            f"{hardware.name} is simulated: no machine need measure", remedy="leave --on out"
        )
    if hardware.kind == "cuda":
        raise UsageError(
            "a farm measures CPUs", remedy="for a GPU elsewhere give --device-batch DIR, not --on"
        )
    if joules is not None:
        raise UsageError(
            "a budget in joules counts those of one machine",
            remedy="with --on give --time or --trials",
        )
    require_ray()
    if meter == AUTO and not parse_objective(objective).needs_energy:
        return MODELLED
    return meter


def open_farm(
    on: str,
    hardware: Hardware,
    *,
    meter: str = MODELLED,
    limits: Limits | None = None,
    timing: Timing | None = None,
    calibrate: bool = True,
    cpus: int | None = None,
) -> FarmMeasurer:
    """Connect to a cluster, or start one here, and warm its measuring nodes up.

    Args:
        on: ``ray`` or ``ray:HOST:PORT``.
        hardware: The target with its thread count; measuring nodes must be it.
        meter: What measuring nodes read joules with, see `meters.open_meter`.
        limits: Time and memory a candidate may take.
        timing: How time is taken.
        calibrate: Measure the rates of measuring nodes where that was not done before.
        cpus: CPUs of a cluster started here (None: all).

    Raises:
        UsageError: ``on`` is not understood, or no node is the target.
        MissingExtra: Ray is not installed.
        MimoError: the cluster does not answer, or no measuring node works.
    """
    address = parse_on(on)
    limits, timing = limits or Limits(), timing or Timing()
    cluster = Cluster(address, cpus=cpus)
    try:
        membership = Membership(cluster, hardware)
        nodes = membership.settled()
        setup = Setup(hardware, limits, timing, meter, calibrate=calibrate)

        def factory(kind: str) -> tuple[type, tuple[Any, ...]]:
            return (BuildHost, (limits,)) if kind == "build" else (MeasureHost, (setup,))

        executor = RayExecutor(cluster, membership, factory, settle=membership.questions)
        (device, name), broken = _warm(executor, cluster, measuring_nodes(nodes))
        setup = replace(
            setup, meter=name or MODELLED
        )  # nodes that come read the same meter, or none
        farm = Farm(executor, broken=broken)
    except BaseException:
        cluster.close()
        raise
    return FarmMeasurer(farm, hardware, device=device, limits=limits, timing=timing, meter=name)


def _warm(
    executor: RayExecutor, cluster: Cluster, nodes: list[str]
) -> tuple[tuple[DeviceModel, str], dict[str, MimoError]]:
    """Start the measuring actors.

    Returns:
        The first device's rates and its meter's name (the first with a meter, if any has one), and what is
        wrong with nodes that cannot measure: they do not work, or read another meter, whose joules cannot be
        compared.

    Raises:
        MimoError: no node works.
    """
    ray = cluster.ray
    hosts = [executor.spawn(n, "measure") for n in nodes]
    questions = [h.actor.ready.remote() for h in hosts]
    greeted: list[tuple[Any, tuple[DeviceModel, str]]] = []
    broken: dict[str, MimoError] = {}
    for host, question in zip(hosts, questions, strict=True):
        try:
            status, value, _ = ray.get(question)
        except ray.exceptions.RayError as error:
            status, value = "broken", MimoError(f"a measuring worker died: {error}")
        if status == "ok":
            greeted.append((host, value))
        else:
            broken[host.node] = value
    if not greeted:
        raise next(iter(broken.values()))
    found = next((v for _, v in greeted if v[1]), greeted[0][1])
    for host, (_, meter) in greeted:
        if meter == found[1]:
            executor.adopt(host)
        else:
            text = f"it reads joules with {meter or 'no meter'}, others with {found[1]}"
            broken[host.node] = MimoError(text)
            ray.kill(host.actor)
    return found, broken
