"""The search over many workloads: propose, build, verify, measure, learn, record, split the budget."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.cost_models.features import Features, extract
from mimo_compile.cost_models.learned import LatencyModel, Sample
from mimo_compile.errors import InputError, MimoError, UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.simulated import SIMULATED
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.budget import Budget, Clock, Share, mark_heavy, next_share
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import Result, summarise
from mimo_compile.search.measure import (
    Measurement,
    Measurer,
    Measures,
    Predicts,
    Timing,
    runnable_here,
)
from mimo_compile.search.meters import AUTO, MODELLED, Meter, open_meter
from mimo_compile.search.objective import Objective, parse_objective
from mimo_compile.search.progress import Event, Progress
from mimo_compile.search.records import Record, Verdict, record_key, versions
from mimo_compile.search.result import TuningResult, collect
from mimo_compile.search.space import Candidate, JointSpace
from mimo_compile.search.strategies import (
    DEFAULT,
    Observation,
    Options,
    Setting,
    Strategy,
    get_strategy,
    make_strategy,
)
from mimo_compile.search.strategies.base import NEAR
from mimo_compile.search.transfer import similar_seeds

BATCH = 8
FIRST = 4
"""Size of a workload's first round: defaults, and the best of similar shapes."""
PATIENCE = 4
"""Rounds without an improvement of 1 % after which a workload counts as done."""
CONFIRM_S = 2.0
"""Seconds of a time budget kept for the comparison at the end, for each workload; at most a quarter of it."""
CONFIRM = 4
"""Candidates of each workload compared against each other at the end, the default among them."""
CONFIRM_AGAIN = 2
"""Further comparisons, while one that was read only once leads."""
RANKED = 4096
"""Features of ranked candidates that are kept for the next time (some kilobytes each)."""
_FATAL = (Verdict.CRASH, Verdict.TIMEOUT, Verdict.OOM)


@dataclass(slots=True)
class _Task:
    """One workload under search."""

    space: JointSpace
    strategy: Strategy
    share: Share
    records: dict[str, list[Record]] = field(default_factory=dict)
    """Records by key, of this run and earlier ones."""
    candidates: dict[str, Candidate] = field(default_factory=dict)
    new: int = 0
    fatal: Counter[str] = field(default_factory=Counter)
    """Crashes and the like by schedule, while it has no correct candidate."""
    measured: bool = False
    """True once a record of the run's own meter has joules: from then on only such joules guide."""

    @property
    def trials(self) -> int:
        return len(self.records)

    def results(self) -> list[Result]:
        return summarise(r for rows in self.records.values() for r in rows)


