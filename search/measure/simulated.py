"""A measurer for machines that do not exist: programs are executed and verified, times come from a model.

Verification is the same as for real kernels: fresh inputs for each round, the op's reference in float64, the
op's bound. Executing a large matmul bit by bit would take minutes, so a witness is verified: all of K, but at
most `ROWS` rows and `OUTPUTS` columns of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mimo_compile.cost_models.simulated import estimate
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.simulated import SIMULATED, Matmul
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.simulated.base import SimulatedSchedule
from mimo_compile.search.measure.base import Measurement
from mimo_compile.search.measure.cases import Case, make_case
from mimo_compile.search.measure.verify import judge
from mimo_compile.search.records import Verdict
from mimo_compile.search.space import Candidate, JointSpace

ROWS, OUTPUTS = 8, 200


def witness(workload: Workload) -> Workload:
    """Return the part of a matmul that is executed: few rows and outputs, the whole depth."""
    m, n = workload.integer("m"), workload.integer("n")
    if parts := dict(workload.params).get("parts"):  # matrices on top of each other: some of each
        rows = f"{parts}".split("+")
        rows = [str(min(int(r), OUTPUTS // len(rows))) for r in rows]
        return workload.replace(m=min(m, ROWS), n=sum(map(int, rows)), parts="+".join(rows))
    return workload.replace(m=min(m, ROWS), n=min(n, OUTPUTS))


class SimulatedMeasurer:
    """Executes and models candidates; its times are marked `SIMULATED` where others say cold or hot."""

    def __init__(self, hardware: Hardware) -> None:
        """Prepare for one simulated target."""
        self.hardware = hardware
        self.cache = SIMULATED
        self._case: Case | None = None

    def measure(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int, *, energy: bool = True
    ) -> Iterator[Measurement]:
        """Execute each candidate on the witness of one seed, and model the time of the whole workload."""
        case = self._case_of(witness(space.workload), seed)
        for candidate in candidates:
            yield self._one(space, candidate, case)

    def confirm(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int
    ) -> Iterator[Measurement]:
        """Yield nothing: a model gives the same time each time."""
        yield from ()

    def describe(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Counts | None]:
        """Return the work of each candidate."""
        return [self._work(space, c) for c in candidates]

    def predict_us(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[float]:
        """Return modelled times: what a candidate gets as soon as its results are verified."""
        return [self._time(space, c) for c in candidates]

    def close(self) -> None:
        """Nothing to release."""

    def _case_of(self, workload: Workload, seed: int) -> Case:
        if self._case is None or (self._case.workload, self._case.seed) != (workload, seed):
            self._case = make_case(workload, seed)
            for array in self._case.inputs.values():
                array.setflags(write=False)  # a program that changes its inputs fails
        return self._case

    @staticmethod
    def _work(space: JointSpace, candidate: Candidate) -> Counts:
        schedule = space.schedules[candidate.schedule]
        return schedule.work(space.workload, space.config(candidate), space.hardware)

    @staticmethod
    def _time(space: JointSpace, candidate: Candidate) -> float:
        return estimate(Matmul.of(space.workload), space.config(candidate)).latency_us

    def _one(self, space: JointSpace, candidate: Candidate, case: Case) -> Measurement:
        schedule, config = space.schedules[candidate.schedule], space.config(candidate)
        base = Measurement(
            candidate, Verdict.OK, seed=case.seed, counts=self._work(space, candidate),
            requires=(SIMULATED,),
        )  # fmt: skip
        if not isinstance(schedule, SimulatedSchedule):
            text = f"{schedule.name} has no program that can be executed here"
            return replace(base, verdict=Verdict.BUILD_FAILED, message=text)
        try:
            got = schedule.simulate(case.workload, config, case.inputs)
        except (ArithmeticError, ValueError, IndexError) as error:
            text = f"simulation: {type(error).__name__}: {error}"
            return replace(base, verdict=Verdict.CRASH, message=text)
        slack = schedule.slack(case.workload, config, case.inputs)
        bound = {name: limit + slack.get(name, 0.0) for name, limit in case.bound.items()}
        ratio, message = judge(case.args, got, case.expected, bound, case.inputs)
        checked = replace(base, error_ratio=min(ratio, 1e30), message=message)
        if message:
            return replace(checked, verdict=Verdict.WRONG)
        return replace(checked, latency_us=self._time(space, candidate))
