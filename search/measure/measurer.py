"""Candidate -> verdict and numbers: build in one child, run in another, compare here.

Order for each candidate: build; run twice on poisoned outputs; compare with the reference that was
computed before; only then measure time and energy; run once more and compare again. All candidates of a
batch are built first, so that no compiler disturbs a clock.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import DeviceLost, EnvironmentMismatch
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware, gpu_of, local_cpu, local_cuda
from mimo_compile.search.measure.base import Limits, Measurement, Timing
from mimo_compile.search.measure.builder import Builder, code_path
from mimo_compile.search.measure.cases import Case, Scratch
from mimo_compile.search.measure.runner import Runner, failed
from mimo_compile.search.measure.twins import Twins
from mimo_compile.search.measure.worker import Reply
from mimo_compile.search.meters.base import Meter
from mimo_compile.search.records import Record, Verdict
from mimo_compile.search.space import Candidate, JointSpace

_LIKE = 1.15
"""By how much a GPU's memory may differ from the target's: one model is sold with several clocks."""


class Measurer:
    """Measures on this machine, in child processes that it starts, limits and replaces."""

    def __init__(
        self,
        hardware: Hardware,
        *,
        device: DeviceModel | None = None,
        meter: Meter | None = None,
        limits: Limits | None = None,
        timing: Timing | None = None,
        builders: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Prepare; children start with the first request.

        Args:
            hardware: Whose features and thread count kernels are built for; must be runnable here.
            device: Rates for modelled energy and the physical floor (None: guessed, no floor).
            meter: Joules counter read around a run of calls, or None.
            limits: Time and memory a candidate may take.
            timing: How time is taken.
            builders: Compiler processes; by default one for each core, at most 4.
            scratch: Folder for temporary files (None: memory or the temporary folder).
        """
        self.hardware = hardware
        self.limits = limits or Limits()
        self.timing = timing or Timing()
        self.cache = self.timing.cache
        self.device = device or DeviceModel.guess(hardware)
        self._best_us: dict[str, float] = {}
        """Fastest so far by workload: what takes twice as long is timed only briefly."""
        self.twins = Twins()
        self._scratch = Scratch(scratch)
        cores = local_cpu().cores if hardware.kind == "cuda" else hardware.cores
        count = builders or max(1, min(4, cores))
        self.builder = Builder(self.limits, self._scratch, count)
        self.runner = Runner(hardware, self.limits, self.timing, self.device, meter, self._scratch)

    def build(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Reply]:
        """Build candidates not built before and return what is known of each."""
        return self.builder.build(space, candidates)

    def describe(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Counts | None]:
        """Return the work each candidate's kernel declares (None where lowering fails)."""
        return self.builder.describe(space, candidates)

    def recall(self, space: JointSpace, candidate: Candidate, record: Record) -> None:
        """Note what is recorded of a candidate: from then on the same code is not timed again."""
        self.twins.learn(space, candidate, record)

    def measure(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int, *, energy: bool = True
    ) -> Iterator[Measurement]:
        """Build, verify and measure candidates of one workload on the fresh inputs of one seed.

        What becomes the same code as something that was recalled gets its figures.

        ``energy``: read joules too, where there is a meter.

        Raises:
            DeviceLost: the device stopped answering; what was found before comes first.
        """
        if not candidates:
            return
        self.runner.cases.keep_only(space.workload, seed)
        case = self.runner.cases.case(space.workload, seed)
        try:
            for candidate, built in zip(
                candidates, self.builder.build(space, candidates), strict=True
            ):
                result = self._measure_one(space, candidate, built, case, energy)
                if result.verdict is Verdict.OK:
                    self.builder.keep(candidate, built)
                yield result
                if result.verdict is Verdict.DEVICE_LOST:
                    raise _lost(result.message)
        finally:
            self.builder.forget(*(c.key for c in candidates if not self.builder.keeps(c)))

    def _measure_one(
        self, space: JointSpace, candidate: Candidate, built: Reply, case: Case, energy: bool
    ) -> Measurement:
        if built.status != "ok":
            return failed(candidate, built, case.seed, "build")
        meter = self.runner.meter.name if energy and self.runner.meter is not None else ""
        if twin := self.twins.find(space, candidate, built.value, case.seed, meter=meter):
            return twin
        checked = self.runner.verified(space, candidate, built, case)
        if checked.verdict is Verdict.OK:
            limit = 2.0 * self._best_us.get(str(space.workload), math.inf)
            times = self.runner.time([candidate.key], stop_above_us=limit)
            if times.status != "ok":
                checked = failed(candidate, times, case.seed, "timing")
            else:
                checked = self.runner.timed(checked, times)
                checked = self.runner.floor(self.runner.energy(checked) if energy else checked)
                if checked.verdict is Verdict.OK:
                    checked = self.runner.still_right(checked)
                if checked.verdict is Verdict.OK and checked.latency_us is not None:
                    name = str(space.workload)
                    self._best_us[name] = min(checked.latency_us, self._best_us.get(name, math.inf))
        if checked.verdict in (Verdict.OK, Verdict.SUSPICIOUS):
            self.runner.drop()
        else:
            self.runner.pool.replace()  # whatever it did to its process ends with it
        return checked

    def confirm(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int
    ) -> Iterator[Measurement]:
        """Build and verify candidates again and time them against each other, batch by batch.

        Raises:
            DeviceLost: the device stopped answering; what was found before comes first.
        """
        self.runner.cases.keep_only(space.workload, seed)
        case = self.runner.cases.case(space.workload, seed)
        loaded: list[Measurement] = []
        out: list[Measurement] = []
        lost = ""
        self.runner.pool.replace()
        for candidate, built in zip(candidates, self.builder.build(space, candidates), strict=True):
            ok = built.status == "ok"
            checked = (
                self.runner.verified(space, candidate, built, case)
                if ok
                else failed(candidate, built, seed, "build")
            )
            if checked.verdict is not Verdict.OK:
                out.append(checked)
                if ok:  # the others' slots may be damaged: leave the comparison to another run
                    break
            else:
                loaded.append(checked)
        if loaded and not any(m.verdict is not Verdict.BUILD_FAILED for m in out):
            times = self.runner.time([m.candidate.key for m in loaded], self.timing.confirm_rounds)
            if times.status == "ok":
                for which, m in enumerate(loaded):
                    timed = self.runner.energy(self.runner.timed(m, times, which))
                    timed = self.runner.floor(timed)
                    ok = timed.verdict is Verdict.OK
                    out.append(self.runner.still_right(timed) if ok else timed)
            elif times.device_lost:  # whichever of them it was
                lost = failed(loaded[0].candidate, times, seed, "timing").message
        self.runner.pool.replace()
        self.builder.forget(*(c.key for c in candidates))
        yield from out
        if lost := lost or next((m.message for m in out if m.verdict is Verdict.DEVICE_LOST), ""):
            raise _lost(lost)

    def time_plain(
        self, candidate: Candidate, facts: dict[str, Any], threads: int, inputs: dict[str, Any]
    ) -> float | None:
        """Time a built kernel without verification (calibration); return the least seconds of a call."""
        folder = self._scratch.folder("plain")
        args = []
        for a in facts["args"]:
            path = folder / f"{a['name']}.npy"
            if a["name"] in inputs:
                np.save(path, inputs[a["name"]], allow_pickle=False)
            args.append({**a, "file": str(path) if a["name"] in inputs else None})
        request = {
            "do": "load", "slot": candidate.key, "code": str(code_path(self._scratch, candidate)),
            "symbol": facts["symbol"], "args": args, "threads": threads,
        }  # fmt: skip
        if self.runner.call(request, self.limits.run_s).status != "ok":
            return None
        times = self.runner.time([candidate.key])
        self.runner.drop()
        self.builder.forget(candidate.key)
        return min(times.value["seconds"][0]) if times.status == "ok" else None

    # -- life ----------------------------------------------------------------------------------

    def close(self) -> None:
        """End the children and remove all files."""
        self.builder.pool.close()
        self.runner.pool.close()
        self._scratch.close()

    def __enter__(self) -> Measurer:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()


