"""The Python API: `compile` and `tune` (`load` is the runtime's)."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.errors import MimoError, UsageError

if TYPE_CHECKING:
    from mimo_compile.artifact import Artifact
    from mimo_compile.ir.hardware import Hardware
    from mimo_compile.ir.workload import Workload
    from mimo_compile.pipeline.choose import ModelPlan
    from mimo_compile.pipeline.graphs import ModelGraphs
    from mimo_compile.pipeline.orders import Scope
    from mimo_compile.quantize.calibration import Calibration
    from mimo_compile.search import TuningResult
    from mimo_compile.search.database import Database
    from mimo_compile.search.farm_runs import Worker

_LOG = logging.getLogger(__name__)
DbLike = "str | os.PathLike[str] | Database | None"


def compile(
    source: Any,
    *,
    target: str = "cpu",
    quant: str = "none",
    attention: str = "model",
    objective: str = "latency",
    trials: int | None = None,
    seconds: float | None = None,
    db: str | os.PathLike[str] | Database | None = None,
    threads: int | None = None,
    seed: int = 0,
    max_context: int | None = None,
    batch: int = 1,
    pages: int | str | None = None,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    progress: Callable[[Any], None] | None = None,
    calibrate: str | Calibration = "rtn",
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    adapter_format: str = "exact",
    gates: str | os.PathLike[str] | None = None,
    reproducible: str = "drafts",
    shapes_only: bool = False,
    pre_gates: str | os.PathLike[str] | None = None,
) -> Artifact:
    """Compile a model to an artifact.

    Without a tuning budget, kernels are chosen from the database's records, the packaged ones and the
    schedules' defaults, so this always works at once; with ``trials`` or ``seconds`` it tunes first.

    Args:
        source: model folder, ``"tiny"``, ``.pt2`` file, or `torch.nn.Module` with ``example_inputs``; or an
            artifact (``.mimo``), which gets another plan and keeps its weights.
        target: ``"cpu"`` or a preset, see `mimo-compile targets`.
        quant: ``"none"`` or a scheme such as ``"w4g64a8"`` (model folders).
        attention: ``"model"`` (as the checkpoint says), or a policy such as ``"quest:budget=1024"``, see
            docs/attention-policies.md (model folders).
        objective: what is best: ``latency energy edp ed2p energy@latency:1.05 latency@energy:12J``.
        trials: candidates to measure before choosing.
        seconds: wall-clock budget of tuning.
        db: records file or open `Database`; None: the user's default database.
        threads: threads to choose kernels for; None: all cores of the target.
        seed: decides random choices of tuning.
        max_context: positions that KV caches provide for; None: the model's own, at most 4096.
        batch: sequences that can be decoded together, each with its own caches (model folders).
        pages: with ``batch``: caches of whole contexts take pages of 64 positions from a pool of so many, or
            of this much memory (``"2GiB"``), and share those of an equal beginning; None: there are none.
        example_inputs: a module's arguments, in their order or (a dict) by name: they fix shapes,
            and whatever is no tensor is fixed itself.
        dynamic_shapes: not supported yet: must be None.
        progress: called with each `search.progress.Event` while tuning.
        calibrate: how codes of quantised weights are chosen: ``"rtn"`` (to the nearest), ``"gptq"`` or
            ``"awq"``, calibrated on text; ``"gptq:book.txt"`` on the text of that file, else on
            standard-library sources. A `Calibration` says how much of it, too.
        adapters: low-rank adapters over the model's frozen weights: name -> folder in PEFT's format. Each
            request chooses one of them, or none.
        adapter_format: how adapters are stored: ``"exact"``, or rounded to ``"bf16"`` or ``"fp8"``.
        gates: safetensors file of what the policy ``"seer"`` (gates) or ``"dsa"`` (indexers) chooses by;
            None: the model's own.
        reproducible: which entry points add up in one order, so that a token's logits do not depend on how
            many come with it: ``"drafts"`` (those that decode and verify drafts, where the model has draft
            layers and kernels can), ``"all"`` or ``"none"``; see docs/speculative.md.
        shapes_only: read the shapes of a model folder alone: its ``config.json`` does, and the artifact holds
            zeros, which take no room on disk. For what a model needs before its weights are there.
        pre_gates: safetensors file of gates that choose the experts of the layer after theirs, with which the
            model was trained (docs/experts.md); None: each layer's router chooses its own.

    Returns:
        The artifact: ``.save(path)``, or ``.module()`` to run it in this process.

    Raises:
        UsageError: an option is wrong or does not fit the source.
        InputError: an input file is missing, damaged or not supported.
        ArtifactError: an artifact is damaged, or was built for another machine or by another version.
        MissingExtra: the ``[compile]`` packages are not installed.
    """
    from mimo_compile.ir.hardware import resolve_target
    from mimo_compile.pipeline.build import Extras, build_artifact
    from mimo_compile.pipeline.device import require_compiler
    from mimo_compile.pipeline.orders import check_scope
    from mimo_compile.pipeline.source import check_compilable, open_source, require_compile_extra

    require_compile_extra()
    from mimo_compile.quantize.calibration import parse_calibration

    if dynamic_shapes is not None:
        raise UsageError(
            "dynamic_shapes are not supported in this version",
            remedy="compile once for each shape",
        )
    if is_artifact(source):
        asked = (
            quant, attention, target, max_context, batch, pages, example_inputs, calibrate,
            adapter_format, gates, reproducible, shapes_only, pre_gates,
        )  # fmt: skip
        if adapters or asked != (
            "none", "model", "cpu", None, 1, None, None, "rtn", "exact", None, "drafts", False,
            None,
        ):  # fmt: skip
            raise UsageError(
                "an artifact keeps target, formats, context, batch, adapters and what is reproducible: only "
                "its plan can change",
                remedy="compile it from its source",
            )
        return _replanned(source, objective, trials, seconds, db, threads, seed, progress)
    scope = check_scope(reproducible)
    hardware = check_compilable(resolve_target(target, threads))
    require_compiler(hardware)
    if isinstance(calibrate, str):
        calibrate = parse_calibration(calibrate, seed=seed)
    opened = open_source(
        source, quant=quant, attention=attention, max_context=max_context,
        example_inputs=example_inputs, calibration=calibrate, adapters=adapters,
        adapter_format=adapter_format, hardware=hardware, batch=batch, pages=pages, gates=gates,
        shapes_only=shapes_only, pre_gates=pre_gates,
    )  # fmt: skip
    plan = _planned(opened.graphs, hardware, objective, trials, seconds, db, seed, progress, scope)
    extras = Extras(
        quant=str(opened.scheme), attention=opened.attention, objective=objective, config=opened.config,
        tokenizer=opened.tokenizer, records=plan.records,
        calibrated=None if opened.loaded is None else opened.loaded.calibrated,
        gates=None if opened.loaded is None else opened.loaded.gates, orders=plan.orders,
        shapes_only=shapes_only,
        pre_gates=None if opened.loaded is None else opened.loaded.pre_gates,
    )  # fmt: skip
    return build_artifact(opened.graphs, plan.choices, hardware, extras)


def _planned(
    graphs: ModelGraphs, hardware: Hardware, objective: str, trials: int | None, seconds: float | None,
    db: Any, seed: int, progress: Callable[[Any], None] | None, scope: Scope,
) -> ModelPlan:  # fmt: skip
    """Choose the kernels of a model, after a search if a budget is given."""
    from mimo_compile.pipeline.choose import choose, tunable

    tuning = trials is not None or seconds is not None
    with _database(db, write=tuning) as database:
        wanted = tunable(graphs, hardware, search=True) if tuning else {}
        if tuning and not wanted:
            _LOG.warning("no kernel of %s can be tuned: defaults are used", graphs.name)
        if wanted:
            found = _tune(
                wanted, hardware, trials, seconds, None, objective, database, seed, progress
            )
            if found.failure is not None:
                raise found.failure
        return choose(graphs, hardware, objective, database, scope)


def tune(
    source: Any,
    *,
    target: str = "cpu",
    quant: str = "none",
    attention: str = "model",
    objective: str = "latency",
    trials: int | None = None,
    seconds: float | None = None,
    joules: float | None = None,
    strategy: str = "evolutionary",
    meter: str = "auto",
    db: str | os.PathLike[str] | Database | None = None,
    threads: int | None = None,
    seed: int = 0,
    max_context: int | None = None,
    batch: int = 1,
    pages: int | str | None = None,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    progress: Callable[[Any], None] | None = None,
    on: str | None = None,
    gates: str | os.PathLike[str] | None = None,
    device_batch: str | os.PathLike[str] | None = None,
) -> TuningResult:
    """Search the best kernels of a model, or of one op, and keep every measurement in the database.

    Args:
        source: as for `compile`, but no artifact; or the text of one workload such as
            ``"mpgemm:m=1,n=4096,k=4096,w=w4g64,a=a8"``.
        target: as for `compile`, as are the other options that are not described here; or a simulated
            machine, ``"sim:lut-tensor-core"`` or ``"sim:roma"``, whose times are modelled.
        quant: scheme of the weights.
        attention: as for `compile`.
        objective: as for `compile`, or ``"pareto"``.
        trials: candidates to measure over all workloads, those of earlier runs included.
        seconds: wall-clock budget.
        joules: budget of energy used while tuning (needs a meter).
        strategy: how candidates are proposed: ``evolutionary``, ``random``, ``grid`` or a plug-in's.
        meter: what reads joules: ``auto`` (the target's own where it works and joules decide), a name that
            `mimo-compile targets` lists, or ``modelled`` to read none.
        db: where records are kept.
        threads: threads to tune for.
        seed: decides random choices.
        max_context: positions that KV caches provide for.
        batch: as for `compile`.
        pages: as for `compile`.
        example_inputs: tensors that fix a module's input shapes.
        progress: called with each `search.progress.Event`.
        on: where candidates are built and measured: None is this machine, ``"ray"`` a Ray cluster of this
            machine alone, ``"ray:HOST:PORT"`` one that runs and of which this machine is a node.
        gates: as for `compile`.
        device_batch: folder of a batch for a GPU that is elsewhere: results that are there are stored, and
            when none is missing the next candidates are compiled into it.

    Returns:
        What is known afterwards: ``.best`` and ``.pareto`` by workload. Ctrl-C ends the search and
        returns too.

    Raises:
        UsageError: an option is wrong, or the target cannot run here.
        InputError: an input file is missing, damaged or not supported.
        MissingExtra: the ``[compile]`` packages are not installed, or Ray for ``on``.
        DeviceLost: no measuring node is left; what was measured is kept.
        EnvironmentMismatch: a plug-in that is used is broken, or the target is a GPU that this machine lacks.
    """
    from mimo_compile.ir.hardware import resolve_target
    from mimo_compile.pipeline.choose import tunable
    from mimo_compile.pipeline.source import open_source, require_compile_extra
    from mimo_compile.search.meters import AUTO, MODELLED, open_meter
    from mimo_compile.search.strategies import get_strategy
    from mimo_compile.search.tune import check_tunable

    if is_artifact(source):
        raise UsageError(
            f"{source} is an artifact, which is tuned while it gets another plan",
            remedy="`mimo-compile compile` it with --trials or --time, or tune its source",
        )
    if is_op_spec(source) and (pages is not None or batch != 1):
        raise UsageError(
            f"batch ({batch}) and pages ({pages}) are for models, and {source} is one workload",
            remedy="write b=, page= and pool= into the workload of an op that has them",
        )
    if on is not None and device_batch is not None:
        raise UsageError("candidates are measured on a farm (on) or as a device batch, not both")
    hardware = check_tunable(resolve_target(target, threads), elsewhere=device_batch is not None)
    get_strategy(strategy)  # wrong names are refused before a model is loaded
    if on is not None:
        from mimo_compile.search.farm.tuning import check_on

        meter = check_on(on, hardware, objective, joules, meter)
    here = on is None and device_batch is None
    local = here and meter not in (AUTO, MODELLED)
    counter = open_meter(hardware, meter) if local else meter
    workloads: dict[Workload, float]
    if is_op_spec(source):
        require_compile_extra()
        from mimo_compile.ir.ops import parse_workload

        workloads = {parse_workload(source): 1.0}
    else:
        opened = open_source(
            source, quant=quant, attention=attention, max_context=max_context,
            example_inputs=example_inputs, hardware=hardware, batch=batch, pages=pages, gates=gates,
        )  # fmt: skip
        workloads = tunable(opened.graphs, hardware, search=True)
        if hardware.kind == "sim":
            workloads = _supported(workloads, hardware)
    with _database(db) as database, _farm(on, hardware, meter) as farm:
        how = {"meter": counter} if farm is None else farm.how()
        if device_batch is not None:
            how["device_batch"] = Path(device_batch)
        with _tallied(farm, database) as workers:
            found = _tune(
                workloads, hardware, trials, seconds, joules, objective, database, seed, progress,
                strategy=strategy, **how,
            )  # fmt: skip
    return replace(found, workers=tuple(workers))


def _farm(on: str | None, hardware: Hardware, meter: str) -> Any:
    """Open the farm that a search is to run on; None is this machine."""
    if on is None:
        return contextlib.nullcontext()
    from mimo_compile.search.farm.tuning import open_farm

    return open_farm(on, hardware, meter=meter)


@contextlib.contextmanager
def _tallied(farm: Any, database: Database) -> Iterator[list[Worker]]:
    """Give a list that tells afterwards what a farm's workers did; it is stored however the search ends."""
    told: list[Worker] = []
    try:
        yield told
    finally:
        if farm is not None:
            from mimo_compile.search.farm_runs import store

            told += farm.workers()
            try:
                store(database, told)
            except MimoError as error:  # the search has told, or will tell, its own
                _LOG.warning("what the workers did is not kept: %s", error)


def _supported(workloads: dict[Workload, float], hardware: Hardware) -> dict[Workload, float]:
    """Return the kernels that a simulated machine has units for; it stands for no whole computer."""
    from mimo_compile.schedules import schedules_for

    found = {w: calls for w, calls in workloads.items() if schedules_for(w, hardware)}
    if not found:
        raise UsageError(
            f"{hardware.name} has no schedule for any kernel of this model",
            remedy="it does matmuls of 1 to 4 bit weights with int8 activations, e.g. --quant w2g64a8",
        )
    return found


def is_artifact(source: Any) -> bool:
    """Say whether a source names an artifact, whatever is in the file or whether there is one."""
    named = isinstance(source, str | os.PathLike) and Path(source).suffix == ".mimo"
    return named and not Path(source).is_dir()


def _replanned(
    source: str | os.PathLike[str], objective: str, trials: int | None, seconds: float | None, db: Any,
    threads: int | None, seed: int, progress: Callable[[Any], None] | None,
) -> Artifact:  # fmt: skip
    """Plan an artifact again, after a search if a budget is given."""
    from mimo_compile.artifact import Artifact
    from mimo_compile.pipeline.plans import problem_of_artifact
    from mimo_compile.pipeline.replan import check, replan

    artifact = Artifact.load(source)
    if artifact.manifest.target.kind != "cpu":
        raise UsageError(
            f"{source} is for {artifact.manifest.target.name}, and only artifacts for CPUs get other plans",
            remedy="compile it from its source",
        )
    problem = problem_of_artifact(artifact, threads)
    check(artifact, problem, objective)
    tuning = trials is not None or seconds is not None
    with _database(db, write=tuning) as database:
        if tuning:
            found = _tune(
                problem.weights, problem.hardware, trials, seconds, None, objective, database, seed,
                progress,
            )  # fmt: skip
            if found.failure is not None:
                raise found.failure
        return replan(artifact, problem, objective, database)


def is_op_spec(source: Any) -> bool:
    """Say whether a source is the text of a workload rather than a path."""
    return isinstance(source, str) and ":" in source and "=" in source and not Path(source).exists()


class _Borrowed:
    """A database that the caller owns."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def __enter__(self) -> Database:
        return self.database

    def __exit__(self, *_: object) -> None:
        pass


def _database(db: str | os.PathLike[str] | Database | None, *, write: bool = True) -> Any:
    """Open the records. To read them only, there need not be any, nor a place to keep them."""
    from mimo_compile.search.database import Database, open_records

    if isinstance(db, Database):
        return _Borrowed(db)
    if write:
        return Database(db)
    if db is not None and not Path(db).exists():
        return contextlib.nullcontext()
    return open_records(db)


def _tune(
    workloads: Any, hardware: Any, trials: int | None, seconds: float | None, joules: float | None,
    objective: str, database: Any, seed: int, progress: Callable[[Any], None] | None, **how: Any,
) -> TuningResult:  # fmt: skip
    from mimo_compile.ir import functions
    from mimo_compile.search import kept_functions
    from mimo_compile.search.tune import tune_workloads

    kept_functions.use(database.path)
    workloads = {
        functions.canonical(w) if functions.is_function(w) else w: n for w, n in workloads.items()
    }
    kept_functions.keep(database.path, workloads)
    return tune_workloads(
        workloads, hardware, trials=trials, seconds=seconds, joules=joules, objective=objective,
        db=database, seed=seed, progress=progress, **how,
    )  # fmt: skip
