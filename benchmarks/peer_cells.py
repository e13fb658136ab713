"""Our kernels beside every peer, cell by cell: workloads x threads x operands in memory or in cache.

Each cell is one `bench KIND` in a process of its own and one line of the output file; cells that are there
already are left out, so a run that was stopped goes on where it was. ``--again`` measures the cells anew in
which a peer was ahead: the new line counts. Nothing is tuned unless ``--db`` has records.

    python benchmarks/peer_cells.py mpgemm --suite llm:m=1,n=4096,k=4096 --threads 1 2 --out cells.jsonl
    python benchmarks/peer_cells.py attention --suite decode:c=bf16 --caches cold --out attention.jsonl
    python benchmarks/peer_cells.py moe --suite layers --caches cold --out moe.jsonl
    python benchmarks/peer_cells.py mpgemm --again --out cells.jsonl
    python benchmarks/peer_cells.py mpgemm --show --out cells.jsonl
    python benchmarks/peer_cells.py mpgemm --write --out cells.jsonl
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

PAGES = {"mpgemm": "lowbit-cells.md", "attention": "attention-cells.md", "moe": "moe-cells.md"}
SAME_BITS = 0.75
"""Bits a weight that a peer may store more than we do, and still count as one of the same bits."""


def measure(op, threads, cache, args):
    """Run one cell; return its line."""
    command = [
        sys.executable, "-m", "mimo_compile.cli", "bench", args.kind, "--op", op, "--threads", str(threads),
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


def rival(kind, line):
    """Return the peer that ours should be ahead of: of weights one of the same bits, else the fastest."""
    return next(iter(line["peers"]), None) if kind == "attention" else same_bits(line)


def latest(lines):
    """Return the last line of each cell, however its op is spelled, in the order of the table."""
    cells = {}
    for line in lines:
        workload = parse_workload(line["op"])
        extents = frozenset(get_op(workload.op).full(workload).items())
        cells[workload.op, extents, line["threads"], line["cache"]] = line

    def order(line):
        workload = parse_workload(line["op"])
        p = get_op(workload.op).full(workload)
        if workload.op == "mpgemm":
            extents = p["m"], p["n"], p["k"], -line["bits_per_weight"]
        elif workload.op == "moe":
            extents = p["e"], p["t"], -line["bits_per_weight"]
        else:
            shape = -p["kv"], p["d"], p["dv"], p["c"], p["b"], p["cap"]
            extents = p["window"], p["t"], *shape, p["arith"]
        return *extents, line["threads"], line["cache"]

    return sorted(cells.values(), key=order)


def versus(peer):
    if peer is None:
        return ""
    low, high = peer["ratio_p10"], peer["ratio_p90"]
    return f"{peer['ratio']:.2f}x ({low:.2f} to {high:.2f}) {peer['impl']}"


def matmul_row(line, p, figures):
    """Return the cells of a matmul's row."""
    same, best = same_bits(line), line["peers"][0] if line["peers"] else None
    where = "memory" if line["cache"] == "cold" else "cache"
    return [
        p["m"], f"{p['n']} x {p['k']}", f"`{p['w']}`", line["threads"], where, *figures,
        versus(same), "the same" if best is same else versus(best),
    ]  # fmt: skip


def attention_row(line, p, figures):
    """Return the cells of a row of attention."""
    widths = f"{p['d']}" if p["d"] == p["dv"] else f"{p['d']}/{p['dv']}"
    folded = next((q for q in line["peers"] if q["impl"].startswith("torch-sdpa-folded")), None)
    tokens = f"{p['b']} x {p['t']}" if p["b"] > 1 else p["t"]
    keys = f"{p['len']}, window {p['window']}" if p["window"] else p["cap"]
    form = p["c"] if p["arith"] == "float" else f"{p['c']}, {p['arith']}"
    return [
        tokens, keys, f"{p['h']} on {p['kv']}, {widths}", f"`{form}`", line["threads"], *figures,
        versus(line["peers"][0] if line["peers"] else None), versus(folded),
    ]  # fmt: skip


