"""What tuning generic functions brings over the rules that schedule them without records.

    python benchmarks/generic_functions.py --trials 96 --threads 1

Each function is searched by itself in a database of its own; then its best candidate of each schedule is
timed against the default of the rules, in turns, on the inputs of several seeds. Ratios are medians over the
seeds. At last the function is compiled as a module of its own, with these records and without any: what calls
of both artifacts take, in turns, is the ratio *compiled*.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import mimo_compile as mc
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.workload import Workload
from mimo_compile.pipeline.choose import tunable
from mimo_compile.pipeline.graphs import module_graphs
from mimo_compile.search import Database, tune_workloads
from mimo_compile.search.measure import Measurer
from mimo_compile.search.space import Candidate, JointSpace


class Function(nn.Module):
    """A module of one function."""

    def __init__(self, compute: Any) -> None:
        """Wrap."""
        super().__init__()
        self.compute = compute

    def forward(self, *inputs: Any) -> Any:
        """Compute."""
        return self.compute(*inputs)


FUNCTIONS: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "softmax": (lambda x: torch.softmax(x, -1), [(12, 128, 128)]),
    "layer_norm": (lambda x, g, b: F.layer_norm(x, (768,), g, b), [(128, 768), (768,), (768,)]),
    "matmul": (torch.matmul, [(12, 128, 64), (12, 64, 128)]),
    "convolution": (lambda x, w: F.conv2d(x, w, padding=1), [(1, 64, 28, 28), (64, 64, 3, 3)]),
    "strided convolution": (
        lambda x, w: F.conv2d(x, w, stride=2, padding=3), [(1, 3, 64, 64), (32, 3, 7, 7)]
    ),
    "max_pool": (lambda x: F.max_pool2d(x, 3, 2, 1), [(1, 64, 56, 56)]),
    "mean": (lambda x: x.mean((2, 3)), [(1, 256, 28, 28)]),
    "argmax": (lambda x: x.argmax(-1), [(64, 1000)]),
    "gelu": (F.gelu, [(128, 1024)]),
}  # fmt: skip


def workload_of(name: str, threads: int) -> Workload:
    """Return the heaviest workload of a function's module."""
    compute, shapes = FUNCTIONS[name]
    graphs = module_graphs(Function(compute), tuple(torch.randn(s) for s in shapes), name)
    hardware = local_cpu().with_threads(threads)
    return next(iter(tunable(graphs, hardware, search=True)))


def compare(
    space: JointSpace, candidates: list[Candidate], seeds: int, measurer: Measurer
) -> list[list[float]]:
    """Return microseconds ``[candidate][seed]``, timed in turns."""
    out: list[list[float]] = [[] for _ in candidates]
    for seed in range(seeds):
        times = {
            m.candidate.key: m.latency_us for m in measurer.confirm(space, candidates, 900 + seed)
        }
        for row, c in zip(out, candidates, strict=True):
            if (us := times.get(c.key)) is not None:
                row.append(us)
    return out


def compiled(name: str, folder: Path, threads: int, rounds: int = 9) -> tuple[float, str]:
    """Return how much faster the function's artifact is with the records in a folder, and what it chose.

    A call of an artifact has costs of its own, some microseconds, that no kernel changes.
    """
    compute, shapes = FUNCTIONS[name]
    inputs = tuple(torch.randn(s) for s in shapes)
    artifacts = [
        mc.compile(Function(compute), example_inputs=inputs, db=folder / file, threads=threads)
        for file in ("none.db", "r.db")
    ]
    modules, times = [a.module() for a in artifacts], [list[float](), list[float]()]
    for _ in range(rounds):
        for module, row in zip(modules, times, strict=True):
            module(*inputs)
            begin, calls = time.perf_counter(), 0
            while time.perf_counter() - begin < 0.05:
                module(*inputs)
                calls += 1
            row.append((time.perf_counter() - begin) / calls)
    found = [(c.schedule, c.source) for c in artifacts[1].manifest.plan]
    return statistics.median(a / b for a, b in zip(*times, strict=True)), str(found)


def run(name: str, trials: int, threads: int, seeds: int, seed: int) -> dict[str, Any]:
    """Search one function and compare."""
    hardware = local_cpu().with_threads(threads)
    workload = workload_of(name, threads)
    space = JointSpace(workload, hardware)
    with tempfile.TemporaryDirectory() as folder, Database(Path(folder) / "r.db") as db:
        result = tune_workloads(
            {workload: 1.0}, hardware, trials=trials, db=db, seed=seed, meter="modelled"
        )
        records = [r for r in db.records(workload, hardware) if r.ok]
        verdicts = {str(k): v for k, v in result.workloads[0].verdicts.items()}
        Database(Path(folder) / "none.db").close()
        gain, chosen = compiled(name, Path(folder), threads)
    best: dict[str, Candidate] = {}
    for record in sorted(records, key=lambda r: r.latency_us or 0.0):
        if record.schedule not in best:
            candidate = space.adopt(record.schedule, record.config)
            if candidate is not None:
                best[record.schedule] = candidate
    default = space.defaults()[0]
    names = [n for n in best if best[n] != default]
    with Measurer(hardware) as measurer:
        rows = compare(space, [default, *(best[n] for n in names)], seeds, measurer)
    ratios = {
        n: statistics.median(d / t for d, t in zip(rows[0], row, strict=False))
        for n, row in zip(names, rows[1:], strict=True)
    }
    return {
        "function": name, "workload": str(workload), "rules_us": statistics.median(rows[0]),
        "speed": ratios, "best": max([1.0, *ratios.values()]),
        "sizes": {n: s.size for n, s in space.spaces.items()}, "verdicts": verdicts,
        "configs": {n: str(c) for n, c in best.items()}, "compiled": gain, "chosen": chosen,
    }  # fmt: skip


def main() -> None:
    """Print a line for each function."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(FUNCTIONS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for name in args.only:
        row = run(name, args.trials, args.threads, args.seeds, args.seed)
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        speed = ", ".join(f"{n.removeprefix('tir.')} {v:.2f}" for n, v in row["speed"].items())
        print(f"{name}: rules {row['rules_us']:.1f} us; faster by {speed}", flush=True)
        print(f"  compiled {row['compiled']:.2f}: {row['chosen']}", flush=True)
        print(f"  {row['verdicts']}", file=sys.stderr)


if __name__ == "__main__":
    main()
