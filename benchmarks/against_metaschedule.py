"""Five kernels, the same minutes for both: our search, and TVM MetaSchedule's `tune_tir`.

For each kernel both sides search one after the other, who begins alternates; each in a process group of its
own, on the same threads, from nothing (no records, no model of other shapes), timing with operands in cache.
Then what they found is checked against the op's reference and timed in turns, batch by batch: our pick, and
MetaSchedule's best three by its own clock, of which the fastest counts.

MetaSchedule gets spaces written by hand (`metaschedule_spaces.py`) and help to start at all
(`metaschedule_tune.py`). Each search and each contest is a line of the output file; those that are there
already are left out, so a run that was stopped goes on where it was.

    python benchmarks/against_metaschedule.py --out against.jsonl          # about 55 minutes, quiet machine
    python benchmarks/against_metaschedule.py --out against.jsonl --show
    python benchmarks/against_metaschedule.py --out against.jsonl --write  # -> docs/search-quality.md
    python benchmarks/against_metaschedule.py --out smoke.jsonl --smoke --seconds 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from metaschedule_table import INTEGER, SIDES, table
from pages import add_line, read_lines, write_part

HERE = Path(__file__).resolve().parent
PAGE = "search-quality.md"
KERNELS = ("matmul_f32", "gemm_int8", "gemv_w4", "gemm_w4", "gemm_f32")
FINALISTS = 3
"""Candidates of MetaSchedule's in a contest: the best of single readings is mostly a lucky one."""
GRACE = 300.0
"""Seconds that a job may take beyond its search: start, calibration, compiling, the last batch."""


# -- jobs: each in a process group of its own ------------------------------------------------------


def search_ours(case, hardware, job):
    """Search as `mimo-compile tune` does, in an empty database."""
    from metaschedule_spaces import SharedSketches

    from mimo_compile.ir.ops import parse_workload
    from mimo_compile.search import tune_workloads
    from mimo_compile.search.calibrate import device_model
    from mimo_compile.search.database import Database
    from mimo_compile.search.measure import Timing

    device = device_model(hardware)  # measured once for a machine
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Database(Path(folder) / "records.db") as db:
        result = tune_workloads(
            {parse_workload(case.op): 1.0}, hardware, db=db, seconds=job["seconds"],
            schedules=[SharedSketches()] if case.shared else None, timing=Timing(cache="hot"),
            device=device, warm_start=False, seed=job["seed"],
        )  # fmt: skip
    (found,) = result.workloads
    best = []
    if found.best is not None:
        record = found.best.record
        best = [{"us": record.latency_us, "schedule": record.schedule, "config": record.config}]
    verdicts = dict(found.verdicts)
    return {
        "took": time.monotonic() - begin, "trials": found.trials, "ok": verdicts.pop("ok", 0),
        "errors": verdicts, "stopped": result.stopped, "best": best,
    }  # fmt: skip


def search_metaschedule(case, hardware, job):
    """Search with `tune_tir`."""
    from metaschedule_integer import register_intrinsics
    from metaschedule_tune import as_json, search

    register_intrinsics()
    small = {"batch": 8, "population": 16, "least": 1} if job["smoke"] else {}
    found = search(case.func(), case.space, hardware, job["seconds"], job["seed"], **small)
    best = [
        {"us": seconds * 1e6, "trace": as_json(trace)} for seconds, trace in found.best(FINALISTS)
    ]
    return {
        "took": found.seconds, "trials": len(found.timed) + sum(found.errors.values()),
        "ok": len(found.timed), "errors": dict(found.errors.most_common(5)),
        "stopped": "seconds" if found.over else "exhausted", "rounds": found.rounds, "best": best,
    }  # fmt: skip


