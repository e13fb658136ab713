"""Which algorithm wins where, why, and whether the search finds it.

For each workload and number of threads:

1. every schedule that can compute it is tuned alone, each with the same number of trials;
2. all of them are tuned together, as ``mimo-compile tune`` does it, without knowing what 1. found;
3. the best config of each schedule and the search's pick are timed against each other, batch by batch, with
   weights from memory (cold) and in cache (hot), beside kernels that only read and that only multiply.

The search has found the best algorithm where its pick takes at most 1.05 times as long as the fastest.
Each cell is one line of the output file; cells that are there already are left out, so a run that was
stopped goes on where it was.

    python benchmarks/which_algorithm.py --suite llm:m=1,n=4096,k=4096 --out which.jsonl
    python benchmarks/which_algorithm.py mpgemm:m=16,n=4096,k=4096,w=w4g64,a=a8 --threads 2 --out which.jsonl
    python benchmarks/which_algorithm.py --show --out which.jsonl
    python benchmarks/which_algorithm.py --write --out which.jsonl
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from pages import add_line, read_lines, write_part

from mimo_compile.bench.contest import compete, ratio_of
from mimo_compile.bench.kernels import Pick, contestants
from mimo_compile.bench.machine import machine_facts
from mimo_compile.bench.roof import read_contestant, work_contestant
from mimo_compile.bench.runner import cold_bytes
from mimo_compile.bench.suites import suite
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.search import tune_workloads
from mimo_compile.search.calibrate import device_model
from mimo_compile.search.database import Database
from mimo_compile.search.measure import Measurer

GOAL = 1.05
"""Times the fastest finalist that the search's pick may take."""
MEMORY = 1 << 30
"""Most bytes of one contestant's argument sets."""


def tuned(workload, hardware, measurer, schedules, **budget):
    """Search in a database of its own; return the pick, how many were tried, and seconds taken."""
    with tempfile.TemporaryDirectory() as folder:
        db = Database(Path(folder) / "records.db")
        try:
            result = tune_workloads(
                {workload: 1.0}, hardware, db=db, measurer=measurer, device=measurer.device,
                schedules=schedules, **budget,
            )  # fmt: skip
        finally:
            db.close()
    (found,) = result.workloads
    if found.best is None:
        return None, found.trials, result.seconds
    record = found.best.record
    return Pick(record.schedule, dict(record.config), "measured"), found.trials, result.seconds


def work_class(ops, products):
    """Say what the inner loop does, by the work that a kernel declares."""
    if ops.get("tile_i8") or ops.get("tile_bf16"):
        return "matrix tiles"
    dots = ops.get("dot_i8", 0.0) + ops.get("dot_bf16", 0.0)
    if ops.get("shuffle_u8") and dots + ops.get("fma_f32", 0.0) < 0.9 * products:
        return "lookups of sums"
    if dots >= 0.9 * products:
        return "dot products"
    if ops.get("fma_f32", 0.0) >= 0.9 * products:
        return "multiply-adds"
    return "additions"


def timed(workload, hardware, picks, cache, rounds):
    """Time finalists against each other and the roofs; return their figures, the fastest first."""
    op, n, k, m = get_op(workload.op), *(workload.integer(i) for i in "nkm")
    inputs = op.make_inputs(workload, np.random.default_rng(0))
    counts, limit = op.counts(workload), cold_bytes(hardware)
    entrants = contestants(workload, hardware, picks, inputs, [cache], limit, MEMORY)
    moved = counts.bytes["dram"]
    roofs = [
        read_contestant(str(workload), hardware, moved, cache, limit, MEMORY),
        work_contestant(str(workload), hardware, counts),
    ]
    *rows, read, work = compete([*entrants, *roofs], rounds=rounds)
    bytes_per_us = read.contestant.bytes / read.median_us
    flops_per_us = work.contestant.operations / work.median_us
    fastest = min(rows, key=lambda r: r.median_us)
    figures = []
    for pick, row in zip(picks, rows, strict=True):
        schedule = get_schedule(pick.schedule)
        config = schedule.config_from_json(pick.config)
        ops = schedule.work(workload, config, hardware).ops
        bits = row.contestant.bits_per_weight
        figures.append(
            {
                "schedule": pick.schedule, "config": pick.config, "median_us": row.median_us,
                "p10_us": row.p10_us, "p90_us": row.p90_us, "bits_per_weight": bits,
                "class": work_class(ops, float(m) * n * k), "ops": ops,
                "read_share": bits * n * k / 8 / row.median_us / bytes_per_us,
                "work_share": counts.flops / row.median_us / flops_per_us,
                "from": pick.source, "ratio": ratio_of(row, fastest),
            }
        )  # fmt: skip
    figures.sort(key=lambda f: f["median_us"])
    roof = {
        "read_gb_per_s": bytes_per_us / 1e3, "work_gop_per_s": flops_per_us / 1e3,
        "work": work.contestant.impl.removeprefix("roof: "), "foreign_cores": read.foreign_cores,
    }  # fmt: skip
    return figures, roof


