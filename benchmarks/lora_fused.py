"""QLoRA: what an adapter adds to a matmul, fused in one kernel and as kernels of its own.

The plain matmul, each fusion, and the unfused way (W x, A x, B t by three kernels, then a sum) alternate in
one run over the same weights, hot and cold; figures are CPU time of the busiest thread, and the median of
ratios to the plain matmul of the same round.

    python benchmarks/lora_fused.py                                # 4096 x 4096, r=16, 2 and 4 bits
    python benchmarks/lora_fused.py lora_mpgemm:m=4,n=4096,k=4096,w=w4g64,a=a8,r=16,l=4 --threads 1
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
from mpgemm_roof import batch_seconds

from mimo_compile._tvm import as_aligned, empty_aligned, from_numpy, load_object, set_threads
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import schedules_for
from mimo_compile.schedules.compile import compile_kernel

DEFAULT = [
    f"lora_mpgemm:m=1,n=4096,k=4096,w={w},a=a8,r=16,d={d}"
    for w in ("w2g64", "w4g64")
    for d in ("fp8", "bf16")
]


def loaded(schedule, workload, config, hardware):
    kernel = schedule.lower(workload, config, hardware)
    return kernel, load_object(compile_kernel(kernel, hardware))[kernel.name]


def bound_calls(kernel, function, sets):
    bound = [[from_numpy(arrays[a.name]) for a in kernel.args] for arrays in sets]
    return [lambda t=t: function(*t) for t in bound]


def small(x, weight, y, copies, hardware):
    """Return calls of ``y = weight x`` with bf16 weights, one for each set."""
    (m, k), n = x.shape, weight.shape[0]
    workload = parse_workload(f"mpgemm:m={m},n={n},k={k},w=bf16")
    (schedule,) = schedules_for(workload, hardware)
    config = schedule.space(workload, hardware).default
    packed = schedule.pack(workload, config, {"w": weight})
    kernel, function = loaded(schedule, workload, config, hardware)
    sets = [{"x": x, "y": y, "w": as_aligned(packed["w"].copy())} for _ in range(copies)]
    return bound_calls(kernel, function, sets)


def measure(text, threads, rounds, cold_bytes):
    workload, hardware = parse_workload(text), local_cpu().with_threads(threads)
    op = get_op(workload.op)
    schedule = schedules_for(workload, hardware)[0]
    default = schedule.space(workload, hardware).default
    arrays = {
        n: as_aligned(a) for n, a in op.make_inputs(workload, np.random.default_rng(0)).items()
    }
    weights = {n: a for n, a in arrays.items() if n not in ("x", "adapter")}
    packed = schedule.pack(workload, default, weights)
    size = sum(a.nbytes for a in packed.values())
    copies = max(2, int(cold_bytes / size) + 1)
    y = empty_aligned(op.args(workload)[-1].shape)
    sets = [
        {"x": arrays["x"], "adapter": arrays["adapter"], "y": y}
        | {n: as_aligned(a.copy()) for n, a in packed.items()}
        for _ in range(copies)
    ]
    ways = {}
    plain = schedule.plain(workload)
    fields = {f.name for f in dataclasses.fields(schedule.base.config)}
    values = {k: v for k, v in dataclasses.asdict(default).items() if k in fields}
    kernel, function = loaded(schedule.base(), plain, schedule.base.config(**values), hardware)
    ways["plain"] = bound_calls(kernel, function, sets)
    for fusion in schedule.fusions(workload):
        if fusion == "shared" and not default.parallel:
            continue
        variants = [("", default)]
        if fusion == "tile":  # one task for each thread, or nearly: fewest repetitions
            variants = [(" chunk 8", dataclasses.replace(default, chunk=8))]
        for name, config in variants:
            config = dataclasses.replace(config, fusion=fusion)
            ways[fusion + name] = bound_calls(*loaded(schedule, workload, config, hardware), sets)
    p = op.full(workload)
    rng = np.random.default_rng(1)
    bits = [
        rng.integers(0, 1 << 16, s, dtype=np.uint16) & 0x3FFF
        for s in ((p["r"], p["k"]), (p["n"], p["r"]))
    ]
    t, added = empty_aligned((p["m"], p["r"])), empty_aligned((p["m"], p["n"]))
    inner = small(arrays["x"], bits[0], t, copies, hardware)
    outer = small(t, bits[1], added, copies, hardware)

    def unfused(base, a, b):
        def run():
            base()
            a()
            b()
            np.add(y, added, out=y)

        return run

    ways["unfused"] = [unfused(*c) for c in zip(ways["plain"], inner, outer, strict=True)]
    set_threads(threads)
    for cache in ("hot", "cold"):
        times = {name: [] for name in ways}
        for i in range(rounds):
            order = list(ways)
            for name in order[i % len(order) :] + order[: i % len(order)]:
                calls = ways[name]
                times[name].append(batch_seconds(calls[:1] if cache == "hot" else calls, 0.03))
        base = np.array(times["plain"])
        parts = [f"plain {np.median(base) * 1e6:.1f} us"]
        for name in list(ways)[1:]:
            ratio = np.array(times[name]) / base
            low, mid, high = np.quantile(ratio, (0.25, 0.5, 0.75))
            parts.append(f"{name} {mid:.3f} [{low:.3f}..{high:.3f}]")
        print(f"{text} {schedule.name} {threads}T {cache}: " + ", ".join(parts), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=DEFAULT)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold-bytes", type=float, default=160e6)
    args = parser.parse_args()
    for text in args.workloads:
        for threads in args.threads:
            measure(text, threads, args.rounds, args.cold_bytes)


if __name__ == "__main__":
    main()
