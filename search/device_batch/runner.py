"""The side with the GPU: runs the units of a batch one after the other and writes down what came of each.

Needs numpy, msgspec and the driver's library; NVML for joules. Kernels run in a child that owns the GPU's
context (`measure.gpu_worker`) and is replaced after whatever a kernel does to it. Whether results are right
is found where the reference is: this side writes down what kernels wrote.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_compile.errors import DeviceLost, EnvironmentMismatch, InputError
from mimo_compile.ir.hardware import local_cuda
from mimo_compile.search.device_batch.files import (
    Batch,
    Folder,
    Job,
    Result,
    Step,
    Unit,
    damage,
    files_left,
    files_of,
    plain,
    torn,
)
from mimo_compile.search.measure.cases import Scratch
from mimo_compile.search.measure.clock import Stopwatch
from mimo_compile.search.measure.measurer import unfit_gpu
from mimo_compile.search.measure.worker import Pool, Reply
from mimo_compile.search.meters import open_meter
from mimo_compile.search.meters.base import Meter

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run of a batch did."""

    batch: str
    number: int
    units: int
    new: int
    """Units run now."""
    open: int
    """Units that are still to be run."""
    failed: int
    """Units, earlier ones included, with a kernel that did not run to its end."""


def run_batch(path: str | Path, tell: Tell = lambda text: None) -> Summary:
    """Run what is left of a batch on the GPU of this machine.

    Args:
        path: The batch's folder.
        tell: Is given a line for each unit.

    Raises:
        InputError: there is no batch, or files are missing or damaged; all other units were run.
        EnvironmentMismatch: this machine has no GPU, or another one than the batch is for.
        UsageError: joules are asked for, and the meter does not work here.
        DeviceLost: the GPU stopped answering; what was run before is kept.
        MimoError: a result cannot be written.
    """
    folder = Folder(path)
    with folder.locked(), ExitStack() as cleanup:
        batch = folder.read()
        if batch is None:
            raise InputError(
                "there is no device batch in this folder", file=folder.path,
                remedy="`mimo-compile tune SRC --target cuda:... --device-batch DIR` makes one",
            )  # fmt: skip
        if why := unfit_gpu(batch.header.hardware):
            raise EnvironmentMismatch(
                f"this device batch cannot be run here: {why}", where=folder.path
            )
        found, _ = folder.results(batch)
        # what a kernel wrote may have been lost since: such a unit is run again
        done = {i: r for i, r in found.items() if not damage(folder, files_left(r))}
        todo = [unit for unit in batch.units if unit.index not in done]
        runner = cleanup.enter_context(_Runner(folder, batch))
        problems: list[str] = []
        for unit in todo:
            if bad := damage(folder, files_of(unit)):
                problems += bad
                continue
            result = runner.run(unit)
            folder.sync()
            folder.add(result)
            done[unit.index] = result
            tell(f"{len(done)}/{len(batch.units)} {unit.workload} {_told(unit, result)}")
        if problems:
            raise torn(folder, list(dict.fromkeys(problems)))
    return Summary(
        batch.header.id, batch.header.number, len(batch.units), len(todo), len(batch.units) - len(done),
        sum(_failure(r) is not None for r in done.values()),
    )  # fmt: skip


def _failure(result: Result) -> Step | None:
    return next((step for step in result.steps if step.status != "ok"), None)


def _told(unit: Unit, result: Result) -> str:
    """Return what a unit was and what came of it, for people."""
    names = ", ".join(
        f"{job.schedule}({', '.join(f'{k}={v}' for k, v in job.config.items())})"
        for job in unit.jobs
    )
    if (bad := _failure(result)) is not None:
        return f"{names}: {bad.do}: {bad.status} {bad.message}"[:300]
    times = [s for step in result.steps if step.do == "time" for s in step.value["seconds"]]
    return f"{names}: {', '.join(f'{1e6 * sorted(s)[len(s) // 2]:.4g} us' for s in times)}"


