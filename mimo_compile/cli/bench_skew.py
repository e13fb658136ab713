"""``mimo-compile bench moe --suite skew``: what it costs that tokens prefer some experts."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimo_compile.bench.skew import Measured
    from mimo_compile.cli.console import Console

_HEADER = (
    "load", "experts", "busiest", "us", "p10..p90", "GB/s", "Gop/s", "of roof", "time", "p10..p90",
)  # fmt: skip


def run_skew(args: argparse.Namespace) -> int:
    """Measure each cell, print tables or JSON rows; return 0."""
    from mimo_compile.bench.machine import machine_facts
    from mimo_compile.bench.peers import LeftOut
    from mimo_compile.bench.skew import bench_cell, cells
    from mimo_compile.cli.bench_table import reason
    from mimo_compile.ir.hardware import resolve_target
    from mimo_compile.search.database import open_records

    console: Console = args.console
    hardware = resolve_target("cpu", args.threads)
    rows: list[Measured] = []
    left_out: list[dict[str, str]] = []
    with open_records(args.db) as db:
        for workload in cells(args.suite):
            console.log(f"{workload} ...")
            found = bench_cell(workload, hardware, db, args.rounds, args.seed)
            if isinstance(found, LeftOut):
                left_out.append({"op": str(workload), **asdict(found)})
                console.say(f"left out: {workload}: {reason(found)}")
                continue
            rows += found
            console.say(render(found, hardware.threads))
    facts = machine_facts(hardware)
    console.say(f"{facts['name']}, {hardware.threads} threads, load {facts['load']}")
    console.result(
        {"ok": True, "machine": facts, "rows": [r.json() for r in rows], "left_out": left_out}
    )
    return 0


def render(found: list[Measured], threads: int) -> str:
    """Lay out one cell: its loads, each beside the even one."""
    from mimo_compile.cli.console import number, table

    lines: list[tuple[object, ...]] = []
    for m in found:
        r, c = m.row, m.row.contestant
        share = None if r.roof_us is None else f"{100 * r.roof_us / r.median_us:.0f} %"
        lines.append(
            (
                m.load, m.hit, f"{m.busiest:.1f}x", number(r.median_us),
                f"{number(r.p10_us)}..{number(r.p90_us)}", number(c.bytes / r.median_us / 1e3),
                number(c.operations / r.median_us / 1e3), share, f"{m.time[0]:.2f}x",
                f"{m.time[1]:.2f}..{m.time[2]:.2f}",
            )
        )  # fmt: skip
    schedule = found[0].row.contestant.schedule
    title = f"\n{found[0].workload}  ({threads} threads, {schedule}; busiest: over the mean; time: over even)"
    return "\n".join([title, table(lines, _HEADER, right="lrrrrrrrrr")])
