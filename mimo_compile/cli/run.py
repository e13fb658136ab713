"""``mimo-compile run``: generate text with an artifact. Needs neither torch nor a compiler."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.cli.options import positive
from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console

DESCRIPTION = """\
Generate text with an artifact: streams it to stdout, then prints tokens/s to stderr, and joules
per token where a meter exists. Temperature 0 (the default) is greedy."""
EXAMPLE = """
mimo-compile run t.mimo --prompt "def " --max-new-tokens 64
mimo-compile run t.mimo --prompt "import os" --temperature 0.8 --seed 1 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("artifact", type=Path, metavar="OUT.mimo")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
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


def run(args: argparse.Namespace) -> int:
    """Generate, stream, print figures; return 0."""
    console: Console = args.console
    prompt = _prompt(args)
    from mimo_compile.runtime import load
    from mimo_compile.runtime.generate import Stats

    begin = time.perf_counter()
    module = load(args.artifact, threads=args.threads)
    load_seconds = time.perf_counter() - begin
    stats = Stats()
    limit = args.max_new_tokens
    if limit is None:
        decoder = module.manifest.decoder
        room = decoder.max_context - len(module.tokenizer.encode(prompt).ids) + 1 if decoder else 0
        limit = max(0, min(128, room))
    pieces: list[str] = []
    try:
        for piece in module.generate(
            prompt, limit, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            seed=args.seed, stop_at_eos=not args.ignore_eos, stats=stats, adapter=args.adapter,
        ):  # fmt: skip
            pieces.append(piece)
            console.stream(piece)
    finally:
        console.stream("\n" if pieces else "")
    console.log(_figures(stats))
    console.result(
        {
            "ok": True, "artifact": args.artifact, "prompt": prompt, "text": "".join(pieces),
            "adapter": args.adapter, "prompt_tokens": stats.prompt_tokens, "new_tokens": stats.new_tokens,
            "prefill_tokens_per_s": stats.prefill_tokens_per_s,
            "decode_tokens_per_s": stats.decode_tokens_per_s,
            "joules_per_token": stats.joules_per_token,
            "joules_source": stats.joules_source if stats.joules_per_token is not None else None,
            "joules_reason": stats.joules_reason or None, "stopped": stats.stopped,
            "load_seconds": load_seconds, "threads": module.threads,
        }
    )  # fmt: skip
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return _argument_text(args.prompt)
    if str(args.prompt_file) == "-":
        data, name = sys.stdin.buffer.read(), "on standard input"
    else:
        data, name = args.prompt_file.read_bytes(), f"file {args.prompt_file}"
    try:
        return str(data.decode("utf-8"))
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
    if stats.joules_per_token is not None:
        parts.append(f"{number(stats.joules_per_token)} J/token ({stats.joules_source})")
    elif stats.joules_reason:
        parts.append(f"joules not measured: {stats.joules_reason}")
    return "[" + ", ".join(parts) + "]"
