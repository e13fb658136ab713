"""What ``run`` says of experts whose memory is limited."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.runtime.expert_memory import ExpertMemory
    from mimo_compile.runtime.module import Module


def add_experts(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help="leave experts in the artifact's file, and have at most so much of them in memory: 512MiB, 2GiB "
        "(see docs/experts.md)",
    )
    parser.add_argument(
        "--pre-gates",
        type=Path,
        metavar="FILE",
        help="let gates that were trained for it say which experts to load ahead of need; needs "
        "--expert-memory, and changes no text",
    )


def asked_experts(args: argparse.Namespace) -> ExpertMemory | None:
    """Return how much memory experts may take; None: all are mapped.

    Raises:
        UsageError: There are gates, and no limit that they could be of use for.
    """
    if args.expert_memory is None:
        if args.pre_gates is not None:
            raise UsageError(
                "--pre-gates say what to load, and without --expert-memory all experts are mapped",
                remedy="give --expert-memory SIZE, or leave --pre-gates out",
            )
        return None
    from mimo_compile.runtime import ExpertMemory

    ahead = 1 if args.pre_gates is None else 2  # routers that are asked so early are often wrong
    return ExpertMemory(args.expert_memory, ahead=ahead, pre_gates=args.pre_gates)


def show_experts(console: Console, module: Module) -> dict[str, dict[str, Any] | None]:
    """Say how often experts were there; return the same for ``--json``: None where all are mapped."""
    from mimo_compile.runtime.sizes import spell_size

    if module.experts is None:
        return {"expert_memory": None}
    facts = module.experts.facts()
    console.log(
        f"[{facts['slots']} of {facts['experts']} experts in {spell_size(int(facts['slot_bytes']))}: of "
        f"{facts['needs']} needs {facts['hits']} hits ({facts['ahead']} loaded ahead), {facts['late']} on "
        f"their way, {facts['misses']} misses; {spell_size(int(facts['bytes_read']))} read, "
        f"{facts['stall_seconds']:.3g} s waited]"
    )
    return {"expert_memory": facts}
