"""``mimo-compile report``: one page to look at, offline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_compile.cli.options import check_output

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console

DESCRIPTION = """\
Write one self-contained HTML page (no network, no scripts, below 1 MB): time and energy by kernel,
speed-up by tuning, winning algorithms, roofline, cost models beside measurements, tuning curves, Pareto
fronts. Measured and modelled energy are never mixed."""
EXAMPLE = """
mimo-compile report t.mimo -o report.html
mimo-compile report records.db -o report.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="an artifact (OUT.mimo) or a database"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")


def run(args: argparse.Namespace) -> int:
    """Write the page; return 0."""
    console: Console = args.console
    output = check_output(args.output, ".html")
    from mimo_compile.report import write_report

    write_report(args.source, output)
    console.say(f"{output}: {output.stat().st_size / 1024:.0f} KiB")
    console.result({"ok": True, "path": output, "bytes": output.stat().st_size})
    return 0
