"""``mimo-compile compile``: a model in, an artifact out."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.cli.options import (
    adapters,
    add_adapters,
    add_calibration,
    add_gates,
    add_model_options,
    add_pre_gates,
    add_reproducible,
    calibration,
    check_output,
    need_extra,
    positive,
    seconds,
    show_progress,
)

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.runtime.program import Manifest

DESCRIPTION = """\
Turn a model into an artifact. Without a tuning budget it uses tuning records where there are any
(your own first, then those shipped with the package) and defaults elsewhere, so it always works at
once. With --trials or --time it tunes first; what was measured is kept in the database. Given an artifact
it makes another plan for it, of another objective or newer records, and keeps the weights."""
EXAMPLE = """
mimo-compile compile tiny --quant w4g64a8 -o t.mimo
mimo-compile compile tiny --quant w3g64a8 --calibrate gptq -o t3.mimo
mimo-compile compile path/to/checkpoint --quant w8a8 --time 10m -o model.mimo
mimo-compile compile model.mimo --objective energy@latency:1.05 -o frugal.mimo
mimo-compile compile path/to/checkpoint --quant w4g64a8 --adapter law=path/to/law -o q.mimo
mimo-compile compile path/to/config --shapes-only --target cuda:sm_90a -o shapes.mimo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="checkpoint folder, .gguf file, exported program (.pt2), tiny, or an artifact to plan again",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT.mimo", help="the artifact to write"
    )
    add_model_options(parser)
    add_calibration(parser)
    add_adapters(parser)
    add_gates(parser)
    add_pre_gates(parser)
    add_reproducible(parser)
    parser.add_argument(
        "--shapes-only",
        action="store_true",
        help="read no weights, only config.json: for what a model needs before its weights are there; the "
        "artifact holds zeros, which take no room on disk",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--trials", type=positive, metavar="N", help="tune first: at most N candidates"
    )
    budget.add_argument(
        "--time", type=seconds, metavar="D", help="tune first: at most 90s, 10m, 1h30m"
    )


def run(args: argparse.Namespace) -> int:
    """Compile and save; return 0."""
    need_extra("compile")
    console: Console = args.console
    output = check_output(args.output, ".mimo")
    begin = time.perf_counter()
    from mimo_compile.api import compile as compile_model

    with show_progress(
        console, tuning=args.trials is not None or args.time is not None, limit_s=args.time
    ) as progress:
        artifact = compile_model(
            args.source, target=args.target, quant=args.quant, attention=args.attention,
            objective=args.objective, trials=args.trials, seconds=args.time, db=args.db,
            threads=args.threads, seed=args.seed, max_context=args.max_context, batch=args.batch,
            pages=args.pages, progress=progress,
            calibrate=calibration(args) or "rtn", adapters=adapters(args),
            adapter_format=args.adapter_format, gates=args.gates, reproducible=args.reproducible,
            shapes_only=args.shapes_only, pre_gates=args.pre_gates,
        )  # fmt: skip
        artifact.save(output)
    taken = time.perf_counter() - begin
    facts = {
        "ok": True, "path": output, "bytes": output.stat().st_size, "seconds": taken,
        **summary(artifact.manifest),
    }  # fmt: skip
    _show(console, facts)
    console.result(facts)
    return 0


def summary(manifest: Manifest) -> dict[str, Any]:
    """Return what an artifact is, and where the choices of its plan come from, as plain values."""
    return {
        "name": manifest.name,
        "quant": manifest.quant,
        "attention": manifest.attention,
        "shapes_only": manifest.shapes_only,
        "calibrated": _plain(manifest.calibrated),
        "gates": _plain(manifest.gates),
        "pre_gates": _plain(manifest.pre_gates),
        "objective": manifest.objective,
        "target": {
            "name": manifest.target.name, "features": manifest.target.features,
            "threads": manifest.target.threads,
        },
        "entries": manifest.entries,
        "adapters": manifest.decoder.adapters if manifest.decoder else (),
        "batch": manifest.decoder.batch if manifest.decoder else 1,
        "pages": _pages(manifest),
        "order_costs": manifest.decoder.order_costs if manifest.decoder else {},
        "choices": dict(Counter(c.source for c in manifest.plan)),
        "plan": [plan_row(c) for c in manifest.plan],
    }  # fmt: skip


def _pages(manifest: Manifest) -> dict[str, int] | None:
    """Return how many pages sequences share, of how many positions, and the bytes of all of them."""
    from mimo_compile.runtime.pages import pooled_bytes

    pool = manifest.decoder.pool if manifest.decoder else None
    if pool is None:
        return None
    return {"pages": pool.pages, "page": pool.page, "bytes": pooled_bytes(manifest)}


def _plain(record: Any) -> dict[str, Any] | None:
    """Return a record's fields by name."""
    return None if record is None else {f: getattr(record, f) for f in record.__struct_fields__}


def plan_row(choice: Any) -> dict[str, Any]:
    """Return one choice of a plan as plain values."""
    return {
        "workload": choice.workload, "schedule": choice.schedule,
        "schedule_version": choice.schedule_version, "config": choice.config,
        "kernel": choice.kernel, "source": choice.source, "latency_us": choice.latency_us,
        "energy_mj": choice.energy_mj, "energy_source": choice.energy_source, "calls": choice.calls,
    }  # fmt: skip


def _quant(facts: dict[str, Any]) -> str:
    """Return the formats, and how codes were chosen if not by rounding to the nearest."""
    record = facts["calibrated"]
    return str(facts["quant"]) + (f" by {record['method']}" if record else "")


def _show(console: Console, facts: dict[str, Any]) -> None:
    from mimo_compile.cli.console import size

    chosen = ", ".join(f"{n} {source}" for source, n in sorted(facts["choices"].items()))
    how = "" if facts["attention"] == "model" else f", attention {facts['attention']}"
    console.say(f"{facts['path']}: {facts['name']}, {_quant(facts)}{how}, {size(facts['bytes'])}")
    console.say(f"  entries  {', '.join(facts['entries'])}")
    if facts["shapes_only"]:
        console.say("  weights  none were read (--shapes-only): zeros, which take no room on disk")
    console.say(f"  kernels  {len(facts['plan'])} ({chosen})")
    if costs := facts["order_costs"]:
        shown = ", ".join(f"{entry} {100 * cost:+.1f} %" for entry, cost in costs.items())
        console.say(f"  order    one order of sums costs {shown} (by the records of the plan)")
    if facts["adapters"]:
        console.say(f"  adapters {', '.join(facts['adapters'])}")
    if pages := facts["pages"]:
        console.say(
            f"  pages    {pages['pages']} of {pages['page']} positions, {size(pages['bytes'])}"
        )
    console.say(f"  target   {facts['target']['name']}, {facts['target']['threads']} threads")
    console.say(f"compiled in {facts['seconds']:.1f} s")
    if facts["choices"].get("default") and not facts["choices"].get("measured"):
        console.log("no tuning records for these kernels: `mimo-compile tune` makes them")
