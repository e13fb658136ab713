"""What a search returns."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from mimo_compile.errors import MimoError
from mimo_compile.ir.workload import Workload
from mimo_compile.search.farm_runs import Worker
from mimo_compile.search.lookup import Result, best, meter_of, pareto
from mimo_compile.search.meters import MODELLED
from mimo_compile.search.objective import Objective


@dataclass(frozen=True, slots=True)
class WorkloadResult:
    """What is known of one workload after the search, older records included."""

    workload: Workload
    weight: float
    space_size: int
    results: tuple[Result, ...]
    """Every correct candidate."""
    default: Result | None
    """The configuration used without tuning, if it was measured and right."""
    best: Result | None
    trials: int
    new_trials: int
    verdicts: Counter[str]
    """Trials by verdict."""
    history: tuple[tuple[int, float], ...]
    """(trials, best microseconds) after each round of this run."""
    meter: str = ""
    """What read joules in this run."""

    @property
    def pareto(self) -> list[Result]:
        """Non-dominated candidates in latency and energy, fastest first."""
        return pareto(self.results, self.meter)

    @property
    def speedup(self) -> float | None:
        """Default latency over best latency."""
        if self.default is None or self.best is None:
            return None
        return self.default.latency_us / self.best.latency_us

    def energy(self, result: Result) -> tuple[float | None, str]:
        """Return the millijoules that results are compared by, with their source: a meter, or the model."""
        meter = meter_of(self.results, self.meter)
        return result.point_by(meter)[1], meter or MODELLED

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""

        def show(r: Result) -> dict[str, Any]:
            energy, source = self.energy(r)
            return {
                "schedule": r.record.schedule, "config": r.record.config, "latency_us": r.latency_us,
                "energy_mj": energy, "energy_source": source,
                "time_source": "simulated" if r.record.simulated else "measured",
            }  # fmt: skip

        return {
            "workload": str(self.workload), "weight": self.weight, "trials": self.trials,
            "new_trials": self.new_trials, "verdicts": dict(self.verdicts),
            "default": show(self.default) if self.default else None,
            "best": show(self.best) if self.best else None, "speedup": self.speedup,
            "pareto": [show(r) for r in self.pareto],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """Where a search stands that measures elsewhere."""

    folder: str
    number: int
    """Batches so far."""
    units: int
    """Pieces of work in the last one: a candidate each, or several to be timed against each other."""
    open: int
    """Those of them without a result."""
    merged: int
    """Those whose results were stored now."""


@dataclass(frozen=True, slots=True)
class TuningResult:
    """What came of a search over one or many workloads."""

    workloads: tuple[WorkloadResult, ...]
    objective: Objective
    stopped: str
    """Why it ended: ``trials``, ``seconds``, ``joules``, ``exhausted``, ``interrupted``, ``database``, or
    ``batch``: a device batch has to be run."""
    seconds: float
    joules: float | None
    failure: MimoError | None = None
    """Why the database took no more records; what is here was found before."""
    workers: tuple[Worker, ...] = ()
    """What the workers of the farm did, where the search ran on one."""
    device_batch: DeviceBatch | None = None
    """Where it stands, if it measures elsewhere."""

    @property
    def simulated(self) -> bool:
        """True when the target does not exist and all times are a model's."""
        return any(r.record.simulated for w in self.workloads for r in w.results)

    @property
    def interrupted(self) -> bool:
        """True after Ctrl-C."""
        return self.stopped == "interrupted"

    @property
    def trials(self) -> int:
        """Measured candidates in all, records of earlier runs included."""
        return sum(w.trials for w in self.workloads)

    @property
    def new_trials(self) -> int:
        """Candidates measured in this run."""
        return sum(w.new_trials for w in self.workloads)

    @property
    def best(self) -> dict[str, Result]:
        """Best candidate of each workload that has one."""
        return {str(w.workload): w.best for w in self.workloads if w.best is not None}

    @property
    def pareto(self) -> dict[str, list[Result]]:
        """Pareto front of each workload."""
        return {str(w.workload): w.pareto for w in self.workloads}

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        return {
            "objective": str(self.objective), "stopped": self.stopped, "seconds": self.seconds,
            "joules": self.joules, "trials": self.trials, "new_trials": self.new_trials,
            "workloads": [w.to_json() for w in self.workloads],
            "workers": [w.to_json() for w in self.workers],
            "device_batch": None if self.device_batch is None else asdict(self.device_batch),
        }  # fmt: skip


def collect(
    workload: Workload,
    weight: float,
    space_size: int,
    results: list[Result],
    default_key: str,
    objective: Objective,
    trials: tuple[int, int],
    verdicts: Counter[str],
    history: list[tuple[int, float]],
    meter: str = "",
) -> WorkloadResult:
    """Put together what is known of one workload; ``trials`` are (all, new), ``meter`` that of the run."""
    default = next((r for r in results if r.record.key == default_key), None)
    return WorkloadResult(
        workload, weight, space_size, tuple(results), default,
        best(results, objective, meter), *trials, verdicts, tuple(history), meter,
    )  # fmt: skip
