"""Another plan for a finished artifact: its kernels are made anew, its weights and programs stay.

Kernels that read tensors in the layouts they are packed in can take each other's place. So neither the
model nor its quantisation is needed again, only code generation.
"""

from __future__ import annotations

import msgspec

from mimo_compile.artifact import Artifact
from mimo_compile.errors import UsageError
from mimo_compile.ir.workload import Workload
from mimo_compile.pipeline.build import origin_of
from mimo_compile.pipeline.choose import with_records
from mimo_compile.pipeline.emit import Lowered
from mimo_compile.pipeline.isolate import compile_isolated
from mimo_compile.pipeline.plans import Problem
from mimo_compile.runtime.program import Call, Choice, Entry, Programs
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.base import Kernel
from mimo_compile.search.database import Database

_SOURCE = "compile it from its source"


def replan(artifact: Artifact, problem: Problem, objective: str, db: Database | None) -> Artifact:
    """Return an artifact with the same weights and the plan of another objective or of newer records.

    Args:
        artifact: What to start from.
        problem: What is planned, from `plans.problem_of_artifact`.
        objective: What the whole model should be best in.
        db: Records, beside those of the package.

    Raises:
        UsageError: it has generic kernels, was built for another machine or by other schedules, or the
            objective's budget cannot be kept.
        MimoError: a kernel cannot be compiled.
    """
    manifest, hardware = artifact.manifest, problem.hardware
    if generic := [
        c.workload for c in manifest.plan if Workload.parse(c.workload) not in problem.built
    ]:
        raise UsageError(
            f"{len(generic)} kernels of {manifest.name} are generic: an artifact does not hold what they "
            "are made from",
            remedy=_SOURCE,
        )
    if set(manifest.target.features) != hardware.features:
        raise UsageError(
            f"{manifest.name} was built for {manifest.target.name}, not for {hardware.name}",
            remedy=_SOURCE,
        )
    packed = {w: _layouts(w, c) for w, c in problem.built.items()}
    plan = problem.planner(db, packed).plan(objective)
    chosen = with_records(plan, hardware, db)
    lowered = {
        w: Lowered(c.schedule.lower(w, c.config, hardware), c.schedule, c.config)
        for w, c in plan.choices.items()
    }
    kernels = {problem.built[w].kernel: low.kernel for w, low in lowered.items()}
    programs = Programs({n: _entry(e, kernels) for n, e in artifact.programs.entries.items()})
    code = artifact.code
    if any(old != new.name for old, new in kernels.items()):
        origins = [origin_of(w, low) for w, low in lowered.items()]
        code = compile_isolated([low.kernel for low in lowered.values()], origins, hardware)
    rows = [
        msgspec.structs.replace(
            chosen.choices[w], kernel=lowered[w].kernel.name, calls=problem.built[w].calls
        )
        for w in sorted(lowered, key=str)
    ]
    changed = msgspec.structs.replace(
        manifest, objective=objective, plan=tuple(rows), modelled=any(c.source == "modelled" for c in rows),
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


def _layouts(workload: Workload, choice: Choice) -> tuple[tuple[str, str], ...]:
    schedule = get_schedule(choice.schedule)
    try:
        config = schedule.config_from_json(choice.config)
    except TypeError as error:  # knobs of another version
        raise UsageError(f"{choice.schedule} has changed since", remedy=_SOURCE) from error
    return tuple(sorted(schedule.layouts(workload, config).items()))


def _entry(entry: Entry, kernels: dict[str, Kernel]) -> Entry:
    """Return an entry point that calls the new kernels, each of which must take what the old one took."""
    calls = []
    for call in entry.calls:
        kernel = kernels[call.kernel]
        given = [(entry.buffers[i].shape, entry.buffers[i].dtype) for i in call.args]
        if given != [(a.shape, a.dtype) for a in kernel.args]:
            raise UsageError(f"{call.label}: its kernels take other arguments now", remedy=_SOURCE)
        calls.append(Call(kernel.name, call.args, call.label))
    return msgspec.structs.replace(entry, calls=tuple(calls))
