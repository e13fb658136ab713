"""Every write that a database or an exported file needs fails once: the old or the new, one clear error."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sample_records import record

from mimo_compile.errors import MimoError
from mimo_compile.search.database import Database
from mimo_compile.search.exchange import check, export_records, import_records, prune, salvage
from mimo_compile.search.records import Record

pytestmark = pytest.mark.fault


def found_in(path: Path) -> list[int]:
    with Database(path) as db:
        assert len(db) == len(list(db))
        return sorted(int(r.config["tile"]) for r in db)


def clear(error: MimoError, path: Path) -> None:
    assert str(path) in str(error) and error.remedy and "\n" not in str(error)


QUICK_ONES = [(None, True, False), (13, False, True)]
OTHERS = [
    c for c in itertools.product((None, 13), (True, False), (True, False)) if c not in QUICK_ONES
]


@pytest.mark.parametrize(
    ("code", "existing", "for_good"),
    [*QUICK_ONES, *(pytest.param(*c, marks=pytest.mark.slow) for c in OTHERS)],
)
def test_each_failing_operation_of_the_database(
    tmp_path: Path, code: int | None, existing: bool, for_good: bool
) -> None:
    """Nothing acknowledged is lost, nothing half is seen, and the next write works if the disk does."""
    import faulty_vfs

    if faulty_vfs.library() is None:
        pytest.skip("Python's SQLite is not a library of its own")
    seen: set[str] = set()
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        folder.mkdir()
        path = folder / "records.db"
        stored: list[int] = []
        if existing:
            with Database(path) as db:
                db.add(record(0))
            stored.append(0)
        with faulty_vfs.failing(folder, n, code, for_good=for_good) as disk:
            errors = write_three(path, stored)
        seen.update(disk.failed)
        for error in errors:
            clear(error, path)
        assert set(stored) <= set(found_in(path)) <= {0, 1, 2, 3}
        assert check(path).ok
        if not for_good:  # one fault costs one commit at most
            assert len(stored) >= existing + 2
        with Database(path) as db:
            db.add(record(9))
        assert 9 in found_in(path)
        if not disk.failed:
            assert not errors and len(stored) == existing + 3
            break
    assert seen >= {"write", "sync", "open"}
    assert n > 10


def write_three(path: Path, stored: list[int]) -> list[MimoError]:
    """Store three records one by one, opening again when that failed; note those acknowledged."""
    errors = []
    db = None
    for i in (1, 2, 3):
        for _ in range(2):
            try:
                db = db or Database(path)
                db.add(record(i))
                stored.append(i)
            except MimoError as error:
                errors.append(error)
                continue
            break
    if db is not None:
        db.close()
    return errors


FILL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from sample_records import record
from mimo_compile.search.database import Database
from mimo_compile.errors import MimoError
path, limit = sys.argv[2], int(sys.argv[3])
with Database(path) as db:
    db.add(record(0))
    print("stored 0", flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for i in range(1, 60):
        try:
            db.add(record(i, message="m" * 3000))
        except MimoError as error:
            print("refused", error, flush=True)
            break
        print("stored", i, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    db.add(record(99))  # there is space again
    print("stored 99", flush=True)
"""