class Theirs:
    """A kernel of MetaSchedule's, on arguments in memory."""

    def __init__(self, case, trace, inputs, shape, hardware):
        from metaschedule_tune import replayed

        from mimo_compile import _tvm
        from mimo_compile.ir.counts import Counts
        from mimo_compile.schedules.base import Kernel
        from mimo_compile.schedules.compile import compile_kernel
        from mimo_compile.search.measure.buffers import as_tensor

        func = replayed(case.func(), trace)
        kernel = Kernel("metaschedule", func, (), Counts())
        self.code = _tvm.load_object(compile_kernel(kernel, hardware))
        self.function = self.code[kernel.name]
        arrays = [_tvm.as_aligned(np.ascontiguousarray(a)) for a in case.arrange(inputs)]
        self.y = _tvm.empty_aligned(shape, "float32")
        self.y.view(np.uint8)[...] = 0xFF
        out = self.y.reshape([int(n) for n in func.params[-1].shape])
        self.tensors = tuple(as_tensor(a, a.dtype.name) for a in (*arrays, out))

    def __call__(self, tensors):
        self.function(*tensors)


def contest(case, hardware, job):
    """Check what was found and time it in turns."""
    from metaschedule_integer import register_intrinsics
    from metaschedule_spaces import SharedSketches

    from mimo_compile import _tvm
    from mimo_compile.bench.contest import Contestant, compete, ratio_of
    from mimo_compile.bench.runnable import Runnable
    from mimo_compile.ir.ops import get_op, parse_workload
    from mimo_compile.schedules import get_schedule
    from mimo_compile.search.measure.verify import judge

    register_intrinsics()
    workload = parse_workload(case.op)
    op = get_op(workload.op)
    inputs = op.make_inputs(workload, np.random.default_rng(job["seed"]))
    expected = op.reference(workload, inputs)
    bound = op.bound(workload, inputs, expected)
    counts = op.counts(workload)

    def contestant(impl, call):
        return Contestant(
            case.op, impl, hardware.threads, "hot", call, [call.tensors],
            counts.bytes.get("dram", 0.0), counts.flops,
            prepare=lambda: _tvm.set_threads(hardware.threads),
        )  # fmt: skip

    (ours,) = job["ours"]
    schedule = (
        SharedSketches()
        if ours["schedule"] == SharedSketches.name
        else get_schedule(ours["schedule"])
    )
    _tvm.set_threads(hardware.threads)
    runnable = Runnable(workload, schedule, ours["config"], hardware, inputs)
    error = {"ours": runnable.check()}
    entrants, wrong = [contestant("ours", runnable)], []
    for number, best in enumerate(job["metaschedule"]):
        theirs = Theirs(case, best["trace"], inputs, expected["y"].shape, hardware)
        theirs(theirs.tensors)
        worst, message = judge(op.args(workload), {"y": theirs.y}, expected, bound, inputs)
        if message:
            wrong.append(message)
            continue
        error[f"metaschedule {number}"] = worst
        entrants.append(contestant(f"metaschedule {number}", theirs))
    first, *rest = compete(entrants, rounds=job["rounds"])
    line = {
        "ours_us": first.median_us, "ours_p10_us": first.p10_us, "ours_p90_us": first.p90_us,
        "error_over_bound": error, "wrong": wrong, "foreign_cores": first.foreign_cores,
    }  # fmt: skip
    if rest:
        theirs = min(rest, key=lambda r: r.median_us)
        line |= {
            "metaschedule_us": theirs.median_us, "metaschedule_p10_us": theirs.p10_us,
            "metaschedule_p90_us": theirs.p90_us, "finalist": theirs.contestant.impl,
            "ratio": ratio_of(theirs, first),
            "ratios": [a / b for a, b in zip(theirs.batches, first.batches, strict=False)],
        }  # fmt: skip
    return line


DO = {"ours": search_ours, "metaschedule": search_metaschedule, "contest": contest}


def do_job(job, result):
    """Do one job in this process and write its line's figures to a file."""
    from metaschedule_spaces import cases

    from mimo_compile.bench.machine import machine_facts
    from mimo_compile.ir.hardware import local_cpu

    case = cases(smoke=job["smoke"])[job["kernel"]]
    hardware = local_cpu().with_threads(job["threads"])
    if not hardware.has_vnni and case.name in INTEGER:
        raise SystemExit(f"{case.name}: this CPU has no AVX-512 VNNI, which its space needs")
    line = DO[job["do"]](case, hardware, job)
    line |= {"op": case.op, "machine": machine_facts(hardware)["id"]}
    result.write_text(json.dumps(line))