class _Runner:
    """The child that owns the GPU, and what it is asked."""

    def __init__(self, folder: Folder, batch: Batch) -> None:
        self._folder = folder
        self._header = header = batch.header
        self._watch = Stopwatch(header.timing, header.hardware, header.limits.time_s)
        self._meter: Meter | None = (
            open_meter(header.hardware, header.meter) if header.meter else None
        )
        self._device = local_cuda().name
        self._scratch = Scratch()
        self._pool = Pool("gpu", 1, memory=0, env={"TMPDIR": str(self._scratch.path)})
        self._steps: list[Step] = []

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.close()
        self._scratch.close()

    def run(self, unit: Unit) -> Result:
        """Run a unit: load and check its kernels, time them, read joules, and look at them once more.

        Raises:
            DeviceLost: the GPU stopped answering.
        """
        self._steps = []
        slots = [job.slot for job in unit.jobs if self._loaded(job)]
        if slots and len(slots) == len(unit.jobs):
            rounds = self._header.timing.confirm_rounds if unit.phase == "confirm" else 1
            if self._watch.time(self._ask, slots, rounds).status == "ok":
                for slot in slots:
                    self._last(slot)
        if all(step.status == "ok" for step in self._steps):
            self._pool.call({"do": "drop"}, self._header.limits.run_s)
        else:
            self._pool.replace()
        meter = "" if self._meter is None else self._meter.name
        return Result(
            batch=self._header.id, unit=unit.index, device=self._device, meter=meter,
            steps=tuple(self._steps), time=time.time(),
        )  # fmt: skip

    def _loaded(self, job: Job) -> bool:
        """Run a kernel on each of its cases, on the last of them last; say whether it came to its end."""
        for case in job.cases:
            files = {name: str(self._folder.file(file)) for name, file in case.items()}
            request = {
                "do": "load", "slot": job.slot, "code": str(self._folder.file(job.code)),
                "symbol": job.facts["symbol"], "threads": 1, "device": job.facts["device"],
                "bytes": job.facts.get("bytes", {}),
                "args": [{**a, "file": files.get(a["name"])} for a in job.facts["args"]],
            }  # fmt: skip
            if self._ask(request, self._header.limits.run_s).status != "ok":
                return False
            wrote = Path(tempfile.mkdtemp(dir=self._scratch.path))
            check = {"do": "check", "slot": job.slot, "folder": str(wrote)}
            reply = self._ask(check, self._header.limits.run_s, wrote)
            shutil.rmtree(wrote, ignore_errors=True)
            if reply.status != "ok":
                return False
        return True

    def _last(self, slot: str) -> None:
        """Read a timed kernel's joules, and run it once more."""
        if self._meter is not None:
            reading = self._watch.joules(self._quietly, self._meter, slot)
            self._steps.append(Step(do="joules", slots=(slot,), reading=reading))
        self._ask({"do": "again", "slot": slot}, self._header.limits.run_s)

    def _quietly(self, request: Mapping[str, Any], limit_s: float) -> Reply:
        """Ask the child for what the reading sums up."""
        reply = self._pool.call(request, limit_s)
        if reply.device_lost:
            raise _lost(reply)
        return reply

    def _ask(self, request: Mapping[str, Any], limit_s: float, wrote: Path | None = None) -> Reply:
        """Ask the child and write down how it ended, with the files that it wrote."""
        reply = self._quietly(request, limit_s)
        slots: Sequence[str] = request["slots"] if "slots" in request else [request["slot"]]
        files = {}
        if wrote is not None and reply.status == "ok":
            for path in sorted(wrote.glob("*.npy")):
                files[path.stem] = self._folder.keep(path.read_bytes(), "npy")
        self._steps.append(
            Step(
                do=request["do"], slots=tuple(slots), status=reply.status, value=plain(reply.value),
                message=reply.message, kind=reply.kind, files=files,
            )
        )  # fmt: skip
        return reply


def _lost(reply: Reply) -> DeviceLost:
    return DeviceLost(
        "the device stopped answering",
        where=reply.message,
        remedy="What was run is kept: run the batch again when the device is back",
    )
