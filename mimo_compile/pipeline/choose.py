"""What to tune for a model, and which kernel each workload gets."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mimo_compile.errors import MimoError, UsageError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.tir import Tir
from mimo_compile.ir.workload import Workload
from mimo_compile.pipeline.graphs import ModelGraphs
from mimo_compile.pipeline.orders import Orders, Scope, order_costs, orders_of_model
from mimo_compile.runtime.program import Choice, decoding_entry
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import Kept, known_results, results_for
from mimo_compile.search.objective import parse_objective
from mimo_compile.search.plan import Choice as Chosen
from mimo_compile.search.plan import Plan, make_plan
from mimo_compile.search.records import encode
from mimo_compile.search.space import JointSpace

_LOG = logging.getLogger(__name__)

GENERIC = {"cpu": "tir.x86_rules", "cuda": "tir.cuda"}
"""Schedule of generic functions without records, by the kind of hardware."""


def entry_tokens(entry: str) -> int:
    """Return the token count of an entry's name (``step_64`` -> 64), 1 for others."""
    tail = entry.rpartition("_")[2]
    return int(tail) if tail.isdigit() else 1


def weigh(calls: Mapping[Workload, Mapping[str, int]]) -> dict[Workload, float]:
    """Return how much each workload's time matters: its calls per token, summed over entry points.

    Every entry counts alike per token it handles, so decoding one token and prefilling one matter equally;
    draft heads count half, since only speculation runs them. Where generated tokens have an entry of their
    own, ``step_1`` reads what a prompt leaves over: it counts as one token of the longest step.

    Args:
        calls: The calls of all workloads of a model, by entry.
    """
    entries = {entry for by_entry in calls.values() for entry in by_entry}
    shares = {e: (0.5 if e.startswith("mtp") else 1.0) / entry_tokens(e) for e in entries}
    if "step_1" in entries and decoding_entry(entries) != "step_1":
        shares["step_1"] = min(share for e, share in shares.items() if e.startswith("step_"))
    return {
        w: sum(count * shares[entry] for entry, count in by_entry.items())
        for w, by_entry in calls.items()
    }


def tunable(
    model: ModelGraphs,
    hardware: Hardware | None = None,
    *,
    search: bool = False,
) -> dict[Workload, float]:
    """Return the workloads of a model that have a choice of kernels with their weights, heaviest first.

    Args:
        model: Entry points as kernel graphs.
        hardware: The target; generic functions without a schedule for it are left out (None: they all are).
        search: They are to be measured: generic functions that cannot be verified are left out, too.
    """
    functions = model.functions()
    weights = {
        w: weight
        for w, weight in weigh(model.workloads()).items()
        if w not in functions or (hardware is not None and _has_choice(w, hardware, search=search))
    }
    return dict(sorted(weights.items(), key=lambda item: -item[1]))


def planned(
    model: ModelGraphs, hardware: Hardware, db: Database | None = None
) -> dict[Workload, float]:
    """Return the workloads to choose kernels for with their weights, heaviest first.

    Generic functions of which nothing is known are left out. They take their default, and neither is a
    space made for them nor does their modelled energy stand among measured ones.

    Args:
        model: Entry points as kernel graphs.
        hardware: The target.
        db: Records to choose from, beside the packaged ones.
    """
    weights, every = tunable(model), weigh(model.workloads())
    for workload in model.functions():
        # looked up by name first: a space of a function takes long to make
        if not results_for(workload, hardware, db, near=True):
            continue
        if not schedules_for(workload, hardware):
            continue
        if known_results(JointSpace(workload, hardware), db):
            weights[workload] = every[workload]
    return dict(sorted(weights.items(), key=lambda item: -item[1]))


def _has_choice(workload: Workload, hardware: Hardware, *, search: bool) -> bool:
    """Say whether a generic function has schedules, and for a search a reference."""
    if not schedules_for(workload, hardware):
        return False
    if search and (reason := Tir().reason(workload)):
        _LOG.info("not tuned: %s", reason)
        return False
    return True


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """The kernel of each workload, and the measurements that this rests on."""

    choices: dict[Workload, Choice]
    records: bytes
    """JSON lines of the records behind measured choices, and of the defaults they were compared with."""
    orders: Orders = field(default_factory=Orders)
    """Which entry points add up in one order."""


def shared_tensors(model: ModelGraphs) -> list[list[tuple[Workload, str]]]:
    """Return groups of (workload, tensor's name in schedule layouts) that are one tensor.

    Those who read or write one tensor (token counts of one matrix, append and attend of one cache) must
    agree on its layout.
    """
    users: dict[tuple[str, str], dict[tuple[Workload, str], None]] = {}
    for graph in model.entries.values():
        for node in graph.nodes:
            if node.func is not None:
                continue
            args = [a for a in get_op(node.workload.op).args(node.workload) if a.role != "output"]
            for arg, value in zip(args, node.args, strict=True):
                if arg.role in ("weight", "state"):
                    name = arg.name if arg.role == "state" else "weight"
                    # ops pack weights apart from each other (a tied table is stored twice), states not
                    key = (value.root.source, node.workload.op if arg.role == "weight" else "")
                    users.setdefault(key, {})[node.workload, name] = None
    groups = {frozenset(group): list(group) for group in users.values() if len(group) > 1}
    return list(groups.values())


