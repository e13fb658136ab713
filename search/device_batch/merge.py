"""What came back of a batch becomes records: the measurer's own conclusions, from what was written down.

The child's answers are played to `Measurer`, which verifies results and doubts times exactly as if it had
asked the child itself.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import InputError, UsageError
from mimo_compile.search.device_batch.files import (
    Batch,
    Folder,
    Result,
    Step,
    Unit,
    damage,
    files_left,
)
from mimo_compile.search.measure.base import Measurement
from mimo_compile.search.measure.measurer import Measurer
from mimo_compile.search.measure.runner import arguments
from mimo_compile.search.measure.worker import Reply
from mimo_compile.search.meters.base import Meter, Reading
from mimo_compile.search.space import Candidate, JointSpace
from mimo_compile.search.task import Task
from mimo_compile.search.tuner import Tuner

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Merged:
    """What was taken in of a batch."""

    new: int = 0
    """Units whose records were not there before."""
    open: int = 0
    """Units without a result, or with one that is damaged."""
    failure: InputError | None = None
    """What has to be transferred again."""
    undecided: Mapping[str, int] = field(default_factory=dict)
    """See `Header.undecided`; this batch's are counted."""


class _Played:
    """The child as it answered on the other side."""

    def __init__(self, folder: Folder, result: Result) -> None:
        self._folder = folder
        self._steps: dict[tuple[str, tuple[str, ...]], deque[Step]] = {}
        for step in result.steps:
            self._steps.setdefault((step.do, step.slots), deque()).append(step)

    def step(self, do: str, *slots: str) -> Step | None:
        """Return what was written down of a request, in order."""
        found = self._steps.get((do, slots))
        return found.popleft() if found else None

    def call(self, request: Mapping[str, Any], limit_s: float) -> Reply:
        """Answer as the child did."""
        if request["do"] == "drop":
            return Reply("ok", {})
        slots = request["slots"] if "slots" in request else [request["slot"]]
        if (step := self.step(request["do"], *slots)) is None:
            return Reply("error", {}, "nothing was written down of it")
        for name, file in step.files.items():
            place = Path(request["folder"], Path(f"{name}.npy").name)
            shutil.copyfile(self._folder.file(file), place)
        return Reply(step.status, dict(step.value), step.message, step.kind)  # type: ignore[arg-type]


class _Named:
    """A meter that read joules on the other side."""

    step_s = 0.0

    def __init__(self, name: str) -> None:
        self.name = name

    def read_mj(self) -> float:
        """Refuse: readings were taken elsewhere."""
        raise OSError("read on the other side")


class _Replay(Measurer):
    """The measurer, with a unit's answers in the place of its children."""

    def same_inputs(self, space: JointSpace, unit: Unit, candidates: Sequence[Candidate]) -> bool:
        """Say whether a unit ran on what would be drawn and packed for it now: only that can be judged."""
        cases = self.runner.cases.all_of(space.workload, unit.seed)
        known: dict[str, str] = {}
        for job, candidate in zip(unit.jobs, candidates, strict=True):
            schedule, config = space.schedules[candidate.schedule], space.config(candidate)
            if len(job.cases) != len(cases):
                return False
            for case, ran in zip(cases, job.cases, strict=True):
                try:
                    args = arguments(self.runner.cases, case, schedule, config, job.facts)
                except ValueError:
                    return False
                files = {a["name"]: a["file"] for a in args if a["file"] is not None}
                for file in set(files.values()) - set(known):
                    known[file] = f"{_hash(file)}.npy"
                if {name: known[file] for name, file in files.items()} != ran:
                    return False
        return True

    def play(self, folder: Folder, unit: Unit, result: Result) -> None:
        """Take up a unit."""
        played = _Played(folder, result)
        facts = {job.slot: job.facts for job in unit.jobs}

        def built(space: JointSpace, candidates: Sequence[Candidate]) -> list[Reply]:
            return [Reply("ok", facts[c.key]) for c in candidates]

        def reading(m: Measurement, meter: Meter) -> Reading:
            step = played.step("joules", m.candidate.key)
            if step is None or step.reading is None:
                return Reading(None, None, self.timing.energy_window_s, "nothing was read")
            return step.reading

        self._best_us.clear()  # there nothing was too slow to be timed in full
        self.builder.build = built  # type: ignore[method-assign]
        self.runner.call = played.call  # type: ignore[method-assign]
        self.runner.reading = reading  # type: ignore[method-assign]
        self.runner.meter = _Named(result.meter) if result.meter else None