def cell(workload, threads, args):
    """Measure one cell and return its line."""
    begin = time.time()
    hardware = local_cpu().with_threads(threads)
    trials, finalists = {}, []
    with Measurer(hardware, device=device_model(hardware)) as measurer:
        for schedule in schedules_for(workload, hardware):
            pick, trials[schedule.name], _ = tuned(
                workload, hardware, measurer, [schedule], trials=args.trials_each
            )
            if pick is not None:
                finalists.append(Pick(pick.schedule, pick.config, "alone"))
        pick, trials["search"], searched = tuned(
            workload, hardware, measurer, None, seconds=args.search_seconds
        )
    if pick is None:
        raise SystemExit(f"{workload}: the search found nothing that works")
    same = [f for f in finalists if (f.schedule, f.config) == (pick.schedule, pick.config)]
    if not same:
        finalists.append(Pick(pick.schedule, pick.config, "search"))
    states = {}
    for cache in args.caches:
        figures, roof = timed(workload, hardware, finalists, cache, args.rounds)
        found = next(
            f for f in figures if (f["schedule"], f["config"]) == (pick.schedule, pick.config)
        )
        states[cache] = {
            "finalists": figures, **roof, "search": found["schedule"],
            "search_ratio": found["ratio"],
        }  # fmt: skip
    return {
        "op": str(workload), "threads": threads, "states": states, "trials": trials,
        "search_seconds": searched, "seconds": time.time() - begin,
        "machine": machine_facts(hardware)["id"],
    }  # fmt: skip


# -- showing ---------------------------------------------------------------------------------------


def short(name):
    return name.rpartition(".")[2].removeprefix("x86_")


def reason(figure, roof):
    """Say in words what the figures of a finalist say."""
    read, work = figure["read_share"], figure["work_share"]
    bits = f"{figure['bits_per_weight']:.2f} bits a weight"
    if read >= work:
        return f"reads {bits} at {read:.0%} of the read roof, {figure['class']}"
    unit = {"dot": "dot", "tile": "tile"}.get(roof["work"].partition("_")[0], "multiply-add")
    done = "" if figure["class"] == "dot products" else f" by {figure['class']}"
    return f"the products at {work:.0%} of the {unit} peak{done}, {bits}"


def table(lines):
    """Return a Markdown table of all cells, and how many reach the goal."""
    out = [
        "| workload | threads | weights | winner | us | why | next algorithm | search's pick | takes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    reached = total = 0
    for line in lines:
        for cache, state in line["states"].items():
            first, *rest = state["finalists"]
            # the pick may be another config of the winner: the next algorithm is another schedule
            other = next((f for f in rest if f["schedule"] != first["schedule"]), None)
            behind = "none"
            if other is not None:
                ratio = other["median_us"] / first["median_us"]
                behind = f"`{short(other['schedule'])}` {ratio:.2f}x: {reason(other, state)}"
            took, low, high = state["search_ratio"]
            ok = took <= GOAL
            if cache == "cold":  # what the search times
                reached, total = reached + ok, total + 1
            out.append(
                f"| `{line['op'].partition(':')[2]}` | {line['threads']} "
                f"| {'memory' if cache == 'cold' else 'cache'} | `{short(first['schedule'])}` "
                f"| {first['median_us']:.0f} | {reason(first, state)} | {behind} "
                f"| `{short(state['search'])}` | {took:.2f}x, {low:.2f} to {high:.2f}{'' if ok else ' *'} |"
            )
    out.append(
        f"\nThe search's pick is within {GOAL:.2f}x of the fastest in {reached} of {total} cells with "
        "weights from memory, as it times them itself. Ratios are of medians, with p10 and p90 over rounds."
    )
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", help="workloads; or --suite")
    parser.add_argument(
        "--suite", help="a suite of `bench mpgemm`, cut as there: llm:m=1+16,w=w4g64"
    )
    parser.add_argument("--threads", type=int, nargs="*", default=[1, local_cpu().cores])
    parser.add_argument("--caches", nargs="*", default=["cold", "hot"], choices=["cold", "hot"])
    parser.add_argument(
        "--trials-each", type=int, default=16, help="for each schedule tuned alone (16)"
    )
    parser.add_argument(
        "--search-seconds", type=float, default=60.0, help="for all together (60, as in `tune`)"
    )
    parser.add_argument("--rounds", type=int, default=11, help="batches of each finalist (11)")
    parser.add_argument("--out", type=Path, default=Path("which_algorithm.jsonl"))
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    parser.add_argument("--write", action="store_true", help="put the table into docs/lowbit.md")
    args = parser.parse_args()
    lines = read_lines(args.out)
    done = {(line["op"], line["threads"]) for line in lines}
    texts = [*args.ops, *(suite("mpgemm", args.suite) if args.suite else [])]
    for text in texts:
        workload = parse_workload(text)
        for threads in args.threads:
            if (str(workload), threads) in done:
                continue
            line = cell(workload, threads, args)
            add_line(args.out, line)
            lines.append(line)
            cold = line["states"].get("cold") or next(iter(line["states"].values()))
            print(
                f"{workload} {threads}T: {cold['finalists'][0]['schedule']} wins, search picks "
                f"{cold['search']} at {cold['search_ratio'][0]:.2f}x, {line['seconds']:.0f} s",
                flush=True,
            )
    if args.show or not (texts or args.write):
        print(table(lines), end="")
    if args.write:
        write_part("lowbit.md", "which algorithm", table(lines))


if __name__ == "__main__":
    main()
