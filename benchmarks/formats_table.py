"""Held-out perplexity of the built-in model in every format, compiled and eager: a table of docs/quantize.md.

    python benchmarks/formats_table.py --out formats.jsonl
    python benchmarks/formats_table.py --out formats.jsonl --show

Every cell is the artifact that ``mimo-compile compile SOURCE --quant Q`` makes and what ``mimo-compile verify
--perplexity`` says of it: perplexity on the first 4,096 held-out tokens in windows of 512, beside that of
eager torch with the same quantiser's codes. Cells that the file has already are not measured again. Exit code
4 if any differs by more than its bound.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import mimo_compile as mc
from mimo_compile.errors import MimoError
from mimo_compile.runtime.module import load
from mimo_compile.search import Database
from mimo_compile.verify import compare_perplexity, eager_decoder, text_ids

WINDOW = 512

INTEGER = (
    "w8,w8g64,w4g32,w4g64,w4g128,w4grow,w4gtensor,w4zg64,w3g64,w3zg64,w2g64,w2zg64,w1g64,w1zg64"
)
TERNARY = "w1.58,w1.58d"
BOOKS = "nf4,nf3,fp4,fp3,anf4,anf3,afp4,afp3,fp8b128"
COMPLEX = "complex2wl,complex2wl2"
FORMATS = f"none,{INTEGER},{TERNARY},{BOOKS},{COMPLEX}"
SHOWN = {"8": "int8 activations", "16": "float activations"}


def measure(source: str, quant: str, tokens: int, folder: Path) -> dict[str, Any]:
    """Compile one cell and compare it with eager torch."""
    begin = time.perf_counter()
    row: dict[str, Any] = {"source": source, "quant": quant, "tokens": tokens}
    try:
        with Database(folder / "records.db") as db:
            artifact = mc.compile(source, quant=quant, max_context=WINDOW, db=db)
        size = artifact.save(folder / "cell.mimo").stat().st_size
        module = load(folder / "cell.mimo", threads=1)
        eager = eager_decoder(module.manifest, source)
    except MimoError as error:  # no kernels for it, say
        return row | {"error": str(error)}
    found = compare_perplexity(module, eager, text_ids(module, None, tokens, None))
    eager.release()
    schedules = {choice.schedule for choice in module.manifest.plan}
    return row | {
        "compiled": found.compiled, "eager": found.eager, "difference": found.difference,
        "noise": found.noise, "ok": found.ok, "bytes": size,
        "schedules": sorted(s for s in schedules if s.startswith(("mpgemm.", "moe."))),
        "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table: a row for each format, eager, compiled and difference for each activation."""
    cells = {(r["source"], *split(r["quant"])): r for r in rows}
    names = list(dict.fromkeys((source, name) for source, name, _ in cells))
    heads = [f"{SHOWN[act]}: eager | compiled | difference" for act in SHOWN]
    print("| format | " + " | ".join(heads) + " |")
    print("|---" * (1 + 3 * len(heads)) + "|")
    for source, name in names:
        shown = []
        for act in SHOWN:
            r = cells.get((source, name, act), {})
            known = "eager" in r
            shown.append(f"{r['eager']:.3f}" if known else "-")
            shown.append(f"{r['compiled']:.3f}" if known else "-")
            shown.append(f"{100 * r['difference']:+.4f} %" if known else "-")
        model = "" if source == "tiny" else f"{Path(source).name} "
        print(f"| {model}`{name}` | " + " | ".join(shown) + " |")


def split(quant: str) -> tuple[str, str]:
    """``w4g64a8`` -> ``("w4g64", "8")``; without activations they are floats."""
    if quant == "none":
        return quant, "16"
    name, _, act = quant.rpartition("a")
    return name or "as stored", act


def main() -> int:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a cell")
    parser.add_argument("--source", default="tiny", help="tiny, or the folder of another model")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--acts", default="8,16")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--show", action="store_true", help="print what the file has and stop")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    if args.show:
        show(rows)
        return 0
    torch.set_num_threads(1)
    done = {(r["source"], r["quant"], r["tokens"]) for r in rows}
    quants = [
        "none" if name == "none" else f"{name}a{act}"
        for act in args.acts.split(",")
        for name in args.formats.split(",")
    ]
    with tempfile.TemporaryDirectory() as folder:
        for quant in dict.fromkeys(quants):
            if (args.source, quant, args.tokens) in done:
                continue
            rows.append(measure(args.source, quant, args.tokens, Path(folder)))
            with args.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
    return 4 if any(not r.get("ok", True) for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
