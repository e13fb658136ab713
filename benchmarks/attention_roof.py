"""Cached attention beside what memory gives and beside torch's scaled_dot_product_attention.

Decode: share of the read roof, a kernel that only reads the same bytes, alternating with it in one run
over caches that exceed the last-level cache. Prefill: GFLOP/s beside torch float32, causal. Figures are
CPU time of the busiest thread, medians with [smallest..largest] share.

    python benchmarks/attention_roof.py                    # the default list, 1 and all threads
    python benchmarks/attention_roof.py cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=8192 --threads 1
    python benchmarks/attention_roof.py SPEC --config tile=1,block=128,splits=4,rows=4,parallel=1
"""

from __future__ import annotations

import argparse

import numpy as np
from mpgemm_roof import batch_seconds, calls_of, roof_kernel

from mimo_compile._tvm import set_threads
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule

HEADS = "h=32,kv=8,d=128,dv=128"
DECODE = [f"cached_attention:t=1,{HEADS},cap={n}" for n in (4096, 32768)]
PREFILL = [f"cached_attention:t=256,{HEADS},cap={n}" for n in (256, 4096)]
SCHEDULE = get_schedule("cached_attention.x86_flash")


def kernel_calls(workload, config, hardware, copies):
    op = get_op(workload.op)
    kernel = SCHEDULE.lower(workload, config, hardware)
    arrays = op.make_inputs(workload, np.random.default_rng(0))
    states = {a.name: arrays[a.name] for a in op.args(workload) if a.role in ("weight", "state")}
    arrays |= SCHEDULE.pack(workload, config, states)
    arrays["out"] = np.zeros(kernel.args[-1].shape, np.float32)

    def one_set(i):
        return [arrays[a.name].copy() if a.role == "state" else arrays[a.name] for a in kernel.args]

    return kernel, arrays, calls_of(kernel, [one_set(i) for i in range(copies)])


def decode(text, config, threads, pairs):
    workload = parse_workload(text)
    hardware = local_cpu().with_threads(threads)
    config = config or SCHEDULE.space(workload, hardware).default
    nbytes = int(get_op(workload.op).counts(workload).bytes["dram"])
    copies = max(1, round(200e6 / nbytes))
    _, _, calls = kernel_calls(workload, config, hardware, copies)
    roof, shape = roof_kernel(nbytes)
    out = np.zeros((64, 16), np.int32)
    roofs = calls_of(roof, [[np.ones(shape, np.int32), out] for _ in range(copies)])
    roof_bytes = 4 * int(np.prod(shape))
    set_threads(threads)
    times = [(batch_seconds(calls), batch_seconds(roofs)) for _ in range(pairs)]
    share = np.sort([(r / roof_bytes) / (t / nbytes) for t, r in times]) * 100
    t = float(np.median([t for t, _ in times]))
    print(
        f"{text} {threads}T {config}: {t * 1e6:.0f} us, {nbytes / t / 1e9:.1f} GB/s, "
        f"{np.median(share):.0f} % of the read roof [{share[0]:.0f}..{share[-1]:.0f}]",
        flush=True,
    )


def prefill(text, config, threads, pairs):
    import torch

    torch.set_num_threads(threads)
    workload = parse_workload(text)
    hardware = local_cpu().with_threads(threads)
    config = config or SCHEDULE.space(workload, hardware).default
    op = get_op(workload.op)
    _, arrays, calls = kernel_calls(workload, config, hardware, 1)
    arrays = op.make_inputs(workload, np.random.default_rng(0))
    p = op.full(workload)
    q, k, v = (
        torch.from_numpy(arrays[n]).transpose(0, 1)[None].contiguous()
        for n in ("q", "k_cache", "v_cache")
    )
    causal = torch.ones(p["t"], p["cap"], dtype=torch.bool).tril(p["cap"] - p["t"])
    square = p["t"] == p["cap"]

    def peer():
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, None if square else causal, is_causal=square, enable_gqa=True
        )

    set_threads(threads)
    work = 2e-9 * op.counts(workload).ops["fma_f32"]
    with torch.inference_mode():
        times = [(batch_seconds(calls), batch_seconds([peer])) for _ in range(pairs)]
    ours, theirs = (np.sort([t[i] for t in times]) for i in (0, 1))
    ratio = np.sort([b / a for a, b in times])
    print(
        f"{text} {threads}T {config}: {np.median(ours) * 1e3:.2f} ms "
        f"[{ours[0] * 1e3:.2f}..{ours[-1] * 1e3:.2f}], {work / np.median(ours):.0f} GFLOP/s; torch "
        f"{torch.__version__} sdpa {np.median(theirs) * 1e3:.2f} ms [{theirs[0] * 1e3:.2f}.."
        f"{theirs[-1] * 1e3:.2f}]; {np.median(ratio):.2f}x [{ratio[0]:.2f}..{ratio[-1]:.2f}]",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="*", default=DECODE + PREFILL)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, local_cpu().cores])
    parser.add_argument("--pairs", type=int, default=7, help="measurements of each, alternating")
    parser.add_argument("--config", help="name=value,... instead of the default config")
    args = parser.parse_args()
    config = None
    if args.config:
        values = {k: int(v) for k, v in (item.split("=") for item in args.config.split(","))}
        config = SCHEDULE.config(**{**values, "parallel": bool(values["parallel"])})
    for text in args.specs:
        one = parse_workload(text).integer("t") == 1
        for threads in args.threads:
            (decode if one else prefill)(text, config, threads, args.pairs)


if __name__ == "__main__":
    main()
