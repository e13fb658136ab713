"""The front door of a search: what the user asks for becomes a tuner, a measurer, a meter and a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import EnvironmentMismatch, UsageError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.budget import Budget, Clock
from mimo_compile.search.database import Database
from mimo_compile.search.measure import Measurer, Measures, Timing, runnable_here, unfit_gpu
from mimo_compile.search.meters import AUTO, MODELLED, Meter, check_meter, open_meter
from mimo_compile.search.objective import Objective, parse_objective
from mimo_compile.search.progress import Progress
from mimo_compile.search.result import TuningResult
from mimo_compile.search.strategies import DEFAULT, Options, get_strategy
from mimo_compile.search.tuner import Tuner
from mimo_compile.search.warm import find_prior

GPU_METER = "nvml"
"""What reads the joules of GPUs that are elsewhere, where joules decide."""


def _counter(meter: Meter | str | None, hardware: Hardware, *, own: bool) -> Meter | None:
    """Open the meter asked for; another measurer than this machine's brings its own readings."""
    if meter is None and not own:
        return None
    return open_meter(hardware, meter) if meter is None or isinstance(meter, str) else meter


def check_tunable(hardware: Hardware, *, elsewhere: bool = False) -> Hardware:
    """Return the target of a search; ``elsewhere``: it is not this machine that measures.

    Raises:
        EnvironmentMismatch: it is a GPU that this machine does not have.
        UsageError: it is no GPU, and only those are measured elsewhere.
    """
    if hardware.kind == "cuda":
        if not elsewhere and (why := unfit_gpu(hardware)):
            raise EnvironmentMismatch(
                f"kernels for {hardware.name} cannot be measured here: {why}",
                remedy="With --device-batch DIR candidates are compiled here, and measured where one is",
            )
    elif elsewhere:
        raise UsageError(
            f"--device-batch is for GPUs, and {hardware.name} is none",
            remedy="give --target cuda:sm_80 or cuda:sm_90a",
        )
    return hardware


