"""``mimo-compile bench attention --suite sparse``: sparse attention beside our own dense attention."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.bench.sparse import Measured
    from mimo_compile.cli.console import Console

_HEADER = ("part", "schedule", "us", "p10..p90", "GB/s", "Gop/s", "time", "bytes", "operations")


def run_sparse(args: argparse.Namespace) -> int:
    """Measure each cell, print tables or JSON rows; return 0."""
    from mimo_compile.bench.machine import machine_facts
    from mimo_compile.bench.sparse import bench_cell, cells
    from mimo_compile.ir.hardware import resolve_target
    from mimo_compile.search.database import open_records

    console: Console = args.console
    hardware = resolve_target("cpu", args.threads)
    rows: list[Measured] = []
    left_out: list[dict[str, str]] = []
    with open_records(args.db) as db:
        for cell in cells(args.suite):
            console.log(f"{cell} ...")
            try:
                found = bench_cell(cell, hardware, db, args.rounds, args.seed)
            except UsageError as error:
                left_out.append({"cell": str(cell), "reason": str(error)})
                console.say(f"left out: {error}")
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
    """Lay out one cell: its parts, each as a part of dense attention, and what that makes of the speed."""
    from mimo_compile.cli.console import number, table

    lines: list[tuple[object, ...]] = []
    for m in found:
        r, c = m.row, m.row.contestant
        lines.append(
            (
                m.part, c.schedule, number(r.median_us),
                f"{number(r.p10_us)}..{number(r.p90_us)}", number(c.bytes / r.median_us / 1e3),
                number(c.operations / r.median_us / 1e3), f"{m.time[0]:.4f}", f"{m.bytes:.4f}",
                f"{m.work:.4f}",
            )
        )  # fmt: skip
    whole = found[0]
    low, middle, high = (1 / whole.time[i] for i in (2, 0, 1))
    text = f"{middle:.2f}x as fast as dense [{low:.2f}..{high:.2f}]"
    if whole.cell.t == 1:
        text += f", of {1 / whole.bytes:.2f}x fewer bytes: {100 * middle * whole.bytes:.0f} %"
    title = f"\n{whole.cell}  ({threads} threads; time, bytes and operations as parts of dense)"
    return "\n".join([title, table(lines, _HEADER, right="llrrrrrrr"), text])
