"""One token's attention with steps of 16, 32, ... slots, in turns: what their default length rests on.

    python benchmarks/attention_steps.py cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=32768,c=bf16

Each config is checked first; caches come from memory. A line has the share of the read roof, and the time
over that of the default: median, p10 and p90 over rounds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from mimo_compile.bench.contest import compete, ratio_of
from mimo_compile.bench.kernels import Pick, contestants
from mimo_compile.bench.oracle import Oracle
from mimo_compile.bench.roof import read_contestant, roof_counts, work_contestant
from mimo_compile.bench.runner import cold_bytes, with_roof
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import schedules_for

MEMORY = 1 << 31
"""Bytes that the copies of a config's arguments may take."""


def compare(text, threads, blocks, rounds):
    """Print how long the default takes with each length of a step."""
    workload, hardware = parse_workload(text), local_cpu().with_threads(threads)
    schedule = schedules_for(workload, hardware)[0]
    space = schedule.space(workload, hardware)
    configs = [c for b in blocks if space.legal(c := replace(space.default, block=b))]
    configs += [space.default] * (space.default not in configs)
    picks = [Pick(schedule.name, schedule.config_to_json(c), "given") for c in configs]
    inputs = get_op(workload.op).make_inputs(workload, np.random.default_rng(0))
    limit, counts = cold_bytes(hardware), roof_counts(workload, inputs)
    moved = counts.bytes["dram"]
    oracle = Oracle(workload, inputs)
    field = contestants(workload, hardware, picks, inputs, ["cold"], limit, MEMORY, oracle)
    field.append(read_contestant(text, hardware, moved, "cold", limit, MEMORY))
    field.append(replace(work_contestant(text, hardware, counts), cache="cold"))
    rows = with_roof(compete(field, rounds=rounds), moved, counts.flops)
    base = rows[configs.index(space.default)]
    print(f"{text}, {threads} threads, {schedule.name}")
    for config, row in zip(configs, rows, strict=False):
        middle, low, high = ratio_of(row, base)
        mark = ", the default" if config == space.default else ""
        print(
            f"  {config.block}{mark}: {row.median_us:.0f} us, {row.roof_us / row.median_us:.0%} of roof, "
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("specs", nargs="+", help="workloads of cached_attention with t=1")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, local_cpu().cores])
    parser.add_argument("--blocks", type=int, nargs="*", default=[16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    for text in args.specs:
        for threads in args.threads:
            compare(text, threads, args.blocks, args.rounds)


if __name__ == "__main__":
    main()
