"""``mimo-compile tune``: measure, learn, store."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.cli.options import (
    add_gates,
    add_model_options,
    joules,
    need_extra,
    positive,
    seconds,
    show_progress,
)
from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console

DESCRIPTION = """\
Search for better kernels of a model, or of one workload: propose, build, verify against the
reference, measure, learn. Each measured candidate is stored at once, so Ctrl-C keeps all of them;
run the same command again to go on where it stopped."""
EXAMPLE = """
mimo-compile tune tiny --quant w4g64a8 --time 1m
mimo-compile tune --op mpgemm:m=1,n=4096,k=4096,w=w4g64,a=a8 --trials 64 --json
mimo-compile tune --op mpgemm:m=16,n=3200,k=3200,w=w1.58,a=a8 --target sim:roma --trials 16
mimo-compile tune --op mpgemm:m=1,n=4096,k=4096,w=w4g128 --target cuda:sm_90a --device-batch batch
mimo-compile tune --run-batch batch
"""
_DEFAULT_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("source", nargs="?", metavar="SRC", help="checkpoint folder, .pt2, or tiny")
    parser.add_argument("--op", metavar="SPEC", help="one workload instead of a model")
    add_model_options(parser)
    add_gates(parser)
    parser.add_argument(
        "--trials",
        type=positive,
        metavar="N",
        help="at most N candidates, those of earlier runs included",
    )
    parser.add_argument(
        "--time", type=seconds, metavar="D", help="at most 90s, 10m, 1h30m (default: 1m)"
    )
    parser.add_argument(
        "--joules", type=joules, metavar="J", help="at most this energy; needs a meter"
    )
    parser.add_argument(
        "--strategy",
        default="evolutionary",
        metavar="NAME",
        help="how candidates are proposed: evolutionary (default), random, grid, or a plug-in's",
    )
    parser.add_argument(
        "--meter",
        default="auto",
        metavar="NAME",
        help="what reads joules: auto (default: where joules decide), nvml, rapl, a plug-in's "
        "(see `targets`), or modelled to read none",
    )
    parser.add_argument(
        "--on",
        metavar="WHERE",
        help="build and measure on a Ray cluster: ray (one of this machine alone), or ray:HOST:PORT "
        "(one that runs, and of which this machine is a node)",
    )
    parser.add_argument(
        "--device-batch",
        type=Path,
        metavar="DIR",
        help="for a GPU that is elsewhere: store the results in DIR and compile the next candidates into it",
    )
    parser.add_argument(
        "--run-batch",
        type=Path,
        metavar="DIR",
        help="run what is left of such a DIR on the GPU of this machine",
    )


def run(args: argparse.Namespace) -> int:
    """Tune and report; return 0 (the caller turns an interruption into 130 or 143)."""
    console: Console = args.console
    if args.run_batch is not None:
        return _run_batch(args, console)
    need_extra("tune")
    if (args.source is None) == (args.op is None):
        raise UsageError(
            "tune needs either SRC or --op SPEC", remedy="See mimo-compile tune --help"
        )
    if args.op is not None and args.quant != "none":
        raise UsageError("--quant goes with SRC; in --op SPEC formats are given by w= and a=")
    if args.op is not None and args.gates is not None:
        raise UsageError("--gates goes with SRC, not with --op SPEC")
    limits = (args.trials, args.time, args.joules)
    if limits == (None, None, None) and args.device_batch is None:
        args.time = _DEFAULT_SECONDS
    from mimo_compile.api import tune
    from mimo_compile.search.database import default_path

    source = args.source
    if args.op is not None:
        from mimo_compile.ir.ops import parse_workload

        source = str(parse_workload(args.op))
    with show_progress(console, tuning=True, limit_s=args.time) as progress:
        result = tune(
            source, target=args.target, quant=args.quant, attention=args.attention,
            objective=args.objective, trials=args.trials, seconds=args.time, joules=args.joules,
            db=args.db, threads=args.threads, seed=args.seed, max_context=args.max_context,
            batch=args.batch, pages=args.pages,
            strategy=args.strategy, meter=args.meter, progress=progress, on=args.on,
            gates=args.gates, device_batch=args.device_batch,
        )  # fmt: skip
    path = args.db or default_path()
    show(console, result)
    if result.failure is not None:
        raise result.failure
    if result.device_batch is not None:
        _tell_batch(console, result.device_batch)
    if result.simulated and args.op is None:
        console.say(f"kernels that {args.target} has no units for are left out")
    console.say(f"records in {path}")
    console.result({"ok": True, "db": path, **result.to_json()})
    return 0


def show(console: Console, result: Any) -> None:
    """Print one line for each workload: default, best, speed-up, schedule."""
    from mimo_compile.cli.console import number, table
    from mimo_compile.cli.energy import NOTE, energy_columns, title

    ranked = sorted(
        result.workloads, key=lambda w: -w.weight * (w.best.latency_us if w.best else 0)
    )
    energies = [w.energy(w.best) if w.best else (None, None) for w in ranked]
    titles, cells = energy_columns(energies)
    lines = []
    for w, mj in zip(ranked, cells, strict=True):
        lines.append(
            (
                str(w.workload), f"{w.new_trials}/{w.trials}",
                number(w.default.latency_us) if w.default else None,
                number(w.best.latency_us) if w.best else None,
                f"{w.speedup:.2f}x" if w.speedup else None,
                *mj,
                w.best.record.schedule if w.best else None,
            )
        )  # fmt: skip
    us = "sim us" if result.simulated else "us"
    header = ("workload", "new/all", f"default {us}", f"best {us}", "speed-up", *titles, "schedule")
    console.say(table(lines, header, right="lrrrr" + "r" * len(titles) + "l"))
    failed: dict[str, int] = {}
    for w in result.workloads:
        for verdict, count in w.verdicts.items():
            if verdict != "ok":
                failed[str(verdict)] = failed.get(str(verdict), 0) + count
    text = ", ".join(f"{n} {v}" for v, n in sorted(failed.items()))
    console.say(
        f"{result.new_trials} candidates {'simulated' if result.simulated else 'measured'} in "
        f"{result.seconds:.0f} s, stopped by {result.stopped}"
        + (f"; rejected: {text}" if text else "")
    )
    if result.workers:
        from mimo_compile.search.farm_runs import TITLES, table_cells

        console.say(
            table(table_cells(result.workers), TITLES, right="ll" + "r" * (len(TITLES) - 2))
        )
        tuner, whole = result.workers[0].tuner_s, result.workers[0].seconds
        console.say(
            f"the farm was open for {whole:.0f} s; for {tuner:.0f} s of it the tuner computed"
        )
    if title(None) in titles:
        console.say(f"{NOTE} (`mimo-compile targets` says why)")
    if result.simulated:
        console.say("all times are simulated: a model's cycles of a machine that does not exist")


def _tell_batch(console: Console, batch: Any) -> None:
    """Say what came back of a device batch, and what is to be done next."""
    if batch.merged:
        console.say(f"results of {batch.merged} units of work were stored")
    if batch.open:
        console.say(
            f"batch {batch.number} in {batch.folder}: {batch.open} of {batch.units} units to be run.\n"
            f"Where the GPU is: mimo-compile tune --run-batch {shlex.quote(batch.folder)}\n"
            "Then bring the folder back, and give this command again"
        )
    else:
        console.say("nothing is left to measure")


def _run_batch(args: argparse.Namespace, console: Console) -> int:
    """Run a device batch; it brings its target, its timing and all else with it."""
    given = {
        "--op": args.op,
        "SRC": args.source,
        "--device-batch": args.device_batch,
        "--on": args.on,
        "--trials": args.trials,
        "--time": args.time,
        "--joules": args.joules,
        "--db": args.db,
    }
    if other := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"--run-batch takes all from its folder, and {other[0]} is given as well")
    from dataclasses import asdict

    from mimo_compile.search.device_batch.runner import run_batch

    done = run_batch(args.run_batch, console.log)
    console.say(
        f"batch {done.number}: {done.new} units were run, {done.open} of {done.units} are left"
        + (f", {done.failed} ended badly" if done.failed else "")
    )
    console.result({"ok": True, "folder": str(args.run_batch), **asdict(done)})
    return 0
