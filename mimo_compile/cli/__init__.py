"""The command line: ``mimo-compile VERB``, one module per verb, imported when its verb is asked for.

A verb's module has ``DESCRIPTION`` and ``EXAMPLE`` texts, ``add_arguments(parser)`` and
``run(args) -> int``, and imports nothing heavy before ``run``: that keeps help instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from mimo_compile.cli.console import Console, ReaderGone
from mimo_compile.cli.signals import Interruption
from mimo_compile.errors import MimoError, UsageError

VERBS: dict[str, str] = {
    "compile": "turn a model into an artifact",
    "tune": "search for better kernels by measurement; records are kept",
    "calibrate": "find what an attention policy has to know, on a text",
    "run": "generate text with an artifact",
    "experts": "forecast the load of experts from a routing log, and place them on devices",
    "verify": "compare an artifact with the reference, op by op and end to end",
    "bench": "time kernels or whole models side by side with peers",
    "inspect": "show an artifact's plan, workloads, kernels and code",
    "report": "write one HTML page about an artifact or a database",
    "db": "export, import, merge, prune, check or salvage tuning records",
    "targets": "describe this machine, its meters, and which formats have kernels",
}
"""Verb (also the name of its module here) to one line of help."""

_EXAMPLES = """\
examples:
  mimo-compile compile tiny --quant w4g64a8 -o t.mimo
  mimo-compile run t.mimo --prompt "def " --max-new-tokens 64
  mimo-compile tune tiny --quant w4g64a8 --time 1m

`mimo-compile VERB --help` explains a verb.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and leaving."""
        raise UsageError(message, remedy=f"See {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(json="--json" in arguments, verbosity=_verbosity(arguments))
    with Interruption() as interruption:
        try:
            code = _dispatch(arguments, console)
            console.flush()
        except ReaderGone:
            code = 0
        except KeyboardInterrupt:
            code = 130
        except (Exception, SystemExit) as error:
            # what an interrupted native call raises is no failure of its own
            code = 1 if interruption.signal is not None else _report(error, console)
        if interruption.signal is not None:
            code = 128 + interruption.signal
        if code > 128:
            console.interrupted(code)
    return code


def _verbosity(arguments: Sequence[str]) -> int:
    """Count -v before parsing, so that a failure of the parser itself can be shown in full."""
    if "--debug" in arguments:
        return 2
    short = [a[1:] for a in arguments if a.startswith("-v") and set(a[1:]) == {"v"}]
    return sum(map(len, short)) + arguments.count("--verbose")


def _dispatch(arguments: list[str], console: Console) -> int:
    if arguments[:1] == ["help"] and arguments[1:2]:  # help VERB
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
        console.say("usage: mimo-compile VERB [options]\n\nverbs:\n" + "\n".join(lines) + "\n")
        console.say(_EXAMPLES.rstrip())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from mimo_compile import __version__

        console.say(f"mimo-compile {__version__}")
        console.result({"ok": True, "version": __version__})
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, 1)
        remedy = f"Did you mean {close[0]!r}?" if close else f"Verbs are {', '.join(VERBS)}"
        raise UsageError(f"unknown verb {verb!r}", remedy=remedy)
    module = import_module(f"mimo_compile.cli.{verb}")
    parser = Parser(
        prog=f"mimo-compile {verb}",
        description=module.DESCRIPTION,
        epilog="example:\n" + "\n".join("  " + e for e in module.EXAMPLE.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    _add_common(parser)
    args = parser.parse_args(rest)
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads} is not a positive number")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed} is negative")
    args.console = console
    with console.guard_stdout(), console.notes_shown():
        return int(module.run(args))


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("common options")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    group.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of everything random (default: 0)"
    )
    group.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout, all else on stderr"
    )
    group.add_argument(
        "-v", "--verbose", action="count", default=0, help="say more; twice: tracebacks of errors"
    )
    group.add_argument("--debug", action="store_true", help="like -v -v")


def _report(error: BaseException, console: Console) -> int:
    """Turn a failure into one line on stderr, JSON if asked for, and the exit code."""
    if isinstance(error, SystemExit):  # argparse after printing help
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if isinstance(error, MimoError):
        text, code = str(error), error.exit_code
    elif isinstance(error, OSError):
        place = f" ({error.filename})" if error.filename else ""
        text, code = f"{error.strerror or error}{place}", 1
    elif isinstance(error, MemoryError):
        text, code = "out of memory", 1
    else:
        hint = "" if console.verbosity >= 2 else ". Run again with -v -v for the traceback"
        first = (str(error).strip() or "no message").splitlines()[0]
        text, code = f"internal error: {type(error).__name__}: {first}{hint}", 1
    if console.verbosity >= 2:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    console.fail(text, code)
    return code


__all__ = ["VERBS", "Parser", "main"]
