"""What it costs that keys and values lie in pages of a pool: beside caches of their own, in turn, in one run.

One token of each of several sequences, or a prompt of one. Caches lie in memory (sets of them take turns);
pages follow one another in no order. Figures are CPU time of the busiest thread; ratios are to caches of
their own, pair by pair, medians with [smallest..largest], and of the fastest measurement of each.

    python benchmarks/paged_caches.py                         # four sequences of 4,096 and 32,768 positions
    python benchmarks/paged_caches.py --cap 32768 --tokens 256 --batch 1 --threads 2
"""

from __future__ import annotations

import argparse

import numpy as np
from kv_caches import COLD, drawn
from mpgemm_roof import batch_seconds, calls_of

from mimo_compile._tvm import set_threads
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, pages, parse_workload
from mimo_compile.schedules import schedules_for


def entrant(text, hardware, rng):
    """Return calls of the default kernel of a workload, and the bytes that it must read."""
    workload = parse_workload(text)
    op, p = get_op(workload.op), get_op(workload.op).full(workload)
    schedule = schedules_for(workload, hardware)[0]
    kernel = schedule.lower(workload, schedule.space(workload, hardware).default, hardware)
    places = [(p["cap"] - p["t"], p["t"])] * p["b"]
    arrays = {a.name: drawn(a, p["cap"], rng) for a in kernel.args if a.dtype != "int32"}
    arrays["pos"] = np.array(places if p["b"] > 1 else places[0], np.int32)
    if pages.paged(p):
        arrays[pages.TABLE] = pages.drawn_tables(p, places, rng)
    needed = op.counts(workload).bytes["dram"]
    sets = [
        [arrays[a.name].copy() if a.role == "state" else arrays[a.name] for a in kernel.args]
        for _ in range(max(1, round(COLD / needed)))
    ]
    return calls_of(kernel, sets), needed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="h=32,kv=8,d=128,dv=128")
    parser.add_argument("--cap", type=int, nargs="*", default=[4096, 32768])
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--formats", nargs="*", default=["bf16", "f32"])
    parser.add_argument("--page", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=9, help="measurements of each, alternating")
    args = parser.parse_args()
    hardware, rng = local_cpu().with_threads(args.threads), np.random.default_rng(0)
    set_threads(args.threads)
    for cap in args.cap:
        for c in args.formats:
            text = f"cached_attention:t={args.tokens},{args.heads},cap={cap},c={c},b={args.batch}"
            text += ",even=1" if args.batch > 1 else ""
            field = {"own": entrant(text, hardware, rng)}
            for page in args.page:
                pool = args.batch * pages.pages_of(cap, page)
                field[f"page={page}"] = entrant(f"{text},page={page},pool={pool}", hardware, rng)
            times = [
                {name: batch_seconds(calls) for name, (calls, _) in field.items()}
                for _ in range(args.pairs)
            ]
            for name, (_, needed) in field.items():
                ratio = np.sort([t[name] / t["own"] for t in times])
                us = np.median([t[name] for t in times]) * 1e6
                fastest = min(t[name] for t in times) / min(t["own"] for t in times)
                print(
                    f"{c} {args.batch} x {cap} {name}: {us:.0f} us, {needed / us / 1e3:.1f} GB/s; "
                    f"{np.median(ratio):.3f}x [{ratio[0]:.3f}..{ratio[-1]:.3f}] caches of their own, "
                    f"fastest {fastest:.3f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
