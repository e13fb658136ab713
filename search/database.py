"""Tuning records on disk: SQLite, write-ahead log, every acknowledged record durable.

A record counts as stored when `Database.add` returns (or its future is done): then its transaction
has been synced. Several processes may write to one database. Each row is a line of JSON with its own
checksum (`records.encode`); rows that do not match it are never served.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

from mimo_compile.errors import InputError, MimoError, UsageError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.search import kept_functions
from mimo_compile.search.records import Record, checksum, decode, encode

APPLICATION_ID = 0x6D696D6F
"""Marks a SQLite file as ours (``mimo``)."""
SCHEMA = 1
PAGE = 8192
"""Bytes; large enough that a record never leaves its page, which `salvage` relies on."""
BUSY = 30.0
"""Seconds to wait for another process's lock."""

_TABLES = """
CREATE TABLE records (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL, workload TEXT NOT NULL, hardware TEXT NOT NULL,
  threads INTEGER NOT NULL, verdict TEXT NOT NULL, sum TEXT NOT NULL UNIQUE, line TEXT NOT NULL);
CREATE INDEX by_key ON records (key);
CREATE INDEX by_workload ON records (workload, hardware, threads);
"""
_INSERT = (
    "INSERT OR IGNORE INTO records (key, workload, hardware, threads, verdict, sum, line) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_SALVAGE = "Run: mimo-compile db salvage {0} -o recovered.db"


def default_path() -> Path:
    """Return where records live unless told otherwise: the user's data folder (XDG).

    Raises:
        UsageError: the user has no home folder.
    """
    try:
        base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    except RuntimeError as error:
        raise UsageError(
            "there is no home folder to keep records in",
            remedy="Set XDG_DATA_HOME or give --db FILE",
        ) from error
    return Path(base) / "mimo_compile" / "records.db"


def open_records(
    path: str | os.PathLike[str] | None = None,
) -> contextlib.AbstractContextManager[Database | None]:
    """Open records for reading; None where the user has no database yet, or no place for one.

    Generic functions that are kept beside them are found from now on.

    Raises:
        InputError: the path that is given does not exist, or the file is damaged.
    """
    try:
        file = Path(path) if path is not None else default_path()
    except UsageError:
        return contextlib.nullcontext()
    if path is None and not file.exists():
        return contextlib.nullcontext()
    kept_functions.use(file)
    return Database(file, read_only=True)


def _row(record: Record) -> tuple[object, ...]:
    line = encode(record)
    return (
        record.key, record.workload, record.hardware, record.threads, str(record.verdict),
        checksum(line), line,
    )  # fmt: skip


def _log_ahead(db: sqlite3.Connection) -> None:
    """Switch the file to a write-ahead log; SQLite waits for others' locks in all but this statement."""
    until = time.monotonic() + BUSY
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


class Database:
    """Tuning records in one file; safe for threads and for several processes at once."""

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, read_only: bool = False
    ) -> None:
        """Open or create a database (None: `default_path`; ``:memory:`` is refused).

        Raises:
            InputError: the file is damaged, foreign or of a newer schema.
        """
        self.path = Path(path) if path is not None else default_path()
        self.read_only = read_only
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[list[Record], Future[None]] | None] = (
            queue.SimpleQueue()
        )
        self._writer: threading.Thread | None = None
        self._closed = False
        if not read_only:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"the database's folder cannot be made: {error.strerror}",
                    file=self.path,
                    remedy="Give a --db FILE that can be written",
                ) from error
        elif not self.path.exists():
            raise InputError("there is no such database", file=self.path)
        self._read = self.connect()

    def connect(self) -> sqlite3.Connection:
        """Open a connection of one's own, after a look whether the file is ours.

        Raises:
            InputError: the file is damaged, foreign or of a newer schema.
        """
        try:
            if self.path.exists() and self.path.is_dir():
                raise sqlite3.DatabaseError("this is a folder")
            mode = "ro" if self.read_only else "rwc"
            uri = f"{self.path.absolute().as_uri()}?mode={mode}"
            db = sqlite3.connect(
                uri, uri=True, timeout=BUSY, check_same_thread=False, isolation_level=None
            )
        except sqlite3.Error as error:
            raise self.unusable(error) from error
        try:
            db.execute(f"PRAGMA busy_timeout={BUSY * 1000:.0f}")
            self._check_header(db)
            if not self.read_only:
                _log_ahead(db)
                db.execute("PRAGMA synchronous=FULL")
        except sqlite3.Error as error:
            db.close()
            raise self.unusable(error) from error
        except MimoError:
            db.close()
            raise
        return db

    def _check_header(self, db: sqlite3.Connection) -> None:
        """Refuse what is not ours; lay out a new file (two processes may try at once)."""
        if not self.read_only and self._is_blank(db):
            db.execute(f"PRAGMA page_size={PAGE}")
            _log_ahead(db)
            db.execute("BEGIN IMMEDIATE")
            try:
                if self._is_blank(db):
                    for statement in _TABLES.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version={SCHEMA}")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
        if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise InputError(
                "this SQLite file does not hold tuning records",
                file=self.path,
                remedy="Give another --db FILE",
            )
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found > SCHEMA:
            raise InputError(
                f"the database has schema {found}, this version reads up to {SCHEMA}",
                file=self.path,
                remedy="Update mimo-compile or give another --db FILE",
            )

    def _is_blank(self, db: sqlite3.Connection) -> bool:
        ours = db.execute("PRAGMA application_id").fetchone()[0] == 0
        return bool(ours and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0)

    def unusable(self, error: Exception) -> InputError:
        """Return what SQLite says as an error with a remedy."""
        text = str(error)
        remedy = _SALVAGE.format(self.path)
        if "is full" in text:
            remedy = "Free some space; what was stored is safe"
        elif "I/O" in text:
            remedy = f"Check the space and the disk; if it stays: {_SALVAGE.format(self.path)}"
        elif "locked" in text:
            remedy = "Another program holds it; try again when that has ended"
        elif "unable to open" in text or "readonly" in text or "folder" in text:
            remedy = "Give a --db FILE that can be written"
        return InputError(f"the database cannot be used: {text}", file=self.path, remedy=remedy)

    # -- writing -------------------------------------------------------------------------------

    def submit(self, records: Sequence[Record]) -> Future[None]:
        """Queue records; the future is done when they are durable (one commit serves all waiting).

        Raises:
            ValueError: a record holds numbers that make no sense.
        """
        rows = list(records)
        for record in rows:
            encode(record)
        future: Future[None] = Future()
        with self._lock:
            if self._closed or self.read_only:
                raise InputError("the database is not open for writing", file=self.path)
            if self._writer is None:
                self._writer = threading.Thread(
                    target=self._write_loop, name="records", daemon=True
                )
                self._writer.start()
        self._queue.put((rows, future))
        return future

    def add(self, *records: Record) -> None:
        """Store records and return when they are durable."""
        self.submit(records).result()

    def _write_loop(self) -> None:
        db: sqlite3.Connection | None = None
        while (item := self._queue.get()) is not None:
            batch = [item]
            stop = False
            while not self._queue.empty():  # all that queued up during the last commit
                more = self._queue.get()
                if more is None:
                    stop = True
                    break
                batch.append(more)
            try:
                db = db or self.connect()
                self._commit(db, [r for rows, _ in batch for r in rows])
            except Exception as error:  # reported to each waiting caller
                failure = self.unusable(error) if isinstance(error, sqlite3.Error) else error
                for _, future in batch:
                    future.set_exception(failure)
            else:
                for _, future in batch:
                    future.set_result(None)
            if stop:
                break
        if db is not None:
            db.close()

    @staticmethod
    def _commit(db: sqlite3.Connection, records: Iterable[Record]) -> None:
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany(_INSERT, (_row(r) for r in records))
            db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise

    # -- reading -------------------------------------------------------------------------------

    def _select(
        self, where: str = "", values: Sequence[object] = (), *, newest_first: bool = False
    ) -> Iterator[Record]:
        after, order = ("<", "DESC") if newest_first else (">", "ASC")
        sql = (
            f"SELECT id, line, sum, key, workload FROM records WHERE {where or '1'} "
            f"AND id {after} ? ORDER BY id {order} LIMIT 2000"
        )
        last = (1 << 63) - 1 if newest_first else -1
        while True:  # in slices, so that no reader holds the lock (or the log) for long
            with self._lock:
                try:
                    rows = self._read.execute(sql, (*values, last)).fetchall()
                except sqlite3.Error as error:
                    raise self.unusable(error) from error
            for row in rows:
                last = row[0]
                if (record := self._checked(*row[1:])) is not None:
                    yield record
            if len(rows) < 2000:
                return

    def _checked(self, line: object, total: object, key: object, workload: object) -> Record | None:
        try:
            record = decode(str(line), file=self.path)
        except InputError:
            return None
        same = (checksum(str(line)), record.key, record.workload) == (total, key, workload)
        return record if same else None

    def __iter__(self) -> Iterator[Record]:
        """All sound records, oldest first."""
        return self._select()

    def __len__(self) -> int:
        """Rows in the database, damaged ones included."""
        with self._lock:
            return int(self._read.execute("SELECT count(*) FROM records").fetchone()[0])

    def records(
        self,
        workload: Workload | str | None = None,
        hardware: Hardware | None = None,
        *,
        op: str | None = None,
        ok: bool | None = None,
    ) -> list[Record]:
        """Return records; of one workload, op, target (identity, threads, features) or verdict when given."""
        tests, values = [], list[object]()
        if workload is not None:
            tests.append("workload = ?")
            values.append(str(workload))
        if op is not None:
            tests.append("workload BETWEEN ? AND ?")  # ":" is followed by ";"
            values += [f"{op}:", f"{op};"]
        if hardware is not None:
            tests.append("hardware = ? AND threads = ?")
            values += [hardware.id, hardware.threads]
        found = self._select(" AND ".join(tests), values)
        features = None if hardware is None else tuple(sorted(hardware.features))
        return [
            r
            for r in found
            if (ok is None or r.ok == ok) and (features is None or r.features == features)
        ]

    def newest(self, op: str, *, but: Sequence[str] = (), of: str = "") -> Iterator[Record]:
        """Yield records of an op, those stored last first, reading no more than is asked for.

        Args:
            op: The op.
            but: Workloads to leave out, where they were measured on the machine ``of``.
            of: Identity of that machine.
        """
        marks = ", ".join("?" for _ in but)
        where = f"workload BETWEEN ? AND ? AND NOT (hardware = ? AND workload IN ({marks}))"
        return self._select(where, (f"{op}:", f"{op};", of, *but), newest_first=True)

    def keys(self, workload: Workload | str, hardware: Hardware) -> dict[str, Record]:
        """Return the newest record of each candidate of a workload on a target."""
        return {r.key: r for r in self.records(workload, hardware)}

    # -- life ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Write what is queued and close."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._writer is not None:
            self._queue.put(None)
            self._writer.join()
        self._read.close()

    def __enter__(self) -> Database:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()
