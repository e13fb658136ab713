"""Published figures of the simulated targets beside what their models give; nothing is measured.

    python benchmarks/simulated_targets.py            # the table
    python benchmarks/simulated_targets.py --write    # put it into docs/simulated-targets.md
    python benchmarks/simulated_targets.py --json

Leaves with 1 when a figure is further off than its stated tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from pages import write_part

from mimo_compile.cost_models.simulated.published import Figure, densest_shape, figures


def table(rows: list[Figure]) -> str:
    """Return the figures as a Markdown table."""
    out = [
        "| machine | figure | published | modelled | error | within | how |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for f in rows:
        out.append(
            f"| {f.machine} | {f.what} | {f.published:.4g} {f.unit} | {f.modelled:.4g} {f.unit} | "
            f"{100 * f.error:+.1f} % | {100 * f.tolerance:.0f} % | {f.how} |"
        )
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update the documentation's table")
    parser.add_argument("--json", action="store_true", help="print plain values")
    args = parser.parse_args()
    rows = figures()
    if args.json:
        print(json.dumps([asdict(f) | {"error": f.error} for f in rows], indent=1))
    else:
        print(table(rows), end="")
        print("densest LMMA shape (published 2, 64, 4):", *densest_shape())
    if args.write:
        write_part("simulated-targets.md", "figures", table(rows))
    off = [f for f in rows if abs(f.error) > f.tolerance]
    for f in off:
        print(f"further off than stated: {f.machine}, {f.what}", file=sys.stderr)
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
