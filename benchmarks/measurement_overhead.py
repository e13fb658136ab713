"""What measuring costs beside the measured: candidates scheduled per second, and the price of isolation.

    python benchmarks/measurement_overhead.py [--trials 1000] [--rounds 5] [--repeats 3]

Scheduling: a search over a real space whose results are looked up, not measured: what remains is proposing,
predicting, learning and storing, each record by its own synced commit. First without any model, which is what
the machinery alone takes; then with models, the database in memory (``/dev/shm``: processor time only) and on
the disk of ``--folder``: the run of median speed, by wall clock.

Isolation: small kernels are built, verified, timed and verified again, by child processes and by the very
same functions in this process, in turns; one compiler each, warm. The difference is what isolation costs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search.database import Database
from mimo_compile.search.learner import Learner
from mimo_compile.search.measure import Measurer, Timing, build_worker, run_worker
from mimo_compile.search.measure.replay import ReplayMeasurer
from mimo_compile.search.measure.worker import Reply
from mimo_compile.search.progress import PlainProgress
from mimo_compile.search.records import Record, Verdict, record_key, versions
from mimo_compile.search.space import JointSpace
from mimo_compile.search.tune import tune_workloads

WORKLOADS = tuple(
    f"mpgemm:m={m},n={n},k=4096,w=w4g64,a=a8" for m in (1, 4, 16, 64) for n in (4096, 6144, 11008)
)
SMALL = ("rms_norm:t=2,d=64", "swiglu:t=2,f=64", "rms_norm:t=3,d=96", "swiglu:t=3,f=48")
TIMING = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.05, repeats=0, cache="hot")


def recorded(workload, hardware, device):
    """Return made-up records of a whole space: the roofline's times, uneven by up to a half."""
    space = JointSpace(parse_workload(workload), hardware)
    out = []
    for candidate in space:
        schedule = space.schedules[candidate.schedule]
        work = schedule.work(space.workload, space.config(candidate), hardware)
        uneven = 1 + int(candidate.key[:4], 16) / (2 << 16)
        latency = device.latency_us(work, hardware) * uneven
        key = record_key(
            workload,
            schedule.name,
            schedule.version,
            candidate.config,
            hardware,
            "cold",
            versions(),
        )
        out.append(
            Record(
                key=key, workload=workload, schedule=schedule.name, schedule_version=schedule.version,
                config=candidate.config, hardware=hardware.id, features=tuple(sorted(hardware.features)),
                threads=hardware.threads, cache="cold", versions=versions(), verdict=Verdict.OK,
                latency_us=latency, ops=dict(work.ops), bytes=dict(work.bytes),
                modelled_mj=device.energy_mj(work, latency),
            )
        )  # fmt: skip
    return out


def scheduling(replay, hardware, device, trials, folder, strategy, learns=True):
    """Return candidates per second, wall clock and processor time, of one search."""
    still = contextlib.nullcontext() if learns else mock.patch.object(Learner, "train")
    with (
        still,
        tempfile.TemporaryDirectory(dir=folder) as path,
        Database(Path(path) / "records.db") as db,
    ):
        begin, cpu = time.perf_counter(), time.process_time()
        result = tune_workloads(
            {parse_workload(w): 1.0 for w in WORKLOADS}, hardware, trials=trials, db=db, device=device,
            measurer=replay, strategy=strategy, warm_start=learns,
            progress=PlainProgress(io.StringIO()),
        )  # fmt: skip
        seconds, busy = time.perf_counter() - begin, time.process_time() - cpu
        count = len(db)
    return {
        "records": count, "stopped": result.stopped, "seconds": seconds,
        "per_s": count / seconds, "per_cpu_s": count / busy,
    }  # fmt: skip


class Here:
    """Serves requests by the children's functions, in this process."""

    def __init__(self, handlers):
        self.handlers = handlers

    def call(self, request, timeout_s):
        """Serve one request."""
        value = self.handlers[request["do"]](request)
        if "forked" in value:  # the other measurer's children are this process's too
            value["forked"] = False
        return Reply("ok", value)

    def run(self, requests, timeout_s):
        """Serve requests one after the other."""
        for index, request in enumerate(requests):
            yield index, self.call(request, timeout_s)

    def replace(self):
        """There is nothing to replace."""

    close = replace


def measurer(hardware, device, isolated, folder):
    """Return a measurer with one compiler, by child processes or in this process."""
    m = Measurer(hardware, device=device, timing=TIMING, builders=1, scratch=folder)
    if not isolated:
        m.builder.pool = Here({"build": build_worker.build, "describe": build_worker.describe})
        m.runner.pool = Here(
            {
                "load": run_worker.load, "check": run_worker.check, "again": run_worker.again,
                "time": run_worker.timing, "spin": run_worker.spin, "drop": run_worker.drop,
            }
        )  # fmt: skip
    return m


def isolation(hardware, device, rounds):
    """Return milliseconds per candidate, isolated and not, of each round; the first warms up."""
    spaces = [JointSpace(parse_workload(w), hardware) for w in SMALL]
    out = {"isolated": [], "in_process": []}
    with tempfile.TemporaryDirectory() as folder:
        pair = {name: measurer(hardware, device, name == "isolated", Path(folder)) for name in out}
        try:
            for number in range(rounds + 1):
                for name, m in pair.items():
                    begin, count = time.perf_counter(), 0
                    for space in spaces:
                        for result in m.measure(space, list(space), number):
                            assert result.verdict is Verdict.OK, result
                            count += 1
                            m.builder.forget(result.candidate.key)
                    if number:
                        out[name].append(1e3 * (time.perf_counter() - begin) / count)
        finally:
            for m in pair.values():
                m.close()
    return out


def main():
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the disk is tried")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    hardware = local_cpu()
    device = DeviceModel.guess(hardware)
    rows = [r for w in WORKLOADS for r in recorded(w, hardware, device)]
    found = {"workloads": len(WORKLOADS), "configs": len(rows)}
    replay = ReplayMeasurer(rows)
    gc.collect()
    gc.freeze()  # a search does not hold whole spaces, which the collector would go through again and again
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    found["scheduling alone (random, no model), database in memory"] = scheduling(
        replay, hardware, device, args.trials, memory, "random", learns=False
    )
    for name, folder in (("memory", memory), ("disk", args.folder)):
        for strategy in ("evolutionary", "random"):
            key = f"{strategy}, database in {name}" if name == "memory" else f"{strategy}, on disk"
            runs = [
                scheduling(replay, hardware, device, args.trials, folder, strategy)
                for _ in range(args.repeats)
            ]
            found[key] = sorted(runs, key=lambda r: r["per_s"])[len(runs) // 2]
    costs = isolation(hardware, device, args.rounds)
    extra = [a - b for a, b in zip(costs["isolated"], costs["in_process"], strict=True)]
    found["isolation"] = {
        **{name: statistics.median(values) for name, values in costs.items()},
        "cost_ms": statistics.median(extra), "least_ms": min(extra), "most_ms": max(extra),
    }  # fmt: skip
    if args.json:
        json.dump(found, sys.stdout, indent=1)
        print()
        return
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items()
            )
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
