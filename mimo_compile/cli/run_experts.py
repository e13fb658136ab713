"""What ``run`` says of experts whose memory is limited."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.runtime.module import Module


def add_experts(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help="leave experts in the artifact's file, and have at most so much of them in memory: 512MiB, 2GiB "
        "(see docs/experts.md)",
    )


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
