"""``mimo-compile verify``: compiled against the reference, op by op and end to end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_compile.cli.options import (
    add_calibration,
    add_gates,
    add_pre_gates,
    calibration,
    need_extra,
    positive,
)
from mimo_compile.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.verify import Verification

DESCRIPTION = """\
Check an artifact: every byte against its hash, every kernel on fresh inputs against its operator's
float64 reference within its error bound, and the whole model against eager torch with the same
quantisation. Exit code 4 if anything is outside its bound."""
EXAMPLE = """
mimo-compile verify t.mimo
mimo-compile verify t.mimo --perplexity
mimo-compile verify model.mimo --source path/to/checkpoint --perplexity --text book.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("artifact", type=Path, metavar="OUT.mimo")
    parser.add_argument(
        "--source", metavar="SRC", help="what it was compiled from (found by itself for tiny)"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="compare logits of N tokens (default: 96, after as many as an attention policy needs to "
        "leave something out)",
    )
    parser.add_argument(
        "--perplexity", action="store_true", help="compare perplexity, compiled against eager, too"
    )
    parser.add_argument(
        "--perplexity-tokens",
        type=positive,
        default=4096,
        metavar="N",
        help="on N tokens (default: 4096)",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="take tokens from this file (default: standard-library modules that tiny never saw)",
    )  # fmt: skip

    add_calibration(parser)
    add_gates(parser)
    add_pre_gates(parser)


def run(args: argparse.Namespace) -> int:
    """Verify and report; return 0, or 4 when something is wrong."""
    need_extra("verify")
    console: Console = args.console
    from mimo_compile.verify import verify_artifact

    text = None
    if args.text is not None:
        try:
            text = args.text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{args.text} is not UTF-8 text") from error
    found = verify_artifact(
        args.artifact, source=args.source, threads=args.threads, seed=args.seed, tokens=args.tokens,
        text=text, perplexity_tokens=args.perplexity_tokens if args.perplexity else 0,
        log=lambda line: console.log(line, 1), calibration=calibration(args),
        gates=args.gates, pre_gates=args.pre_gates,
    )  # fmt: skip
    _show(console, found)
    console.result({**found.to_json(), "exit_code": 0 if found.ok else VerificationError.exit_code})
    if not found.ok:
        console.log(f"error: {args.artifact} is not right: see the lines marked WRONG")
    return 0 if found.ok else VerificationError.exit_code


def _show(console: Console, found: Verification) -> None:
    from mimo_compile.cli.console import table
    from mimo_compile.verify.found import STRAYED_BOUND

    rows = []
    by_op: dict[str, list[float]] = {}
    for check in found.kernels:
        if check.error_ratio is not None:
            by_op.setdefault(check.workload.partition(":")[0], []).append(check.error_ratio)
    for op, ratios in sorted(by_op.items()):
        rows.append((op, len(ratios), f"{max(ratios):.3f}"))
    console.say(f"{found.path}: all bytes match their hashes")
    if rows:
        console.say(table(rows, ("op", "kernels", "largest error / bound"), right="lrr"))
    skipped = [c for c in found.kernels if c.skipped]
    if skipped:
        console.say(f"{len(skipped)} kernels have no reference of their own ({skipped[0].message})")
    for check in found.kernels:
        if not check.ok:
            console.say(f"WRONG {check.workload} ({check.schedule}): {check.message}")
    for what, whole in (("end to end", found.end_to_end), ("in a batch", found.batch)):
        if whole is None:
            continue
        state = "ok" if whole.ok else "WRONG"
        console.say(
            f"{what}, {whole.rows} rows against eager torch: {state}; error over the row's largest: "
            f"median {whole.median_error:.1e}, p95 {whole.p95_error:.1e} (bound {whole.bound_p95:.0e}), "
            f"decoded {whole.decoded_median:.1e}, max {whole.max_error:.1e}"
            + (f" (bound {whole.bound_max:.0e})" if whole.bound_max < 1e30 else "")
            + f"; same largest logit in {100 * whole.same_choice:.1f} %"
        )
        if whole.followed or whole.strayed or whole.unseen:
            share = 100 * whole.followed / max(1, whole.choices)
            console.say(
                f"experts: {whole.followed} of {whole.choices} choices ({share:.2g} %) fell otherwise at "
                f"scores that nearly tie, and were followed; {whole.strayed} at others were not (bound "
                f"{100 * STRAYED_BOUND:.0f} %)"
                + (f"; {whole.unseen} could not be compared" if whole.unseen else "")
            )
    p = found.perplexity
    if p is not None:
        console.say(
            f"perplexity on {p.tokens} tokens: {'ok' if p.ok else 'WRONG'}; compiled {p.compiled:.4f}, "
            f"eager {p.eager:.4f}, difference {100 * p.difference:+.4f} % (bound {100 * p.bound:.3g} %)"
        )
    for note in found.notes:
        console.say(f"note: {note}")
