"""What action-level scheduling brings a tuning farm: completion times, makespan, how long devices idle.

    python benchmarks/farm_schedule.py [--seeds 20] [--real] [--repeats 3]

Four searches share a farm. Each works in rounds: a batch of builds, a measurement of each candidate
as soon as it is built, a pause in which the search thinks, the next round. Builds and measurements of the
four take different times, drawn anew around their means for each seed, and unknown to the scheduler.

- ``static``: each search has its fixed part of the builders, each device its fixed searches, first come first
  served;
- ``fifo``: everything is shared, first come first served;
- ``ours``: shared, by `search/farm/scheduling.py`.

In simulated time over seeds; with ``--real`` also on a Ray cluster of this machine, whose actions sleep for
the drawn times (shortened), so that what is measured is scheduler, coordinator and Ray, and no kernel.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

from mimo_compile.search.farm.hosts import Answer
from mimo_compile.search.farm.scheduling import Action, Node, Scheduler, Start
from mimo_compile.search.farm.simulation import Fifo, Job, Span, Trace, simulate


@dataclass(frozen=True)
class Search:
    """One tuning task: mean seconds of a build, of a measurement, and of a check after each round."""

    build_s: float
    measure_s: float
    rounds: int
    batch: int = 8
    check_s: float = 0.0


MIXED = (
    Search(0.3, 0.2, 12),  # small kernels
    Search(2.0, 0.4, 5),  # code that is slow to compile
    Search(0.5, 2.5, 5),  # energy windows
    Search(0.8, 0.8, 8),
)
CHECKED = tuple(Search(s.build_s, s.measure_s, s.rounds, s.batch, 6.0) for s in MIXED)
BUILD, MEASURE = frozenset({"build", "check"}), frozenset({"measure"})
THINK_S = 0.2


class Rounds:
    """The searches' side: which actions arrive when others end."""

    def __init__(self, searches: Iterable[Search], seed: int, scale: float = 1.0, high: int = 1):
        self.searches = tuple(searches)
        self.rng = random.Random(seed)
        self.scale = scale
        self.high = high
        self.ids = count(1)
        self.left = [s.rounds for s in self.searches]
        self.open = [0] * len(self.searches)

    def job(self, task: int, kind: str, at: float, mean_s: float) -> Job:
        drawn = mean_s * self.scale * self.rng.lognormvariate(-0.06, 0.35)
        wide = kind == "check"
        action = Action(
            next(self.ids), kind, f"w{task}", task=f"t{task}", exclusive=kind == "measure",
            high=self.high if wide else 1, parallel=0.9 if wide else 0.0,
        )  # fmt: skip
        return Job(action, at, drawn)

    def round(self, task: int, at: float) -> list[Job]:
        if not self.left[task]:
            return []
        self.left[task] -= 1
        s = self.searches[task]
        self.open[task] = s.batch
        return [self.job(task, "build", at, s.build_s) for _ in range(s.batch)]

    def start(self) -> list[Job]:
        return [j for t in range(len(self.searches)) for j in self.round(t, 0.0)]

    def ended(self, action: Action, now: float) -> list[Job]:
        task = int(action.task[1:])
        s = self.searches[task]
        if action.kind == "build":
            return [self.job(task, "measure", now, s.measure_s)]
        if action.kind == "measure":
            self.open[task] -= 1
            if self.open[task]:
                return []
            if s.check_s:
                return [self.job(task, "check", now, s.check_s)]
        return self.round(task, now + THINK_S * self.scale)


def shared(devices: int, *, alone: bool = False) -> list[Node]:
    """Return two nodes of builders, and devices on nodes of their own; or one node of two CPUs for all."""
    if alone:
        return [Node("n", 2, ("d",))]
    nodes = [Node(f"b{i}", 4, kinds=BUILD) for i in range(2)]
    return nodes + [Node(f"m{i}", 1, ("d",), kinds=MEASURE) for i in range(devices)]