def run_job(job):
    """Do one job in a process group of its own; return its figures, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        result, said = Path(folder) / "result.json", Path(folder) / "said.txt"
        env = {
            **os.environ, "PYTHONPATH": str(HERE), "TVM_NUM_THREADS": str(job["threads"]),
            "TVM_BIND_THREADS": "0", "TMPDIR": folder,
            **({"TVM_FFI_DISABLE_TORCH_C_DLPACK": "1"} if job["do"] == "metaschedule" else {}),
        }  # fmt: skip
        command = [sys.executable, __file__, "--job", json.dumps(job), "--result", str(result)]
        with said.open("w") as out:
            child = subprocess.Popen(
                command, env=env, start_new_session=True, stdout=out, stderr=out
            )
            try:
                child.wait(job.get("seconds", 0.0) + GRACE)
            except subprocess.TimeoutExpired:
                pass
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # compilers and runners too
                child.wait()
        if not result.exists():
            tail = "\n".join(said.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{job['kernel']} {job['do']}: no result ({child.returncode})\n{tail}")
        return json.loads(result.read_text())


# -- the run ---------------------------------------------------------------------------------------


class Run:
    """What is there, and what is still to do."""

    def __init__(self, args):
        self.args = args
        self.lines = [x for x in read_lines(args.out) if self._fits(x)]

    def _fits(self, line):
        a = self.args
        return (line["threads"], line["seconds"], line["seed"], line["smoke"]) == (
            a.threads, a.seconds, a.seed, a.smoke
        )  # fmt: skip

    def find(self, **wanted):
        for line in self.lines:
            if all(line.get(k) == v for k, v in wanted.items()):
                return line
        return None

    def add(self, line, job):
        shared = ("kernel", "threads", "seconds", "seed", "smoke")
        line |= {k: job[k] for k in shared}
        add_line(self.args.out, line)
        self.lines.append(line)

    def search(self, kernel, side):
        if self.find(kind="search", kernel=kernel, side=side) is not None:
            return
        job = self.job(kernel, side)
        line = {"kind": "search", "side": side, **run_job(job)}
        self.add(line, job)
        us = f"{line['best'][0]['us']:.1f} us" if line["best"] else "nothing"
        print(
            f"{kernel} {side}: {us}, {line['ok']} of {line['trials']} trials in {line['took']:.0f} s",
            flush=True,
        )

    def contest(self, kernel):
        found = {s: self.find(kind="search", kernel=kernel, side=s) for s in SIDES}
        if self.find(kind="contest", kernel=kernel) or not all(found.values()):
            return
        if not found["ours"]["best"]:
            raise SystemExit(f"{kernel}: our search found nothing that works")
        best = {s: x["best"] for s, x in found.items()}
        job = self.job(kernel, "contest") | best | {"rounds": self.args.rounds}
        line = {"kind": "contest", **run_job(job)}
        self.add(line, job)
        ratio = "MetaSchedule has nothing right"
        if "ratio" in line:
            ratio = "MetaSchedule takes {:.2f}x ({:.2f} to {:.2f})".format(*line["ratio"])
        print(f"{kernel}: ours {line['ours_us']:.1f} us; {ratio}", flush=True)

    def job(self, kernel, do):
        a = self.args
        return {
            "do": do, "kernel": kernel, "seconds": a.seconds, "threads": a.threads, "seed": a.seed,
            "smoke": a.smoke,
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(KERNELS)} (all)")
    parser.add_argument("--seconds", type=float, default=300.0, help="for each search (300)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=21, help="batches of each finalist (21)")
    parser.add_argument(
        "--smoke", action="store_true", help="small shapes and rounds, to see that it works"
    )
    parser.add_argument("--out", type=Path, default=Path("against_metaschedule.jsonl"))
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE}")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        do_job(args.job, args.result)
        return
    if strange := sorted(set(args.kernels) - set(KERNELS)):
        parser.error(f"there is no kernel {strange[0]}: use some of {', '.join(KERNELS)}")
    run = Run(args)
    if not (args.show or args.write):
        for number, kernel in enumerate(KERNELS):
            if args.kernels and kernel not in args.kernels:
                continue
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                run.search(kernel, side)
            run.contest(kernel)
    if args.write:
        write_part(PAGE, "against metaschedule", table(run.lines))
    else:
        print(table(run.lines), end="")


if __name__ == "__main__":
    main()
