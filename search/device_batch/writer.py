"""Compiles candidates and puts into a batch what only a GPU can tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.search.device_batch.files import Folder, Job, Unit, plain
from mimo_compile.search.measure.base import Limits, Measurement, Timing
from mimo_compile.search.measure.builder import Builder, code_path
from mimo_compile.search.measure.cases import Case, CaseStore, Scratch
from mimo_compile.search.measure.runner import arguments, failed
from mimo_compile.search.measure.twins import Twins
from mimo_compile.search.measure.worker import Reply
from mimo_compile.search.records import Record, Verdict
from mimo_compile.search.space import Candidate, JointSpace


class BatchWriter:
    """A measurer (`base.Measures`) that answers only what needs no GPU; all else becomes units of a batch."""

    def __init__(
        self,
        hardware: Hardware,
        folder: Folder,
        *,
        limits: Limits,
        timing: Timing,
        meter: str = "",
        builders: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Prepare; builders start with the first request.

        Args:
            hardware: The GPU.
            folder: Where machine code and arrays go.
            limits: What building may take.
            timing: How kernels will be timed.
            meter: What will read joules; "": nothing will.
            builders: Compiler processes (None: one for each core of this machine, at most 4).
            scratch: Folder for temporary files.
        """
        from mimo_compile.ir.hardware import local_cpu

        self.hardware = hardware
        self.cache = timing.cache
        self.units: list[Unit] = []
        self.twins = Twins()
        self._folder = folder
        self._meter = meter
        self._scratch = Scratch(scratch)
        count = builders or max(1, min(4, local_cpu().cores))
        self.builder = Builder(limits, self._scratch, count)
        self._cases = CaseStore(self._scratch)
        self._queued: set[tuple[str, str]] = set()
        """Workloads and hashes of code that is in the batch."""

    def recall(self, space: JointSpace, candidate: Candidate, record: Record) -> None:
        """Note what is recorded of a candidate: the same code is not run again."""
        self.twins.learn(space, candidate, record)

    def describe(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Counts | None]:
        """Return the work each candidate's kernel declares (None where lowering fails)."""
        return self.builder.describe(space, candidates)

    def measure(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int, *, energy: bool = True
    ) -> Iterator[Measurement]:
        """Yield what is known without a GPU: failed builds, and code that was measured before.

        Of candidates that become the same code the first one is put into the batch.
        """
        meter = self._meter if energy else ""
        for candidate, built in zip(candidates, self.builder.build(space, candidates), strict=True):
            if built.status != "ok":
                yield failed(candidate, built, seed, "build")
                continue
            if twin := self.twins.find(space, candidate, built.value, seed, meter=meter):
                yield twin
                continue
            code = str(space.workload), built.value["code_hash"]
            if code not in self._queued:
                try:
                    self._queue(space, "search", seed, [(candidate, built)])
                    self._queued.add(code)
                except ValueError as error:
                    yield Measurement(candidate, Verdict.BUILD_FAILED, str(error), seed)
        self.builder.forget(*(c.key for c in candidates))

    def confirm(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int
    ) -> Iterator[Measurement]:
        """Put candidates into the batch to be timed against each other; yield those that cannot be built."""
        ready = []
        for candidate, built in zip(candidates, self.builder.build(space, candidates), strict=True):
            if built.status == "ok":
                ready.append((candidate, built))
            else:
                yield failed(candidate, built, seed, "build")
        if len(ready) > 1:
            self._queue(space, "confirm", seed, ready)
        self.builder.forget(*(c.key for c in candidates))

    def close(self) -> None:
        """End the builders and remove their files."""
        self.builder.pool.close()
        self._scratch.close()

    def _queue(
        self, space: JointSpace, phase: str, seed: int, pairs: Sequence[tuple[Candidate, Reply]]
    ) -> None:
        """Add a unit.

        Raises:
            ValueError: arrays cannot be packed for a kernel.
        """
        cases = self._cases.all_of(space.workload, seed)
        jobs = tuple(self._job(space, candidate, built, cases) for candidate, built in pairs)
        self.units.append(
            Unit(
                index=len(self.units),
                workload=str(space.workload),
                phase=phase,
                seed=seed,
                jobs=jobs,
            )
        )

    def _job(
        self, space: JointSpace, candidate: Candidate, built: Reply, cases: Sequence[Case]
    ) -> Job:
        schedule, config = space.schedules[candidate.schedule], space.config(candidate)
        code = code_path(self._scratch, candidate).read_bytes()
        stored = []
        for case in cases:
            args = arguments(self._cases, case, schedule, config, built.value)
            stored.append(
                {
                    a["name"]: self._folder.keep(Path(a["file"]).read_bytes(), "npy")
                    for a in args
                    if a["file"] is not None
                }
            )
        return Job(
            slot=candidate.key, schedule=candidate.schedule, schedule_version=schedule.version,
            config=candidate.config, code=self._folder.keep(code, "cubin"), facts=plain(built.value),
            cases=tuple(stored),
        )  # fmt: skip