def _lost(message: str) -> DeviceLost:
    return DeviceLost(
        "the device stopped answering",
        where=message,
        remedy="What was measured is kept: run again when the device is back",
    )


def runnable_here(hardware: Hardware) -> bool:
    """Say whether kernels for the target can run on this machine."""
    if hardware.kind == "cuda":
        return not unfit_gpu(hardware)
    return (
        hardware.kind == "cpu"
        and not local_cpu().missing(hardware.features)
        and (hardware.threads <= len(os.sched_getaffinity(0)))
    )


def unfit_gpu(hardware: Hardware) -> str:
    """Say why kernels for a GPU cannot be measured on that of this machine ("": they can).

    It has to be of the same architecture, with as many SMs, and about as fast a memory and as large an L2
    (`_LIKE`): times for another GPU would be stored, and an H100 is an H200 but for its memory.
    """
    try:
        here = local_cuda()
    except EnvironmentMismatch as error:
        return error.what
    found, wanted = ((gpu_of(h).arch, h.cores) for h in (here, hardware))
    if found != wanted:
        return (
            f"the GPU of this machine, {here.name}, is {found[0]} with {found[1]} SMs, "
            f"{hardware.name} is {wanted[0]} with {wanted[1]}"
        )
    sizes = (
        (
            gpu_of(here).memory_bytes_per_s,
            gpu_of(hardware).memory_bytes_per_s,
            1e12,
            "TB/s of memory",
        ),
        (here.l3_bytes, hardware.l3_bytes, 1 << 20, "MiB of L2"),
    )
    for has, asked, unit, what in sizes:
        if not asked / _LIKE <= has <= asked * _LIKE:
            return (
                f"the GPU of this machine, {here.name}, has {has / unit:.3g} {what}, "
                f"{hardware.name} has {asked / unit:.3g}"
            )
    return ""
