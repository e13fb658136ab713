"""Plans of one model side by side: what each objective costs, and which kernels it takes instead."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimo_compile import _tvm
from mimo_compile.artifact import Artifact
from mimo_compile.errors import EnvironmentMismatch, UsageError
from mimo_compile.ir.hardware import Hardware, built_for
from mimo_compile.ir.ops import OPS, get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.pipeline.choose import planned, shared_tensors, weigh
from mimo_compile.pipeline.graphs import ModelGraphs
from mimo_compile.pipeline.orders import Orders, orders_of_model, same_order
from mimo_compile.runtime.container import Parts
from mimo_compile.runtime.program import Choice as Built
from mimo_compile.schedules import Schedule, get_schedule
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import Kept, kept_records
from mimo_compile.search.plan import Choice, Plan, Planner
from mimo_compile.search.plan_options import Layouts

FROM_SOURCE = "compile it from its source"
"""The remedy where an artifact does not hold what another plan would take."""
SLACK = "energy@latency:1.05"
OBJECTIVES = ("latency", SLACK, "energy")
"""What is compared unless told otherwise: fastest, least energy within 5 % of it, least energy."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What a plan is made for: workloads with their calls, and which tensors they share."""

    name: str
    calls: dict[Workload, dict[str, int]]
    """Calls by entry point."""
    shared: list[list[tuple[Workload, str]]]
    hardware: Hardware
    built: dict[Workload, Built] = field(default_factory=dict)
    """What an artifact holds."""
    kept: Kept = field(default_factory=dict)
    """The records that an artifact's plan rests on, by workload."""
    orders: Orders = field(default_factory=Orders)
    """Which entry points add up in one order."""

    @property
    def weights(self) -> dict[Workload, float]:
        """Calls per token, summed over the entry points: what totals of a plan count."""
        return weigh(self.calls)

    def packed(self) -> dict[Workload, Layouts]:
        """Return the layouts that an artifact's tensors have already.

        Raises:
            EnvironmentMismatch: a schedule is gone, has other knobs now, or is of another version than the
                one that packed weights.
        """
        return {w: _layouts(w, c, self.kept) for w, c in self.built.items()}

    def planner(self, db: Database | None, *, free: bool = False) -> Planner:
        """Gather the options from records, those of an artifact included, in the layouts that it holds.

        Args:
            db: Records, beside those of the package.
            free: Let kernels add up in any order.
        """
        orders = Orders() if free else self.orders
        return Planner(
            self.weights, self.hardware, db=db, shared=[*self.shared, *orders.groups],
            packed=self.packed(), kept=self.kept, ordered=orders.workloads,
        )  # fmt: skip


def problem_of_model(model: ModelGraphs, hardware: Hardware, db: Database | None = None) -> Problem:
    """Return what to plan for a model that was read from its source: see `choose.planned`."""
    calls = model.workloads()
    chosen = planned(model, hardware, db)
    return Problem(
        model.name, {w: calls[w] for w in chosen}, shared_tensors(model), hardware,
        orders=orders_of_model(model, hardware, "drafts"),
    )  # fmt: skip


