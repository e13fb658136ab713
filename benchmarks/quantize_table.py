"""Held-out perplexity of the built-in model by weight format and calibration: the table of docs/quantize.md.

    python benchmarks/quantize_table.py --out table.jsonl
    python benchmarks/quantize_table.py --out table.jsonl --show

Every cell is the eager model that ``mimo-compile compile tiny --quant Q --calibrate M`` compiles, judged on
the first 4,096 held-out tokens in windows of 512, as ``mimo-compile verify --perplexity`` does. Cells
that the file has already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from mimo_compile.frontend.huggingface import load_checkpoint, resolve_source
from mimo_compile.frontend.models.decoder import Decoder
from mimo_compile.ir.formats import parse_scheme, parse_weight_format
from mimo_compile.quantize.calibration import Calibration
from mimo_compile.runtime.scores import log_softmax_at
from mimo_compile.tiny import corpus

FORMATS = "w4g64,w3g64,w2g64,w1.58,nf3,anf3,afp3"
METHODS = "rtn,gptq,awq"
WINDOW = 512


def perplexity(decoder: Decoder, ids: np.ndarray) -> float:
    """Return the perplexity per token over windows that start empty."""
    total, count = 0.0, 0
    for at in range(0, len(ids), WINDOW):
        window = ids[at : at + WINDOW]
        logits = decoder.prefill([int(i) for i in window])[1].numpy()
        total += float(log_softmax_at(logits[:-1], window[1:]).sum())
        count += len(window) - 1
    return math.exp(-total / count)


def bits_per_weight(name: str, k: int = 4096) -> float:
    """Return stored bits of one weight of a row of ``k``, float16 scales and zero points included."""
    fmt = parse_weight_format(name)
    if fmt.group == -1:
        return fmt.bits_per_weight
    numbers = fmt.groups(k) * (fmt.scales_per_group + fmt.has_zero)
    return fmt.bits_per_weight + 16 * numbers / k


def measure(quant: str, method: str, tokens: int) -> dict[str, object]:
    """Calibrate, quantise and judge one cell."""
    begin = time.perf_counter()
    calibration = Calibration(method)  # type: ignore[arg-type]
    loaded = load_checkpoint(resolve_source("tiny"), parse_scheme(quant), WINDOW, calibration)
    seconds = time.perf_counter() - begin
    assert loaded.tokenizer is not None
    tokenizer = Tokenizer.from_str(loaded.tokenizer.decode())
    held_out = corpus.encode(tokenizer, corpus.collect().held_out)[:tokens].astype(np.int32)
    return {
        "quant": quant, "method": method, "perplexity": perplexity(loaded.decoder, held_out),
        "seconds": round(seconds, 1), "tokens": len(held_out),
    }  # fmt: skip


def show(rows: list[dict[str, object]]) -> None:
    """Print a Markdown table: a row for each format, a column for each activation and method."""
    cells = {(str(r["quant"]), str(r["method"])): float(str(r["perplexity"])) for r in rows}
    names = list(dict.fromkeys(q.rpartition("a")[0] for q, _ in cells if q != "none"))
    columns = [(a, m) for a in ("16", "8") for m in METHODS.split(",")]
    print("| format | bits | " + " | ".join(f"a{a} {m}" for a, m in columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for name in names:
        values = [cells.get((f"{name}a{a}", m)) for a, m in columns]
        shown = ["" if v is None else f"{v:.2f}" for v in values]
        print(f"| `{name}` | {bits_per_weight(name):.2f} | " + " | ".join(shown) + " |")


def main() -> None:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a cell")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--acts", default="8,16")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--show", action="store_true", help="print what the file has and stop")
    args = parser.parse_args()
    rows = (
        [json.loads(line) for line in args.out.read_text().splitlines()]
        if args.out.exists()
        else []
    )
    if args.show:
        show(rows)
        return
    torch.set_num_threads(1)
    done = {(r["quant"], r["method"]) for r in rows}
    for act in args.acts.split(","):
        for name in args.formats.split(","):
            for method in args.methods.split(","):
                quant = f"{name}a{act}"
                if (quant, method) in done:
                    continue
                row = measure(quant, method, args.tokens)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
