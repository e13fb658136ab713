"""The side without a GPU: take in what came back, propose the next batch, compile it.

One command does all of it, and may be given at any time: results that are there are stored once, a batch that
is not through stays as it is, and a new one is proposed when nothing is left of the last.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimo_compile import __version__
from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.search.budget import Budget, Clock, mark_heavy
from mimo_compile.search.device_batch.files import Batch, Folder, Header
from mimo_compile.search.device_batch.merge import Merged, comparison, merge
from mimo_compile.search.device_batch.writer import BatchWriter
from mimo_compile.search.measure.base import Limits, Timing
from mimo_compile.search.result import DeviceBatch, TuningResult
from mimo_compile.search.space import Candidate
from mimo_compile.search.task import Task
from mimo_compile.search.tuner import CONFIRM_AGAIN, Tuner

ROUND = 16
"""Candidates of a workload in one batch, fewer in its first: the way there and back is long."""
FIRST = 8
MOST = 128
"""Candidates of one batch."""


def device_batch(
    workloads: Mapping[Workload, float],
    hardware: Hardware,
    path: Path,
    *,
    tuner: Mapping[str, Any],
    schedules: Any = None,
    trials: int | None = None,
    meter: str = "",
    limits: Limits | None = None,
    timing: Timing | None = None,
    builders: int | None = None,
    scratch: Path | None = None,
) -> TuningResult:
    """Take in the results of a batch, and write the next one when there is nothing left of it.

    Args:
        workloads: Each with its weight: how often the model calls the kernel.
        hardware: The GPU.
        path: Folder of the batch; made when it is not there.
        tuner: Arguments of `Tuner` but for the measurer: ``db``, ``objective``, ``seed``, ``device`` ...
        schedules: Algorithms to choose from (None: all that are registered).
        trials: Candidates to measure over all workloads, records of earlier batches included.
        meter: What is to read joules; "": nothing.
        limits: What candidates may use up.
        timing: How time is taken.
        builders: Compiler processes.
        scratch: Folder for temporary files.

    Raises:
        InputError: the folder is damaged or in use, or what came back is damaged; nothing is lost.
        UsageError: the batch in the folder is for something else.
    """
    folder, given = Folder(path), dict(tuner)
    device: DeviceModel = given["device"]
    limits, timing = limits or Limits(), timing or Timing()
    with folder.locked(create=True):
        writer = BatchWriter(
            hardware, folder, limits=limits, timing=timing, meter=meter, builders=builders,
            scratch=scratch,
        )  # fmt: skip
        try:
            search = Tuner(hardware, given.pop("db"), writer, given.pop("objective"), **given)
            search.total = trials
            for workload, weight in workloads.items():
                search.add(workload, weight, schedules)
            batch, merged = folder.read(), Merged()
            if batch is not None:
                merged = merge(search, folder, batch, device)
                if merged.failure is not None:
                    raise merged.failure
            if not merged.open:
                number = 1 if batch is None else batch.header.number + 1
                propose(
                    search, writer, trials, _seed(search.seed, number), undecided=merged.undecided
                )
                if writer.units:
                    header = Header(
                        id=secrets.token_hex(8), number=number, hardware=hardware, limits=limits,
                        timing=timing, meter=meter, version=__version__,
                        undecided=dict(merged.undecided),
                    )  # fmt: skip
                    batch = Batch(header, tuple(writer.units))
                    folder.sync()
                    folder.write(batch)
            told = DeviceBatch(
                str(path),
                0 if batch is None else batch.header.number,
                0 if batch is None else len(batch.units),
                merged.open or len(writer.units),
                merged.new,
            )
            stopped = "batch" if told.open else "trials" if _spent(search, trials) else "exhausted"
            return replace(search.result(stopped, Clock(Budget(trials), None)), device_batch=told)
        finally:
            writer.close()


def propose(
    search: Tuner,
    writer: BatchWriter,
    trials: int | None,
    seed: int,
    *,
    undecided: Mapping[str, int] | None = None,
) -> None:
    """Ask each workload's strategy for candidates, those first from which most is expected.

    Leaders that were only read once are timed against each other besides. What is known without a GPU (a
    build that fails) is stored at once; where it is all that was asked for, strategies are asked for more.

    Args:
        search: What is known.
        writer: Where candidates go.
        trials: Candidates in all.
        seed: Of the batch's inputs.
        undecided: How often comparisons were run of which no times came back, by `merge.comparison`.
    """
    mark_heavy([task.share for task in search.tasks])
    more = True
    while more and not writer.units:
        search.train()
        more = _searched(search, writer, trials, seed)
        more |= _confirmed(search, writer, seed, undecided or {})


def _searched(search: Tuner, writer: BatchWriter, trials: int | None, seed: int) -> bool:
    """Put new candidates into the batch; say whether there were any."""
    any_new = False
    for task in sorted(search.tasks, key=lambda t: -t.share.expected_gain_us()):
        left, most = MOST - len(writer.units), ROUND if task.records else FIRST
        if trials is not None:  # a small budget takes small steps
            left = min(left, trials - _known(search) - len(writer.units))
            most = min(most, max(2, trials // (2 * len(search.tasks))))
        count = min(most, left)
        if batch := _asked(task, count):
            any_new = True
            for m in writer.measure(task.space, batch, seed):
                search.store(task, m, "search")
    return any_new


def _confirmed(search: Tuner, writer: BatchWriter, seed: int, undecided: Mapping[str, int]) -> bool:
    """Put comparisons of leaders into the batch; say whether one changed what is known, or is in it."""
    changed = False
    for task in search.tasks:
        chosen = [task.candidates[key] for key in task.leaders(*_compared(task))]
        tried = undecided.get(comparison(c.key for c in chosen), 0)
        if len(chosen) < 2 or tried > CONFIRM_AGAIN:
            continue
        before = len(writer.units)
        for m in writer.confirm(task.space, chosen, seed):
            search.store(task, m, "confirm")
            changed = True
        changed |= len(writer.units) > before
    return changed


def _asked(task: Task, count: int) -> list[Candidate]:
    """Return up to so many new candidates; strategies give few at a time, to learn from them."""
    out: list[Candidate] = []
    while len(out) < count and (more := task.strategy.ask(count - len(out))):
        out += more
    return out


def _compared(task: Task) -> tuple[set[str], set[str]]:
    """Return the keys of candidates that were compared, and of those that failed when they were to be."""
    newest = {
        key: rows[-1]
        for key, rows in task.records.items()
        if any(r.phase == "confirm" for r in rows)
    }
    failed = {key for key, r in newest.items() if not r.ok}
    return set(newest) - failed, failed


def _known(search: Tuner) -> int:
    return sum(task.trials for task in search.tasks)


def _spent(search: Tuner, trials: int | None) -> bool:
    return trials is not None and _known(search) >= trials


def _seed(seed: int, number: int) -> int:
    """Return the seed of a batch's inputs: fresh ones for each."""
    return (seed * 1_000_003 + 7_919 * number) % (1 << 31)
