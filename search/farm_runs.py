"""What the workers of a farm did, kept in the database of the search: one row for each worker of each search.

Rows stand in a table of their own, which is made when the first one comes: a database without it is one that
no farm wrote to, and older versions read all else of a database that has it. Each row is a line of JSON with
its checksum, as records are.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec

from mimo_compile.errors import InputError
from mimo_compile.search.database import Database
from mimo_compile.search.records import checksum, seal, unseal

SCHEMA = 1
"""Version of a row; newer ones are not shown."""
LINE = re.compile(rb'\{"kind":"worker",(?:(?!\{"kind":")[^\x00])*?,"sum":"[0-9a-f]{32}"\}')
"""A row in the raw bytes of a damaged file."""
_TABLE = (
    "CREATE TABLE IF NOT EXISTS farm_workers "
    "(id INTEGER PRIMARY KEY, sum TEXT NOT NULL UNIQUE, line TEXT NOT NULL)"
)
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e11)]


class Worker(msgspec.Struct, kw_only=True, tag_field="kind", tag="worker"):
    """What one worker of a farm did in one search. Times are seconds.

    A worker is what bears one name: a node, or several nodes with the same label. Its time is counted in
    seconds of the whole node: of a node with four CPUs that builds on one for eight seconds, two are busy.
    """

    name: str
    search: str = ""
    """Identity of the search, the same for all its workers."""
    hardware: str = ""
    """Identity of the target."""
    threads: _Count = 0
    began: _Seconds = 0.0
    """Seconds since 1970 when the search began."""
    seconds: _Seconds = 0.0
    """How long the farm was open."""
    tuner_s: _Seconds = 0.0
    """Of these, how long the tuner computed and started nothing."""
    cpus: _Count = 0
    """Actions it takes at a time, at most."""
    devices: tuple[str, ...] = ()
    compiled: _Count = 0
    measured: _Count = 0
    """Candidates that it measured and found right, comparisons at the end included."""
    failed: _Count = 0
    """Candidates that it could not compile, or found wrong, too slow, crashing..."""
    lost: _Count = 0
    """Actions without an answer: it died, vanished, broke, or took too long."""
    busy_s: _Seconds = 0.0
    idle_s: _Seconds = 0.0
    started: _Count = 0
    waited_s: _Seconds = 0.0
    """Sum over the actions it started, of the time from their arrival (or their last loss)."""
    schema: int = SCHEMA

    @property
    def share(self) -> float:
        """Part of its time that it was busy; 0 where it was there for none."""
        there = self.busy_s + self.idle_s
        return self.busy_s / there if there > 0 else 0.0

    @property
    def wait_s(self) -> float:
        """Mean seconds that its actions had waited when they started."""
        return self.waited_s / self.started if self.started else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        names = (
            "name", "cpus", "compiled", "measured", "failed", "lost", "busy_s", "idle_s", "seconds",
            "tuner_s",
        )  # fmt: skip
        told = {n: getattr(self, n) for n in names}
        return {**told, "devices": list(self.devices), "wait_s": self.wait_s, "used": self.share}


def decode(line: str | bytes, *, file: object = "row") -> Worker:
    """Read one line that was stored.

    Raises:
        InputError: damaged, of a newer schema, or something else.
    """
    data = line.encode() if isinstance(line, str) else line
    body = unseal(data, what="a row of a farm's worker", file=file)
    try:
        worker = msgspec.json.decode(body, type=Worker)
    except msgspec.DecodeError as error:
        raise InputError(f"not a row of a farm's worker: {error}", file=file) from error
    if worker.schema > SCHEMA:
        raise InputError(
            f"a row of a farm's worker has schema {worker.schema}, this version reads up to {SCHEMA}",
            file=file,
            remedy="Update mimo-compile",
        )
    return worker


def store(db: Database, workers: Iterable[Worker]) -> None:
    """Add rows, durably; those that are there already stay one.

    Raises:
        InputError: the database cannot be written.
    """
    rows = [(checksum(line), line) for w in workers if (line := seal(msgspec.json.encode(w)))]
    if not rows:
        return
    try:
        with contextlib.closing(db.connect()) as raw:
            raw.execute("BEGIN IMMEDIATE")
            raw.execute(_TABLE)
            raw.executemany("INSERT OR IGNORE INTO farm_workers (sum, line) VALUES (?, ?)", rows)
            raw.execute("COMMIT")
    except sqlite3.Error as error:
        raise db.unusable(error) from error


def load(db: Database) -> list[Worker]:
    """Return all sound rows, those stored last first.

    Raises:
        InputError: the database cannot be read.
    """
    return [w for row in _rows(db) if (w := _sound(row)) is not None][::-1]


def unread(db: Database) -> tuple[int, int]:
    """Return how many rows do not match their checksum or are none, and how many are of a newer schema."""
    rest = [row for row in _rows(db) if _sound(row) is None]
    newer = sum(_is_newer(row) for row in rest)
    return len(rest) - newer, newer


def delete_before(raw: sqlite3.Connection, db: Database, time: float) -> None:
    """Delete rows of searches that began before a time (seconds since 1970), by an open connection."""
    old = [row for row in _rows(db) if (w := _sound(row)) is not None and w.began < time]
    if old:
        raw.executemany("DELETE FROM farm_workers WHERE sum = ?", ((total,) for total, _ in old))


def searches(workers: Iterable[Worker]) -> list[list[Worker]]:
    """Return workers by search, the newest search first, in each by name."""
    found: dict[str, list[Worker]] = {}
    for worker in workers:
        found.setdefault(worker.search, []).append(worker)
    ordered = sorted(found.values(), key=lambda ws: (-ws[0].began, ws[0].search))
    return [sorted(ws, key=lambda w: w.name) for ws in ordered]


def table_cells(workers: Sequence[Worker]) -> list[tuple[str, ...]]:
    """Return the cells of a table of the workers of one search, under `TITLES`."""
    return [
        (
            w.name, ", ".join(w.devices) or "–", str(w.cpus), str(w.compiled), str(w.measured),
            str(w.failed), str(w.lost), f"{w.busy_s:.1f}", f"{w.idle_s:.1f}", f"{w.wait_s:.2f}",
            f"{100 * w.share:.0f} %",
        )
        for w in workers
    ]  # fmt: skip


TITLES = (
    "worker", "devices", "CPUs", "compiled", "measured", "failed", "lost", "busy s", "idle s",
    "mean wait s", "used",
)  # fmt: skip


def _rows(db: Database) -> list[tuple[str, str]]:
    """Return checksum and line of each row, those stored first first."""
    try:
        with contextlib.closing(db.connect()) as raw:
            there = "SELECT count(*) FROM sqlite_master WHERE name = 'farm_workers'"
            if not raw.execute(there).fetchone()[0]:
                return []
            found = raw.execute("SELECT sum, line FROM farm_workers ORDER BY id")
            return [(str(total), str(line)) for total, line in found]
    except sqlite3.Error as error:
        raise db.unusable(error) from error


def _sound(row: tuple[str, str]) -> Worker | None:
    total, line = row
    with contextlib.suppress(InputError):
        worker = decode(line)
        return worker if checksum(line) == total else None
    return None


def _is_newer(row: tuple[str, str]) -> bool:
    """Whether a row that is not sound is of a newer version, and undamaged."""
    total, line = row
    try:
        body = msgspec.json.decode(unseal(line.encode(), what="a row", file="row"))
    except (InputError, msgspec.DecodeError):
        return False
    schema = body.get("schema") if isinstance(body, dict) else None
    return checksum(line) == total and isinstance(schema, int) and schema > SCHEMA
