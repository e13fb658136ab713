"""What choosing costs beside attending: kernels that describe, score and select, and dense attention.

Every kernel with its default config, interleaved with dense attention of the same shape, which also drives
what they read out of the caches. Times include a call from Python; `empty` is the smallest such call.

    python benchmarks/sparse_selectors.py                 # 65,536 keys, 8 KV heads, bfloat16 caches
    python benchmarks/sparse_selectors.py --length 32768 --format f32 --threads 1 --json
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from mimo_compile._tvm import empty_aligned, from_numpy, load_object, set_threads
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import schedules_for
from mimo_compile.schedules.compile import compile_kernel

SHAPE = "t=1,h=32,kv=8,d=128,cap={n}"
ROWS = {
    "dense": "cached_attention:" + SHAPE + ",dv=128,c={c}",
    "empty": "select_blocks:t=1,hs=1,cap=16,block=1,k=2",
    "describe bounds 16": "describe_blocks:t=1,kv=8,d=128,cap={n},kind=bounds,size=16,whole=1,c={c},e={c}",
    "quest 16": "score_blocks:" + SHAPE + ",kind=quest,agg=max,block=16,e={c}",
    "select 10 % of blocks of 16": "select_blocks:t=1,hs=8,cap={n},block=16,share=0.1",
    "quest 64": "score_blocks:" + SHAPE + ",kind=quest,agg=max,block=64,e={c}",
    "gate 64": "score_blocks:" + SHAPE + ",kind=gate,block=64,e={c}",
    "select 10 % of blocks of 64": "select_blocks:t=1,hs=8,cap={n},block=64,share=0.1",
    "logits": "score_keys:" + SHAPE + ",kind=logits,c={c}",
    "select ranks of 2048": "select_blocks:t=1,hs=32,cap={n},block=1,k=2048,first=4,last=508,merge=rank",
    "oracle 64": "score_keys:" + SHAPE + ",kind=oracle,agg=max,block=64,c={c}",
    "8 channels": "score_keys:" + SHAPE + ",kind=channels,agg=mean,channels=8,c={c}",
    "indexer": "score_blocks:t=1,h=64,kv=1,d=128,cap={n},kind=indexer,agg=sum,block=1,e={c}",
    "select 2048 tokens": "select_blocks:t=1,hs=1,cap={n},block=1,k=2048",
}  # fmt: skip


class Timed:
    """One kernel on memory of its own."""

    def __init__(self, text, hardware, values):
        workload = parse_workload(text)
        op, schedule = get_op(workload.op), schedules_for(workload, hardware)[0]
        kernel = schedule.lower(workload, schedule.space(workload, hardware).default, hardware)
        p = op.full(workload)
        self.bytes = op.counts(workload).bytes["dram"]
        self.call, self.seconds = load_object(compile_kernel(kernel, hardware))[kernel.name], []
        self.memory = [filled(a.shape, a.dtype, values) for a in kernel.args]
        for arg, array in zip(kernel.args, self.memory, strict=True):
            if arg.name == "pos":
                array[:] = [p["cap"] - p["t"], p["t"]]
        self.tensors = [from_numpy(a) for a in self.memory]

    def run(self):
        start = time.perf_counter()
        self.call(*self.tensors)
        self.seconds.append(time.perf_counter() - start)


def filled(shape, dtype, values):
    """Return an aligned array of normal numbers, or zeros."""
    kind = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    out = empty_aligned(int(np.prod(shape)) * kind.itemsize, "uint8").view(kind)
    source = values if kind == np.float32 else (values.view(np.uint32) >> 16).astype(np.uint16)
    if kind == np.int32:
        out[:] = 0
    else:
        for at in range(0, len(out), len(source)):
            out[at : at + len(source)] = source[: len(out) - at]
    return out.reshape(shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--format", choices=("f32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    hardware = local_cpu().with_threads(args.threads)
    set_threads(hardware.threads)
    values = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)
    made = {
        name: Timed(text.format(n=args.length, c=args.format), hardware, values)
        for name, text in ROWS.items()
    }
    dense = made["dense"]
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end:
        for one in made.values():
            dense.run()
            if one is not dense:
                one.run()
    rows = []
    for name, one in made.items():
        low, middle, high = (1e6 * np.percentile(one.seconds[1:], q) for q in (10, 50, 90))
        base = 1e6 * np.percentile(dense.seconds[1:], 10)
        rows.append({
            "kernel": name, "p10_us": low, "median_us": middle, "p90_us": high,
            "time_ratio": low / base, "byte_ratio": one.bytes / dense.bytes,
        })  # fmt: skip
    if args.json:
        print(json.dumps({"machine": hardware.id, "threads": hardware.threads, "rows": rows}))
        return
    print(f"{hardware.name}, {hardware.threads} threads, {args.length} keys, {args.format}")
    for r in rows:
        print(
            f"{r['kernel']:28} {r['p10_us']:9.1f} {r['median_us']:9.1f} {r['p90_us']:9.1f} us"
            f"  time {r['time_ratio']:7.4f}  bytes {r['byte_ratio']:7.4f} of dense"
        )


if __name__ == "__main__":
    main()
