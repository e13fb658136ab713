"""What ``mimo-compile run`` takes and tells about drafts (``--speculative``)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mimo_compile.cli.options import positive
from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.runtime.generate import Stats
    from mimo_compile.runtime.module import Module


def add_drafts(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--speculative",
        action="store_true",
        help="let the model's draft heads say some tokens ahead and verify them in one pass: the same text "
        "in less time (docs/speculative.md)",
    )
    parser.add_argument(
        "--draft-depth",
        type=positive,
        metavar="N",
        help="drafts of each pass (default: as many as pay, by what is accepted)",
    )


def check_drafts(args: argparse.Namespace, prompts: int) -> None:
    """Refuse what does not go together.

    Raises:
        UsageError: a depth without drafts, or drafts for several prompts.
    """
    if args.draft_depth is not None and not args.speculative:
        raise UsageError("--draft-depth is about --speculative", remedy="give both, or neither")
    if args.speculative and prompts > 1:
        raise UsageError(
            "--speculative is for one --prompt: texts that are decoded together share their passes already",
            remedy="give one prompt, or leave out --speculative",
        )


def drafting(args: argparse.Namespace) -> Any:
    """Return how to speculate; False: not at all."""
    if not args.speculative:
        return False
    from mimo_compile.runtime.speculate import Speculation

    return Speculation(args.draft_depth)


def show_drafts(
    args: argparse.Namespace, console: Console, module: Module, stats: Stats
) -> dict[str, Any]:
    """Say where the text may differ from a plain one; return what ``--json`` tells."""
    decoder = module.manifest.decoder
    if not args.speculative or decoder is None:
        return {}
    from mimo_compile.runtime.speculate import doubt

    why = doubt(decoder)
    if why:
        console.log(f"note: where tokens nearly tie, the text may differ from a plain one: {why}")
    told = stats.acceptance or {"passes": 0, "tokens_per_pass": None, "heads": []}
    return {"acceptance": {**told, "exact": not why}}


def draft_figures(stats: Stats) -> list[str]:
    """Return what the line of figures says of drafts."""
    told = stats.acceptance
    if told is None:
        return []
    rates = [f"{100 * head['rate']:.0f} %" for head in told["heads"] if head["rate"] is not None]
    accepted = f", drafts accepted {' '.join(rates)}" if rates else ""
    return [f"{told['tokens_per_pass']:.2f} tokens/pass{accepted}"]
