"""Another plan for a finished artifact: its kernels are made anew, its weights and programs stay.

Kernels that read tensors in the layouts they are packed in can take each other's place. So neither the
model nor its quantisation is needed again, only code generation.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from mimo_compile.artifact import Artifact
from mimo_compile.errors import EnvironmentMismatch, UsageError
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.workload import Workload
from mimo_compile.pipeline.build import built_with, final_choice, lower_choice, origin_of
from mimo_compile.pipeline.choose import with_records
from mimo_compile.pipeline.isolate import compile_isolated
from mimo_compile.pipeline.orders import order_costs, rounded
from mimo_compile.pipeline.plans import FROM_SOURCE, Problem
from mimo_compile.runtime.host import series
from mimo_compile.runtime.program import Call, Entry, Programs
from mimo_compile.schedules.base import Kernel
from mimo_compile.search.database import Database
from mimo_compile.search.objective import parse_objective


def check(artifact: Artifact, problem: Problem, objective: str) -> None:
    """Refuse what `replan` cannot do, before anything is measured for it.

    Args:
        artifact: What to start from.
        problem: What is planned, from `plans.problem_of_artifact`.
        objective: What the whole model should be best in.

    Raises:
        UsageError: no objective of a plan, or the artifact has generic kernels.
        EnvironmentMismatch: it was built for another machine, or by another version.
    """
    manifest, hardware = artifact.manifest, problem.hardware
    if parse_objective(objective).kind == "pareto":
        raise UsageError("a plan needs one objective, not pareto", remedy="pareto is for `tune`")
    generic = sum(Workload.parse(c.workload) not in problem.built for c in manifest.plan)
    if generic or not problem.built:
        raise UsageError(
            f"{generic} kernels of {manifest.name} are generic: an artifact does not hold what they "
            "are made from",
            remedy=FROM_SOURCE,
        )
    built, now = manifest.versions.get("mimo_compile", ""), built_with()["mimo_compile"]
    if series(built) != series(now):
        raise EnvironmentMismatch(
            f"{manifest.name} was built by mimo_compile {built or 'of unknown version'}, {now} is "
            "installed: its schedules may pack weights in other ways",
            remedy=f"{FROM_SOURCE}, or plan it with the version that built it",
        )
    here = PRESETS.get(manifest.target.name) or local_cpu()
    if set(manifest.target.features) != here.features:
        raise EnvironmentMismatch(
            f"{manifest.name} was built for {manifest.target.name}, not for {here.name}",
            remedy=f"plan it on such a machine, or {FROM_SOURCE}",
        )
    if hardware.threads > here.cores:
        raise EnvironmentMismatch(
            f"{manifest.name} was built for {hardware.threads} threads, {here.name} has {here.cores} cores",
            remedy=f"plan it for fewer: --threads {here.cores}",
        )
    problem.packed()


def replan(artifact: Artifact, problem: Problem, objective: str, db: Database | None) -> Artifact:
    """Return an artifact with the same weights and the plan of another objective or of newer records.

    Args:
        artifact: What to start from.
        problem: What is planned, from `plans.problem_of_artifact`.
        objective: What the whole model should be best in.
        db: Records, beside those of the package.

    Raises:
        UsageError: it has generic kernels, or the objective's budget cannot be kept.
        EnvironmentMismatch: it was built for another machine or by other schedules.
        MimoError: a kernel cannot be compiled.
    """
    manifest, hardware = artifact.manifest, problem.hardware
    check(artifact, problem, objective)
    plan = problem.planner(db).plan(objective)
    chosen = with_records(plan, hardware, db, problem.kept)
    lowered = {w: lower_choice(w, c.schedule, c.config, hardware) for w, c in plan.choices.items()}
    kernels = {problem.built[w].kernel: low.kernel for w, low in lowered.items()}
    programs = Programs({n: _entry(e, kernels) for n, e in artifact.programs.entries.items()})
    code, versions = artifact.code, manifest.versions
    if any(old != new.name for old, new in kernels.items()) or _of_another_series(versions):
        origins = [origin_of(w, low) for w, low in lowered.items()]
        code = compile_isolated([low.kernel for low in lowered.values()], origins, hardware)
        versions = built_with()
    rows = [
        final_choice(w, chosen.choices[w], lowered[w], problem.built[w].calls)
        for w in sorted(lowered, key=str)
    ]
    decoder = manifest.decoder
    if decoder is not None and problem.orders.groups:
        free = problem.planner(db, free=True).plan(objective)
        costs = order_costs(problem.orders, problem.calls, plan, free)
        decoder = msgspec.structs.replace(decoder, order_costs=rounded(costs))
    changed = msgspec.structs.replace(
        manifest, decoder=decoder, objective=objective, versions=versions, plan=tuple(rows),
        modelled=any(c.source == "modelled" for c in rows),
        target=msgspec.structs.replace(manifest.target, threads=hardware.threads),
    )  # fmt: skip
    return Artifact(
        changed,
        programs,
        code,
        artifact.weights,
        artifact.config,
        artifact.tokenizer,
        chosen.records,
    )


def _of_another_series(versions: Mapping[str, str]) -> bool:
    """Say whether code was built by packages whose code does not run with the installed ones."""
    return any(series(versions.get(name, "")) != series(now) for name, now in built_with().items())


def _entry(entry: Entry, kernels: dict[str, Kernel]) -> Entry:
    """Return an entry point that calls the new kernels, each of which must take what the old one took."""
    calls = []
    for call in entry.calls:
        kernel = kernels[call.kernel]
        given = [(entry.buffers[i].shape, entry.buffers[i].dtype) for i in call.args]
        if given != [(a.shape, a.dtype) for a in kernel.args]:
            raise EnvironmentMismatch(
                f"{call.label}: its kernels take other arguments now", remedy=FROM_SOURCE
            )
        calls.append(Call(kernel.name, call.args, call.label))
    return msgspec.structs.replace(entry, calls=tuple(calls))
