"""``mimo-compile db``: share and look after tuning records."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.cli.options import check_output, days, positive
from mimo_compile.errors import InputError, UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console

DESCRIPTION = """\
Share and look after tuning records.

  export FILE    write records as JSON lines (--best N: only the N fastest of each workload)
  import FILE    add the records of a JSON-lines file
  merge FILE     add the records of another database or JSON-lines file
  prune          delete records: --keep N, --older-than DAYS, --failures
  check [FILE]   verify the file's structure and each record's checksum (exit code 1 if damaged)
  salvage FILE   recover what is sound in a damaged database into a new one (-o)
"""
EXAMPLE = """
mimo-compile db export best.jsonl --best 3
mimo-compile db import best.jsonl --db other.db
mimo-compile db check
"""
_ACTIONS = ("export", "import", "merge", "prune", "check", "salvage")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("action", choices=_ACTIONS, metavar="ACTION", help=", ".join(_ACTIONS))
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE")
    parser.add_argument(
        "--db", type=Path, metavar="FILE", help="the database (default: the user's data folder)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="salvage: the new database"
    )
    parser.add_argument("--best", type=positive, metavar="N", help="export: fastest N per workload")
    parser.add_argument(
        "--keep", type=positive, metavar="N", help="prune: keep the fastest N per workload"
    )
    parser.add_argument(
        "--older-than", type=days, metavar="DAYS", help="prune: delete what is older than this"
    )
    parser.add_argument("--failures", action="store_true", help="prune: delete failed candidates")


def run(args: argparse.Namespace) -> int:
    """Do what ACTION says; return 0, or 1 when `check` finds damage."""
    action: str = args.action
    if action in ("export", "import", "merge", "salvage") and args.file is None:
        raise UsageError(f"db {action} needs a FILE", remedy="See mimo-compile db --help")
    if action == "prune" and args.file is not None:
        raise UsageError("db prune takes no FILE", remedy="name the database by --db FILE")
    owners = (
        ("best", "export"),
        ("keep", "prune"),
        ("older_than", "prune"),
        ("output", "salvage"),
    )
    for name, owner in owners:
        if getattr(args, name) is not None and action != owner:
            raise UsageError(
                f"--{name.replace('_', '-')} belongs to db {owner}, not to db {action}"
            )
    if action == "check":
        return _check(args)
    if action == "salvage":
        return _salvage(args)
    return {"export": _export, "import": _add, "merge": _add, "prune": _prune}[action](args)


def _open(args: argparse.Namespace, *, must_exist: bool, read_only: bool = False) -> Any:
    from mimo_compile.search.database import Database, default_path

    path = args.db or default_path()
    if must_exist and not path.exists():
        raise InputError(
            "there is no such database",
            file=path,
            remedy="Run `mimo-compile tune` or give --db FILE",
        )
    return Database(path, read_only=read_only)


def _export(args: argparse.Namespace) -> int:
    from mimo_compile.search.exchange import export_records

    check_output(args.file)
    with _open(args, must_exist=True, read_only=True) as db:
        count = export_records(db, args.file, best_only=args.best)
    return _done(
        args.console,
        "export",
        f"{count} records written to {args.file}",
        records=count,
        path=args.file,
    )


def _add(args: argparse.Namespace) -> int:
    from mimo_compile.search.exchange import import_records, merge

    if not args.file.exists():
        raise InputError("there is no such file", file=args.file)
    with _open(args, must_exist=False) as db:
        new, known = (merge if args.action == "merge" else import_records)(db, args.file)
        path = db.path
    text = f"{new} new records added to {path}, {known} were there already"
    return _done(args.console, args.action, text, new=new, known=known, path=path)


def _prune(args: argparse.Namespace) -> int:
    from mimo_compile.search.exchange import prune

    if args.keep is None and args.older_than is None and not args.failures:
        raise UsageError("db prune needs --keep N, --older-than DAYS or --failures")
    with _open(args, must_exist=True) as db:
        gone = prune(db, keep=args.keep, older_than_days=args.older_than, failures=args.failures)
        left, path = len(db), db.path
    text = f"{gone} records deleted, {left} left in {path}"
    return _done(args.console, "prune", text, deleted=gone, records=left, path=path)


def _check(args: argparse.Namespace) -> int:
    from mimo_compile.search.database import Database, default_path
    from mimo_compile.search.exchange import check

    console: Console = args.console
    path = args.file or args.db or default_path()
    outcome = check(path)
    verdicts: Counter[str] = Counter()
    workloads: Counter[str] = Counter()
    machines: set[str] = set()
    with Database(path, read_only=True) as db:
        for record in db:
            verdicts[str(record.verdict)] += 1
            workloads[record.workload] += 1
            label = "simulated" if record.simulated else f"{record.threads} threads"
            machines.add(f"{record.hardware}, {label}")
    console.say(f"{path}: {outcome.sound} of {outcome.rows} records are sound")
    if workloads:
        counts = ", ".join(f"{n} {v}" for v, n in verdicts.most_common())
        console.say(
            f"{len(workloads)} workloads on {len(machines)} machines ({'; '.join(sorted(machines))})"
        )
        console.say(f"verdicts: {counts}")
    for problem in outcome.problems:
        console.say(f"problem: {problem}")
    if not outcome.ok:
        console.say(f"Run: mimo-compile db salvage {path} -o recovered.db")
    console.result(
        {
            "ok": outcome.ok, "action": "check", "path": path, "rows": outcome.rows, "sound": outcome.sound,
            "problems": outcome.problems, "workloads": len(workloads), "verdicts": dict(verdicts),
        }
    )  # fmt: skip
    return 0 if outcome.ok else 1


def _salvage(args: argparse.Namespace) -> int:
    from mimo_compile.search.exchange import salvage

    if args.output is None:
        raise UsageError("db salvage needs -o FILE for the new database")
    if not args.file.exists():
        raise InputError("there is no such file", file=args.file)
    check_output(args.output)
    count = salvage(args.file, args.output)
    text = f"{count} records recovered into {args.output}"
    return _done(args.console, "salvage", text, records=count, path=args.output)


def _done(console: Console, action: str, text: str, **figures: object) -> int:
    console.say(text)
    console.result({"ok": True, "action": action, **figures})
    return 0
