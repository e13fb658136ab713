"""``mimo-compile run``: generate text with an artifact. Needs neither torch nor a compiler."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.cli.options import positive
from mimo_compile.cli.run_drafts import (
    add_drafts,
    check_drafts,
    draft_figures,
    drafting,
    show_drafts,
)
from mimo_compile.cli.run_experts import add_experts, asked_experts, show_experts
from mimo_compile.cli.run_routing import add_routing, check_routing, routed, show_routing
from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console

DESCRIPTION = """\
Generate text with an artifact: streams it to stdout, then prints tokens/s to stderr, and joules
per token where a meter exists. Temperature 0 (the default) is greedy."""
EXAMPLE = """
mimo-compile run t.mimo --prompt "def " --max-new-tokens 64
mimo-compile run t.mimo --prompt "import os" --temperature 0.8 --seed 1 --json
mimo-compile run t.mimo --prompt "def add(" --speculative
mimo-compile run t.mimo --prompt "def add(" --prompt "class Stack:" --max-new-tokens 32
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("artifact", type=Path, metavar="OUT.mimo")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be repeated: as many texts at a time as the artifact was compiled for (--batch)",
    )
    prompt.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="take the prompt from a file; -: standard input",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="default: 128, or what fits the context",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: greedy (default)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all tokens (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument(
        "--adapter", metavar="NAME", help="use one of the artifact's adapters (see `inspect`)"
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on after the end-of-text token"
    )
    add_drafts(parser)
    parser.add_argument(
        "--kv-store", metavar="DIR",
        help="keep keys and values that are read by lists alone in a file there (--attention tailorkv)",
    )  # fmt: skip
    add_experts(parser)
    add_routing(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, stream, print figures; return 0."""
    console: Console = args.console
    prompts = _prompts(args)
    check_drafts(args, len(prompts))
    check_routing(args)
    from mimo_compile.runtime import load
    from mimo_compile.runtime.generate import Stats

    begin = time.perf_counter()
    module = load(
        args.artifact, threads=args.threads, kv_store=args.kv_store,
        expert_memory=asked_experts(args),
    )  # fmt: skip
    load_seconds = time.perf_counter() - begin
    stats = Stats()
    limit = args.max_new_tokens
    if limit is None:
        decoder = module.manifest.decoder
        longest = max(len(module.tokenizer.encode(prompt).ids) for prompt in prompts)
        limit = max(0, min(128, decoder.max_context - longest + 1 if decoder else 0))
    how: dict[str, Any] = {
        "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed,
        "stop_at_eos": not args.ignore_eos, "stats": stats, "adapter": args.adapter,
    }  # fmt: skip
    made: dict[str, Any]
    with routed(args, module, len(prompts)) as routing:
        if len(prompts) == 1:
            pieces = module.generate(prompts[0], limit, speculative=drafting(args), **how)
            text = _stream(console, pieces)
            made = {"prompt": prompts[0], "text": text}
        else:
            pairs = module.generate_batch(prompts, limit, **how)
            made = {"prompts": prompts, "texts": _collect(console, prompts, pairs)}
    console.log(_figures(stats))
    show_routing(console, routing)
    experts = show_experts(console, module)
    drafts = show_drafts(args, console, module, stats)
    console.result(
        {
            "ok": True, "artifact": args.artifact, **made, "adapter": args.adapter,
            "prompt_tokens": stats.prompt_tokens, "new_tokens": stats.new_tokens,
            "prefill_tokens_per_s": stats.prefill_tokens_per_s,
            "decode_tokens_per_s": stats.decode_tokens_per_s,
            "joules_per_token": stats.joules_per_token,
            "joules_source": stats.joules_source if stats.joules_per_token is not None else None,
            "joules_reason": stats.joules_reason or None, "stopped": stats.stopped,
            "load_seconds": load_seconds, "threads": module.threads, **drafts,
            **routing, **experts,
        }
    )  # fmt: skip
    return 0


def _stream(console: Console, pieces: Iterator[str]) -> str:
    """Show a text as it comes, and return it."""
    got: list[str] = []
    try:
        for piece in pieces:
            got.append(piece)
            console.stream(piece)
    finally:
        console.stream("\n" if got else "")
    return "".join(got)


def _collect(console: Console, prompts: list[str], pairs: Iterator[tuple[int, str]]) -> list[str]:
    """Return the texts of several prompts, and show each behind its prompt when all are complete."""
    texts = [""] * len(prompts)
    try:
        for index, piece in pairs:
            texts[index] += piece
    finally:  # also what there is when it is interrupted
        for prompt, text in zip(prompts, texts, strict=True):
            console.stream(f"{prompt}{text}\n\n")
    return texts


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        return [_argument_text(text) for text in args.prompt]
    if str(args.prompt_file) == "-":
        data, name = sys.stdin.buffer.read(), "on standard input"
    else:
        data, name = args.prompt_file.read_bytes(), f"file {args.prompt_file}"
    try:
        return [str(data.decode("utf-8"))]
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt {name} is not UTF-8 text") from error


def _argument_text(text: str) -> str:
    """Return an argument as text; what the locale could not decode is read as UTF-8."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise UsageError("the prompt is not UTF-8 text (--prompt)") from error


def _figures(stats: Any) -> str:
    from mimo_compile.cli.console import number

    parts = [f"{stats.prompt_tokens} prompt tokens", f"{stats.new_tokens} new"]
    if stats.prefill_tokens_per_s:
        parts.append(f"prefill {number(stats.prefill_tokens_per_s)} tokens/s")
    if stats.decode_tokens_per_s:
        parts.append(f"decode {number(stats.decode_tokens_per_s)} tokens/s")
    parts += draft_figures(stats)
    if stats.joules_per_token is not None:
        parts.append(f"{number(stats.joules_per_token)} J/token ({stats.joules_source})")
    elif stats.joules_reason:
        parts.append(f"joules not measured: {stats.joules_reason}")
    return "[" + ", ".join(parts) + "]"
