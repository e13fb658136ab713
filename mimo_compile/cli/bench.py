"""``mimo-compile bench``: side by side in one run, ratios with spread."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from mimo_compile.cli.options import add_calibration, add_model_options, need_extra, positive
from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.bench.contest import Row
    from mimo_compile.cli.console import Console

DESCRIPTION = """\
Time kernels, or a whole model, side by side with peers. Candidates, peers and a roof kernel
(reads the same bytes, or does nothing but arithmetic) take turns in one run; every candidate is
checked against the reference first, every peer against float64 over its own weights. Figures:
median of one call, p10 and p90 over batches; ratio: its time over that of our fastest.
`hot`: operands stay in the caches; `cold`: weights and caches come from memory."""
EXAMPLE = """
mimo-compile bench mpgemm --suite gemv --peers torch
mimo-compile bench mpgemm --op mpgemm:m=1,n=4096,k=4096,w=w4g64,a=a8 --json
mimo-compile bench mpgemm --suite llm:m=1+16,w=w4g64 --peers all --threads 1
mimo-compile bench attention --suite decode:d=128,cap=32768 --peers torch-sdpa-folded,flexattention
mimo-compile bench moe --suite layers:t=16,w=bf16 --peers torch,torch-compile,transformers
mimo-compile bench model tiny --quant w4g64a8
"""
PEERS = "torch"
"""Who takes part unless others are asked for."""
_KINDS = ("mpgemm", "attention", "moe", "model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("kind", choices=_KINDS, metavar="KIND", help=", ".join(_KINDS))
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SRC",
        help="model: checkpoint folder, OUT.mimo or tiny (default)",
    )
    parser.add_argument(
        "--suite",
        metavar="NAME[:KEY=V+V,...]",
        help="a named list of workloads (default: quick), or those with these parameters",
    )
    parser.add_argument(
        "--op", action="append", default=[], metavar="SPEC", help="a workload; may be given again"
    )
    parser.add_argument(
        "--peers",
        metavar="LIST",
        help="torch (default), onnxruntime, openvino, llama.cpp; all, or none; of attention also "
        "torch-sdpa, torch-sdpa-folded, torch-matmul, torch-flex alone; of moe torch-compile, transformers",
    )
    parser.add_argument("--cache", metavar="LIST", help="hot, cold or both (default)")
    parser.add_argument(
        "--all",
        action="store_true",
        help="let every schedule's default take part, not the best alone",
    )
    parser.add_argument(
        "--rounds", type=positive, default=11, metavar="N", help="batches (default: 11)"
    )
    parser.add_argument(
        "--prompt-tokens", type=positive, default=64, metavar="N", help="model: prefill"
    )
    parser.add_argument(
        "--new-tokens", type=positive, default=32, metavar="N", help="model: decode"
    )
    parser.add_argument(
        "--source",
        dest="weights",
        metavar="SRC",
        help="model: what OUT.mimo was compiled from, for peers",
    )
    parser.add_argument(
        "--keep", metavar="DIR", help="model: keep the files of peers here, and use them again"
    )
    add_model_options(parser)
    add_calibration(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, print a table or JSON rows; return 0."""
    need_extra("bench")
    if args.kind == "model":
        if args.op or args.suite:
            raise UsageError("bench model takes no --op and no --suite")
        from mimo_compile.cli.bench_model import run_model

        return run_model(args)
    if args.weights or args.keep:
        raise UsageError(
            f"bench {args.kind} takes no --source and no --keep", remedy="Did you mean bench model?"
        )
    if args.kind == "attention" and (args.suite or "").partition(":")[0] == "sparse":
        from mimo_compile.cli.bench_sparse import run_sparse

        _alone(args, "sparse")
        return run_sparse(args)
    if args.kind == "moe" and (args.suite or "").partition(":")[0] == "skew":
        from mimo_compile.cli.bench_skew import run_skew

        _alone(args, "skew")
        return run_skew(args)
    return _kernels(args)


def _alone(args: argparse.Namespace, suite: str) -> None:
    """Refuse what a suite that compares nothing but our own kernels does not look at.

    Raises:
        UsageError: It is given.
    """
    given = {
        "--op": args.op, "--peers": args.peers, "--cache": args.cache, "--all": args.all,
        "--calibrate": args.calibrate is not None, "SRC": args.source is not None,
        "--target": args.target != "cpu",
    }  # fmt: skip
    if found := [name for name, value in given.items() if value]:
        raise UsageError(
            f"--suite {suite} is a run of its own, without {', '.join(found)}",
            remedy=f"Leave out {', '.join(found)}.",
        )


def _kernels(args: argparse.Namespace) -> int:
    from mimo_compile.bench.machine import machine_facts
    from mimo_compile.bench.peers import parse_peers
    from mimo_compile.bench.runner import Settings, bench_workload, missing_peers
    from mimo_compile.bench.suites import KINDS, suite
    from mimo_compile.bench.summary import cells
    from mimo_compile.cli.bench_table import reason, render, render_summary
    from mimo_compile.ir.hardware import resolve_target
    from mimo_compile.ir.ops import parse_workload
    from mimo_compile.search.database import open_records
    from mimo_compile.search.meters import open_meter

    console: Console = args.console
    if args.calibrate is not None:
        raise UsageError(
            f"bench {args.kind} takes no --calibrate", remedy="Did you mean bench model?"
        )
    if args.source is not None:
        raise UsageError(f"bench {args.kind} takes no SRC", remedy="Did you mean bench model?")
    if args.target != "cpu":
        raise UsageError("bench measures on this machine: --target must be cpu")
    caches = [c for c in ("hot,cold" if args.cache is None else args.cache).split(",") if c]
    if not caches or set(caches) - {"hot", "cold"}:
        raise UsageError(f"--cache {args.cache} is not hot, cold or hot,cold")
    peers = parse_peers(PEERS if args.peers is None else args.peers)
    hardware = resolve_target("cpu", args.threads)
    texts = args.op + (suite(args.kind, args.suite or "quick") if args.suite or not args.op else [])
    workloads = [parse_workload(t) for t in texts]
    for workload in workloads:
        if workload.op != KINDS[args.kind]:
            raise UsageError(f"{workload} is not a workload of bench {args.kind}")
    settings = Settings(
        peers,
        caches,
        args.rounds,
        seed=args.seed,
        every_schedule=args.all,
        meter=open_meter(hardware),
    )
    missing = missing_peers(peers)
    for absent in missing:
        console.say(f"missing: {reason(absent)}")
    rows: list[Row] = []
    left_out: list[dict[str, str]] = []
    with open_records(args.db) as db:
        for workload in workloads:
            console.log(f"{workload} ...")
            found = bench_workload(
                workload, hardware, db, settings, lambda text: console.log(text, 1)
            )
            rows += found.rows
            left_out += [{"op": str(workload), **asdict(o)} for o in found.left_out]
            console.say(render(found.rows))
            for entry in found.left_out:
                console.say(f"left out: {reason(entry)}")
    summary = cells(rows)
    if peers and summary:
        console.say(render_summary(summary))
    facts = machine_facts(hardware)
    if facts["load"] > hardware.cores:
        console.log(
            "warning: other programs keep this machine busy; ratios of threaded kernels mean little"
        )
    console.say(f"{facts['name']}, {hardware.threads} threads, load {facts['load']}")
    console.result(
        {
            "ok": True,
            "machine": facts,
            "rows": [r.json() for r in rows],
            "missing": [asdict(m) for m in missing],
            "left_out": left_out,
            "summary": [c.json() for c in summary],
            "slower": [c.json() for c in summary if c.slower],
        }
    )
    return 0
