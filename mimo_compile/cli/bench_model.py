"""``mimo-compile bench model``: tokens/s of an artifact beside eager PyTorch."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.cli.options import calibration
from mimo_compile.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from mimo_compile.bench.model import ModelRow
    from mimo_compile.cli.console import Console


def run_model(args: argparse.Namespace) -> int:
    """Compare tokens/s of a model, compiled and eager; return 0."""
    from mimo_compile.bench.machine import machine_facts
    from mimo_compile.bench.model import (
        ModelRow,
        compare_models,
        compiled_run,
        eager_peer,
        eager_run,
        peer_name,
        random_prompt,
        read_roof,
        weight_bytes,
    )
    from mimo_compile.bench.peers import parse_peers
    from mimo_compile.ir.hardware import resolve_target
    from mimo_compile.runtime import load

    console: Console = args.console
    hardware = resolve_target("cpu", args.threads)
    peers = parse_peers(args.peers)
    with tempfile.TemporaryDirectory(prefix="mimo-bench-") as scratch:
        artifact, folder = _artifact(args, Path(scratch))
        module = load(artifact, threads=args.threads)
        decoder = module.manifest.decoder
        if decoder is None:
            raise UsageError(
                f"{artifact} is no decoder", remedy="bench model needs a language model"
            )
        count = args.prompt_tokens + args.new_tokens
        if count > decoder.max_context:
            raise UsageError(f"{count} tokens do not fit the context of {decoder.max_context}")
        prompt = random_prompt(decoder.vocab, args.prompt_tokens, args.seed)
        ours = ModelRow(
            f"mimo {module.manifest.quant}", module.threads, weight_bytes=weight_bytes(module)
        )
        entries = [(ours, compiled_run(module, prompt, args.new_tokens, ours))]
        for dtype in ("float32", "bfloat16") if "torch" in peers else ():
            if folder is None:
                console.log("no eager peer: the artifact does not say which folder it came from")
                break
            try:
                model = eager_peer(folder, dtype)
            except MissingExtra as error:
                console.log(f"no eager peer: {error}")
                break
            row = ModelRow(peer_name(dtype), hardware.threads)
            entries.append((row, eager_run(model, prompt, args.new_tokens, hardware.threads)))
        roofs = [(ours, read_roof(hardware, ours.weight_bytes))] if ours.weight_bytes else []
        rows = compare_models(
            entries, min(args.rounds, 5), lambda text: console.log(text, 1), roofs
        )
    facts = machine_facts(hardware)
    _show(console, rows)
    console.say(f"{facts['name']}, {hardware.threads} threads, load {facts['load']}")
    console.result(
        {
            "ok": True, "machine": facts, "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens, "rows": [r.json() for r in rows],
        }
    )  # fmt: skip
    return 0


def _artifact(args: argparse.Namespace, scratch: Path) -> tuple[Path, Path | None]:
    """Return the artifact to run and the checkpoint folder of its peer (None: unknown)."""
    from mimo_compile.frontend.huggingface import resolve_source

    source = args.source or "tiny"
    if Path(source).suffix == ".mimo":
        from mimo_compile.runtime.container import open_artifact
        from mimo_compile.verify import builtin_source

        return Path(source), builtin_source(open_artifact(source))
    from mimo_compile.api import compile as compile_model

    folder = resolve_source(source)
    artifact = compile_model(
        folder, quant=args.quant, objective=args.objective, db=args.db, threads=args.threads,
        seed=args.seed, max_context=args.max_context or args.prompt_tokens + args.new_tokens,
        calibrate=calibration(args) or "rtn",
    )  # fmt: skip
    return artifact.save(scratch / "bench.mimo"), folder


def _show(console: Console, rows: list[ModelRow]) -> None:
    from mimo_compile.cli.console import number, table

    base: dict[str, Any] = rows[0].json()
    lines = []
    for row in rows:
        figures = row.json()
        cells: list[object] = [figures["impl"]]
        for part in ("prefill", "decode"):
            rate, (low, high) = figures[f"{part}_tokens_per_s"], figures[f"{part}_spread"]
            cells += [number(rate), f"{number(low)}..{number(high)}"]
            cells.append(f"{base[f'{part}_tokens_per_s'] / rate:.2f}x")
        cells.append(number(figures["decode_gb_per_s"]))
        share = figures["decode_roof_share"]
        cells.append(None if share is None else f"{100 * share:.0f} %")
        lines.append(cells)
    header = (
        "impl",
        "prefill tok/s",
        "spread",
        "ours/its",
        "decode tok/s",
        "spread",
        "ours/its",
        "GB/s",
        "of read roof",
    )
    console.say(table(lines, header, right="lrrrrrrrr"))
