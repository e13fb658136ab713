"""From kernel graphs and a plan to an artifact."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mimo_compile import __version__
from mimo_compile.artifact import Artifact
from mimo_compile.errors import MimoError
from mimo_compile.ir import functions
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.pages import TABLE
from mimo_compile.ir.workload import Workload
from mimo_compile.pipeline.choose import GENERIC
from mimo_compile.pipeline.device import compile_device_code, compiler_version
from mimo_compile.pipeline.emit import Emitter, Lowered
from mimo_compile.pipeline.graphs import DRAFT_STEPS, HEADS, ModelGraphs, within_context
from mimo_compile.pipeline.isolate import Origin, compile_isolated
from mimo_compile.pipeline.orders import Orders, rounded
from mimo_compile.runtime.program import (
    SCHEMA,
    Calibrated,
    Choice,
    Decoder,
    GateFile,
    Layer,
    Manifest,
    Pool,
    Programs,
    State,
    Target,
)
from mimo_compile.schedules import Schedule, get_schedule

if TYPE_CHECKING:
    from mimo_compile.frontend.models.decoder import Decoder as ModelDecoder

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Extras:
    """What an artifact carries beside code and weights."""

    quant: str = "none"
    attention: str = "model"
    objective: str = "latency"
    config: bytes | None = None
    tokenizer: bytes | None = None
    records: bytes | None = None
    calibrated: Calibrated | None = None
    gates: GateFile | None = None
    orders: Orders = field(default_factory=Orders)
    """Which entry points add up in one order."""
    shapes_only: bool = False
    """No weights were read."""
    pre_gates: GateFile | None = None


def lower_model(
    model: ModelGraphs, choices: Mapping[Workload, Choice], hardware: Hardware
) -> dict[Workload, Lowered]:
    """Generate the kernel of each workload as chosen.

    Raises:
        MimoError: a schedule refuses what was chosen.
    """
    generic = model.functions()
    lowered: dict[Workload, Lowered] = {}
    for workload in model.workloads():
        choice = choices.get(workload)
        if choice is None:
            from mimo_compile.schedules.generic.x86_tir import default_config, lower_tir

            func, name = generic[workload], workload.text("does")
            config = default_config(func)
            kernel = lower_tir(func, f"{name[:40]}_{workload.text('hash')}", config, hardware)
            lowered[workload] = Lowered(kernel)
            continue
        schedule = get_schedule(choice.schedule)
        chosen = schedule.config_from_json(choice.config)
        lowered[workload] = lower_choice(workload, schedule, chosen, hardware)
    return lowered


def lower_choice(
    workload: Workload, schedule: Schedule, config: Any, hardware: Hardware
) -> Lowered:
    """Generate the kernel of one choice.

    A generic function takes the rules' kernel where the compiler refuses the decisions of a record: another
    version of it may have taken them, and no other kernel depends on them.

    Raises:
        MimoError: a schedule refuses what was chosen; names workload, schedule and config.
    """
    try:
        return Lowered(schedule.lower(workload, config, hardware), schedule, config)
    except ValueError as error:
        if not functions.is_function(workload) or schedule.name in GENERIC.values():
            values = json.dumps(schedule.config_to_json(config))
            raise MimoError(
                f"no kernel for {workload}: {error}",
                where=f"schedule {schedule.name}, config {values}",
                remedy=f"Search for kernels that can be built: mimo-compile tune --op {workload}",
            ) from error
        _LOG.warning(
            "%s takes its default: %s refuses a record: %s", workload, schedule.name, error
        )
    rules = get_schedule(GENERIC[hardware.kind])
    default = rules.space(workload, hardware).default
    return Lowered(rules.lower(workload, default, hardware), rules, default, stands_in=True)


def build_artifact(
    model: ModelGraphs, choices: Mapping[Workload, Choice], hardware: Hardware, extras: Extras
) -> Artifact:
    """Lower, compile, lay out: everything but choosing.

    Args:
        model: Entry points as kernel graphs.
        choices: Schedule and config for each workload but functions that no schedule supports.
        hardware: What to compile for.
        extras: Other members and the texts that the manifest repeats.

    Raises:
        MimoError: a kernel cannot be made or compiled; names workload, schedule and config.
    """
    lowered = lower_model(model, choices, hardware)
    emitter = Emitter(lowered, model.tensors)
    entries = {
        name: emitter.entry(graph, model.input_names[name], model.output_names[name])
        for name, graph in model.entries.items()
    }
    kernels = [low.kernel for low in lowered.values()]
    origins = [origin_of(w, low) for w, low in lowered.items()]
    calls = model.workloads()
    plan = [final_choice(w, choices.get(w), lowered[w], calls[w]) for w in sorted(lowered, key=str)]
    manifest = Manifest(
        schema=SCHEMA,
        name=model.name,
        # LLVM may use any feature it was told of, in every function.
        target=Target(
            hardware.kind, hardware.name, tuple(sorted(hardware.features)), hardware.threads
        ),
        versions=built_with() | compiler_version(hardware),
        quant=extras.quant,
        attention=extras.attention,
        objective=extras.objective,
        entries=tuple(entries),
        members={},
        states=emitter.states,
        plan=tuple(plan),
        decoder=_decoder(model, emitter, extras.orders),
        modelled=any(c.source == "modelled" for c in plan),
        calibrated=extras.calibrated,
        gates=extras.gates,
        shapes_only=extras.shapes_only,
        pre_gates=extras.pre_gates,
    )
    return Artifact(
        manifest,
        Programs(entries),
        (compile_device_code if hardware.kind == "cuda" else compile_isolated)(
            kernels, origins, hardware
        ),
        dict(emitter.weights),
        extras.config,
        extras.tokenizer,
        extras.records,
    )


def origin_of(workload: Workload, low: Lowered) -> Origin:
    """Return where a kernel comes from, for messages about it."""
    if low.schedule is None:
        return Origin(str(workload), "generic.x86_tir", "default")
    return Origin(
        str(workload), low.schedule.name, json.dumps(low.schedule.config_to_json(low.config))
    )


def final_choice(
    workload: Workload, choice: Choice | None, low: Lowered, calls: dict[str, int]
) -> Choice:
    """Return what the manifest says of a kernel, once it is made."""
    if choice is None or low.schedule is None:
        return Choice(str(workload), "generic.x86_tir", {}, low.kernel.name, "default", calls=calls)
    version = low.schedule.version
    if low.stands_in:
        return Choice(
            choice.workload, low.schedule.name, low.schedule.config_to_json(low.config),
            low.kernel.name, "default", calls=calls, schedule_version=version,
        )  # fmt: skip
    return Choice(
        choice.workload, choice.schedule, choice.config, low.kernel.name, choice.source,
        choice.latency_us, choice.energy_mj, choice.energy_source, calls, version,
    )  # fmt: skip


def built_with() -> dict[str, str]:
    """Return the installed packages that decide what an artifact holds, with their versions."""
    from importlib.metadata import version

    return {
        "mimo_compile": __version__,
        **{name: version(name) for name in ("apache-tvm", "apache-tvm-ffi")},
    }


def _pool(model: ModelGraphs, emitter: Emitter) -> Pool | None:
    """Return the pages that sequences take, and which states are theirs."""
    paging = model.paging
    if paging is None:
        return None
    return Pool(paging.page, paging.pages, tuple(sorted(emitter.pooled)), TABLE)


def _decoder(model: ModelGraphs, emitter: Emitter, orders: Orders) -> Decoder | None:
    if model.decoder is None:
        return None
    config = model.decoder.config
    counts = {
        kind: tuple(int(n.rpartition("_")[2]) for n in model.entries if n.startswith(f"{kind}_"))
        for kind in ("step", "decode", "batch")
    }
    return Decoder(
        steps=counts["step"], heads=HEADS, hidden=config.hidden, vocab=config.vocab,
        max_context=config.max_context, eos=tuple(config.eos), bos=config.bos,
        mtp=len(config.mtp), mtp_steps=within_context(DRAFT_STEPS, config.max_context) if config.mtp else (),
        adapters=model.decoder.adapters, decode=counts["decode"],
        rerun=config.attention.rerun if config.decodes_apart else 0,
        layers=tuple(_layers(model.decoder, emitter.states)), batch=(*counts["batch"], 1)[0],
        pool=_pool(model, emitter),
        alike=orders.tokens, unlike=orders.unknown,
        order_costs=rounded(orders.costs),
    )  # fmt: skip


def _layers(decoder: ModelDecoder, states: Mapping[str, State]) -> Iterator[Layer]:
    """Yield what each layer attends to and keeps between calls."""
    from mimo_compile.frontend.models import kv
    from mimo_compile.frontend.models.stages import LayerCore

    config = decoder.config
    for stage in decoder.stages():
        if not isinstance(stage.module, LayerCore):
            continue
        core, spec = stage.module, stage.module.spec
        part, _, number = stage.name.partition(".")
        role = config.roles[int(number)] if part == "layers" and config.roles else None
        kind = role.kind if role is not None else "window"
        if kind == "window" and not spec.window:  # it would leave nothing out of this context
            kind = "full"
        slots, tail = kv.extent(spec, core.caches, config.max_context)
        yield Layer(
            stage.name, kind, spec.window, slots, core.caches.name,
            stage.follows[0].rpartition(".")[0] if stage.follows else "",
            tuple(n for n in stage.states.values() if n in states and n.startswith(f"{stage.name}.")),
            getattr(core.attend, "thresholds", ()),
            group=getattr(core.caches, "group", 0), tail=tail,
            first=spec.stays, outside=config.attention.spread(int(number)) if part == "layers" else 0.0,
            chosen_by=f"layers.{int(number) - 1}" if stage.routed else "",
        )  # fmt: skip
