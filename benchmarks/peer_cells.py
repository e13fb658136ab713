"""Our kernels beside every peer, cell by cell: workloads x threads x weights in memory or in cache.

Each cell is one `bench mpgemm` in a process of its own and one line of the output file; cells that are there
already are left out, so a run that was stopped goes on where it was. ``--again`` measures the cells anew in
which a peer was ahead: the new line counts. Nothing is tuned unless ``--db`` has records.

    python benchmarks/peer_cells.py --suite llm:m=1,n=4096,k=4096 --threads 1 2 --out cells.jsonl
    python benchmarks/peer_cells.py --again --out cells.jsonl
    python benchmarks/peer_cells.py --show --out cells.jsonl
    python benchmarks/peer_cells.py --write --out cells.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from pages import add_line, read_lines, write_part

from mimo_compile.bench.suites import suite
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload

PAGE = "lowbit-cells.md"
SAME_BITS = 0.75
"""Bits a weight that a peer may store more than we do, and still count as one of the same bits."""


def measure(op, threads, cache, args):
    """Run one cell; return its line."""
    command = [
        sys.executable, "-m", "mimo_compile.cli", "bench", "mpgemm", "--op", op, "--threads", str(threads),
        "--cache", cache, "--rounds", str(args.rounds), "--peers", args.peers, "--json",
    ]  # fmt: skip
    if args.db:
        command += ["--db", args.db]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    found = json.loads(done.stdout)
    (ours,) = found["summary"]
    keep = ("impl", "bits_per_weight", "median_us", "ratio", "ratio_p10", "ratio_p90")
    peers = [{k: r[k] for k in keep} for r in found["rows"] if r["peer"]]
    return {
        "op": op, "threads": threads, "cache": cache, "schedule": ours["schedule"],
        "median_us": ours["median_us"], "bits_per_weight": ours["bits_per_weight"],
        "roof_share": ours["roof_share"], "foreign_cores": ours["foreign_cores"],
        "peers": sorted(peers, key=lambda p: p["ratio"]), "missing": found["missing"],
        "machine": found["machine"]["id"], "rounds": args.rounds,
    }  # fmt: skip


def same_bits(line):
    """Return the fastest peer of about the same bits, or None."""
    most = line["bits_per_weight"] + SAME_BITS
    return next((p for p in line["peers"] if p["bits_per_weight"] <= most), None)


def latest(lines):
    """Return the last line of each cell, in the order of tokens, shapes, formats, threads, caches."""
    cells = {(line["op"], line["threads"], line["cache"]): line for line in lines}

    def order(line):
        p = get_op("mpgemm").full(parse_workload(line["op"]))
        return p["m"], p["n"], p["k"], -line["bits_per_weight"], line["threads"], line["cache"]

    return sorted(cells.values(), key=order)


def versus(peer):
    if peer is None:
        return ""
    low, high = peer["ratio_p10"], peer["ratio_p90"]
    return f"{peer['ratio']:.2f}x ({low:.2f} to {high:.2f}) {peer['impl']}"


def table(lines):
    """Return a Markdown table, and which cells are not ahead of every peer of the same bits."""
    out = [
        "| tokens | N x K | format | threads | weights | kernel | us | roof | same bits | all peers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    behind = []
    for line in lines:
        p = get_op("mpgemm").full(parse_workload(line["op"]))
        same, best = same_bits(line), line["peers"][0] if line["peers"] else None
        where = "memory" if line["cache"] == "cold" else "cache"
        cell = (
            f"| {p['m']} | {p['n']} x {p['k']} | `{p['w']}` | {line['threads']} | {where} "
            f"| `{line['schedule'].rpartition('.')[2]}` | {line['median_us']:.0f} "
            f"| {line['roof_share']:.0%} "
        )
        out.append(f"{cell}| {versus(same)} | {'the same' if best is same else versus(best)} |")
        if same is not None and same["ratio"] < 1:
            sure = "" if same["ratio_p90"] < 1 else ", not sure"
            behind.append(
                f"{p['m']} tokens, {p['n']} x {p['k']}, `{p['w']}`, {line['threads']} threads, "
                f"{where}: {same['impl']} takes {same['ratio']:.2f} of our time{sure}"
            )
    out.append(f"\nIn {len(behind)} of {len(lines)} cells a peer of the same bits is ahead.")
    out += [f"- {text}" for text in behind]
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", help="a suite of `bench mpgemm`, cut as there: llm:m=1,w=w4g64")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, local_cpu().cores])
    parser.add_argument("--caches", nargs="*", default=["cold", "hot"], choices=["cold", "hot"])
    parser.add_argument("--peers", default="all")
    parser.add_argument("--rounds", type=int, default=7, help="batches of each contestant (7)")
    parser.add_argument("--db", help="tuning records (none: defaults and what is shipped)")
    parser.add_argument("--out", type=Path, default=Path("cells.jsonl"))
    parser.add_argument("--again", action="store_true", help="measure cells anew that lag")
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    parser.add_argument("--write", action="store_true", help=f"put it into docs/{PAGE}")
    args = parser.parse_args()
    lines = read_lines(args.out)
    texts = suite("mpgemm", args.suite) if args.suite else []
    done = {(line["op"], line["threads"], line["cache"]) for line in lines}
    todo = [(op, t, c) for op in texts for t in args.threads for c in args.caches]
    todo = [cell for cell in todo if cell not in done]
    if args.again:
        slow = [c for c in latest(lines) if (p := same_bits(c)) is not None and p["ratio"] < 1]
        todo += [(c["op"], c["threads"], c["cache"]) for c in slow]
    for op, threads, cache in todo:
        line = measure(op, threads, cache, args)
        lines.append(line)
        add_line(args.out, line)
        print(
            f"{op} {threads}T {cache}: {line['median_us']:.0f} us, {line['roof_share']:.0%} of roof; "
            f"{versus(same_bits(line))}",
            flush=True,
        )
    if args.show or not (todo or args.write):
        print(table(latest(lines)), end="")
    if args.write:
        write_part(PAGE, "cells", table(latest(lines)))


if __name__ == "__main__":
    main()
