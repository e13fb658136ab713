"""What ``run`` records of the experts that a model chooses, and forces on it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.cli.options import check_output
from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.runtime.module import Module


def add_routing(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--route-log",
        type=Path,
        metavar="OUT.safetensors",
        help="write which experts each token got (see docs/experts.md)",
    )
    parser.add_argument(
        "--route-replay",
        type=Path,
        metavar="FILE",
        help="give each token the experts that such a file has for its text and position",
    )


def check_routing(args: argparse.Namespace) -> None:
    """Refuse an output that cannot be written, or that is the input.

    Raises:
        UsageError: as said.
    """
    if args.route_log is None:
        return
    check_output(args.route_log, ".safetensors")
    replay = args.route_replay
    if replay is not None and replay.exists() and args.route_log.resolve() == replay.resolve():
        raise UsageError(f"--route-log would replace the file of --route-replay ({replay})")


@contextmanager
def routed(
    args: argparse.Namespace, module: Module, texts: int
) -> Iterator[dict[str, dict[str, Any] | None]]:
    """Record and replay what is asked for while texts are generated.

    Yields:
        ``route_log`` and ``route_replay``: None, or what was done, once it ends.

    Raises:
        UsageError: what routers of the artifact choose is not looked at.
    """
    from mimo_compile.runtime.routing import RoutingLog, recording, replaying

    target = module.manifest.target
    for option, path in (("--route-log", args.route_log), ("--route-replay", args.route_replay)):
        if path is not None and target.kind != "cpu":
            raise UsageError(
                f"{option}: the artifact is for {target.name}, where kernels run as one graph, and what "
                "routers choose is not looked at",
                remedy="Leave it out, or compile for a CPU.",
            )
    facts: dict[str, dict[str, Any] | None] = {"route_log": None, "route_replay": None}
    slots = range(min(texts, module.batch))
    recorder = replay = None
    with ExitStack() as stack:
        if args.route_replay is not None:
            log = RoutingLog.load(args.route_replay)
            replay = stack.enter_context(replaying(module, log, slots))
        if args.route_log is not None:
            recorder = stack.enter_context(recording(module, slots))
        try:
            yield facts
        finally:  # also what there is when it is interrupted
            if recorder is not None:
                log = recorder.log()
                log.save(args.route_log)
                facts["route_log"] = {
                    "path": args.route_log, "tokens": len(log.ids), "dropped": log.dropped,
                }  # fmt: skip
            if replay is not None:
                facts["route_replay"] = {
                    "path": args.route_replay, "forced": replay.forced, "changed": replay.changed,
                    "own": replay.own,
                }  # fmt: skip


def show_routing(console: Console, facts: dict[str, dict[str, Any] | None]) -> None:
    """Say what was recorded and replayed."""
    if (log := facts["route_log"]) is not None:
        more = f", {log['dropped']} more were not kept" if log["dropped"] else ""
        console.log(f"[routing of {log['tokens']} tokens in {log['path']}{more}]")
    if (replay := facts["route_replay"]) is not None:
        console.log(
            f"[{replay['forced']} choices of experts as in {replay['path']}, of which {replay['changed']} "
            f"would have been others; {replay['own']} that it has not were left to the model]"
        )
