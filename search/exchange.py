"""Move tuning records between databases: export, import, merge, prune, check, salvage."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mimo_compile.errors import InputError
from mimo_compile.search import farm_runs
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import summarise
from mimo_compile.search.records import Record, checksum, decode, encode

_LINE = re.compile(rb'\{"key":"[0-9a-f]{64}",(?:(?!\{"key":")[^\x00])*?,"sum":"[0-9a-f]{32}"\}')
_BATCH = 5000
_PIECE = 1 << 20
_ROOM = "Check the folder, its permissions and the free space"


def export_records(
    db: Database, path: str | os.PathLike[str], *, best_only: int | None = None
) -> int:
    """Write records as JSON lines (atomically) and return how many.

    Args:
        db: Where they come from.
        path: The file to write.
        best_only: Keep only this many fastest candidates of each workload and target, of those that are
            the same code the one that was timed.

    Raises:
        InputError: the file is the database itself, or cannot be written (what was there stays).
    """
    target = Path(path)
    if target.exists() and target.samefile(db.path):
        raise InputError(
            "the records would replace their own database",
            file=target,
            remedy="Give another FILE to write to",
        )
    records: Iterable[Record] = db if best_only is None else _fastest(db, best_only)
    count = 0
    with _published(target) as temporary:
        # Unbuffered below: what cannot be written fails here, not when the file is forgotten.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            piece = bytearray()
            for record in records:
                piece += encode(record).encode() + b"\n"
                count += 1
                if len(piece) > _PIECE:
                    _write(descriptor, piece)
                    piece.clear()
            _write(descriptor, piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return count


def _write(descriptor: int, data: bytes | bytearray) -> None:
    done = 0
    while done < len(data):
        done += os.write(descriptor, bytes(data[done:]))


@contextlib.contextmanager
def _published(target: Path) -> Iterator[Path]:
    """Give the name of a file to be made, which then takes the target's place; or leave all as it was.

    Raises:
        InputError: a system call failed.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            for name in ("", "-journal", "-wal", "-shm"):
                temporary.with_name(temporary.name + name).unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise InputError(
            f"the file cannot be written: {error.strerror or error}",
            file=target,
            remedy=_ROOM,
        ) from error


def _fastest(db: Database, count: int) -> list[Record]:
    groups: dict[tuple[str, str, int, tuple[str, ...]], list[Record]] = {}
    for r in db:
        groups.setdefault((r.workload, r.hardware, r.threads, r.features), []).append(r)
    out: list[Record] = []
    for rows in groups.values():
        mine = {r.key for r in rows}
        results = [s for s in summarise(rows) if s.record.twin not in mine]
        order = sorted(results, key=lambda s: s.latency_us)[:count]
        keys = {s.record.key for s in order}
        out += [r for r in rows if r.key in keys]
    return out


def import_records(db: Database, path: str | os.PathLike[str]) -> tuple[int, int]:
    """Add the records of a JSON-lines file; return (new ones, ones already there).

    A last line without its end (a writer was killed) is left out; other damage is an error and
    nothing is imported.

    Raises:
        InputError: the file is missing or holds something else than records.
    """
    source = Path(path)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read records: {error.strerror}", file=source) from error
    lines = data.split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(decode(line, file=f"{source}:{number}"))
        except InputError:
            if number == len(lines) and records:
                break
            raise
    return _insert(db, records)


def merge(db: Database, other: str | os.PathLike[str]) -> tuple[int, int]:
    """Add all records of another database (or JSON-lines file); return (new, already there).

    What a database keeps of farms' workers comes along.

    Raises:
        InputError: there is no such file, it holds something else, or a newer version wrote some of it.
    """
    source = Path(other)
    if not source.exists():
        raise InputError("there is no such file", file=source)
    with source.open("rb") as file:
        start = file.read(16)
    if not start.startswith(b"SQLite format 3"):
        return import_records(db, source)
    with Database(source, read_only=True) as from_db:
        if newer := farm_runs.unread(from_db)[1]:
            raise InputError(
                f"{newer} rows of farms' workers are of a newer version",
                file=source,
                remedy="Update mimo-compile",
            )
        farm_runs.store(db, reversed(farm_runs.load(from_db)))
        return _insert(db, from_db)