def split(devices: int, tasks: int = 4) -> list[Node]:
    """Return the same, dealt out to the searches."""
    nodes = [
        Node(f"b{t}", 8 // tasks, kinds=BUILD, tasks=frozenset({f"t{t}"})) for t in range(tasks)
    ]
    for i in range(devices):
        mine = frozenset(f"t{t}" for t in range(tasks) if t % devices == i)
        nodes.append(Node(f"m{i}", 1, ("d",), kinds=MEASURE, tasks=mine))
    return nodes


Way = tuple[Callable[[], Scheduler], list[Node]]


def run(searches: tuple[Search, ...], way: Way, seed: int, high: int = 1) -> Trace:
    """Simulate one seed."""
    work = Rounds(searches, seed, high=high)

    def react(span: Span) -> list[Job]:
        return work.ended(span.start.action, span.ended)

    trace = simulate(work.start(), way[1], way[0](), react=react)
    assert not trace.refused and len(trace.done) == len(trace.spans)
    return trace


def row(name: str, traces: list[Trace], devices: int, base: list[Trace]) -> str:
    """Return a line of the table: medians over seeds, with quartiles of the mean and of its ratio."""
    mean = [t.mean_s for t in traces]
    ratio = [b.mean_s / t.mean_s for b, t in zip(base, traces, strict=True)]
    cells = [name, spread(mean), spread([t.p95_s for t in traces])]
    cells += [spread([t.makespan_s for t in traces])]
    cells += [spread([100 * t.idle(devices) for t in traces], 0), spread(ratio)]
    return "| " + " | ".join(cells) + " |"


def spread(values: list[float], digits: int = 2) -> str:
    """Return the median with the quartiles."""
    if len(values) < 3:
        return " ".join(f"{v:.{digits}f}" for v in values)
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{mid:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


HEAD = (
    "| way | mean completion s | p95 s | makespan s | device idle % | mean: first way / this |\n"
    "|---|---|---|---|---|---|"
)


def table(title: str, rows: list[tuple[str, list[Trace]]], devices: int) -> None:
    """Print the ways beside each other."""
    print(f"\n{title}\n\n{HEAD}")
    for name, traces in rows:
        print(row(name, traces, devices, rows[0][1]))


def simulated(seeds: int) -> None:
    """Print the tables of simulated time."""
    for devices in (1, 2):
        ways: dict[str, Way] = {
            "static": (Fifo, split(devices)),
            "fifo": (Fifo, shared(devices)),
            "ours": (Scheduler, shared(devices)),
        }
        rows = [(n, [run(MIXED, w, s) for s in range(seeds)]) for n, w in ways.items()]
        table(f"8 build CPUs, {devices} device(s), simulated, {seeds} seeds", rows, devices)
    alone = shared(1, alone=True)
    rows = [
        (name, [run(MIXED, (kind, alone), s) for s in range(seeds)])
        for name, kind in (("fifo", Fifo), ("ours", Scheduler))
    ]
    table(f"one node of 2 CPUs, quiet while it measures, simulated, {seeds} seeds", rows, 1)
    rows = [("static", [run(CHECKED, (Fifo, split(2)), s) for s in range(seeds)])]
    for name, high in (("ours, one CPU each", 1), ("ours, elastic", 4)):
        way: Way = (Scheduler, shared(2))
        rows.append((name, [run(CHECKED, way, s, high) for s in range(seeds)]))
    table(
        f"with a check of 6 s (90 % parallel, up to 4 CPUs) after each round, 2 devices, {seeds} seeds",
        rows, 2,
    )  # fmt: skip


# -- for real ------------------------------------------------------------------------------------

SHORT = (Search(0.3, 0.2, 8, 4), Search(2.0, 0.4, 3, 4))
SCALE = 0.5


class Sleeper:
    """A host whose orders are durations."""

    def run(self, seconds: float) -> Answer:
        """Sleep."""
        time.sleep(seconds)
        return "ok", seconds, seconds

    def close(self) -> None:
        """Nothing to release."""


def real(repeats: int) -> None:
    """Print the table of a Ray cluster with two CPUs for builds and one device, all on this machine."""
    from mimo_compile.search.farm.ray_cluster import Cluster

    class Here(Cluster):
        """Several farm nodes on one node of Ray."""

        def on(self, node: str) -> object:
            return super().on(self.home)

    mine = [Node(f"b{t}", 1, kinds=BUILD, tasks=frozenset({f"t{t}"})) for t in range(2)]
    device = Node("m", 1, ("d",), kinds=MEASURE)
    ways: dict[str, Way] = {
        "static": (Fifo, [*mine, device]),
        "fifo": (Fifo, [Node("b", 2, kinds=BUILD), device]),
        "ours": (Scheduler, [Node("b", 2, kinds=BUILD), device]),
    }
    found: dict[str, list[Trace]] = {name: [] for name in ways}
    predicted = {
        name: [run_short(way, seed) for seed in range(repeats)] for name, way in ways.items()
    }
    cluster = Here(cpus=2)
    try:
        for seed in range(repeats):  # in turns
            for name, way in ways.items():
                found[name].append(sleep_through(cluster, way, seed))
    finally:
        cluster.close()
    table(f"2 build CPUs, 1 device, {repeats} seeds, simulated", list(predicted.items()), 1)
    table(f"the same on Ray: actions that sleep, {repeats} seeds", list(found.items()), 1)


def run_short(way: Way, seed: int) -> Trace:
    """Simulate what `sleep_through` does."""
    work = Rounds(SHORT, seed, SCALE)
    return simulate(
        work.start(), way[1], way[0](), react=lambda s: work.ended(s.start.action, s.ended)
    )


def sleep_through(cluster: object, way: Way, seed: int) -> Trace:
    """Run the searches on Ray; return what happened, in seconds since the start."""
    from mimo_compile.search.farm.coordinator import Farm
    from mimo_compile.search.farm.ray_executor import RayExecutor

    nodes = {n.name: n for n in way[1]}
    executor = RayExecutor(cluster, lambda: nodes, lambda kind: (Sleeper, ()))
    warm = [executor.spawn(n.name, k) for n in way[1] for k in ("build", "measure")
            if n.kinds and k in n.kinds for _ in range(n.units)]  # fmt: skip
    cluster.ray.get([h.actor.run.remote(0.0) for h in warm])
    for host in warm:
        executor.adopt(host)
    farm = Farm(executor, way[0]())
    work = Rounds(SHORT, seed, SCALE)
    begin = time.monotonic()
    arrived: dict[int, float] = {}
    later: list[Job] = []
    starts: dict[int, tuple[float, Start]] = {}
    spans: list[Span] = []
    original = executor.start

    def start(order: Start, payload: object) -> None:
        starts[order.action.id] = (time.monotonic() - begin, order)
        original(order, payload)

    executor.start = start

    def submit(jobs: list[Job]) -> None:
        for job in jobs:
            if job.at > time.monotonic() - begin + 1e-3:
                later.append(job)
                continue
            arrived[job.action.id] = time.monotonic() - begin
            farm.submit(job.action, job.seconds)

    submit(work.start())
    while arrived.keys() - {span.start.action.id for span in spans} or later:
        due = [j for j in later if j.at <= time.monotonic() - begin]
        later = [j for j in later if j not in due]
        submit(due)
        if len(spans) == len(arrived):
            time.sleep(0.001)
            continue
        wait = min((j.at for j in later), default=1e9) - (time.monotonic() - begin)
        result = farm.poll(max(0.0, min(1.0, wait)))
        if result is None:
            continue
        now = time.monotonic() - begin
        at, order = starts[result.action.id]
        spans.append(Span(order, arrived[result.action.id], at, now, True))
        submit(work.ended(result.action, now))
    for hosts in list(executor._idle.values()):
        for host in hosts:
            cluster.ray.kill(host.actor)
    return Trace(tuple(spans), ())


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    simulated(args.seeds)
    if args.real:
        real(args.repeats)


if __name__ == "__main__":
    main()
