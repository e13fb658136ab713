"""``mimo-compile bench model``: an artifact beside whole models of peers."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.cli.options import calibration
from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.bench.model import ModelRow
    from mimo_compile.cli.console import Console


def run_model(args: argparse.Namespace) -> int:
    """Compare tokens/s, load time and memory of a model, compiled and by peers; return 0."""
    from mimo_compile.bench.machine import machine_facts
    from mimo_compile.bench.model import ModelRow, compare_models, find_entrants, random_prompt
    from mimo_compile.bench.models.compiled import (
        batch_entrant,
        entrant,
        roof_entrant,
        weight_bytes,
    )
    from mimo_compile.bench.models.entrant import ModelAsk
    from mimo_compile.bench.peers import parse_peers
    from mimo_compile.bench.runner import missing_peers
    from mimo_compile.cli.bench import PEERS
    from mimo_compile.cli.bench_table import reason
    from mimo_compile.ir.hardware import resolve_target
    from mimo_compile.runtime import load

    console: Console = args.console
    hardware = resolve_target("cpu", args.threads)
    peers = parse_peers(PEERS if args.peers is None else args.peers)
    missing = missing_peers(peers)
    for absent in missing:
        console.say(f"missing: {reason(absent)}")
    with tempfile.TemporaryDirectory(prefix="mimo-bench-") as scratch:
        artifact, folder = _artifact(args, Path(scratch))
        module = load(artifact, threads=hardware.threads)
        decoder = module.manifest.decoder
        if decoder is None:
            raise UsageError(
                f"{artifact} is no decoder", remedy="bench model needs a language model"
            )
        count = args.prompt_tokens + args.new_tokens
        if count > decoder.max_context:
            raise UsageError(f"{count} tokens do not fit the context of {decoder.max_context}")
        prompt = random_prompt(decoder.vocab, args.prompt_tokens, args.seed)
        kept = Path(scratch if args.keep is None else args.keep)
        ask = ModelAsk(folder, module.manifest.quant, module.threads, count, kept)
        nbytes = weight_bytes(module)
        ours = ModelRow(f"mimo {module.manifest.quant}", module.threads, weight_bytes=nbytes)
        roof = roof_entrant(nbytes, module.threads) if nbytes else None
        side = entrant(artifact, module)
        together = [batch_entrant(artifact, module)] if module.batch > 1 else []
        del module  # its own process loads it again
        field, left_out = find_entrants(peers, ask)
        found = compare_models(
            (ours, side), [*together, *field], prompt, args.new_tokens, min(args.rounds, 5),
            lambda text: console.log(text, 1), roof,
        )  # fmt: skip
    left_out += found.left_out
    facts = machine_facts(hardware)
    _show(console, found.rows)
    for absent in left_out:
        console.say(f"left out: {reason(absent)}")
    console.say(f"{facts['name']}, {hardware.threads} threads, load {facts['load']}")
    console.result(
        {
            "ok": True, "machine": facts, "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens, "rows": [r.json() for r in found.rows],
            "missing": [asdict(m) for m in missing], "left_out": [asdict(o) for o in left_out],
        }
    )  # fmt: skip
    return 0


def _artifact(args: argparse.Namespace, scratch: Path) -> tuple[Path, Path | None]:
    """Return the artifact to run and the checkpoint folder of its peers (None: unknown)."""
    from mimo_compile.api import is_artifact
    from mimo_compile.frontend.huggingface import resolve_source

    source = args.source or "tiny"
    if is_artifact(source):
        if args.batch != 1 or args.pages is not None:
            raise UsageError(
                f"--batch and --pages are for models that are compiled here; {source} has the sequences that "
                "it was compiled for",
                remedy="leave it out",
            )
        from mimo_compile.runtime.container import open_artifact
        from mimo_compile.verify import builtin_source

        parts = open_artifact(source)
        if parts.manifest.target.kind != "cpu":
            raise UsageError(
                f"bench model is for CPUs, and {source} is for {parts.manifest.target.name}",
                remedy="`mimo-compile run` says how many tokens a second an artifact makes",
            )
        if args.weights is not None:
            return Path(source), resolve_source(args.weights)
        return Path(source), builtin_source(parts)
    if args.weights is not None:
        raise UsageError("--source says what an artifact was compiled from; SRC is no artifact")
    from mimo_compile.api import compile as compile_model

    folder = resolve_source(source)
    artifact = compile_model(
        folder, quant=args.quant, objective=args.objective, db=args.db, threads=args.threads,
        seed=args.seed, max_context=args.max_context or args.prompt_tokens + args.new_tokens,
        batch=args.batch, pages=args.pages,
        calibrate=calibration(args) or "rtn",
    )  # fmt: skip
    return artifact.save(scratch / "bench.mimo"), folder


_SPEED = (
    "impl", "prefill tok/s", "spread", "ours/its", "decode tok/s", "spread", "ours/its", "GB/s",
    "of read roof",
)  # fmt: skip
_SIZE = ("impl", "load s", "check s", "file MB", "resident MB", "own MB", "mapped MB", "peak MB")


def _show(console: Console, rows: list[ModelRow]) -> None:
    from mimo_compile.cli.console import number, table

    base: dict[str, Any] = rows[0].json()
    speed, size = [], []
    for row in rows:
        figures = row.json()
        cells: list[object] = [figures["impl"]]
        for part in ("prefill", "decode"):
            rate, spread = figures[f"{part}_tokens_per_s"], figures[f"{part}_spread"]
            if rate is None:
                cells += [None, None, None]
                continue
            cells += [number(rate), "..".join(number(x) or "" for x in spread)]
            cells.append(f"{base[f'{part}_tokens_per_s'] / rate:.2f}x")
        share = figures["decode_roof_share"]
        cells += [number(figures["decode_gb_per_s"]), share and f"{100 * share:.0f} %"]
        speed.append(cells)
        size.append(
            [
                figures["impl"], number(figures["load_s"]), number(figures["check_s"]),
                *(
                    None if figures[name] is None else f"{figures[name] / 1e6:.0f}"
                    for name in ("file_bytes", "rss_bytes", "anonymous_bytes", "mapped_bytes", "peak_bytes")
                ),
            ]
        )  # fmt: skip
    console.say(table(speed, _SPEED, right="lrrrrrrrr"))
    console.say(table(size, _SIZE, right="lrrrrrrr"))
