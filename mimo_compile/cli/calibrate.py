"""``mimo-compile calibrate``: what an attention policy has to know of a model, from a text."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_compile.cli.options import check_output, need_extra, positive
from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.frontend.models.classes import Classes
    from mimo_compile.frontend.models.thresholds import Thresholds

DESCRIPTION = """\
Find what an attention policy has to know of a model, on a text; it is written as JSON, which
--attention reads when the model is compiled. Of sale: the thresholds of each layer and query head,
the largest ones whose error stays below --theta (sale:thresholds=FILE). Of tailorkv: how much of
each layer's attention lies outside of its best keys, which says whose cache is quantised
(tailorkv:classes=FILE)."""
EXAMPLE = """
mimo-compile calibrate tiny --attention sale:least=256 --length 1024 -o thresholds.json
mimo-compile calibrate path/to/checkpoint --attention sale --text book.txt -o thresholds.json
mimo-compile calibrate path/to/checkpoint --attention tailorkv -o classes.json
"""
THETA = 0.4


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
        help="sale (default), or with arguments, of which tau= is the largest threshold that is tried; "
        "or tailorkv",
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
        metavar="E",
        help=f"of sale: L1 error of a head's output that is allowed for each token (default: {THETA})",
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
    if args.theta is not None and not 0 < args.theta < float("inf"):
        raise UsageError(f"--theta {args.theta:g} is not a positive number")
    from mimo_compile.frontend.huggingface import load_checkpoint, resolve_source
    from mimo_compile.frontend.models.calibrate_classes import calibrate_classes
    from mimo_compile.frontend.models.calibrate_thresholds import Text, calibrate_thresholds
    from mimo_compile.ir.formats import parse_scheme
    from mimo_compile.ir.hardware import local_cpu
    from mimo_compile.ir.policies import parse_policy
    from mimo_compile.ir.policies.sale import Sale
    from mimo_compile.ir.policies.tailorkv import TailorKV

    policy = parse_policy(args.attention)
    if not isinstance(policy, Sale | TailorKV):
        raise UsageError(
            f"--attention {policy} has no thresholds to calibrate",
            remedy="use --attention sale or tailorkv",
        )
    tau = policy.tau
    if isinstance(policy, TailorKV):
        if args.theta is not None:
            raise UsageError("--theta is for --attention sale", remedy="leave it out")
        # attention as it is without them
        policy = replace(policy, quantised=0, classes="", tau=TailorKV().tau)
    loaded = load_checkpoint(
        resolve_source(args.source), parse_scheme(args.quant), args.max_context,
        hardware=local_cpu(), attention=policy,
    )  # fmt: skip
    text = Text(args.text, args.sequences, args.length, args.seed)
    if isinstance(policy, TailorKV):
        classes = calibrate_classes(loaded, text, console.log)
        classes.save(output)
        _show_classes(console, output, classes, tau)
        return 0
    found = calibrate_thresholds(
        loaded, THETA if args.theta is None else args.theta, text, console.log
    )
    found.save(output)
    _show(console, output, found)
    return 0


def _show_classes(console: Console, output: Path, found: Classes, tau: float) -> None:
    from mimo_compile.cli.console import table

    quantised = [i for i, mass in found.outside.items() if mass > tau]
    rows = [
        (layer, f"{mass:.3f}", "quantised" if layer in quantised else "select")
        for layer, mass in found.outside.items()
    ]
    console.say(f"{output}: attention outside of the best 5 % of the keys; quantised above {tau:g}")
    console.say(table(rows, ("layer", "outside", "attention"), right="rrl"))
    console.result(
        {
            "ok": True, "path": output, "tau": tau, "text": dict(found.text),
            "outside": {str(i): mass for i, mass in found.outside.items()}, "quantised": quantised,
        }
    )  # fmt: skip


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
