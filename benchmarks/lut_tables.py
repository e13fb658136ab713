"""What a lookup matmul spends besides looking up: waking threads, quantising x, making its tables.

The parts are kernels of their own that take turns with the whole one. If several matmuls that read the
same x (or what produced x) made the tables once, the others would save the column ``tables``, and with
it the reading of x, no more: ``share`` is that part of the whole.

    python benchmarks/lut_tables.py
    python benchmarks/lut_tables.py mpgemm:m=1,n=1024,k=4096,w=w1g64,a=a8 --threads 2
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from mimo_compile._tvm import empty_aligned, from_numpy, load_object, set_threads
from mimo_compile.bench.contest import Contestant, compete
from mimo_compile.bench.kernels import Pick, contestants
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.base import Arg
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.compile import compile_kernel
from mimo_compile.schedules.emit.build import T, function, loop, store
from mimo_compile.schedules.emit.lut import Tables
from mimo_compile.schedules.emit.quantize import Activations, quantize_row

CELLS = [
    (f"mpgemm:m=1,n={n},k={k},w={w},a=a8", schedule)
    for n, k in ((1024, 4096), (4096, 4096), (11008, 4096))
    for w, schedule in (
        ("w1g64", "mpgemm.x86_lut"), ("w2g64", "mpgemm.x86_lut"), ("w1.58d", "mpgemm.x86_tl2"),
    )
]  # fmt: skip


def parts(problem, lookup, hardware):
    """Return the parts by name, each a call: ``launch``, ``quantise`` and ``both`` (it and the tables)."""
    layout, m, columns = problem.layout, problem.m, problem.layout.k_padded + 16
    entry = "int8" if lookup.signed else "uint8"
    shapes = {
        "codes": ((m, columns), "int8"), "sums": ((m, layout.groups), "int32"),
        "scale": ((m,), "float32"), "low": ((m, 16 * lookup.runs), entry),
        "rest": ((m, 16 * lookup.runs), entry),
        "places": ((m, layout.groups * lookup.parts), "int32"),
        "counts": ((m, layout.groups), "int32"),
        "starts": ((m, layout.groups), "int32"),
    }  # fmt: skip
    out = [Arg(name, "output", *shape) for name, shape in shapes.items()]
    x = Arg("x", "input", (m, problem.k), "float32")

    def emit(tables):
        def body(x, codes, sums, scale, *rest):
            rows = Activations(codes, sums, scale, columns=columns)
            with loop(m) as row:
                quantize_row(layout, x, (row,), rows, row)
                if tables:
                    lookup.build(rows, Tables(*rest), row)

        return body

    def launch(y):
        with loop(2 * hardware.threads, parallel=True) as i:
            store(y, T.float32(0), i, 0)

    values = np.random.default_rng(0).standard_normal((m, problem.k)).astype(np.float32)
    memory = [from_numpy(_aligned(values))]
    memory += [from_numpy(empty_aligned(shape, dtype)) for shape, dtype in shapes.values()]
    line = Arg("y", "output", (2 * hardware.threads, 16), "float32")
    few = [from_numpy(empty_aligned(line.shape))]
    return {
        "launch": (_call("launch", [line], launch, hardware), few),
        "quantise": (_call("quantise", [x, *out], emit(False), hardware), memory),
        "both": (_call("tables", [x, *out], emit(True), hardware), memory),
    }


def _call(name, args, body, hardware):
    kernel = Kernel(name, function(name, args, body), tuple(args), Counts())
    compiled = load_object(compile_kernel(kernel, hardware))[name]
    return lambda arguments: compiled(*arguments)


def _aligned(values):
    out = empty_aligned(values.shape)
    out[...] = values
    return out


def measure(text, name, threads, rounds, cache):
    """Print one line: microseconds of the whole kernel and of its parts."""
    hardware, workload = local_cpu().with_threads(threads), parse_workload(text)
    schedule, op = get_schedule(name), get_op(workload.op)
    config = replace(schedule.space(workload, hardware).default, parallel=threads > 1)
    inputs = op.make_inputs(workload, np.random.default_rng(0))
    pick = Pick(name, schedule.config_to_json(config), "given")
    turns = contestants(workload, hardware, [pick], inputs, [cache], 200 << 20, 4 << 30)
    problem = schedule.problem(workload)
    for part, (call, memory) in parts(problem, schedule.lookup(problem, config), hardware).items():
        turns.append(
            Contestant(text, part, threads, "hot", call, [memory], 0.0, 0.0,
                       prepare=lambda: set_threads(threads))
        )  # fmt: skip
    whole, launch, quantise, both = (row.median_us for row in compete(turns, rounds=rounds))
    tables = both - quantise
    print(
        f"{text} {name} {threads}T {cache}: {whole:.1f} us, of these launch "
        f"{launch if threads > 1 else 0:.1f}, quantise {quantise:.2f}, tables {tables:.2f}; "
        f"share of quantising and tables {100 * both / whole:.1f} %, of tables {100 * tables / whole:.1f} %",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="workloads; default: three shapes at 1 to 2 bits")
    parser.add_argument("--schedule", default="mpgemm.x86_lut", help="of the workloads given")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, local_cpu().cores])
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    for text, name in [(text, args.schedule) for text in args.ops] or CELLS:
        for threads in args.threads:
            for cache in ("hot", "cold"):
                measure(text, name, threads, args.rounds, cache)


if __name__ == "__main__":
    main()
