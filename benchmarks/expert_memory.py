"""What it costs that experts stay in the artifact's file: beside all of them in memory, in turn, in one run.

    python benchmarks/expert_memory.py --model wide.mimo --out memory.jsonl --write docs/experts.md

The model is the built-in one whose experts are made `--factor` times as wide by rows of zeros: it computes
the same and routes the same text alike, while its experts have the bytes, and take the time, of larger ones.
Tokens of held-out text are appended one at a time, each with all ways in turn. Where others use the machine,
times are long now and then: of each token and way the median of `--repeat` runs counts, and their sum is its
time. Each run begins with nothing in the slots, so that a token finds the same experts there in every run but
for what comes ahead. Counts are those of the timed tokens of all runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import mimo_compile as mc
from mimo_compile.runtime import ExpertMemory, load
from mimo_compile.runtime.module import Module

BEGIN, END = "<!-- expert memory: begin -->", "<!-- expert memory: end -->"
WARM = 32
"""Tokens before those that are timed."""


def widened(folder: Path, factor: int) -> Path:
    """Write a checkpoint of the built-in model whose experts have `factor` times as many inner rows."""
    import torch
    from safetensors.torch import load_file, save_file

    from mimo_compile.frontend.huggingface import resolve_source

    source = resolve_source("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    inner = config["moe_intermediate_size"]
    config["moe_intermediate_size"] = inner * factor
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name:
            more = inner * (factor - 1)
            pad = (0, more) if "down_proj" in name else (0, 0, 0, more)
            tensors[name] = torch.nn.functional.pad(tensor, pad)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def model(path: Path | None, factor: int, quant: str, context: int) -> Path:
    """Return the artifact, compiled unless it is there."""
    if path is not None and path.exists():
        return path
    with tempfile.TemporaryDirectory() as folder:
        source = widened(Path(folder), factor)
        made = mc.compile(source, quant=quant, max_context=context)
        return made.save(path or Path(tempfile.mkdtemp()) / "wide.mimo")


def text(module: Module, count: int) -> list[int]:
    """Return tokens of held-out text."""
    from mimo_compile.tiny import corpus

    ids: list[int] = [0]
    for file in corpus.collect().held_out:
        ids += module.tokenizer.encode(file.text).ids
        if len(ids) >= count:
            return ids[:count]
    raise SystemExit(f"there are not {count} tokens of held-out text")


def timed(
    path: Path, ways: Sequence[ExpertMemory | None], tokens: list[int], repeat: int
) -> list[dict[str, float]]:
    """Append tokens one by one, with each way in turn; returns figures for a token.

    Raises:
        SystemExit: Two of them give other hidden states.
    """
    count = len(tokens) - WARM
    seconds = np.empty((repeat, len(ways), count))
    used: list[Counter[str]] = [Counter() for _ in ways]
    for run in seconds:
        modules = [load(path, threads=1, verify="full", expert_memory=how) for how in ways]
        sessions = [module.session() for module in modules]
        for token in tokens[:WARM]:
            for session in sessions:
                session.append([token])
        before = [module.experts.facts() if module.experts else {} for module in modules]
        for at, token in enumerate(tokens[WARM:]):
            found = set()
            for way, session in enumerate(sessions):
                begin = time.perf_counter()
                hidden = session.append([token])
                run[way, at] = time.perf_counter() - begin
                found.add(hidden.tobytes())
            if len(found) > 1:
                raise SystemExit("hidden states depend on where experts lie")
        for module, first, counts in zip(modules, before, used, strict=True):
            if module.experts:
                last = module.experts.facts()
                counts.update({name: last[name] - first[name] for name in last})
    out = []
    each = np.median(seconds, 0).sum(1)
    for module, counts, total in zip(modules, used, each, strict=True):
        row = {"tokens_per_s": count / total, "ms": 1e3 * total / count}
        if module.experts:
            needs = ("hits", "ahead", "late", "misses")
            row |= {name: counts[name] / counts["needs"] for name in needs}
            row["mb_read"] = counts["bytes_read"] / (repeat * count) / 1e6
            row["unused"] = counts["unused"] / max(counts["loaded_ahead"], 1)
            facts = module.experts.facts()
            row |= {"slots": facts["slots"], "experts": facts["experts"]}
        out.append(row)
    return out


def ways_of(
    path: Path, parts: int, balances: list[float], tokens: list[int]
) -> Iterator[tuple[str, str, ExpertMemory | None]]:
    """Name the ways to have experts, with the rate at which the file can be read.

    A balance of 1 is the rate at which the bytes that a token needs, and that are not there, take as long to
    read as the token takes where all experts are in memory; both are measured first.
    """
    yield "mapped", "", None
    everything = ExpertMemory(1 << 50)
    yield "all in slots", "", everything
    whole = load(path, threads=1, expert_memory=everything)
    assert whole.experts is not None
    size = int(whole.experts.facts()["expert_bytes"]) // parts
    fast, slow = timed(path, [everything, ExpertMemory(size, ahead=0)], tokens, 5)
    for balance in (0.0, *balances):
        rate = 1e9 * slow["mb_read"] / fast["ms"] / balance if balance else None
        name = f"{rate / 1e9:.2f} GB/s ({balance:g})" if rate else "page cache"
        for ahead in (0, 1, 2):
            what = f"{ahead} ahead" if ahead else "on demand"
            yield what, name, ExpertMemory(size, ahead=ahead, bytes_per_s=rate)


def table(rows: list[dict[str, object]]) -> str:
    """Return the figures as a table in Markdown."""
    lines = [
        "| experts | file | tokens/s | times on demand | hits | of them ahead | late | misses | MB read |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def part(row: dict[str, object], name: str, form: str) -> str:
        return format(row[name], form) if name in row else "–"

    for row in rows:
        cells = [
            str(row["mode"]), str(row["file"]) or "–", part(row, "tokens_per_s", ".0f"),
            part(row, "ratio", ".2f"), *(part(row, n, ".1%") for n in ("hits", "ahead", "late", "misses")),
            part(row, "mb_read", ".1f"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="the artifact; compiled and kept if it is not there"
    )
    parser.add_argument("--factor", type=int, default=64, help="how many times as wide experts are")
    parser.add_argument("--quant", default="w2g64")
    parser.add_argument("--parts", type=int, default=4, help="experts are so many times the memory")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument(
        "--balance", type=float, nargs="*", default=[0.5, 1, 2],
        help="time to read what is missing over the time to compute, for each rate",
    )  # fmt: skip
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write a JSON line for each way")
    parser.add_argument("--write", type=Path, help="put the table between the marks of this page")
    args = parser.parse_args()
    path = model(args.model, args.factor, args.quant, WARM + args.tokens)
    tokens = text(load(path), WARM + args.tokens)
    ways = list(ways_of(path, args.parts, args.balance, tokens))
    found_of = timed(path, [how for _, _, how in ways], tokens, args.repeat)
    rows: list[dict[str, object]] = []
    for (mode, file, _), found in zip(ways, found_of, strict=True):
        row: dict[str, object] = {"mode": mode, "file": file, **found}
        base = next((r for r in rows if r["file"] == file and r["mode"] == "on demand"), row)
        if file:
            row["ratio"] = found["tokens_per_s"] / float(str(base["tokens_per_s"]))
        rows.append(row)
    print(table(rows))
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.write:
        page = args.write.read_text()
        begin, rest = page.split(BEGIN)
        args.write.write_text(f"{begin}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