def problem_of_artifact(parts: Parts | Artifact, threads: int | None = None) -> Problem:
    """Return what to plan for an artifact; neither its code nor its weights are read.

    Kernels that read one packed tensor share it; generic kernels have no choice: an artifact does not
    hold their functions.

    Args:
        parts: The artifact.
        threads: To plan for another number of threads than it was built for.
    """
    manifest = parts.manifest
    target = manifest.target
    hardware = built_for(
        target.name, target.kind, frozenset(target.features),
        target.threads if threads is None else min(threads, target.threads),
    ).with_threads(threads)  # fmt: skip
    built = {
        Workload.parse(c.workload): c for c in manifest.plan if c.workload.split(":")[0] in OPS
    }
    by_kernel = {c.kernel: w for w, c in built.items()}
    users: dict[tuple[str, str], dict[tuple[Workload, str], None]] = {}
    for entry in parts.programs.entries.values():
        for call in entry.calls:
            workload = by_kernel.get(call.kernel)
            if workload is None:
                continue
            # kernels keep the order of their op's states
            states = iter(a.name for a in get_op(workload.op).args(workload) if a.role == "state")
            for buffer in (entry.buffers[i] for i in call.args):
                if buffer.kind == "weight":
                    users.setdefault((buffer.source, workload.op), {})[workload, "weight"] = None
                elif buffer.kind == "state":
                    users.setdefault((buffer.source, ""), {})[workload, next(states)] = None
    groups = {frozenset(g): list(g) for g in users.values() if len(g) > 1}
    calls = {w: dict(c.calls) for w, c in built.items()}
    text = parts.records if isinstance(parts, Artifact) else parts.texts.get("records.jsonl")
    alike = manifest.decoder.alike if manifest.decoder else ()
    ours = {kernel: w for kernel, w in by_kernel.items() if w.op != "tir"}
    sequences = {
        name: [ours.get(call.kernel) for call in entry.calls]
        for name, entry in parts.programs.entries.items()
    }
    return Problem(
        manifest.name, calls, list(groups.values()), hardware, built, kept_records(text),
        same_order(sequences, alike, hardware),
    )  # fmt: skip


def _layouts(workload: Workload, choice: Built, kept: Kept) -> Layouts:
    """Return the layouts of a built kernel's tensors, as its schedule names them now.

    A name says how weights are packed only for the version of the schedule that packed them. Without
    weights nothing is packed: states are made anew by kernels that are all made anew.
    """
    try:
        schedule = get_schedule(choice.schedule)
        config = schedule.config_from_json(choice.config)
        layouts = tuple(sorted(schedule.layouts(workload, config).items()))
    except (UsageError, TypeError, ValueError, KeyError) as error:  # of another version
        raise _changed(workload, choice) from error
    if any(a.role == "weight" for a in get_op(workload.op).args(workload)):
        built = built_version(choice, kept)
        # one that was never raised cannot have been another
        if built != schedule.version and (built is not None or schedule.version > 1):
            raise _changed(workload, choice, built, schedule)
    return layouts


def built_version(choice: Built, kept: Kept) -> int | None:
    """Return the version of the schedule that made a kernel; None if an older artifact does not tell.

    Where the choice does not name it, the artifact's own records of this very config may.
    """
    if choice.schedule_version is not None:
        return choice.schedule_version
    same = (r for r in kept.get(choice.workload, ()) if r.schedule == choice.schedule)
    found = {r.schedule_version for r in same if r.config == choice.config}
    return found.pop() if len(found) == 1 else None


def _changed(
    workload: Workload, choice: Built, built: int | None = None, schedule: Schedule | None = None
) -> EnvironmentMismatch:
    what = f"schedule {choice.schedule} has changed since the artifact was compiled"
    if schedule is not None:
        what += (
            f": version {built or 'unknown'} packed its weights, {schedule.version} is installed"
        )
    return EnvironmentMismatch(what, where=str(workload), remedy=FROM_SOURCE)


