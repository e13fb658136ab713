"""``mimo-compile calibrate``: thresholds of an attention policy, from a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_compile.cli.options import check_output, need_extra, positive
from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.frontend.models.thresholds import Thresholds

DESCRIPTION = """\
Find the thresholds of --attention sale for each layer and query head: the largest ones whose error
on a text stays below --theta. They are written as JSON, which --attention sale:thresholds=FILE
reads when the model is compiled."""
EXAMPLE = """
mimo-compile calibrate tiny --attention sale:least=256 --length 1024 -o thresholds.json
mimo-compile calibrate path/to/checkpoint --attention sale --text book.txt -o thresholds.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("source", metavar="SRC", help="checkpoint folder, .gguf file, or tiny")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT.json", help="the file to write"
    )
    parser.add_argument(
        "--attention",
        default="sale",
        metavar="A",
        help="sale (default), or with arguments, of which tau= is the largest threshold that is tried",
    )
    parser.add_argument(
        "--quant",
        default="none",
        metavar="Q",
        help="formats of weights and KV caches (default: none)",
    )
    parser.add_argument(
        "--max-context", type=positive, metavar="N", help="longest sequence (default: as compile)"
    )
    parser.add_argument(
        "--theta",
        type=float,
        default=0.4,
        metavar="E",
        help="L1 error of a head's output that is allowed for each token (default: 0.4)",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="calibrate on this text (default: sources of the standard library, without those held out "
        "for judging)",
    )  # fmt: skip
    parser.add_argument(
        "--sequences", type=positive, default=4, metavar="N", help="of the text (default: 4)"
    )
    parser.add_argument(
        "--length", type=positive, default=4096, metavar="N", help="tokens of each (default: 4096)"
    )


def run(args: argparse.Namespace) -> int:
    """Calibrate and write; return 0."""
    need_extra("calibrate")
    console: Console = args.console
    output = check_output(args.output, ".json")
    if not 0 < args.theta < float("inf"):
        raise UsageError(f"--theta {args.theta:g} is not a positive number")
    from mimo_compile.frontend.huggingface import load_checkpoint, resolve_source
    from mimo_compile.frontend.models.calibrate_thresholds import Text, calibrate_thresholds
    from mimo_compile.ir.formats import parse_scheme
    from mimo_compile.ir.hardware import local_cpu
    from mimo_compile.ir.policies import parse_policy

    policy = parse_policy(args.attention)
    if policy.name != "sale":
        raise UsageError(
            f"--attention {policy} has no thresholds to calibrate", remedy="use --attention sale"
        )
    loaded = load_checkpoint(
        resolve_source(args.source), parse_scheme(args.quant), args.max_context,
        hardware=local_cpu(), attention=policy,
    )  # fmt: skip
    found = calibrate_thresholds(
        loaded, args.theta, Text(args.text, args.sequences, args.length, args.seed), console.log
    )
    found.save(output)
    _show(console, output, found)
    return 0


def _show(console: Console, output: Path, found: Thresholds) -> None:
    from mimo_compile.cli.console import table

    rows = []
    for layer, taus in found.layers.items():
        share = found.share[layer]
        rows.append(
            (
                layer, f"{min(taus):.2g}..{max(taus):.2g}", sum(not tau for tau in taus),
                f"{100 * sum(share) / len(share):.0f} %",
            )
        )  # fmt: skip
    console.say(f"{output}: thresholds of {found.policy}, theta {found.theta:g}")
    console.say(table(rows, ("layer", "thresholds", "dense heads", "blocks kept"), right="rlrr"))
    console.result(
        {
            "ok": True, "path": output, "policy": found.policy, "theta": found.theta,
            "text": dict(found.text), "layers": {str(i): row for i, row in found.layers.items()},
            "share": {str(i): row for i, row in found.share.items()},
        }
    )  # fmt: skip
