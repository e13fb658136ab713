"""Sparse attention beside our own dense attention: how much of the ratio of bytes becomes speed.

Decode of one token with lists of a share of the keys, at random, one for each KV head (or ``--lists``).
Dense and sparse calls alternate within one run over the same caches, which exceed the last-level cache;
sparse calls rotate over several lists, so that together they read all of the caches. Figures are CPU time
of the busiest thread, medians with [smallest..largest]; the selector is not part of them. *share* is the
speed-up over dense attention as a part of the ratio of the bytes that each must read.

    python benchmarks/sparse_attention.py                        # blocks of 16 to 128, and single tokens
    python benchmarks/sparse_attention.py --heads h=32,kv=4,d=192,dv=128 --blocks 64 --threads 1
    python benchmarks/sparse_attention.py --blocks 64 --config block=64,ahead=2
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
from mpgemm_roof import batch_seconds, calls_of

from mimo_compile._tvm import as_aligned, set_threads
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import schedules_for

HEADS = ("h=32,kv=8,d=128,dv=128", "h=32,kv=8,d=64,dv=64", "h=32,kv=4,d=192,dv=128")
BLOCKS = ("16", "32", "64", "128", "tokens", "tokens-in-blocks")
LISTS = 12
"""Lists to rotate over."""


def workloads(heads, block, cap, share, c, lists):
    """Return the workloads of sparse attention, and of dense attention over the same caches."""
    size = 1 if block.startswith("tokens") else int(block)
    lay = ",lay=rows" if block == "tokens" else ""
    every, kv = (heads.split(f"{n}=")[1].split(",")[0] for n in ("h", "kv"))
    hs = {"kv": kv, "all": "1", "head": every}[lists]
    kmax = max(1, round(cap * share / size))
    sparse = f"sparse_attention:t=1,{heads},cap={cap},hs={hs},block={size},kmax={kmax},c={c}{lay}"
    return parse_workload(sparse), parse_workload(f"cached_attention:t=1,{heads},cap={cap},c={c}")


def caches(workload, rng):
    """Return packed caches of random numbers for the preferred schedule, and that schedule."""
    schedule = schedules_for(workload, local_cpu())[0]
    config = schedule.space(workload, local_cpu()).default
    out = {}
    for arg in schedule.lower(workload, config, local_cpu()).args:
        if arg.role == "state":
            kind = np.uint16 if arg.dtype in ("uint16", "bfloat16") else np.float32
            values = rng.random(arg.shape, dtype=np.float32) - np.float32(0.5)
            if kind is np.uint16:
                values = (values.view(np.uint32) >> 16).astype(np.uint16)
            out[arg.name] = as_aligned(values)
    return out, schedule


def listed(p, rng):
    """Return the arrays of one draw of lists."""
    blocks = -(-p["cap"] // p["block"])
    rows = [np.sort(rng.permutation(blocks)[: p["kmax"]]) for _ in range(p["hs"])]
    idx = np.stack(rows)[None].astype(np.int32)
    return {"idx": idx, "cnt": np.full(idx.shape[:2], p["kmax"], np.int32)}


def calls(workload, schedule, config, held, hardware, rng):
    """Return a call for each draw of lists (one without lists)."""
    op = get_op(workload.op)
    p = op.full(workload)
    kernel = schedule.lower(workload, config, hardware)
    shared = {
        "q": rng.standard_normal((1, p["h"], p["d"]), dtype=np.float32),
        "pos": np.array([p["cap"] - 1, 1], np.int32),
        "out": np.zeros((1, p["h"], p["dv"]), np.float32),
        "lse": np.zeros((1, p["h"]), np.float32),
        **held,
    }
    draws = [listed(p, rng) for _ in range(LISTS)] if "hs" in p else [{}]
    return calls_of(kernel, [[{**shared, **d}[a.name] for a in kernel.args] for d in draws])


def changed(default, text):
    """Return a config with some knobs changed: ``name=value,...``."""
    values = {}
    for item in filter(None, (text or "").split(",")):
        name, _, value = item.partition("=")
        kind = type(getattr(default, name))
        values[name] = value == "1" if kind is bool else kind(value)
    return dataclasses.replace(default, **values)


def compare(heads, block, args, threads):
    """Print one line."""
    hardware, rng = local_cpu().with_threads(threads), np.random.default_rng(0)
    sparse, dense = workloads(heads, block, args.cap, args.share, args.c, args.lists)
    set_threads(threads)
    times, found = [], []
    for workload, text in ((sparse, args.config), (dense, args.dense)):
        held, schedule = caches(workload, np.random.default_rng(1))
        config = changed(schedule.space(workload, hardware).default, text)
        found.append((schedule, config, calls(workload, schedule, config, held, hardware, rng)))
    for _ in range(args.pairs):
        times.append([batch_seconds(c, args.budget) for _, _, c in found])
    ours, theirs = np.array(times).T
    moved = [get_op(w.op).counts(w).bytes["dram"] for w in (sparse, dense)]
    most, speed = moved[1] / moved[0], np.sort(theirs / ours)
    mid = float(np.median(speed))
    print(
        f"{sparse} {threads}T {found[0][1]}: {np.median(ours) * 1e6:.0f} us "
        f"({moved[0] / np.median(ours) / 1e9:.1f} GB/s), dense {np.median(theirs) * 1e6:.0f} us "
        f"({moved[1] / np.median(theirs) / 1e9:.1f} GB/s): {mid:.2f}x [{speed[0]:.2f}..{speed[-1]:.2f}] of "
        f"{most:.2f}x, share {100 * mid / most:.0f} % [{100 * speed[0] / most:.0f}.."
        f"{100 * speed[-1] / most:.0f}]",
        flush=True,
    )


def main():
    """Run the comparisons that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="*", default=HEADS, help="h=,kv=,d=,dv=")
    parser.add_argument(
        "--blocks", nargs="*", default=BLOCKS,
        help="sizes; tokens (caches in rows), tokens-in-blocks (caches in blocks of 16)",
    )  # fmt: skip
    parser.add_argument("--cap", type=int, default=65536, help="keys in the cache")
    parser.add_argument("--share", type=float, default=0.1, help="part of the keys that is listed")
    parser.add_argument("--lists", default="kv", choices=("kv", "all", "head"))
    parser.add_argument("--c", default="bf16", choices=("f32", "bf16"), help="format of the caches")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, local_cpu().cores])
    parser.add_argument("--pairs", type=int, default=7, help="measurements of each, alternating")
    parser.add_argument("--budget", type=float, default=0.05, help="seconds of one measurement")
    parser.add_argument("--config", help="name=value,... that differ from the default config")
    parser.add_argument("--dense", help="the same for dense attention")
    args = parser.parse_args()
    for heads in args.heads:
        for block in args.blocks:
            for threads in args.threads:
                compare(heads, block, args, threads)


if __name__ == "__main__":
    main()
