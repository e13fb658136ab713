"""From kernel graphs and a plan to an artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from mimo_compile import __version__
from mimo_compile.artifact import Artifact
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.pipeline.emit import Emitter, Lowered
from mimo_compile.pipeline.graphs import DRAFT_STEPS, HEADS, ModelGraphs, within_context
from mimo_compile.pipeline.isolate import Origin, compile_isolated
from mimo_compile.runtime.program import (
    SCHEMA,
    Calibrated,
    Choice,
    Decoder,
    Manifest,
    Programs,
    Target,
)
from mimo_compile.schedules import get_schedule


@dataclass(frozen=True, slots=True)
class Extras:
    """What an artifact carries beside code and weights."""

    quant: str = "none"
    objective: str = "latency"
    config: bytes | None = None
    tokenizer: bytes | None = None
    records: bytes | None = None
    calibrated: Calibrated | None = None


def lower_model(
    model: ModelGraphs, choices: Mapping[Workload, Choice], hardware: Hardware
) -> dict[Workload, Lowered]:
    """Generate the kernel of each workload as chosen."""
    functions = model.functions()
    lowered: dict[Workload, Lowered] = {}
    for workload in model.workloads():
        choice = choices.get(workload)
        if choice is None:
            from mimo_compile.schedules.generic.x86_tir import default_config, lower_tir

            func, name = functions[workload], workload.text("does")
            config = default_config(func)
            kernel = lower_tir(func, f"{name[:40]}_{workload.text('hash')}", config, hardware)
            lowered[workload] = Lowered(kernel)
            continue
        schedule = get_schedule(choice.schedule)
        chosen = schedule.config_from_json(choice.config)
        lowered[workload] = Lowered(schedule.lower(workload, chosen, hardware), schedule, chosen)
    return lowered


def build_artifact(
    model: ModelGraphs, choices: Mapping[Workload, Choice], hardware: Hardware, extras: Extras
) -> Artifact:
    """Lower, compile, lay out: everything but choosing.

    Args:
        model: Entry points as kernel graphs.
        choices: Schedule and config for each dialect workload.
        hardware: What to compile for.
        extras: Other members and the texts that the manifest repeats.

    Raises:
        MimoError: a kernel cannot be compiled; names workload, schedule and config.
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
    plan = [
        _final_choice(w, choices.get(w), lowered[w], calls[w]) for w in sorted(lowered, key=str)
    ]
    manifest = Manifest(
        schema=SCHEMA,
        name=model.name,
        # LLVM may use any feature it was told of, in every function.
        target=Target(
            hardware.kind, hardware.name, tuple(sorted(hardware.features)), hardware.threads
        ),
        versions=built_with(),
        quant=extras.quant,
        objective=extras.objective,
        entries=tuple(entries),
        members={},
        states=emitter.states,
        plan=tuple(plan),
        decoder=_decoder(model),
        modelled=any(c.source == "modelled" for c in plan),
        calibrated=extras.calibrated,
    )
    return Artifact(
        manifest,
        Programs(entries),
        compile_isolated(kernels, origins, hardware),
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


def _final_choice(
    workload: Workload, choice: Choice | None, low: Lowered, calls: dict[str, int]
) -> Choice:
    if choice is None:
        return Choice(str(workload), "generic.x86_tir", {}, low.kernel.name, "default", calls=calls)
    version = None if low.schedule is None else low.schedule.version
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


def _decoder(model: ModelGraphs) -> Decoder | None:
    if model.decoder is None:
        return None
    config = model.decoder.config
    steps = tuple(int(n[5:]) for n in model.entries if n.startswith("step_"))
    return Decoder(
        steps=steps, heads=HEADS, hidden=config.hidden, vocab=config.vocab,
        max_context=config.max_context, eos=tuple(config.eos), bos=config.bos,
        mtp=len(config.mtp), mtp_steps=within_context(DRAFT_STEPS, config.max_context) if config.mtp else (),
        adapters=model.decoder.adapters,
    )  # fmt: skip