def merge(tuner: Tuner, folder: Folder, batch: Batch, device: DeviceModel) -> Merged:
    """Store records of all results that are there; those that were stored before are left alone.

    Raises:
        UsageError: the batch is for other workloads, or another GPU, than the search.
    """
    header, tasks = batch.header, {str(t.space.workload): t for t in tuner.tasks}
    strange = sorted({u.workload for u in batch.units} - set(tasks))
    if strange or header.hardware.id != tuner.hardware.id:
        other = strange[0] if strange else header.hardware.name
        raise UsageError(
            f"the device batch in {folder.path} is for {other}, which this search is not for",
            remedy="Give the same source, options and target as before, or another folder",
        )
    results, torn = folder.results(batch)
    new, problems = 0, [f"{torn} lines of results are not whole"] if torn else []
    undecided = dict(header.undecided)
    measurer = _Replay(tuner.hardware, device=device, limits=header.limits, timing=header.timing)
    try:
        for index, result in sorted(results.items()):
            unit = batch.units[index]
            if bad := damage(folder, files_left(result)):
                problems += bad
                del results[index]
                continue
            task = tasks[unit.workload]
            new += _stored(tuner, task, measurer, folder, unit, result)
            if unit.phase == "confirm" and not _compared(tuner, task, unit, result):
                name = comparison(job.slot for job in unit.jobs)
                undecided[name] = undecided.get(name, 0) + 1
    finally:
        measurer.close()
    still_open = len(batch.units) - len(results)
    failure = None
    if problems and still_open:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        failure = InputError(
            f"results of this device batch are damaged: {problems[0]}{more}", file=folder.path,
            remedy="Transfer the folder from the GPU's machine again, or run the batch there again",
        )  # fmt: skip
    return Merged(new, still_open, failure, undecided)


def _stored(
    tuner: Tuner, task: Task, measurer: _Replay, folder: Folder, unit: Unit, result: Result
) -> bool:
    """Store what is not stored yet of one unit; say whether anything was."""
    candidates = []
    for job in unit.jobs:
        schedule = task.space.schedules.get(job.schedule)
        found = task.space.adopt(job.schedule, job.config)
        if schedule is None or found is None or schedule.version != job.schedule_version:
            _LOG.warning("%s has changed since this batch was made: not counted", job.schedule)
            return False
        candidates.append(found)
    if all(_stored_at(tuner, task, c, result.time) for c in candidates):
        return False
    if not measurer.same_inputs(task.space, unit, candidates):
        _LOG.warning(
            "the inputs of %s have changed since this batch was made: not counted", unit.workload
        )
        return False
    measurer.play(folder, unit, result)
    new = False
    for m in list(_concluded(measurer, task.space, candidates, unit)):
        if not _stored_at(
            tuner, task, m.candidate, result.time
        ):  # a merge may have been interrupted
            made = replace(m, time=result.time, device=m.device or result.device)
            tuner.store(task, made, unit.phase)
            new = True
    return new


def comparison(slots: Iterable[str]) -> str:
    """Return the name of a comparison of candidates."""
    return " ".join(sorted(slots))


def _compared(tuner: Tuner, task: Task, unit: Unit, result: Result) -> bool:
    """Say whether anything came of a comparison."""
    adopted = [task.space.adopt(job.schedule, job.config) for job in unit.jobs]
    return any(c is not None and _stored_at(tuner, task, c, result.time) for c in adopted)


def _stored_at(tuner: Tuner, task: Task, candidate: Candidate, time: float) -> bool:
    rows = task.records.get(tuner.key(task, candidate), ())
    return any(r.time == time for r in rows)


def _hash(file: str) -> str:
    with Path(file).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _concluded(
    measurer: _Replay, space: JointSpace, candidates: Sequence[Candidate], unit: Unit
) -> Iterator[Measurement]:
    """Return the verdicts and numbers of one unit."""
    if unit.phase == "confirm":
        return measurer.confirm(space, candidates, unit.seed)
    return measurer.measure(space, candidates, unit.seed)
