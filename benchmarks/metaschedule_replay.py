"""TVM's MetaSchedule on a recorded space: its evolutionary search and its boosted trees, without any kernel.

Each algorithm is a sketch: a trace that samples one category for each knob and writes it beside a function
that does nothing. Builder and runner answer from the recording. The legal configs are its postprocessor, so
that it proposes no others. Its own features describe loops, of which there are none here: the model gets
instead which algorithm it is, the position of each knob's value, the value itself where it is a number, and
what the schedule declares the kernel to do (operations and bytes, as ours sees them too).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mimo_compile._tvm import compiler

tvm = compiler()
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.script import tirx as T

ROUNDS = {"metaschedule": (64, 512), "metaschedule 8": (8, 128)}
"""Name of a search -> candidates in a round, and in its evolution: its own numbers; small rounds, as ours."""
_OVER = "the search is over"


@T.prim_func(s_tir=True)
def nothing(x: T.Buffer((1,), "float32"), y: T.Buffer((1,), "float32")) -> None:
    T.func_attr({"global_symbol": "main"})
    for i in T.serial(1):
        with T.sblock("copy"):
            vi = T.axis.spatial(1, i)
            y[vi] = x[vi]


class Space:
    """One recording as MetaSchedule wants it."""

    def __init__(self, recording: Any) -> None:
        self.knobs: dict[str, dict[str, tuple]] = {
            name: {k: tuple(v) for k, v in knobs.items()} for name, knobs in recording.knobs.items()
        }
        self.fixed: dict[str, dict] = {}
        """What configs of an algorithm have besides knobs."""
        self.legal: dict[tuple[str, tuple[int, ...]], dict] = {}
        """(Algorithm, position of each knob's value) -> config."""
        self.works: dict[tuple[str, tuple[int, ...]], Mapping[str, float]] = {}
        for record in recording.records:
            knobs = self.knobs[record.schedule]
            if any(record.config.get(k) not in values for k, values in knobs.items()):
                continue  # a default outside the knobs' values cannot be sampled
            place = tuple(values.index(record.config[k]) for k, values in knobs.items())
            key = record.schedule, place
            self.legal[key] = dict(record.config)
            self.works[key] = {
                **{f"ops.{k}": v for k, v in record.ops.items()},
                **{f"bytes.{k}": v for k, v in record.bytes.items()},
            }
        self.columns = sorted({c for w in self.works.values() for c in w})

    def sketches(self, schedule: Any) -> list[Any]:
        """Return one trace for each algorithm."""
        out = []
        for number, knobs in enumerate(self.knobs.values()):
            copy = schedule.copy()
            block = copy.get_sblock("copy")
            copy.annotate(block, "algorithm", number)
            for place, values in enumerate(knobs.values()):
                count = len(values)
                drawn = copy.sample_categorical(list(range(count)), [1.0 / count] * count)
                copy.annotate(block, f"knob{place}", drawn)
            out.append(copy)
        return out

    def key(self, function: Any) -> tuple[str, tuple[int, ...]]:
        """Return the algorithm and the positions that are written in a function."""
        notes = _annotations(function)
        name = list(self.knobs)[int(notes["algorithm"])]
        return name, tuple(int(notes[f"knob{p}"]) for p in range(len(self.knobs[name])))

    def features(self, key: tuple[str, tuple[int, ...]]) -> list[float]:
        """Return one row: algorithm, knobs of each (zero where they belong to another), declared work."""
        name, place = key
        row: list[float] = []
        for other, knobs in self.knobs.items():
            own = other == name
            row.append(float(own))
            for at, values in enumerate(knobs.values()):
                value = values[place[at]] if own else 0
                row += [float(place[at]) if own else -1.0, _number(value) if own else -1.0]
        work = self.works.get(key, {})
        return row + [math.log2(1.0 + work.get(c, 0.0)) for c in self.columns]


def _annotations(function: Any) -> Mapping[str, Any]:
    found: list[Any] = []
    from tvm_ffi import structural_walk

    structural_walk(
        function.body,
        (tvm.s_tir.SBlock, lambda b: found.append(b) if b.name_hint == "copy" else None),
        order="pre",
    )
    notes: Mapping[str, Any] = found[0].annotations
    return notes


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


@derived_object
class Legal(ms.postproc.PyPostproc):
    """Refuses configs that the space does not have."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space

    def _initialize_with_tune_context(self, context: Any) -> None:
        pass

    def apply(self, sch: Any) -> bool:
        return self.space.key(sch.mod["main"]) in self.space.legal

    def clone(self) -> Any:
        return Legal(self.space)


@derived_object
class ChangeKnob(ms.mutator.PyMutator):
    """Draws one knob anew: what MetaSchedule's own mutators do to tiles, for categories."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.rng = np.random.default_rng(seed)

    def _initialize_with_tune_context(self, context: Any) -> None:
        pass

    def apply(self, trace: Any, _: Any = None) -> Any:
        drawn = [i for i in trace.decisions if len(i.attrs[0]) > 1]
        if not drawn:
            return None
        one = drawn[int(self.rng.integers(len(drawn)))]
        old, count = int(trace.decisions[one]), len(one.attrs[0])
        new = (old + 1 + int(self.rng.integers(count - 1))) % count
        return trace.with_decision(one, new, remove_postproc=True)

    def clone(self) -> Any:
        return ChangeKnob(int(self.rng.integers(1 << 30)))


@derived_object
class Features(ms.feature_extractor.PyFeatureExtractor):
    """One row for each candidate."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space

    def extract_from(self, context: Any, candidates: list[Any]) -> list[Any]:
        rows = [self.space.features(self.space.key(c.sch.mod["main"])) for c in candidates]
        return [tvm.runtime.tensor(np.array([row], np.float64)) for row in rows]


@derived_object
class Names(ms.builder.PyBuilder):
    """The name of a config is its code."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space

    def build(self, build_inputs: list[Any]) -> list[Any]:
        keys = [self.space.key(b.mod["main"]) for b in build_inputs]
        return [ms.builder.BuilderResult(json.dumps(key), None) for key in keys]


@derived_object
class Answer(ms.runner.PyRunnerFuture):
    """A result that is there already."""

    def __init__(self, seconds: float | None) -> None:
        super().__init__()
        self.seconds = seconds

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        if self.seconds is None:
            return ms.runner.RunnerResult(None, "it failed when it was recorded")
        return ms.runner.RunnerResult([self.seconds], None)


@derived_object
class Replay(ms.runner.PyRunner):
    """Asks the lookup, until that has enough."""

    def __init__(self, space: Space, lookup: Callable, stop: type[BaseException]) -> None:
        super().__init__()
        self.space, self.lookup, self.stop = space, lookup, stop
        self.over = False

    def run(self, runner_inputs: list[Any]) -> list[Any]:
        out = []
        for one in runner_inputs:
            name, place = json.loads(str(one.artifact_path))
            try:
                us = self.lookup(name, self.space.legal[name, tuple(place)])
            except self.stop:
                self.over = True
                raise RuntimeError(_OVER) from None
            out.append(Answer(None if us is None or math.isinf(us) else us / 1e6))
        return out


_SPACES: dict[int, Space] = {}


def search(lookup: Any, seed: int, name: str, stop: type[BaseException]) -> None:
    """Run one search; the lookup counts, and ends it by raising ``stop``."""
    space = _SPACES.get(id(lookup.recording)) or Space(lookup.recording)
    _SPACES[id(lookup.recording)] = space
    for talker in ("tvm.s_tir.meta_schedule", "tvm.s_tir"):
        logging.getLogger(talker).setLevel(logging.ERROR)
    np.random.seed(seed)  # its cost model draws from it until it is trained
    batch, population = ROUNDS[name]
    runner = Replay(space, lookup, stop)
    generator = ms.space_generator.ScheduleFn(
        space.sketches, sch_rules=[], postprocs=[Legal(space)],
        mutator_probs={ChangeKnob(seed): 1.0},
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        try:
            ms.tune_tir(
                tvm.IRModule({"main": nothing}), target=tvm.target.Target({"kind": "llvm", "num-cores": 1}),
                work_dir=folder, max_trials_global=1 << 30, num_trials_per_iter=batch,
                builder=Names(space), runner=runner, database=ms.database.MemoryDatabase(),
                cost_model=ms.cost_model.XGBModel(
                    extractor=Features(space), num_warmup_samples=batch, num_tuning_cores=1
                ),
                measure_callbacks=[
                    ms.measure_callback.AddToDatabase(), ms.measure_callback.UpdateCostModel(),
                ],
                task_scheduler="round-robin", space=generator,
                strategy=ms.search_strategy.EvolutionarySearch(population_size=population),
                num_tuning_cores=1, seed=seed,
            )  # fmt: skip
        except Exception:
            if not runner.over:
                raise
    if runner.over:
        raise stop