def _insert(db: Database, records: Iterable[Record]) -> tuple[int, int]:
    before, seen = len(db), 0
    for chunk in _chunks(records):
        db.add(*chunk)
        seen += len(chunk)
    new = len(db) - before
    return new, seen - new


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == _BATCH:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def prune(
    db: Database,
    *,
    keep: int | None = None,
    older_than_days: float | None = None,
    failures: bool = False,
) -> int:
    """Delete records and return how many; by age, what is kept of farms' workers goes as well.

    Args:
        db: The database.
        keep: Keep this many fastest candidates of each workload and target (failures stay).
        older_than_days: Delete what is older.
        failures: Delete records whose verdict is not ok.

    Raises:
        InputError: the database cannot be written.
    """
    drop: set[str] = set()
    best = {r.key for r in _fastest(db, keep)} if keep is not None else set()
    limit = time.time() - older_than_days * 86400 if older_than_days is not None else 0.0
    for r in db:
        if (
            (keep is not None and r.ok and r.key not in best)
            or r.time < limit
            or (failures and not r.ok)
        ):
            drop.add(checksum(encode(r)))
    try:
        raw = sqlite3.connect(db.path, timeout=30.0, isolation_level=None)
        with contextlib.closing(raw):
            raw.execute("BEGIN IMMEDIATE")
            raw.executemany("DELETE FROM records WHERE sum = ?", ((s,) for s in sorted(drop)))
            farm_runs.delete_before(raw, db, limit)
            raw.execute("COMMIT")
            with contextlib.suppress(sqlite3.Error):  # needs space, and nobody else at the file
                raw.execute("VACUUM")
    except sqlite3.Error as error:
        raise db.unusable(error) from error
    return len(drop)


@dataclass(frozen=True, slots=True)
class Check:
    """Outcome of `check`."""

    rows: int
    sound: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return not self.problems


def check(path: str | os.PathLike[str]) -> Check:
    """Verify the file's structure and the checksum of each row.

    Raises:
        InputError: the file is missing or cannot be opened as a database of records at all.
    """
    problems: list[str] = []
    with Database(path, read_only=True) as db:
        rows = sound = 0
        raw = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True, timeout=30.0)
        try:
            problems += [
                str(r[0]) for r in raw.execute("PRAGMA integrity_check(20)") if r[0] != "ok"
            ]
            for line, total, key, workload in raw.execute(
                "SELECT line, sum, key, workload FROM records"
            ):
                rows += 1
                if db._checked(line, total, key, workload) is None:
                    problems.append(f"row {rows}: does not match its checksum")
                else:
                    sound += 1
        except sqlite3.Error as error:
            problems.append(str(error))
        finally:
            raw.close()
        bad, newer = farm_runs.unread(db)
        if bad:
            problems.append(f"{bad} rows of farms' workers do not match their checksums")
        if newer:
            problems.append(
                f"{newer} rows of farms' workers are of a newer version of mimo-compile"
            )
    return Check(rows, sound, tuple(problems[:50]))


def salvage(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> int:
    """Recover every record whose checksum holds from a damaged database into a new one.

    Reads the raw bytes of the file and of its write-ahead log, so the structure may be lost
    altogether. Records that were pruned but not yet overwritten may come back.

    Raises:
        InputError: the file cannot be read, or ``out`` exists or cannot be written.
    """
    source, target = Path(path), Path(out)
    if target.exists():
        raise InputError("the output exists already", file=target, remedy="Give another -o FILE")
    found: dict[str, Record] = {}
    workers: dict[bytes, farm_runs.Worker] = {}
    for file in (source, source.with_name(source.name + "-wal")):
        try:
            data = file.read_bytes()
        except OSError as error:
            if file == source:
                raise InputError(
                    f"cannot read the database: {error.strerror}", file=file
                ) from error
            continue
        for line in _LINE.findall(data):
            try:
                record = decode(line)
            except InputError:
                continue
            found[checksum(line.decode())] = record
        for line in farm_runs.LINE.findall(data):
            with contextlib.suppress(InputError):
                workers[line] = farm_runs.decode(line)
    order = sorted(found.values(), key=lambda r: r.time)
    with _published(target) as temporary:
        try:
            with Database(temporary) as db:
                for chunk in _chunks(order):
                    db.add(*chunk)
                farm_runs.store(db, workers.values())
            _settle(temporary, len(order))
        except (InputError, sqlite3.Error) as error:
            text = error.what if isinstance(error, InputError) else f"it cannot be written: {error}"
            raise InputError(text, file=target, remedy=_ROOM) from error
    return len(order)


def _settle(path: Path, rows: int) -> None:
    """Bring all of a database that was just closed into its one file, and see that it is there.

    SQLite does so when the last connection closes, but says nothing if it cannot.

    Raises:
        sqlite3.Error: the log's pages cannot be copied; the file alone is not sound.
        InputError: rows are missing, or something is left in the log.
    """
    with contextlib.closing(sqlite3.connect(path, timeout=30.0, isolation_level=None)) as raw:
        found = raw.execute("SELECT count(*) FROM records").fetchone()[0]  # reads the log as well
        busy, *_ = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        log = path.with_name(path.name + "-wal")
        if busy or found != rows or (log.exists() and log.stat().st_size):
            raise InputError("not all records arrived in the file", file=path)


__all__ = ["Check", "check", "export_records", "import_records", "merge", "prune", "salvage"]
