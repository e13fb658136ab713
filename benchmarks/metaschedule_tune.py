"""TVM's `tune_tir` on one kernel of `metaschedule_spaces.py`, within seconds of wall clock.

As it comes it does not complete on x86 in TVM 0.27, so it gets help that changes nothing it decides: a build
function without the import that takes longer than the limit of a build, compilers that live from one batch to
the next (the own builder starts them anew for each), no torch in its workers, and a clock that stops it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from mimo_compile._tvm import compiler

tvm = compiler()
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.builder.local_builder import _worker_func as build_one
from tvm.s_tir.meta_schedule.runner.local_runner import LocalRunnerFuture
from tvm.support.popen_pool import PopenPoolExecutor, StatusKind

WORKER = {"TVM_FFI_DISABLE_TORCH_C_DLPACK": "1"}
"""Environment in which its workers start four times as fast."""
OVER = "the time is over"
BATCH = 32
"""Candidates of a round; its own 64 would leave too few rounds in five minutes."""
POPULATION = 128
"""Traces in its evolution; with its own 512 it would replay 2,500 a round: longer than it measures."""
CHUNK = 8
"""Candidates that are built between two looks at the clock."""


def plain_build(mod: Any, target: Any, _params: Any) -> Any:
    """Compile a module in a worker."""
    return tvm.tirx.build(mod, target=target)


@dataclass
class Found:
    """What a search found."""

    timed: list[tuple[float, Any]] = field(default_factory=list)
    """Seconds (median of the repeats) and trace of each candidate that ran."""
    errors: Counter = field(default_factory=Counter)
    rounds: int = 0
    over: bool = False
    """Ended by the clock (else by itself: it found no new candidates)."""
    seconds: float = 0.0
    deadline: float = 0.0
    least: int = 0
    """Rounds that it gets even if the time is over."""

    def late(self) -> bool:
        """Say whether the time is over."""
        return self.rounds >= self.least and time.monotonic() > self.deadline

    def best(self, count: int) -> list[tuple[float, Any]]:
        """Return the fastest candidates."""
        return sorted(self.timed, key=lambda t: t[0])[:count]


@derived_object
class TimedBuilder(ms.builder.PyBuilder):
    """Builds in processes that stay, until the time is over."""

    def __init__(self, workers: int, found: Found) -> None:
        super().__init__()
        self.pool = PopenPoolExecutor(max_workers=workers, timeout=60)
        self.found = found

    def build(self, build_inputs: list[Any]) -> list[Any]:
        out = []
        for start in range(0, len(build_inputs), CHUNK):
            chunk = build_inputs[start : start + CHUNK]
            if self.found.late():
                out.extend(ms.builder.BuilderResult(None, OVER) for _ in chunk)
                continue
            jobs = [(plain_build, None, b.mod, b.target, None) for b in chunk]
            for result in self.pool.map_with_error_catching(lambda job: build_one(*job), jobs):
                if result.status == StatusKind.COMPLETE:
                    out.append(ms.builder.BuilderResult(result.value, None))
                else:
                    why = "build: timeout" if result.status == StatusKind.TIMEOUT else result.value
                    out.append(ms.builder.BuilderResult(None, f"build: {why}"))
        return out


@derived_object
class TimedRunner(ms.runner.PyRunner):
    """Its own local runner, until the time is over."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        config = ms.runner.EvaluatorConfig(
            number=1, repeat=3, min_repeat_ms=20, enable_cpu_cache_flush=False
        )
        self.inner = ms.runner.LocalRunner(timeout_sec=20, evaluator_config=config)
        self.found = found

    def run(self, runner_inputs: list[Any]) -> list[Any]:
        out = []
        for one in runner_inputs:
            if self.found.late():
                out.append(LocalRunnerFuture(res=None, error_message=OVER))
            else:
                out.extend(self.inner.run([one]))
        return out


@derived_object
class Watch(ms.measure_callback.PyMeasureCallback):
    """Counts what came back, and ends the search."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def apply(self, scheduler, task_id, candidates, built, results) -> None:
        for candidate, result in zip(candidates, results, strict=True):
            if result.run_secs:
                seconds = sorted(float(s) for s in result.run_secs)
                self.found.timed.append((seconds[len(seconds) // 2], candidate.sch.trace))
            elif OVER not in str(result.error_msg):
                self.found.errors[first_reason(str(result.error_msg))] += 1
        self.found.rounds += 1
        if self.found.late():
            self.found.over = True
            raise RuntimeError(OVER)


def first_reason(message: str) -> str:
    """Return the line of an error that says what happened."""
    lines = [x.strip() for x in message.splitlines() if x.strip()]
    said = [x for x in lines if "Error" in x or x.startswith("build:")]
    return (said or lines or ["no message"])[-1][:160]


def search(
    func: Any,
    space: Callable[[Any], list[Any]],
    hardware: Any,
    seconds: float,
    seed: int,
    batch: int = BATCH,
    population: int = POPULATION,
    least: int = 0,
) -> Found:
    """Run `tune_tir` on one PrimFunc.

    Args:
        func: What to tune.
        space: Schedule -> its sketches, as `ScheduleFn` takes it.
        hardware: The target, with its threads.
        seconds: Wall clock from now on; candidates that are not timed by then do not count.
        seed: Of its random choices.
        batch: Candidates of a round.
        population: Traces that it evolves.
        least: Rounds that it gets however long they take.
    """
    begin = time.monotonic()
    found = Found(deadline=begin + seconds, least=least)
    generator = ms.space_generator.ScheduleFn(
        space, sch_rules=[], postprocs=[], mutator_probs={ms.mutator.MutateTileSize(): 1.0}
    )
    with TemporaryDirectory() as folder:
        try:
            ms.tune_tir(
                tvm.IRModule({"main": func}),
                target=tvm.target.Target(hardware.tvm_target()),
                work_dir=folder,
                max_trials_global=100_000,
                num_trials_per_iter=batch,
                builder=TimedBuilder(hardware.cores, found),
                runner=TimedRunner(found),
                database=ms.database.MemoryDatabase(),
                cost_model=ms.cost_model.XGBModel(num_warmup_samples=batch, num_tuning_cores=1),
                measure_callbacks=[
                    Watch(found),  # first: the model need not learn what came last
                    ms.measure_callback.AddToDatabase(),
                    ms.measure_callback.UpdateCostModel(),
                    ms.measure_callback.RemoveBuildArtifact(),
                ],
                task_scheduler="round-robin",
                space=generator,
                strategy=ms.search_strategy.EvolutionarySearch(
                    population_size=population,
                    init_min_unmeasured=population // 4,
                    genetic_num_iters=3,
                ),
                num_tuning_cores=hardware.cores,
                seed=seed,
            )
        except Exception:
            if not found.over:
                raise
    found.seconds = time.monotonic() - begin
    return found


def as_json(trace: Any) -> list:
    """Return a trace as plain values."""
    text = json.dumps(trace.as_json(), default=lambda number: number.value)
    plain: list = json.loads(text)
    return plain


def replayed(func: Any, trace: list) -> Any:
    """Return the PrimFunc that a trace (as JSON) makes of another."""
    schedule = tvm.s_tir.Schedule(tvm.IRModule({"main": func}))
    tvm.s_tir.schedule.Trace.apply_json_to_schedule(trace, schedule)
    return schedule.mod["main"]
