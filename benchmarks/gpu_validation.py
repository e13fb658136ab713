"""The kernels of docs/gpu-validation.md as device batches: prepared without a GPU, run on one, judged here.

::

    python benchmarks/gpu_validation.py batch --target cuda:sm_90a     # prepares, and takes in what came back
    mimo-compile tune --run-batch batch                                # where the GPU is

The first batch has each kernel's default and some configs beside it. When results are back the first command
prints a line for each kernel: the least time predicted, the time measured, the error as a part of its bound.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mimo_compile.cli.inspect_cuda import launches_of
from mimo_compile.ir.hardware import CUDA, Hardware
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules.cuda.nvcc import compile_device
from mimo_compile.search.database import Database
from mimo_compile.search.records import Record
from mimo_compile.search.space import JointSpace
from mimo_compile.search.tune import tune_workloads

WORKLOADS = (
    "kv_append:t=1,h=32,kv=8,d=128,dv=128,cap=4096,rot=128,c=bf16",
    "cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=4096,c=bf16",
    "cached_attention:t=512,h=32,kv=8,d=128,dv=128,cap=4096,c=bf16",
    "sparse_attention:t=1,h=32,kv=8,d=128,dv=128,cap=8192,hs=8,block=64,kmax=32,c=bf16",
    "mpgemm:m=1,n=4096,k=4096,w=w4g128",
    "mpgemm:m=512,n=4096,k=4096,w=bf16,a=abf16",
    "mpgemm:m=512,n=4096,k=4096,w=w8grow,a=a8",
    "mpgemm:m=512,n=4096,k=4096,w=w4g128,a=abf16",
)


def predicted_us(record: Record, hardware: Hardware) -> float:
    """Return the least time of a record's kernel, with the registers that it takes."""
    workload = parse_workload(record.workload)
    space = JointSpace(workload, hardware)
    schedule = space.schedules[record.schedule]
    kernel = schedule.lower(workload, schedule.config_from_json(record.config), hardware)
    return float(launches_of(kernel, hardware, compile_device(kernel, hardware))["predicted_us"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="cuda:sm_90a", choices=CUDA)
    parser.add_argument("--db", type=Path, help="records (default: records.db beside the folder)")
    parser.add_argument("--trials", type=int, default=64, help="candidates in all")
    parser.add_argument("--workload", action="append", help="in the place of the list")
    args = parser.parse_args()
    hardware = CUDA[args.target]
    workloads = {parse_workload(text): 1.0 for text in args.workload or WORKLOADS}
    with Database(args.db or args.folder.with_name("records.db")) as db:
        found = tune_workloads(
            workloads, hardware, trials=args.trials, db=db, device_batch=args.folder
        )
        rows = [r for w in workloads for r in db.records(w, hardware)]
    best: dict[tuple[str, str], Record] = {}
    for r in rows:
        if not r.ok:
            print(f"{r.schedule} {r.workload} {dict(r.config)}: {r.verdict} {r.message}")
        elif r.latency_us is not None:
            known = best.get((r.workload, r.schedule))
            if known is None or r.latency_us < (known.latency_us or 0.0):
                best[r.workload, r.schedule] = r
    for (workload, schedule), r in best.items():
        print(
            f"{schedule} {workload} {dict(r.config)}: predicted {predicted_us(r, hardware):.2f} us at least, "
            f"measured {r.latency_us:.2f} us ({r.p10_us:.2f} to {r.p90_us:.2f}) on {r.device}, error "
            f"{r.error_ratio:.2g} of its bound"
        )
    batch = found.device_batch
    print(
        f"batch {batch.number} in {args.folder}: {batch.open} of {batch.units} units to be run, "
        f"{batch.merged} stored now"
    )


if __name__ == "__main__":
    main()