def experts_row(line, p, figures):
    """Return the cells of a row of routed experts."""
    same, best = same_bits(line), line["peers"][0] if line["peers"] else None
    wide = next((q for q in line["peers"] if q["bits_per_weight"] >= 16), None)
    return [
        p["t"], f"{p['k']} of {p['e']}, {p['d']} x {p['f']}", f"`{p['w']}`, `{p['a']}`", line["threads"],
        *figures, versus(same), "the same" if best is same else versus(best),
        "the same" if wide is same else versus(wide),
    ]  # fmt: skip


ROWS = {"mpgemm": matmul_row, "attention": attention_row, "moe": experts_row}
FIGURES = ["kernel", "us", "roof"]
COLUMNS = {
    "mpgemm": ["tokens", "N x K", "format", "threads", "weights", *FIGURES, "same bits", "all peers"],
    "attention": ["tokens", "keys", "heads", "caches", "threads", *FIGURES, "fastest peer", "SDPA, folded"],
    "moe": ["tokens", "experts", "format", "threads", *FIGURES, "same bits", "all peers", "16 bits or more"],
}  # fmt: skip


def table(kind, lines):
    """Return a Markdown table, and which cells are not ahead of every peer that counts."""
    out = ["| " + " | ".join(COLUMNS[kind]) + " |", "|" + "---|" * len(COLUMNS[kind])]
    behind = []
    for line in lines:
        workload = parse_workload(line["op"])
        name = f"`{line['schedule'].rpartition('.')[2]}`"
        figures = [name, f"{line['median_us']:.0f}", f"{line['roof_share']:.0%}"]
        row = ROWS[kind](line, get_op(workload.op).full(workload), figures)
        out.append("| " + " | ".join(map(str, row)) + " |")
        peer = rival(kind, line)
        if peer is not None and peer["ratio"] < 1:
            sure = "" if peer["ratio_p90"] < 1 else ", not sure"
            behind.append(
                f"`{workload}`, {line['threads']} threads, {line['cache']}: {peer['impl']} takes "
                f"{peer['ratio']:.2f} of our time{sure}"
            )
    of = "" if kind == "attention" else "of the same bits "
    out.append(f"\nIn {len(behind)} of {len(lines)} cells a peer {of}is ahead.")
    out += [f"- {text}" for text in behind]
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=PAGES, help="of `bench`")
    parser.add_argument("--suite", help="a suite of that kind, cut as there: llm:m=1,w=w4g64")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, local_cpu().cores])
    parser.add_argument("--caches", nargs="*", default=["cold", "hot"], choices=["cold", "hot"])
    parser.add_argument("--peers", default="all")
    parser.add_argument("--rounds", type=int, default=7, help="batches of each contestant (7)")
    parser.add_argument("--db", help="tuning records (none: defaults and what is shipped)")
    parser.add_argument("--out", type=Path, default=Path("cells.jsonl"))
    parser.add_argument("--again", action="store_true", help="measure cells anew that lag")
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    parser.add_argument("--write", action="store_true", help="put it into the page of docs/")
    args = parser.parse_args()
    lines = read_lines(args.out)
    texts = suite(args.kind, args.suite) if args.suite else []
    done = {(line["op"], line["threads"], line["cache"]) for line in lines}
    todo = [(op, t, c) for op in texts for t in args.threads for c in args.caches]
    todo = [cell for cell in todo if cell not in done]
    if args.again:
        slow = [
            c for c in latest(lines) if (p := rival(args.kind, c)) is not None and p["ratio"] < 1
        ]
        todo += [(c["op"], c["threads"], c["cache"]) for c in slow]
    for op, threads, cache in todo:
        line = measure(op, threads, cache, args)
        lines.append(line)
        add_line(args.out, line)
        print(
            f"{op} {threads}T {cache}: {line['median_us']:.0f} us, {line['roof_share']:.0%} of roof; "
            f"{versus(rival(args.kind, line))}",
            flush=True,
        )
    if args.show or not (todo or args.write):
        print(table(args.kind, latest(lines)), end="")
    if args.write:
        write_part(PAGES[args.kind], "cells", table(args.kind, latest(lines)))


if __name__ == "__main__":
    main()