class Tuner:
    """One search; see `tune_workloads` for the arguments."""

    def __init__(
        self, hardware: Hardware, db: Database, measurer: Measures, objective: Objective, *, seed: int,
        device: DeviceModel, strategy: str = DEFAULT, progress: Progress | None = None,
        options: Options | None = None, meter: str = MODELLED,
    ) -> None:  # fmt: skip
        """Prepare; `run` does the work. ``meter`` names what the measurer reads joules with."""
        self.hardware = hardware
        self.db = db
        self.measurer = measurer
        self.objective = objective
        self.seed = seed
        self.device = device
        self.strategy = strategy
        self.meter = meter
        self.options = options or Options()
        self.model = LatencyModel(seed=seed)
        self.versions = versions()
        self.tasks: list[_Task] = []
        self._progress = progress or (lambda event: None)
        self._features: dict[str, Features] = {}
        """Of measured candidates, by their records' keys."""
        self._ranked: dict[str, Features] = {}
        """Of candidates that were ranked lately, by their keys."""
        self._round = 0

    # -- setting up ----------------------------------------------------------------------------

    def add(
        self, workload: Workload, weight: float, schedules: Sequence[Schedule] | None = None
    ) -> None:
        """Add a workload, with everything that is already recorded about it.

        Raises:
            UsageError: no schedule supports it.
        """
        space = JointSpace(workload, self.hardware, schedules)
        need = get_op(workload.op).counts(workload)
        floor = max(0.0, self.device.latency_us(need, self.hardware) - self.device.launch_us)
        seeds = space.defaults() + similar_seeds(self.db, space)
        rng = np.random.default_rng([self.seed, len(self.tasks)])
        options = self.options
        if any(type(s).work is Schedule.work for s in space.schedules.values()):
            options = replace(options, pool=options.costly_pool)
        setting = Setting(space, rng, seeds, lambda cs: self._predict(space, cs), options)
        task = _Task(space, make_strategy(self.strategy, setting), Share(weight, floor))
        self.tasks.append(task)
        old = [r for r in self.db.records(workload, self.hardware) if self._usable(task, r)]
        for record in old:
            self._learn(task, record)
        if old:
            best = min((r.latency_us for r in task.results()), default=math.inf)
            task.share.learn(task.trials, best)
            task.share.stale = 0

    def _usable(self, task: _Task, r: Record) -> bool:
        schedule = task.space.schedules.get(r.schedule)
        return (
            schedule is not None
            and (r.schedule_version, r.cache, r.versions)
            == (schedule.version, self.measurer.cache, self.versions)
            and task.space.adopt(r.schedule, r.config) is not None
        )

    def _key(self, task: _Task, candidate: Candidate) -> str:
        schedule = task.space.schedules[candidate.schedule]
        return record_key(
            str(candidate.workload), schedule.name, schedule.version, candidate.config, self.hardware,
            self.measurer.cache, self.versions,
        )  # fmt: skip

    # -- learning ------------------------------------------------------------------------------

    def _learn(self, task: _Task, record: Record) -> None:
        candidate = task.space.adopt(record.schedule, record.config)
        if candidate is None:
            return
        task.candidates[record.key] = candidate
        task.records.setdefault(record.key, []).append(record)
        if not task.measured and self._joules(record) is not None and self.objective.needs_energy:
            task.measured = True
            self._tell_again(task)
        task.strategy.tell([Observation(candidate, self._score(task, record))])
        if record.ok:
            task.fatal[record.schedule] = -(10**6)
            counts = self._work(task.space, candidate, record)
            self._features[record.key] = self._extract(task.space, candidate, counts)
        elif record.verdict in _FATAL:
            task.fatal[record.schedule] += 1
            if task.fatal[record.schedule] >= 3:
                task.strategy.ban(record.schedule)

    def _joules(self, record: Record) -> float | None:
        """Return a record's millijoules if the meter of this run measured them."""
        ours = record.ok and self.meter != MODELLED and record.energy_source == self.meter
        return record.energy_mj if ours else None

    def _tell_again(self, task: _Task) -> None:
        """Correct every score told so far: they stood on modelled joules, which no longer count."""
        task.strategy.tell(
            [
                Observation(task.candidates[key], self._score(task, rows[-1]))
                for key, rows in task.records.items()
            ]
        )

    def _score(self, task: _Task, record: Record) -> float:
        """Score a record; a workload's scores rest on joules of one source, measured or modelled.

        Where joules are measured, a candidate without them cannot be ranked by energy and scores as a
        failure does.
        """
        if not record.ok or record.latency_us is None:
            return math.inf
        energy = self._joules(record) if task.measured else record.modelled_mj
        best = min(task.share.best_us, record.latency_us)
        return self.objective.score((record.latency_us, energy), best)

    def _work(self, space: JointSpace, candidate: Candidate, record: Record) -> Counts:
        """Return the work of a measured candidate as ranking sees it: records keep no traits."""
        schedule = space.schedules[candidate.schedule]
        if type(schedule).work is Schedule.work:
            return Counts(record.ops, record.bytes)
        return schedule.work(space.workload, space.config(candidate), self.hardware)

    def _extract(self, space: JointSpace, candidate: Candidate, counts: Counts) -> Features:
        return extract(
            space.workload, self.hardware, counts, candidate.schedule, candidate.config, self.device
        )

    def _predict(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[float] | None:
        """Predict scores of candidates that were not measured."""
        if isinstance(self.measurer, Predicts):
            return self.measurer.predict_us(space, candidates)
        keys = [c.key for c in candidates]
        costly = any(type(s).work is Schedule.work for s in space.schedules.values())
        if costly and not self.model.trained:
            return None  # the roofline alone tells too little to generate code for it
        rows = self._ranked
        if len(rows) > RANKED:
            rows.clear()
        new = [c for c in candidates if c.key not in rows]
        for candidate, counts in zip(new, self.measurer.describe(space, new), strict=True):
            if counts is not None:
                rows[candidate.key] = self._extract(space, candidate, counts)
        known = [k for k in keys if k in rows]
        times = dict(zip(known, self.model.predict_us([rows[k] for k in known]), strict=True))
        best = min(times.values(), default=1.0)
        out = []
        for key in keys:
            if key not in times:
                out.append(1e30)  # what cannot be lowered comes last
                continue
            energy = self.device.energy_mj(_counts_of(rows[key]), float(times[key]))
            out.append(self.objective.score((float(times[key]), energy), float(best)))
        return out

    def _train(self) -> None:
        samples = [
            Sample(self._features[r.record.key], r.latency_us, str(t.space.workload))
            for t in self.tasks
            for r in t.results()
            if r.record.key in self._features
        ]
        if len(samples) >= max(self.model.min_samples, self.model.samples + 4):
            self.model.fit(samples)

    # -- running -------------------------------------------------------------------------------

    def run(self, clock: Clock) -> TuningResult:
        """Search until a limit is reached, all is exhausted, or Ctrl-C."""
        limit = clock.budget.trials
        self._tell("start", None, text=f"{len(self.tasks)} workloads", total=limit)
        touched: set[int] = set()
        stopped = "exhausted"
        mark_heavy([t.share for t in self.tasks])
        try:
            self._train()
            while (index := next_share([t.share for t in self.tasks])) is not None:
                per_trial = clock.seconds / max(1, sum(t.new for t in self.tasks))
                reserve = max(CONFIRM_S, 3 * per_trial) * len(touched | {index})
                if stopped_by := clock.reached(sum(t.trials for t in self.tasks), reserve):
                    stopped = stopped_by
                    break
                left = BATCH if limit is None else limit - sum(t.trials for t in self.tasks)
                if self._one_round(self.tasks[index], min(self._batch(limit), left), clock):
                    touched.add(index)
                self._train()
            for index in sorted(touched, key=lambda i: -self._cost(self.tasks[i])):
                if not clock.reached(0):
                    self._confirm(self.tasks[index])
        except KeyboardInterrupt:
            stopped = "interrupted"
        except InputError as error:  # the database takes no more; tell what was found
            stopped, self._failure = "database", error
        self._tell("done", None, text=f"stopped: {stopped}", total=limit)
        return self._result(stopped, clock)

    @staticmethod
    def _cost(task: _Task) -> float:
        best = task.share.best_us
        return task.share.weight * best if math.isfinite(best) else 0.0

    def _batch(self, limit: int | None) -> int:
        """Return the size of a round: small budgets over many workloads take small steps."""
        if limit is None:
            return BATCH
        return max(2, min(BATCH, limit // (3 * len(self.tasks))))

    def _one_round(self, task: _Task, count: int, clock: Clock) -> bool:
        """Measure one batch of a workload; return whether anything was measured."""
        batch = task.strategy.ask(count if task.share.rounds else min(count, FIRST))
        if not batch:
            task.share.exhausted = True
            return False
        self._round += 1
        seed = (self.seed * 1_000_003 + self._round) % (1 << 31)
        fresh = 0
        for measurement in self.measurer.measure(task.space, batch, seed):
            self._store(task, measurement, "search")
            fresh += 1
            if clock.budget.seconds is not None and clock.seconds > clock.budget.seconds:
                break
        best = min((r.latency_us for r in task.results()), default=math.inf)
        task.share.learn(fresh, best)
        if task.share.stale >= PATIENCE and task.share.rounds > PATIENCE:
            task.share.exhausted = True
        self._tell("workload", task, total=clock.budget.trials)
        return fresh > 0

    def _store(self, task: _Task, m: Measurement, phase: str) -> Record:
        schedule = task.space.schedules[m.candidate.schedule]
        record = Record(
            key=self._key(task, m.candidate), workload=str(m.candidate.workload), schedule=schedule.name,
            schedule_version=schedule.version, config=m.candidate.config, hardware=self.hardware.id,
            features=tuple(sorted(self.hardware.features)), threads=self.hardware.threads,
            cache=self.measurer.cache, versions=self.versions, verdict=m.verdict, phase=phase, seed=m.seed,
            latency_us=m.latency_us, p10_us=m.p10_us, p90_us=m.p90_us, cv=m.cv, calls=m.calls,
            energy_mj=m.energy_mj, energy_spread_mj=m.energy_spread_mj, energy_source=m.energy_source,
            energy_window_s=m.energy_window_s, modelled_mj=m.modelled_mj, error_ratio=m.error_ratio,
            message=m.message, code_hash=m.code_hash, requires=m.requires, ops=dict(m.counts.ops),
            bytes=dict(m.counts.bytes), time=time.time(),
        )  # fmt: skip
        self.db.add(record)
        new = record.key not in task.records
        self._learn(task, record)
        task.new += new
        self._tell("measured" if phase == "search" else "confirm", task, record=record)
        return record

    def _confirm(self, task: _Task) -> None:
        """Time the leaders and the default against each other: single readings flatter the lucky.

        The best of each algorithm that came near takes part as well. Afterwards the leader is one of them;
        if another that was read once still leads, it is compared too.
        """
        done: set[str] = set()
        for _ in range(1 + CONFIRM_AGAIN):
            chosen = self._leaders(task, done)
            if len(chosen) < 2:
                return
            self._round += 1
            seed = (self.seed * 1_000_003 + self._round) % (1 << 31)
            for m in self.measurer.confirm(task.space, [task.candidates[k] for k in chosen], seed):
                self._store(task, m, "confirm")
            done.update(chosen)

    def _leaders(self, task: _Task, done: set[str]) -> list[str]:
        """Return the keys of candidates to compare, the best first; none if the leader was compared."""
        scores = {
            r.record.key: self._score(
                task, msgspec.structs.replace(r.record, latency_us=r.latency_us)
            )
            for r in task.results()
        }
        keys = sorted(scores, key=lambda k: (scores[k], k))
        if not keys or keys[0] in done:
            return []
        if done:
            new = [k for k in keys if k not in done]
            # none is left of those compared before if all of them failed in it
            return [*new[: CONFIRM - 1], *[k for k in keys if k in done][:1]]
        best: dict[str, str] = {}
        for key in keys:
            best.setdefault(task.candidates[key].schedule, key)
        near = {k for k in best.values() if scores[k] <= NEAR * scores[keys[0]]}
        near.add(self._key(task, task.space.defaults()[0]))
        return keys[: CONFIRM - 1] + [k for k in keys[CONFIRM - 1 :] if k in near]

    # -- telling -------------------------------------------------------------------------------

    def _tell(
        self, kind: str, task: _Task | None, *, total: int | None = None, record: Record | None = None,
        text: str = "",
    ) -> None:  # fmt: skip
        best = default = None
        if task is not None and kind in ("measured", "workload"):
            results = task.results()
            best = min((r.latency_us for r in results), default=None)
            key = self._key(task, task.space.defaults()[0])
            default = next((r.latency_us for r in results if r.record.key == key), None)
        name = str(task.space.workload) if task is not None else ""
        trials = sum(t.trials for t in self.tasks)
        simulated = self.measurer.cache == SIMULATED
        self._progress(
            Event(kind, name, trials, total or self._total, best, default, record, text, simulated)  # type: ignore[arg-type]
        )

    _total: int | None = None
    _failure: MimoError | None = None

    def _result(self, stopped: str, clock: Clock) -> TuningResult:
        workloads = []
        for t in self.tasks:
            newest = [rows[-1] for rows in t.records.values()]
            workloads.append(
                collect(
                    t.space.workload,
                    t.share.weight,
                    t.space.size,
                    t.results(),
                    self._key(t, t.space.defaults()[0]),
                    self.objective,
                    (t.trials, t.new),
                    Counter(str(r.verdict) for r in newest),
                    t.share.history,
                )
            )
        return TuningResult(
            tuple(workloads), self.objective, stopped, clock.seconds, clock.joules, self._failure
        )


def _counts_of(row: Features) -> Counts:
    ops = {k[4:]: math.expm1(v) for k, v in row.items() if k.startswith("ops.")}
    levels = {k[6:]: math.expm1(v) for k, v in row.items() if k.startswith("bytes.")}
    return Counts(ops, levels)


def _counter(meter: Meter | str | None, hardware: Hardware, *, own: bool) -> Meter | None:
    """Open the meter asked for; another measurer than this machine's brings its own readings."""
    if meter is None and not own:
        return None
    return open_meter(hardware, meter) if meter is None or isinstance(meter, str) else meter


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
    if measurer is None and hardware.kind == "sim":
        if goal.needs_energy or joules is not None:
            raise UsageError(
                f"the energy of {hardware.name} is not modelled", remedy="use --objective latency"
            )
        from mimo_compile.search.measure.simulated import SimulatedMeasurer

        measurer = SimulatedMeasurer(hardware)
    elif measurer is None and not runnable_here(hardware):
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
    own = measurer or Measurer(hardware, device=device, meter=used, timing=timing)
    try:
        tuner = Tuner(
            hardware, db, own, goal, seed=seed, device=device, strategy=strategy, progress=progress,
            options=options, meter=MODELLED if used is None else used.name,
        )  # fmt: skip
        tuner._total = trials
        for workload, weight in pairs:
            tuner.add(workload, weight, schedules)
        return tuner.run(clock)
    finally:
        if measurer is None:
            own.close()