def choose(
    model: ModelGraphs,
    hardware: Hardware,
    objective: str,
    db: Database | None,
    reproducible: Scope = "drafts",
) -> ModelPlan:
    """Choose schedule and config of each dialect workload for the whole model at once.

    Args:
        model: Entry points as kernel graphs.
        hardware: The target.
        objective: See `search.objective.parse_objective`.
        db: Records to choose from, beside the packaged ones.
        reproducible: Which entry points must add up in one order. ``drafts`` is given up, with a warning,
            where kernels cannot.

    Raises:
        UsageError: an op has no kernel for the hardware, or the objective's budget cannot be kept; kernels
            promise no order of their sums that all are to have.
        MimoError: they have no order in common.
    """
    require_schedules(model, hardware)
    untuned = _defaults(model, hardware, workloads := planned(model, hardware, db))
    if not workloads:  # nothing to choose among
        parse_objective(objective)
        return ModelPlan(untuned, b"")
    orders = orders_of_model(model, hardware, reproducible)
    how: dict[str, Any] = {"objective": objective, "db": db}
    shared = shared_tensors(model)
    try:
        plan = make_plan(
            workloads, hardware, shared=[*shared, *orders.groups], ordered=orders.workloads, **how
        )
    except MimoError as error:
        if isinstance(error, UsageError) or reproducible == "all" or not orders.groups:
            raise
        orders = Orders(unknown=(str(error),))
        plan = make_plan(workloads, hardware, shared=shared, **how)
    if orders.unknown:
        _LOG.warning(
            "speculative texts may differ from plain ones where two tokens nearly tie: %s adds up in an "
            "order that nothing promises", orders.unknown[0],
        )  # fmt: skip
    if orders.groups:
        free = make_plan(workloads, hardware, shared=shared, **how)
        orders = replace(orders, costs=order_costs(orders, model.workloads(), plan, free))
    chosen = with_records(plan, hardware, db)
    return ModelPlan(untuned | chosen.choices, chosen.records, orders)


def require_schedules(model: ModelGraphs, hardware: Hardware) -> None:
    """Check that there are kernels for all that a model calls; on CPUs any generic function has one.

    Raises:
        UsageError: there are not; names all workloads without.
    """
    anyhow = model.functions() if hardware.kind == "cpu" else ()
    calls = (w for w in model.workloads() if w not in anyhow)
    if missing := sorted(str(w) for w in calls if not schedules_for(w, hardware)):
        raise UsageError(
            f"no schedule supports {'; '.join(missing)} on {hardware.name}",
            remedy="`mimo-compile targets --formats` lists what has kernels where",
        )


def _defaults(
    model: ModelGraphs, hardware: Hardware, planned: Mapping[Workload, float]
) -> dict[Workload, Choice]:
    """Return the default of each generic function that is not planned, if a schedule supports it."""
    schedule = get_schedule(GENERIC[hardware.kind])
    out = {}
    for workload in model.functions():
        if workload not in planned and schedule.supports(workload, hardware):
            default = schedule.config_to_json(schedule.space(workload, hardware).default)
            out[workload] = Choice(
                str(workload),
                schedule.name,
                default,
                "",
                "default",
                schedule_version=schedule.version,
            )
    return out


def with_records(
    plan: Plan, hardware: Hardware, db: Database | None, kept: Kept | None = None
) -> ModelPlan:
    """Return a plan's choices as an artifact holds them, with the records they rest on and ``kept`` ones.

    Records of other versions of the chosen schedules are of other code, and are left out.
    """
    choices: dict[Workload, Choice] = {}
    lines: dict[str, None] = {}
    for workload, chosen in plan.choices.items():
        option = chosen.option
        choices[workload] = Choice(
            str(workload), option.candidate.schedule, option.candidate.config, "", option.source,
            option.latency_us, option.energy_mj, option.energy_source, {}, chosen.schedule.version,
        )  # fmt: skip
        if option.source == "measured":
            default = chosen.schedule.space(workload, hardware).default
            both = (option.candidate.config, chosen.schedule.config_to_json(default))
            for result in results_for(workload, hardware, db, kept=kept):
                r = result.record
                mine = (r.schedule, r.schedule_version) == (
                    chosen.schedule.name,
                    chosen.schedule.version,
                )
                if mine and r.config in both:
                    lines[encode(r)] = None
    lines.update(dict.fromkeys(_still_true(plan, kept or {})))
    return ModelPlan(choices, "".join(f"{line}\n" for line in lines).encode())


def _still_true(plan: Plan, kept: Kept) -> list[str]:
    """Return kept records but for those of schedules that were changed since."""
    chosen: dict[str, Chosen] = {str(w): c for w, c in plan.choices.items()}
    out = []
    for workload, rows in kept.items():
        schedule = chosen[workload].schedule if workload in chosen else None
        out += [
            encode(r)
            for r in rows
            if schedule is None
            or r.schedule != schedule.name
            or r.schedule_version == schedule.version
        ]
    return out
