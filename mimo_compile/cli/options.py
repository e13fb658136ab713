"""Option values that several verbs share, and flags that come in groups."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?\Z")
_ENERGY = re.compile(r"(\d+(?:\.\d+)?)(mJ|kJ|J)?\Z")


def _number(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse show a UsageError's own text."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


@_number
def seconds(text: str) -> float:
    """Parse a duration: ``90``, ``90s``, ``10m``, ``1h30m``."""
    match = _DURATION.match(text)
    if not text or match is None:
        raise UsageError(f"{text!r} is not a duration", remedy="write 90s, 10m or 1h30m")
    h, m, s = (float(g or 0) for g in match.groups())
    total = 3600 * h + 60 * m + s
    if total <= 0:
        raise UsageError(f"{text!r}: a duration must be positive")
    return total


@_number
def joules(text: str) -> float:
    """Parse an energy: ``500J``, ``2kJ``, ``1500``."""
    match = _ENERGY.match(text)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{text!r} is not an energy", remedy="write 500J or 2kJ")
    return float(match[1]) * {"mJ": 1e-3, "kJ": 1e3}.get(match[2] or "J", 1.0)


@_number
def days(text: str) -> float:
    """Parse a positive number of days."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{text!r} is not a positive number of days")
    return value


@_number
def positive(text: str) -> int:
    """Parse a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{text!r} is not a positive whole number")
    return int(text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how a model is compiled: target, formats, objective, context, records."""
    parser.add_argument(
        "--target",
        default="cpu",
        metavar="T",
        help="cpu (this machine, default), or x86-64-v3, x86-64-v4, sapphirerapids; to tune only: "
        "sim:lut-tensor-core, sim:roma (simulated)",
    )
    parser.add_argument(
        "--quant",
        default="none",
        metavar="Q",
        help="none (default) or WEIGHT[aACT][kvKV], e.g. w8a8, w4g64a8, w4g64abf16, w4g64a8kv16; abf16 or a8 "
        "alone keep weights (see `targets --formats`); KV caches: kv16 (bfloat16), kvfp8, kv8, kv4, kv2, kv1",
    )
    parser.add_argument(
        "--attention",
        default="model",
        metavar="A",
        help="model (default: as the model says), full, window:size=N, stream, quest:budget=N, seer, "
        "lessismore, moba, resa, sale, tailorkv (see docs/attention-policies.md)",
    )
    parser.add_argument(
        "--objective",
        default="latency",
        metavar="O",
        help="latency (default), energy, edp, ed2p, energy@latency:1.05, latency@energy:12J",
    )
    parser.add_argument(
        "--max-context",
        type=positive,
        metavar="N",
        help="longest sequence of tokens, prompt included",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=1,
        metavar="B",
        help="sequences that can be decoded together, each with caches of its own (default: 1)",
    )
    parser.add_argument(
        "--pages",
        metavar="N|SIZE",
        help="with --batch: caches of whole contexts take pages of 64 positions from a pool of N, or of this "
        "much memory (512MiB, 2GiB)",
    )
    parser.add_argument(
        "--db", type=Path, metavar="FILE", help="tuning records (default: the user's data folder)"
    )


def add_reproducible(parser: argparse.ArgumentParser) -> None:
    """Add which entry points add up in one order."""
    parser.add_argument(
        "--reproducible",
        nargs="?",
        choices=("drafts", "all", "none"),
        const="all",
        default="drafts",
        help="which entry points add up in one order, so that a token's logits do not depend on how many "
        "come with it: drafts (default: those that decode and verify drafts, in models with draft layers), "
        "all (the flag alone), none",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add how codes of quantised weights are chosen."""
    parser.add_argument(
        "--calibrate",
        default=None,
        metavar="METHOD[:FILE]",
        help="rtn (default), or gptq or awq, calibrated on the text of FILE (default: sources of the "
        "standard library, without those held out for judging)",
    )


def calibration(args: argparse.Namespace) -> Any:
    """Return the `Calibration` that was asked for (None: nothing was); what it does is logged."""
    from mimo_compile.quantize.calibration import parse_calibration

    if args.calibrate is None:
        return None
    console: Console = args.console
    return parse_calibration(args.calibrate, seed=args.seed, log=console.log)


def add_gates(parser: argparse.ArgumentParser) -> None:
    """Add the gates that an attention policy chooses by."""
    parser.add_argument(
        "--gates",
        type=Path,
        metavar="FILE",
        help="safetensors file of the gates that --attention seer chooses by, or the indexers of dsa "
        "(default: the model's own)",
    )


def add_pre_gates(parser: argparse.ArgumentParser) -> None:
    """Add the gates that choose experts one layer earlier."""
    parser.add_argument(
        "--pre-gates",
        type=Path,
        metavar="FILE",
        help="safetensors file of gates that choose the experts of the layer after theirs, for a model that "
        "was trained with them (default: each layer's router chooses its own)",
    )


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Add low-rank adapters over the model's weights."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a LoRA adapter in PEFT's format, which `run --adapter NAME` selects; may be repeated",
    )
    parser.add_argument(
        "--adapter-format",
        default="exact",
        metavar="F",
        help="how adapters are stored: exact (default), or rounded to bf16 or fp8",
    )


def adapters(args: argparse.Namespace) -> dict[str, str]:
    """Return the folder of each adapter.

    Raises:
        UsageError: an option has no name or folder, or a name comes twice.
    """
    out: dict[str, str] = {}
    for text in args.adapter:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UsageError(
                f"{text!r} is no adapter (--adapter)", remedy="Write --adapter NAME=DIR"
            )
        if name in out:
            raise UsageError(f"two adapters are called {name} (--adapter)")
        out[name] = folder
    return out


def need_extra(feature: str) -> None:
    """Refuse a feature when the [compile] extra is not installed, without importing any of it.

    Raises:
        MissingExtra: names the one pip line that helps.
    """
    for package in ("torch", "scipy", "networkx", "xgboost", "safetensors", "threadpoolctl"):
        if find_spec(package) is None:
            raise MissingExtra(feature, missing=package)


def check_output(path: Path, suffix: str = "") -> Path:
    """Refuse an output path that cannot be written, before any work is done.

    Raises:
        UsageError: its folder is missing, it is a folder or a device, or it has another suffix.
    """
    if suffix and path.suffix != suffix:  # mostly a slip; the file there would be replaced
        raise UsageError(f"the output {path} should end in {suffix}")
    if path.is_dir():
        raise UsageError(f"the output {path} is a folder")
    if path.exists() and not path.is_file():  # it would be replaced by a file, not written to
        raise UsageError(f"the output {path} is not a regular file")
    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"the folder of the output {path} does not exist", remedy="create it first"
        )
    return path


@contextlib.contextmanager
def show_progress(console: Console, *, tuning: bool, limit_s: float | None = None) -> Iterator[Any]:
    """Give the display of a search (or None without one), and end it whatever happens.

    Args:
        console: With -v, each measured candidate has its own line.
        tuning: False when there is nothing to search.
        limit_s: The search's limit of time.
    """
    if not tuning:
        yield None
        return
    from mimo_compile.search.progress import PlainProgress, make_progress

    display = PlainProgress(every_s=0.0) if console.verbosity else make_progress(seconds=limit_s)
    try:
        yield display
    finally:
        display.close()
