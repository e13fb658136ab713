"""The search over many workloads: propose, build, verify, measure, learn, record, split the budget."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import InputError, MimoError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.simulated import SIMULATED
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.ahead import LookAhead
from mimo_compile.search.budget import Clock, Share, mark_heavy, next_share, patience
from mimo_compile.search.database import Database
from mimo_compile.search.interrupts import finish_first
from mimo_compile.search.joules import Joules
from mimo_compile.search.learner import Learner, Prior
from mimo_compile.search.measure import Measurement, Measures, Predicts, Recalls
from mimo_compile.search.meters import MODELLED
from mimo_compile.search.objective import Objective
from mimo_compile.search.progress import Event, Progress
from mimo_compile.search.records import Record, record_key, versions
from mimo_compile.search.result import TuningResult, collect
from mimo_compile.search.space import Candidate, JointSpace
from mimo_compile.search.strategies import DEFAULT, Options, Setting, make_strategy
from mimo_compile.search.task import Task
from mimo_compile.search.transfer import similar_seeds

BATCH = 8
CONFIRM_S = 2.0
"""Seconds of a time budget kept for the comparison at the end, for each workload; at most a quarter of it."""
CONFIRM_AGAIN = 2
"""Further comparisons, while one that was read only once leads."""


class Tuner:
    """One search; see `tune_workloads` for the arguments."""

    def __init__(
        self, hardware: Hardware, db: Database, measurer: Measures, objective: Objective, *, seed: int,
        device: DeviceModel, strategy: str = DEFAULT, progress: Progress | None = None,
        options: Options | None = None, meter: str = MODELLED, prior: Prior | None = None,
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
        self.learner = Learner(
            hardware, device, measurer, objective, seed=seed, meter=meter, prior=prior
        )
        self.versions = versions()
        self.tasks: list[Task] = []
        self._ahead = LookAhead(measurer)
        self.total: int | None = None
        """Trials that there are to be, for who watches."""
        self._failure: MimoError | None = None
        self._progress = progress
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
        if space.costly:
            few = options.costly_pool
            options = replace(options, pool=few, verified=min(few, options.verified))
        elif isinstance(self.measurer, Predicts):  # which knows: it may look at all that is ranked
            options = replace(options, verified=1 << 30)
        share = Share(weight, floor)
        setting = Setting(
            space, rng, seeds,
            lambda cs: self.learner.predict(space, cs, share.best_us), options,
            spread=lambda cs: self.learner.spread(space, cs),
            foretell=lambda cs: self.learner.foretell(space, cs),
        )  # fmt: skip
        staged = self.objective.needs_energy and self.meter != MODELLED
        joules = Joules(self.objective, self.meter, staged)
        task = Task(
            space, make_strategy(self.strategy, setting), share, self.objective, joules,
            np.random.default_rng([self.seed, len(self.tasks), 1]),
        )  # fmt: skip
        task.default_key = self.key(task, space.defaults()[0])
        self.tasks.append(task)
        old = [r for r in self.db.records(workload, self.hardware) if self._usable(task, r)]
        for record in old:
            self._learn(task, record)
        if old:
            task.close_round(task.trials)
            task.share.stale = 0

    def _usable(self, task: Task, r: Record) -> bool:
        schedule = task.space.schedules.get(r.schedule)
        return (
            schedule is not None
            and (r.schedule_version, r.cache, r.versions)
            == (schedule.version, self.measurer.cache, self.versions)
            and task.space.adopt(r.schedule, r.config) is not None
        )

    def key(self, task: Task, candidate: Candidate) -> str:
        """Return the key of a candidate's records."""
        schedule = task.space.schedules[candidate.schedule]
        return record_key(
            str(candidate.workload), schedule.name, schedule.version, candidate.config, self.hardware,
            self.measurer.cache, self.versions,
        )  # fmt: skip

    # -- learning ------------------------------------------------------------------------------

    def _learn(self, task: Task, record: Record) -> None:
        candidate = task.learn(record)
        if candidate is None:
            return
        if record.ok:
            self.learner.note(task.space, candidate, record)
        if isinstance(self.measurer, Recalls):
            self.measurer.recall(task.space, candidate, record)

    def train(self, *, now: bool = False) -> None:
        """Fit the models to what is known, where that is due."""
        known = sum(len(t.joules.values) for t in self.tasks)
        if not self.learner.due(sum(len(t.results()) for t in self.tasks), known, now=now):
            return
        times = {
            t.space.workload: {r.record.key: r.latency_us for r in t.results()} for t in self.tasks
        }
        joules = {t.space.workload: t.joules.known() for t in self.tasks}
        self.learner.train(times, joules, now=now)

    # -- running -------------------------------------------------------------------------------

    def run(self, clock: Clock) -> TuningResult:
        """Search until a limit is reached, all is exhausted, or Ctrl-C."""
        limit = clock.budget.trials
        self._tell("start", None, text=f"{len(self.tasks)} workloads", total=limit)
        touched: set[int] = set()
        stopped = "exhausted"
        mark_heavy([t.share for t in self.tasks])
        try:
            self.train()
            while (index := next_share([t.share for t in self.tasks])) is not None:
                per_trial = clock.seconds / max(1, sum(t.new for t in self.tasks))
                reserve = max(CONFIRM_S, 3 * per_trial) * len(touched | {index})
                if stopped_by := clock.reached(sum(t.trials for t in self.tasks), reserve):
                    stopped = stopped_by
                    break
                left = BATCH if limit is None else limit - sum(t.trials for t in self.tasks)
                if self._one_round(self.tasks[index], min(self._batch(limit), left), clock):
                    touched.add(index)
                self.train()
            for index in sorted(touched, key=lambda i: -self.tasks[i].cost):
                if not clock.reached(0):
                    self._confirm(self.tasks[index], clock)
        except KeyboardInterrupt:
            stopped = "interrupted"
        except InputError as error:  # the database takes no more; tell what was found
            stopped, self._failure = "database", error
        self._tell("done", None, text=f"stopped: {stopped}", total=limit)
        return self.result(stopped, clock)

    def _batch(self, limit: int | None) -> int:
        """Return the size of a round: small budgets over many workloads take small steps."""
        if limit is None:
            return BATCH
        return max(2, min(BATCH, limit // (3 * len(self.tasks))))

    def _next_seed(self) -> int:
        """Return the seed of the next inputs."""
        self._round += 1
        return (self.seed * 1_000_003 + self._round) % (1 << 31)

    def _one_round(self, task: Task, count: int, clock: Clock) -> bool:
        """Measure one batch of a workload; return whether anything was measured."""
        batch = self._ahead.batch(self.tasks, task, count)
        if not batch:
            task.share.exhausted = True
            return False
        seed, fresh = self._next_seed(), 0
        found = (
            self.measurer.measure(task.space, batch, seed, energy=False)
            if task.joules.staged
            else self.measurer.measure(task.space, batch, seed)
        )
        for measurement in found:
            self.store(task, measurement, "search")
            fresh += 1
            clock.note()
            if not clock.affords():
                break
        if task.joules.staged:
            self._read_joules(task, clock)
        task.close_round(fresh)
        rounds = patience(task.space.size, len(batch))
        if task.share.stale >= rounds and task.share.rounds > rounds:
            task.share.exhausted = True
        self._tell("workload", task, total=clock.budget.trials)
        return fresh > 0

    def _read_joules(self, task: Task, clock: Clock) -> None:
        """Measure the energy of those that deserve it, and correct the scores of the others."""
        results = {r.record.key: r for r in task.results() if not task.doubled(r.record)}
        limit = self.objective.window * min((r.latency_us for r in results.values()), default=0.0)
        waiting = {
            k: r.latency_us
            for k, r in results.items()
            if k not in task.joules.tried and r.latency_us <= limit
        }
        energies = self.learner.energies(task.space.workload, waiting)
        energies = task.joules.refine(results, energies, task.knobs())
        blind = not (task.joules.measured or self.learner.energy.trained)
        chosen = task.joules.choose(results, energies, task.knobs(), task.rng)
        pairs = {}
        if chosen and not clock.reached(0):
            batch = [task.candidates[k] for k in chosen]
            for m in self.measurer.measure(task.space, batch, self._next_seed()):
                record = self.store(task, m, "energy")
                # an old record may spell a config otherwise, and so have another key
                keys = [k for k in chosen if task.candidates[k].key == m.candidate.key]
                task.joules.tried.update(k for k in keys if k != record.key)
                if not blind and (mj := task.joules.known().get(record.key)) is not None:
                    pairs[record.key] = (mj, energies[keys[0]])
                clock.note()
                if not clock.affords():
                    break
        self.train(now=task.joules.judge(pairs))
        task.tell(task.records)

    def store(self, task: Task, m: Measurement, phase: str) -> Record:
        """Store what came of a candidate, and learn from it."""
        schedule = task.space.schedules[m.candidate.schedule]
        record = Record(
            key=self.key(task, m.candidate), workload=str(m.candidate.workload), schedule=schedule.name,
            schedule_version=schedule.version, config=m.candidate.config, hardware=self.hardware.id,
            features=tuple(sorted(self.hardware.features)), threads=self.hardware.threads,
            cache=self.measurer.cache, versions=self.versions, verdict=m.verdict, phase=phase, seed=m.seed,
            latency_us=m.latency_us, p10_us=m.p10_us, p90_us=m.p90_us, cv=m.cv, calls=m.calls,
            energy_mj=m.energy_mj, energy_spread_mj=m.energy_spread_mj, energy_source=m.energy_source,
            energy_window_s=m.energy_window_s, modelled_mj=m.modelled_mj, error_ratio=m.error_ratio,
            message=m.message, code_hash=m.code_hash, requires=m.requires, ops=dict(m.counts.ops),
            bytes=dict(m.counts.bytes), time=m.time or time.time(), twin=m.twin,
            worker=m.worker, device=m.device,
        )  # fmt: skip
        with finish_first():  # what is stored is also counted
            self.db.add(record)
            new = record.key not in task.records
            self._learn(task, record)
            task.new += new
        self._tell("measured" if phase == "search" else "confirm", task, record=record)
        return record

    def _confirm(self, task: Task, clock: Clock) -> None:
        """Time the leaders and the default against each other: single readings flatter the lucky.

        Afterwards the leader is one of them; if another that was read once still leads, it is compared too.
        One that fails may end the comparison before the others were timed: it is repeated without it.
        """
        done: set[str] = set()
        failed: set[str] = set()
        for _ in range(1 + CONFIRM_AGAIN):
            chosen = task.leaders(done, failed)
            if len(chosen) < 2 or not clock.affords(len(chosen)):
                return
            batch = [task.candidates[k] for k in chosen]
            measured = 0
            for m in self.measurer.confirm(task.space, batch, self._next_seed()):
                measured += 1
                record = self.store(task, m, "confirm")
                keys = [k for k in chosen if task.candidates[k].key == m.candidate.key]
                (done if record.ok else failed).update(keys)
                if record.ok and record.energy_mj is None and task.joules.staged:
                    # its reading failed: no prediction stands for it
                    task.joules.tried.update(keys)
                    task.tell(keys)
            if measured:
                clock.note(measured)

    # -- telling -------------------------------------------------------------------------------

    def _tell(
        self, kind: str, task: Task | None, *, total: int | None = None, record: Record | None = None,
        text: str = "",
    ) -> None:  # fmt: skip
        if self._progress is None:
            return
        best = default = predicted = None
        if task is not None and kind in ("measured", "workload"):
            best = task.best_us if math.isfinite(task.best_us) else None
            default = task.default_us
        if record is not None and kind == "measured" and getattr(self._progress, "predicted", True):
            predicted = self.learner.expected_us(record.key)
        name = str(task.space.workload) if task is not None else ""
        trials = sum(t.trials for t in self.tasks)
        simulated = self.measurer.cache == SIMULATED
        gain = None if task is None else task.share.expected_gain_us()
        self._progress(
            Event(
                kind, name, trials, total or self.total, best, default, record, text, simulated,  # type: ignore[arg-type]
                predicted_us=predicted,
                weight=0.0 if task is None else task.share.weight,
                gain_us=gain if gain is not None and math.isfinite(gain) else None,
                own_trials=0 if task is None else task.trials, workloads=len(self.tasks),
            )
        )  # fmt: skip

    def result(self, stopped: str, clock: Clock) -> TuningResult:
        """Return all that is known."""
        workloads = []
        for t in self.tasks:
            newest = [rows[-1] for rows in t.records.values()]
            workloads.append(
                collect(
                    t.space.workload,
                    t.share.weight,
                    t.space.size,
                    t.results(),
                    t.default_key,
                    self.objective,
                    (t.trials, t.new),
                    Counter(str(r.verdict) for r in newest),
                    t.share.history,
                    self.meter,
                )
            )
        return TuningResult(
            tuple(workloads), self.objective, stopped, clock.seconds, clock.joules, self._failure
        )
