"""One token over KV caches of each format, alternating in one run: what fewer bits save of the time.

Caches hold random codes and lie in memory (sets of them take turns). Figures are CPU time of the busiest
thread; ratios are to the first format, pair by pair, medians with [smallest..largest].

    python benchmarks/kv_caches.py                          # bfloat16 and fewer bits at 32,768 positions
    python benchmarks/kv_caches.py --heads h=32,kv=8,d=64,dv=64 --cap 65536 --threads 2
"""

from __future__ import annotations

import argparse

import numpy as np
from mpgemm_roof import batch_seconds, calls_of

from mimo_compile._tvm import set_threads
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import schedules_for

COLD = 200e6
"""Bytes of all sets together."""


def drawn(arg, cap, rng):
    """Return random contents of a kernel's argument."""
    if arg.name == "pos":
        return np.array([cap - 1, 1], np.int32)
    if arg.dtype == "uint8":
        # powers of two of 8-bit floats stay small
        return rng.integers(96, 144, arg.shape, np.uint8)
    values = rng.standard_normal(arg.shape, np.float32)
    if arg.dtype in ("uint16", "bfloat16"):
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return (np.abs(values) * 0.01).astype(np.float16) if arg.dtype == "float16" else values


def entrant(text, hardware, rng):
    """Return calls of a format's default kernel, the bytes that it must read, and those that it keeps."""
    workload = parse_workload(text)
    schedule = schedules_for(workload, hardware)[0]
    kernel = schedule.lower(workload, schedule.space(workload, hardware).default, hardware)
    arrays = {a.name: drawn(a, workload.integer("cap"), rng) for a in kernel.args}
    states = [a.name for a in kernel.args if a.role == "state"]
    needed = get_op(workload.op).counts(workload).bytes["dram"]
    sets = [
        [arrays[a.name].copy() if a.name in states else arrays[a.name] for a in kernel.args]
        for _ in range(max(2, round(COLD / needed)))
    ]
    return calls_of(kernel, sets), needed, sum(arrays[n].nbytes for n in states)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="h=32,kv=8,d=128,dv=128")
    parser.add_argument("--cap", type=int, default=32768)
    parser.add_argument("--formats", nargs="*", default=["bf16", "e4m3", "i8", "i4", "i2", "i1"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=9, help="measurements of each, alternating")
    args = parser.parse_args()
    hardware, rng = local_cpu().with_threads(args.threads), np.random.default_rng(0)
    field = {
        c: entrant(f"cached_attention:t=1,{args.heads},cap={args.cap},c={c}", hardware, rng)
        for c in args.formats
    }
    set_threads(args.threads)
    times = [
        {c: batch_seconds(calls) for c, (calls, _, _) in field.items()} for _ in range(args.pairs)
    ]
    first = args.formats[0]
    for c, (_, needed, kept) in field.items():
        ratio = np.sort([t[first] / t[c] for t in times])
        us = np.median([t[c] for t in times]) * 1e6
        print(
            f"{c}: {us:.0f} us, {needed / us / 1e3:.1f} GB/s, {kept / 1e6:.1f} MB kept; "
            f"{np.median(ratio):.2f}x [{ratio[0]:.2f}..{ratio[-1]:.2f}] {first}, "
            f"whose bytes are {field[first][1] / needed:.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