@pytest.mark.parametrize("limit", [8192 * 4 + 100, 8192 * 20, 8192 * 33 + 24])
def test_a_full_disk_in_the_middle_of_a_search(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "records.db"
    arguments = [str(Path(__file__).parent / "zoo"), str(path), str(limit)]
    done = subprocess.run(
        [sys.executable, "-c", FILL, *arguments], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    stored = [int(line.split()[1]) for line in lines if line.startswith("stored")]
    (refused,) = [line for line in lines if line.startswith("refused")]
    assert str(path) in refused and "space" in refused and stored[-1] == 99
    assert found_in(path) == stored and check(path).ok


class Calls:
    """Counts the system calls of writing files and makes one fail."""

    NAMES = ("open", "write", "fsync", "replace")

    def __init__(self, patch: pytest.MonkeyPatch, fail: int) -> None:
        self.count, self.failed = itertools.count(1), ""
        for name in self.NAMES:
            patch.setattr(os, name, self._wrap(name, getattr(os, name), fail))

    def _wrap(self, name: str, real: Any, fail: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(self.count) == fail:
                self.failed = name
                raise OSError(28, "No space left on device", str(args[0]))
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("existing", [False, True])
def test_each_failing_call_of_an_export(
    tmp_path: Path, existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "a.db", tmp_path / "out"
    out.mkdir()
    target = out / "records.jsonl"
    seen = set()
    with Database(source) as db:
        db.add(*(record(i, message="m" * 3000) for i in range(20)))
        export_records(db, target)
        complete, old = target.read_bytes(), b"old\n" if existing else b""
        for n in itertools.count(1):
            target.unlink(missing_ok=True)
            if existing:
                target.write_bytes(old)
            with monkeypatch.context() as patch:
                calls = Calls(patch, n)
                try:
                    export_records(db, target)
                except MimoError as error:
                    clear(error, target)
                    assert "No space left" in str(error) and calls.failed
            assert [p.name for p in out.iterdir()] in ([], [target.name])
            data = target.read_bytes() if target.exists() else b""
            assert data in (old, complete)
            assert data == complete or calls.failed
            if not calls.failed:
                break
            seen.add(calls.failed)
    assert seen == set(Calls.NAMES)
    with Database(tmp_path / "b.db") as db:
        assert import_records(db, target) == (20, 0)


def test_a_salvage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source, out = tmp_path / "a.db", tmp_path / "out"
    out.mkdir()
    with Database(source) as db:
        db.add(*(record(i, message="m" * 3000) for i in range(40)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        with pytest.raises(MimoError) as caught:
            salvage(source, out / "b.db")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    clear(caught.value, out / "b.db")
    assert list(out.iterdir()) == []
    assert salvage(source, out / "b.db") == 40
    assert [p.name for p in out.iterdir()] == ["b.db"]


@pytest.mark.parametrize("code", [None, 13])
def test_a_salvage_onto_a_disk_that_fills_is_whole_or_an_error(
    tmp_path: Path, code: int | None
) -> None:
    """SQLite says nothing when it cannot bring its log into the file on closing."""
    import faulty_vfs

    if faulty_vfs.library() is None:
        pytest.skip("Python's SQLite is not a library of its own")
    source, out = tmp_path / "a.db", tmp_path / "out"
    out.mkdir()
    target = out / "b.db"
    with Database(source) as db:
        db.add(*(record(i, message="m" * 3000) for i in range(40)))
    refused = 0
    for n in itertools.count(1):
        with faulty_vfs.failing(out, n, code, for_good=True) as disk:
            try:
                assert salvage(source, target) == 40
            except MimoError as error:
                clear(error, target)
                refused += 1
                assert list(out.iterdir()) == []
        if target.exists():
            assert [p.name for p in out.iterdir()] == ["b.db"]
            assert check(target).ok and found_in(target) == list(range(40))
            target.unlink()
        if not disk.failed:
            break
    assert refused > 40


def test_a_prune_that_fails_deletes_nothing(tmp_path: Path) -> None:
    import faulty_vfs

    if faulty_vfs.library() is None:
        pytest.skip("Python's SQLite is not a library of its own")
    path = tmp_path / "a.db"
    rows: list[Record] = [record(i) for i in range(10)]
    with Database(path) as db:
        db.add(*rows)
    for n in itertools.count(1):
        with Database(path) as db, faulty_vfs.failing(tmp_path, n) as disk:
            try:
                prune(db, keep=3)
                pruned = True
            except MimoError as error:
                clear(error, path)
                pruned = False
        assert check(path).ok
        assert found_in(path) == ([0, 1, 2] if pruned else list(range(10)))
        if pruned and not disk.failed:
            break
        with Database(path) as db:
            db.add(*rows)
    assert n > 3
