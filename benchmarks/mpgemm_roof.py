"""Matmul kernels beside what memory gives: share of the read roof (M=1) and GOP/s beside torch.

Kernel and roof (a kernel that only reads the same bytes) alternate within one run, hot (one set of
weights) and cold (rotating over sets that exceed the last-level cache), on 1 and more threads.
Figures are CPU time of the busiest thread, so that other work on the machine counts little.

    python benchmarks/mpgemm_roof.py                       # the default list
    python benchmarks/mpgemm_roof.py mpgemm:m=1,n=4096,k=4096,w=w4g64,a=a8 --threads 1
    python benchmarks/mpgemm_roof.py --torch               # M > 1 beside torch's float matmuls
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np

from mimo_compile._tvm import as_aligned, empty_aligned, from_numpy, load_object, set_threads
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.base import Arg
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.compile import compile_kernel

DECODE = [
    f"mpgemm:m=1,n={n},k={k},{w}"
    for n, k in ((4096, 4096), (2048, 8192))
    for w in ("w=w4g64,a=a8", "w=w8,a=a8", "w=w2g64,a=a8", "w=bf16", "w=w4g64")
]
PREFILL = [
    f"mpgemm:m={m},n=4096,k=4096,{w}"
    for m in (64, 256)
    for w in ("w=w4g64,a=a8", "w=w8,a=a8", "w=bf16", "w=f32", "w=w4g64")
]


def busiest_thread_seconds() -> dict[str, float]:
    out = {}
    for task in os.listdir("/proc/self/task"):
        try:
            text = Path(f"/proc/self/task/{task}/schedstat").read_text()
            out[task] = int(text.split()[0]) / 1e9
        except OSError:
            continue
    return out


def batch_seconds(calls, budget=0.05):
    """Seconds of one call, from a batch of at least ``budget`` seconds over all of ``calls``."""
    one = float("inf")
    for i in range(3):
        start = time.perf_counter()
        calls[-1 - i % len(calls)]()
        one = min(one, time.perf_counter() - start)
    number = max(len(calls) if len(calls) > 1 else 1, int(budget / max(one, 1e-7)))
    before = busiest_thread_seconds()
    for i in range(number):
        calls[i % len(calls)]()
    after = busiest_thread_seconds()
    return max(after[t] - before.get(t, 0.0) for t in after) / number


def roof_kernel(nbytes, streams=4, tasks=64):
    """Return a kernel that reads ``nbytes`` and does nothing else, and the shape of its input."""
    from mimo_compile.schedules.emit.build import Register, T, function, load, loop, splat, store

    steps = max(1, nbytes // 64 // streams // tasks)
    shape = (tasks, streams, steps, 16)
    args = (Arg("w", "weight", shape, "int32"), Arg("y", "output", (tasks, 16), "int32"))

    def body(w, y):
        with loop(tasks, parallel=True) as task:
            sums = [Register("int32", 16, splat(T.int32(0), 16)) for _ in range(streams)]
            with loop(steps) as i:
                for s, register in enumerate(sums):
                    register.set(register.get() + load(w, task, s, i, 0, lanes=16))
            total = sums[0].get()
            for register in sums[1:]:
                total = total + register.get()
            store(y, total, task, 0, lanes=16)

    name = f"roof_{nbytes}"
    from mimo_compile.ir.counts import Counts

    return Kernel(name, function(name, args, body), args, Counts()), shape


def calls_of(kernel, sets):
    code = load_object(compile_kernel(kernel, local_cpu()))
    function = code[kernel.name]
    tensors = [[from_numpy(as_aligned(a)) for a in arrays] for arrays in sets]
    return [lambda t=t: function(*t) for t in tensors]


def measure(text, schedule_name, threads, pairs, config=None, cold_bytes=200e6):
    workload, hardware = parse_workload(text), local_cpu()
    op = get_op(workload.op)
    hw = hardware.with_threads(threads)
    schedule = get_schedule(schedule_name) if schedule_name else schedules_for(workload, hw)[0]
    config = config or schedule.space(workload, hw).default
    kernel = schedule.lower(workload, config, hw)
    arrays = op.make_inputs(workload, np.random.default_rng(0))
    roles = {a.name: a.role for a in op.args(workload)}
    weights = {n: a for n, a in arrays.items() if roles[n] == "weight"}
    packed = schedule.pack(workload, config, weights)
    nbytes = sum(a.nbytes for a in packed.values())
    copies = max(2, int(cold_bytes / nbytes) + 1)
    y = empty_aligned(op.args(workload)[-1].shape)

    def one_set(i):
        own = packed if i == 0 else {n: a.copy() for n, a in packed.items()}
        return [own.get(a.name, arrays.get(a.name, y)) for a in kernel.args]

    calls = calls_of(kernel, [one_set(i) for i in range(copies)])
    roof, shape = roof_kernel(nbytes)
    out = np.zeros((64, 16), np.int32)
    roof_calls = calls_of(roof, [[np.ones(shape, np.int32), out] for _ in range(copies)])
    roof_bytes = 4 * int(np.prod(shape))
    set_threads(threads)
    for state, kernels, roofs in (
        ("hot", calls[:1], roof_calls[:1]),
        ("cold", calls, roof_calls),
    ):
        times = [(batch_seconds(kernels), batch_seconds(roofs)) for _ in range(pairs)]
        share = np.sort([(r / roof_bytes) / (t / nbytes) for t, r in times])
        t = float(np.median([t for t, _ in times]))
        work = 2e-9 * np.prod([workload.integer(i) for i in "mnk"]) / t
        print(
            f"{text} {schedule.name} {threads}T {state}: {t * 1e6:.0f} us, "
            f"{nbytes / t / 1e9:.1f} GB/s, {100 * np.median(share):.0f} % of the read roof "
            f"[{100 * share[0]:.0f}..{100 * share[-1]:.0f}], {work:.0f} GOP/s",
            flush=True,
        )


def against_torch(text, threads, pairs):
    import torch

    torch.set_num_threads(threads)
    workload, hw = parse_workload(text), local_cpu().with_threads(threads)
    op = get_op(workload.op)
    m, n, k = (workload.integer(i) for i in "mnk")
    schedule = schedules_for(workload, hw)[0]
    config = schedule.space(workload, hw).default
    kernel = schedule.lower(workload, config, hw)
    arrays = op.make_inputs(workload, np.random.default_rng(0))
    packed = schedule.pack(workload, config, {k: a for k, a in arrays.items() if k != "x"})
    y = empty_aligned((m, n))
    (ours,) = calls_of(kernel, [[{**arrays, **packed, "y": y}[a.name] for a in kernel.args]])
    rivals = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        rivals[str(dtype)] = lambda a=a, b=b: torch.nn.functional.linear(a, b)
    set_threads(threads)
    work = 2e-9 * m * n * k
    rows = []
    for _ in range(pairs):
        rows.append([batch_seconds([f]) for f in (ours, *rivals.values())])
    for name, times in zip((schedule.name, *rivals), np.array(rows).T, strict=True):
        times = np.sort(times)
        print(
            f"{text} {threads}T {name}: {np.median(times) * 1e3:.2f} ms "
            f"[{times[0] * 1e3:.2f}..{times[-1] * 1e3:.2f}], {work / np.median(times):.0f} GOP/s",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="workloads; default: a list for decode")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, local_cpu().cores])
    parser.add_argument("--pairs", type=int, default=5, help="interleaved repetitions")
    parser.add_argument("--schedule", help="default: the first that supports the workload")
    parser.add_argument("--torch", action="store_true", help="M > 1 beside torch")
    args = parser.parse_args()
    for text in args.ops or (PREFILL if args.torch else DECODE):
        for threads in args.threads:
            if args.torch:
                against_torch(text, threads, args.pairs)
            else:
                measure(text, args.schedule, threads, args.pairs)


if __name__ == "__main__":
    main()