def tune_workloads(
    workloads: Mapping[Workload, float] | Sequence[tuple[Workload, float]],
    hardware: Hardware,
    *,
    trials: int | None = None,
    seconds: float | None = None,
    joules: float | None = None,
    objective: str | Objective = "latency",
    db: Database,
    seed: int = 0,
    strategy: str = DEFAULT,
    progress: Progress | None = None,
    schedules: Sequence[Schedule] | None = None,
    measurer: Measures | None = None,
    meter: Meter | str | None = None,
    device: DeviceModel | None = None,
    timing: Timing | None = None,
    options: Options | None = None,
    warm_start: bool = True,
    device_batch: Path | None = None,
) -> TuningResult:
    """Search the best kernel of each workload; every measurement is stored as soon as it is taken.

    Args:
        workloads: Each with its weight: how often the model calls the kernel.
        hardware: The target, with the thread count to tune for.
        trials: Candidates to measure over all workloads; records of earlier runs count.
        seconds: Wall-clock limit.
        joules: Limit of energy used (needs a meter).
        objective: What is best, see `objective.parse_objective`.
        db: Where records go, and where an earlier search is taken up.
        seed: Decides inputs and random choices.
        strategy: A name of `strategies.strategy_names`.
        progress: Called with each `progress.Event`.
        schedules: Algorithms to choose from (None: all that are registered).
        measurer: Measures candidates (None: on this machine, in child processes; for simulated targets
            their models).
        meter: Joules counter, or a name of `meters.meter_names` (None: ``auto``). One that is asked for
            is read for every objective, ``auto`` only where joules decide.
        device: Rates of the machine (None: calibrated if that was done before, else guessed).
        timing: How time is taken.
        options: Settings of the strategy.
        warm_start: Begin with a cost model trained on records of other shapes and machines, see
            `warm.find_prior`.
        device_batch: Folder in which candidates are put to be measured elsewhere, and from which their
            results are taken (GPUs only), see `device_batch.flow`.

    Returns:
        All that is known, also after Ctrl-C, or when the database could not be written any more (see
        `TuningResult.failure`).

    Raises:
        UsageError: no workloads, a bad budget, an unknown strategy or objective, an unsupported workload,
            an unknown or unusable meter, a target that cannot run here.
        EnvironmentMismatch: a plug-in that is used is broken.
    """
    get_strategy(strategy)
    pairs = list(workloads.items()) if isinstance(workloads, Mapping) else list(workloads)
    if not pairs:
        raise UsageError("nothing to tune: no workloads were given")
    budget = Budget(trials, seconds, joules)
    goal = parse_objective(objective) if isinstance(objective, str) else objective
    if device_batch is not None:
        return _batched(
            dict(pairs), check_tunable(hardware, elsewhere=True), device_batch, budget, goal, meter,
            schedules, timing,
            {"db": db, "seed": seed, "strategy": strategy, "progress": progress, "options": options},
        )  # fmt: skip
    if measurer is None and hardware.kind == "sim":
        if goal.needs_energy or joules is not None:
            raise UsageError(
                f"the energy of {hardware.name} is not modelled", remedy="use --objective latency"
            )
        from mimo_compile.search.measure.simulated import SimulatedMeasurer

        measurer = SimulatedMeasurer(hardware)
    elif measurer is None and not runnable_here(check_tunable(hardware)):
        raise UsageError(
            f"kernels for {hardware.name} cannot run here, so they cannot be tuned",
            remedy="tune on such a machine and share the records (`mimo-compile db export`)",
        )
    if device is None:
        from mimo_compile.search.calibrate import device_model

        device = device_model(hardware, measure=measurer is None)
    asked = meter not in (None, AUTO)
    counter = _counter(meter, hardware, own=measurer is None)
    clock = Clock(budget, counter)
    used = counter if asked or goal.needs_energy or joules is not None else None
    own_goal = goal.for_one(pairs[0][1]) if len(pairs) == 1 else goal
    cache = measurer.cache if measurer is not None else (timing or Timing()).cache
    prior = find_prior(hardware, [w for w, _ in pairs], db, cache) if warm_start else None
    own = measurer or Measurer(hardware, device=device, meter=used, timing=timing)
    try:
        tuner = Tuner(
            hardware, db, own, own_goal, seed=seed, device=device, strategy=strategy, progress=progress,
            options=options, meter=MODELLED if used is None else used.name, prior=prior,
        )  # fmt: skip
        tuner.total = trials
        for workload, weight in pairs:
            tuner.add(workload, weight, schedules)
        return replace(tuner.run(clock), objective=goal)
    finally:
        if measurer is None:
            own.close()


def _batched(
    workloads: dict[Workload, float],
    hardware: Hardware,
    folder: Path,
    budget: Budget,
    goal: Objective,
    meter: Meter | str | None,
    schedules: Sequence[Schedule] | None,
    timing: Timing | None,
    tuner: dict[str, Any],
) -> TuningResult:
    """Take one step of a search that measures elsewhere.

    Raises:
        UsageError: a limit that only a search here can keep.
    """
    from mimo_compile.search.device_batch.flow import device_batch

    if budget.seconds is not None or budget.joules is not None:
        raise UsageError(
            "a device batch has no limit of time or joules", remedy="give --trials, or none at all"
        )
    name = meter if isinstance(meter, str) or meter is None else meter.name
    if name in (None, AUTO):
        name = GPU_METER if goal.needs_energy else MODELLED
    check_meter(hardware, str(name))
    (only, *others) = workloads.values()
    return replace(
        device_batch(
            workloads, hardware, folder, schedules=schedules, trials=budget.trials, timing=timing,
            meter="" if name == MODELLED else str(name),
            tuner={
                **tuner, "objective": goal if others else goal.for_one(only), "meter": name,
                "device": DeviceModel.guess(hardware),
            },
        ),
        objective=goal,
    )  # fmt: skip