@dataclass(frozen=True, slots=True)
class Difference:
    """A workload for which two plans, or a plan and an artifact, take other kernels."""

    workload: Workload
    choices: tuple[Choice, ...]
    """One for each plan."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Plans of one problem for several objectives."""

    problem: Problem
    plans: tuple[Plan, ...]
    gathered_s: float
    """Seconds that reading the records took, once for all plans."""
    loaded_s: float
    """Seconds that importing the compiler and the solver took; once for a process."""

    def differences(self) -> list[Difference]:
        """Return the workloads for which not all plans agree, those with most time first."""
        rows = []
        for workload, first in self.plans[0].choices.items():
            choices = tuple(p.choices[workload] for p in self.plans)
            if len({c.option.candidate for c in choices}) > 1:
                rows.append((first.calls * first.option.latency_us, Difference(workload, choices)))
        return [d for _, d in sorted(rows, key=lambda r: -r[0])]

    def changed(self, plan: Plan) -> int:
        """Return for how many workloads a plan takes another kernel than the first plan does."""
        first = self.plans[0].choices
        return sum(c.option.candidate != first[w].option.candidate for w, c in plan.choices.items())

    def unlike_built(self, plan: Plan) -> int | None:
        """Return for how many workloads a plan takes another kernel than the artifact holds."""
        built = self.problem.built
        if not built:
            return None
        pairs = ((c, built[w]) for w, c in plan.choices.items())
        return sum(_unlike(c, b) for c, b in pairs)

    def entry_totals(self, plan: Plan) -> dict[str, tuple[float, float]]:
        """Return microseconds and millijoules in kernels of one run of each entry point."""
        totals: dict[str, tuple[float, float]] = {}
        for workload, choice in plan.choices.items():
            for entry, count in self.problem.calls[workload].items():
                time, energy = totals.get(entry, (0.0, 0.0))
                option = choice.option
                totals[entry] = time + count * option.latency_us, energy + count * option.energy_mj
        return totals

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.problem.name, "target": self.problem.hardware.id,
            "threads": self.problem.hardware.threads, "workloads": len(self.problem.calls),
            "loaded_seconds": self.loaded_s, "gathered_seconds": self.gathered_s,
            "plans": [self._plan_json(p) for p in self.plans],
            "differences": [
                {
                    "workload": str(d.workload), "calls": self.problem.calls[d.workload],
                    "options": [_choice_json(c) for c in d.choices],
                }
                for d in self.differences()
            ],
        }  # fmt: skip

    def _plan_json(self, plan: Plan) -> dict[str, Any]:
        first = self.plans[0]
        return {
            "objective": str(plan.objective), "latency_us": plan.latency_us, "energy_mj": plan.energy_mj,
            "energy_source": plan.energy_source, "latency_ratio": plan.latency_us / first.latency_us,
            "energy_ratio": plan.energy_mj / first.energy_mj, "changed": self.changed(plan),
            "unlike_built": self.unlike_built(plan), "choices": dict(sources(plan)),
            "measured_share": measured_share(plan),
            "seconds": plan.seconds,
            "entries": {
                e: {"latency_us": t, "energy_mj": j, "energy_source": plan.energy_source}
                for e, (t, j) in self.entry_totals(plan).items()
            },
        }  # fmt: skip


def _unlike(choice: Choice, built: Built) -> bool:
    candidate, known = choice.option.candidate, built.schedule_version
    same = (candidate.schedule, candidate.config) == (built.schedule, dict(built.config))
    return not same or (known is not None and known != choice.schedule.version)


def sources(plan: Plan) -> Counter[str]:
    """Count a plan's kernels by where their times come from."""
    return Counter(c.option.source for c in plan.choices.values())


def measured_share(plan: Plan) -> float:
    """Return the part of a plan's time that was measured here; the rest is predicted, with a penalty."""
    costs = [(c.calls * c.option.latency_us, c.option.source) for c in plan.choices.values()]
    return sum(us for us, source in costs if source == "measured") / sum(us for us, _ in costs)


def _choice_json(choice: Choice) -> dict[str, Any]:
    option = choice.option
    return {
        "schedule": option.candidate.schedule, "schedule_version": choice.schedule.version,
        "config": option.candidate.config,
        "latency_us": option.latency_us, "energy_mj": option.energy_mj, "source": option.source,
        "energy_source": option.energy_source,
    }  # fmt: skip


def compare_plans(
    problem: Problem, db: Database | None, objectives: Sequence[str] = OBJECTIVES
) -> Comparison:
    """Plan a problem for several objectives from the same records.

    Raises:
        UsageError: an objective is none, or its budget cannot be kept.
        EnvironmentMismatch: an artifact's schedules have changed.
    """
    begin = time.perf_counter()
    _tvm.compiler()
    import scipy.optimize  # noqa: F401 - so that its time is not taken for that of the first plan

    loaded = time.perf_counter() - begin
    planner = problem.planner(db)
    plans = tuple(planner.plan(o) for o in objectives)
    return Comparison(problem, plans, planner.seconds, loaded)


def config_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Say which knobs differ: ``rows 4 -> 8, unroll 1 -> 2``."""
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    return ", ".join(f"{n} {before.get(n, '-')} -> {after.get(n, '-')}" for n in names)
