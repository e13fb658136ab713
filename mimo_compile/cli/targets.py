"""``mimo-compile targets``: what this machine is, which meters work, which formats have kernels."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mimo_compile.cli.options import need_extra

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console

DESCRIPTION = """\
Describe this machine as the compiler sees it: features, cores, caches, and which energy meters work
(or why not). --formats lists which weight formats have kernels on which target."""
EXAMPLE = """
mimo-compile targets
mimo-compile targets --formats
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "--formats", action="store_true", help="which weight formats have kernels where"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure bandwidths and peaks now (seconds) and keep them",
    )


def run(args: argparse.Namespace) -> int:
    """Print the description; return 0."""
    console: Console = args.console
    from mimo_compile.bench.machine import machine_facts
    from mimo_compile.ir.hardware import CUDA, PRESETS, SIMULATED, resolve_target

    hardware = resolve_target("cpu", args.threads)
    facts = machine_facts(hardware)
    meters = _meters()
    value: dict[str, Any] = {
        "ok": True, "machine": facts, "meters": meters,
        "presets": {n: sorted(h.features) for n, h in PRESETS.items()},
        "gpus": {n: sorted(h.features) for n, h in CUDA.items()}, "gpu": _gpu(),
        "simulated": [{"name": n, "features": sorted(h.features)} for n, h in SIMULATED.items()],
    }  # fmt: skip
    from mimo_compile.search.calibrate import calibrate, load

    rates = calibrate(hardware) if args.calibrate else load(hardware)
    value["calibration"] = None if rates is None else rates.to_json()
    if args.formats:
        need_extra("targets --formats")
        from mimo_compile.cli.formats_table import formats

        paper = {n: h for n, h in SIMULATED.items() if n in ("sim:lut-tensor-core", "sim:roma")}
        value["formats"] = formats({"cpu": hardware, **PRESETS, **CUDA, **paper})
    _show(console, value)
    console.result(value)
    return 0


def _gpu() -> dict[str, Any]:
    """Return the GPU of this machine and its features, or why there is none."""
    from mimo_compile.errors import EnvironmentMismatch
    from mimo_compile.ir.hardware import local_cuda

    try:
        found = local_cuda()
    except EnvironmentMismatch as error:
        return {"name": None, "reason": error.what}
    return {"name": found.name, "features": sorted(found.features), "sms": found.cores}


def _meters() -> list[dict[str, Any]]:
    """Try each meter; without the [compile] extra those that need it say so themselves."""
    from mimo_compile.search.meters import available

    return [{"name": m.name, "usable": m.usable, "reason": m.reason} for m in available()]


def _show(console: Console, value: dict[str, Any]) -> None:
    from mimo_compile.cli.console import size

    facts = value["machine"]
    caches = ", ".join(f"{n} {size(facts[n + '_bytes'])}" for n in ("l1d", "l2", "l3"))
    console.say(f"machine   {facts['name']} (id {facts['id']})")
    console.say(f"threads   {facts['threads']} of {facts['cores']} cores")
    console.say(f"caches    {caches}; memory {size(facts['memory_bytes'])}")
    console.say(f"features  {' '.join(facts['features'])}")
    console.say("versions  " + ", ".join(f"{n} {v}" for n, v in facts["versions"].items()))
    console.say("meters")
    for meter in value["meters"]:
        console.say(
            f"  {meter['name']:<9} {'works' if meter['usable'] else 'no'}: {meter['reason']}"
        )
    rates = value["calibration"]
    if rates is None:
        console.say("rates     not measured yet (--calibrate)")
    else:
        ops = ", ".join(f"{k} {v / 1e9:,.0f} G/s" for k, v in rates["ops_per_s"].items())
        levels = ", ".join(
            f"{k} {v[0] / 1e9:,.0f} (1 thread) to {v[-1] / 1e9:,.0f} GB/s ({len(v)})"
            for k, v in rates["bytes_per_s"].items()
        )
        console.say(f"rates     of one thread: {ops}")
        console.say(f"          {levels}")
    console.say("targets   cpu (this machine), " + ", ".join(value["presets"]))
    gpu = value["gpu"]
    here = f"cuda ({gpu['name']})" if gpu["name"] else gpu["reason"]
    console.say("GPUs      " + ", ".join(value["gpus"]) + "; " + here)
    console.say(
        "          (compiled for without being there: `compile --target`, `inspect --op SPEC --target`)"
    )
    console.say("simulated " + ", ".join(s["name"] for s in value["simulated"]))
    console.say("          (machines on paper: `tune` ranks schedules by modelled time)")
    if "formats" not in value:
        return
    from mimo_compile.cli.formats_table import lines

    console.say()
    for line in lines(value["formats"]):
        console.say(line)
