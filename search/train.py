"""Train a latency model on records and store it for the package: ``python -m mimo_compile.search.train``."""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from mimo_compile.cost_models import pretrained
from mimo_compile.errors import InputError, MimoError, UsageError
from mimo_compile.search.database import Database
from mimo_compile.search.records import Record, decode
from mimo_compile.search.warm import train


def packaged() -> list[Path]:
    """Return the files of records that come with the package."""
    folder = Path(str(files("mimo_compile") / "pretuned"))
    return sorted(folder.glob("*.jsonl"))


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a database, of JSON lines (also ``.gz`` or ``.xz``), or of a recorded space.

    Raises:
        InputError: the file is missing or damaged.
    """
    if not path.exists():
        raise InputError("there is no such file", file=path)
    if path.suffix == ".db":
        with Database(path, read_only=True) as db:
            yield from db
        return
    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)
    try:
        lines = unpack(path.read_bytes()).splitlines()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"the records cannot be read: {error}", file=path) from error
    features = _recorded_on(lines)
    for line in lines if features is None else lines[1:]:
        if line.strip():
            record = decode(line, file=path)
            yield record if features is None else replace(record, features=features)


def _recorded_on(lines: Sequence[bytes]) -> tuple[str, ...] | None:
    """Return the ISA of a recorded space, whose first line describes it; None for plain records."""
    try:
        head: Any = json.loads(lines[0]) if lines else {}
        return tuple(head["hardware"]["features"]) if "format" in head else None
    except (ValueError, KeyError, TypeError):
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; print what came of it."""
    parser = argparse.ArgumentParser(
        prog="python -m mimo_compile.search.train", description=__doc__
    )
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE",
        help="databases and JSON lines of records (default: those of the package)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: into the package, by machine"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        rows = [r for path in args.files or packaged() for r in read_records(path)]
        written = _train_each(_usable(rows), args.output, args.seed)
    except MimoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(written)
    return 0


def _usable(rows: Sequence[Record]) -> list[Record]:
    """Return the records that a packaged model may learn from.

    Raises:
        UsageError: there are none; it says what the others are.
    """
    found = [r for r in rows if r.cache == "cold" and not r.simulated]
    if found:
        return found
    simulated = sum(r.simulated for r in rows)
    others = {"of simulated targets": simulated, "of hot caches": len(rows) - simulated}
    why = ", ".join(f"{n} are {text}" for text, n in others.items() if n)
    raise UsageError(
        "there are no records to learn from" + (f": {why}" if why else ""),
        remedy="give databases or JSON lines of kernels timed with cold caches",
    )


def _file_of(machine: str) -> Path:
    """Return where the model of a machine is put in the package; its name comes from records.

    Raises:
        InputError: the name is none of a file.
    """
    name = f"{machine}.json"
    if Path(name).name != name or not machine or machine.startswith(".") or not name.isprintable():
        raise InputError(
            f"the records are of a machine called {machine!r}, which names no file",
            file=Path(pretrained.__file__).parent,
            remedy="give -o FILE",
        )
    return Path(pretrained.__file__).parent / name


def _train_each(rows: Sequence[Record], output: Path | None, seed: int) -> str:
    """Train one model for each machine, or one for all into ``output``."""
    groups: dict[str, list[Record]] = {}
    for r in rows:
        groups.setdefault("" if output is not None else r.hardware, []).append(r)
    lines = []
    for machine, mine in sorted(groups.items()):
        path = output or _file_of(machine)
        model = train(mine, seed=seed)
        if not model.trained:
            raise InputError(
                f"{len(mine)} records are too few to learn from, or of older schedules", file=path
            )
        digest = model.save(path)
        lines.append(
            f"{path}: {model.samples} candidates of {model.meta['workloads']} workloads, sha256 {digest}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
