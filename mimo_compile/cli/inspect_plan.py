"""``mimo-compile inspect --plan``: whole-model plans for several objectives, side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.pipeline.plans import Comparison, Difference, Problem
    from mimo_compile.search.database import Database
    from mimo_compile.search.plan import Plan

_SHOWN = 12  # workloads whose kernels differ


def run_plan(args: argparse.Namespace) -> int:
    """Plan for several objectives from records, without measuring; return 0."""
    from mimo_compile.pipeline.plans import OBJECTIVES, compare_plans
    from mimo_compile.search.database import open_records
    from mimo_compile.search.objective import parse_objective

    console: Console = args.console
    if args.objective is not None and parse_objective(args.objective).kind == "pareto":
        raise UsageError(
            "a plan needs one objective, not pareto (--objective)", remedy="pareto is for `tune`"
        )
    objectives = [*OBJECTIVES]
    if args.objective is not None and args.objective not in objectives:
        objectives.append(args.objective)
    with open_records(args.db) as db:
        problem = _problem(args, db)
        if not problem.calls:
            raise UsageError(
                f"{args.artifact} has only generic kernels without records: there is nothing to plan"
            )
        found = compare_plans(problem, db, objectives)
    _show(console, found)
    console.result({"ok": True, "source": args.artifact, **found.to_json()})
    return 0


def _problem(args: argparse.Namespace, db: Database | None) -> Problem:
    from mimo_compile.api import is_artifact
    from mimo_compile.pipeline.plans import problem_of_artifact, problem_of_model

    if is_artifact(args.artifact):
        if args.quant is not None or args.target != "cpu" or args.max_context is not None:
            raise UsageError(
                "--quant, --target and --max-context go with SRC: an artifact has its own"
            )
        from mimo_compile.runtime.container import open_artifact

        return problem_of_artifact(
            open_artifact(args.artifact, for_this_machine=False), args.threads
        )
    from mimo_compile.ir.hardware import resolve_target
    from mimo_compile.pipeline.source import check_compilable, open_source

    hardware = check_compilable(resolve_target(args.target, args.threads))
    opened = open_source(
        str(args.artifact), quant=args.quant or "none", attention="model", hardware=hardware,
        max_context=args.max_context,
    )  # fmt: skip
    return problem_of_model(opened.graphs, hardware, db)


def _show(console: Console, found: Comparison) -> None:
    from mimo_compile.cli.console import number, table
    from mimo_compile.cli.energy import MODELLED, NOTE, title
    from mimo_compile.pipeline.plans import measured_share
    from mimo_compile.runtime.program import decoding_entry

    problem, plans = found.problem, found.plans
    hardware = problem.hardware
    console.say(
        f"{problem.name} on {hardware.id}, {hardware.threads} threads: {len(problem.calls)} kernels to choose"
    )
    totals = found.entry_totals(plans[0])
    entries = [e for e in (decoding_entry(totals), "head_1", "main") if e in totals]
    (energy,) = {p.energy_source for p in plans}
    first = plans[0]
    rows: list[list[object]] = [
        ["latency us", *(_beside(p.latency_us, first.latency_us) for p in plans)],
        [f"energy {title(energy)}", *(_beside(p.energy_mj, first.energy_mj) for p in plans)],
    ]
    for entry in entries:
        rows.append([f"  {entry} us", *(number(found.entry_totals(p)[entry][0]) for p in plans)])
        rows.append(
            [
                f"  {entry} {title(energy)}",
                *(number(found.entry_totals(p)[entry][1]) for p in plans),
            ]
        )
    rows.append(["other kernels than the first", *(found.changed(p) for p in plans)])
    if problem.built:
        rows.append(["other kernels than built", *(found.unlike_built(p) for p in plans)])
    rows.append(["times come from", *(_sources(p) for p in plans)])
    rows.append(["part of the time measured", *(f"{100 * measured_share(p):.0f} %" for p in plans)])
    rows.append(["planned in", *(_seconds(p) for p in plans)])
    header = ["", *(str(p.objective) for p in plans)]
    console.say("\n" + table(rows, header, right="l" + "r" * len(plans)))
    console.say(
        f"\nTotals count a kernel's calls per token, over all entry points. Libraries were loaded in "
        f"{found.loaded_s:.1f} s, records read in {found.gathered_s:.2f} s; nothing was measured."
    )
    if energy == MODELLED:
        console.say(NOTE)
    differences = found.differences()
    if not differences:
        console.say("All plans take the same kernels.")
    for difference in differences[:_SHOWN]:
        console.say("\n" + _difference(difference, plans, problem))
    if len(differences) > _SHOWN:
        console.say(f"\n... and {len(differences) - _SHOWN} more, which take less time")


def _seconds(plan: Plan) -> str:
    return f"{plan.seconds * 1e3:.1f} ms" + ("" if plan.proved else ", not proved best")


def _beside(value: float, first: float) -> str:
    from mimo_compile.cli.console import number

    change = 100 * (value / first - 1)
    return number(value, 4) + (f" ({change:+.2f} %)" if abs(change) >= 0.005 else "")


def _sources(plan: Plan) -> str:
    from mimo_compile.pipeline.plans import sources

    return ", ".join(f"{n} {s}" for s, n in sorted(sources(plan).items()))


def _difference(found: Difference, plans: tuple[Plan, ...], problem: Problem) -> str:
    """Show a workload's kernel in each plan: whole for the first, then what differs from it."""
    from mimo_compile.cli.console import number, table
    from mimo_compile.cli.energy import title
    from mimo_compile.pipeline.plans import config_change

    first = found.choices[0].option.candidate
    rows = []
    for plan, choice in zip(plans, found.choices, strict=True):
        option = choice.option
        chosen = option.candidate
        if choice is found.choices[0]:
            how = str(chosen)
        elif chosen == first:
            how = "the same"
        elif chosen.schedule == first.schedule:
            how = config_change(first.config, chosen.config)
        else:
            how = f"instead {chosen}"
        rows.append(
            [f"  {plan.objective}", number(option.latency_us), number(option.energy_mj), option.source, how]
        )  # fmt: skip
    calls = ", ".join(f"{n} in {e}" for e, n in problem.calls[found.workload].items())
    header = ["  plan", "us", title(found.choices[0].option.energy_source), "source", "kernel"]
    return f"{found.workload}  ({calls})\n" + table(rows, header, right="lrrll")
