"""SQLite on a disk that fails: the n-th write, sync, truncation, deletion or opening of a file goes wrong.

SQLite reaches files through a table of functions (its VFS). Here the table of the library that Python's
``sqlite3`` is linked with is changed in place, for files in one folder only.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_void_p
from ctypes.util import find_library

FULL, CANNOT_OPEN = 13, 14
IO_WRITE, IO_SYNC, IO_TRUNCATE, IO_DELETE = (10 | (n << 8) for n in (3, 4, 6, 10))

_Write = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_Truncate = CFUNCTYPE(c_int, c_void_p, c_int64)
_Sync = CFUNCTYPE(c_int, c_void_p, c_int)
_Open = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_Delete = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int)  # SQLite keeps the pointers to paths
_SLOTS = 20
_WRITE, _TRUNCATE, _SYNC = 3, 4, 5
"""Places of functions in the table of a file; place 0 is its version."""


class _Vfs(Structure):
    _fields_ = [
        ("version", c_int), ("file_bytes", c_int), ("path_bytes", c_int), ("next", c_void_p),
        ("name", c_char_p), ("data", c_void_p), ("open", c_void_p), ("delete", c_void_p),
    ]  # fmt: skip


class Disk:
    """Counts operations on files of one folder; the ``fail``-th one fails, or all from then on."""

    def __init__(self, folder: str, fail: int, code: int | None, *, for_good: bool) -> None:
        self.folder, self.fail, self.code, self.for_good = folder, fail, code, for_good
        self.count = 0
        self.failed: list[str] = []

    def goes_wrong(self, what: str) -> bool:
        self.count += 1
        wrong = self.count >= self.fail if self.for_good else self.count == self.fail
        if wrong:
            self.failed.append(what)
        return wrong


_kept: list[object] = []
"""Files that are still open call these for as long as they live."""
_disk: Disk | None = None


def library() -> ctypes.CDLL | None:
    """Return the library that Python's sqlite3 uses, or None where it is not a library of its own."""
    import _sqlite3
    import sqlite3

    with open("/proc/self/maps", errors="replace") as maps:
        names = {line.split()[-1] for line in maps if "libsqlite3" in line}
    name = min(names) if names else find_library("sqlite3")
    if name is None or (not names and _sqlite3.__file__):
        return None
    lib = ctypes.CDLL(name)
    lib.sqlite3_libversion.restype = c_char_p
    same = lib.sqlite3_libversion().decode() == sqlite3.sqlite_version
    return lib if same else None


def _wrapped(table: int) -> int:
    """Return the address of a copy of a file's table whose writing functions may fail."""
    slots = (c_void_p * _SLOTS).from_address(table)
    copy = (c_void_p * _SLOTS)(*slots)
    real_write, real_sync = _Write(slots[_WRITE]), _Sync(slots[_SYNC])
    real_truncate = _Truncate(slots[_TRUNCATE])

    def code(default: int) -> int:
        return _disk.code or default if _disk is not None else default

    @_Write
    def write(file: int, data: int, size: int, at: int) -> int:
        if _disk is not None and _disk.goes_wrong("write"):
            if size > 1:
                real_write(file, data, size // 2, at)  # half of it arrives
            return code(IO_WRITE)
        return int(real_write(file, data, size, at))

    @_Truncate
    def truncate(file: int, size: int) -> int:
        if _disk is not None and _disk.goes_wrong("truncate"):
            return IO_TRUNCATE
        return int(real_truncate(file, size))

    @_Sync
    def sync(file: int, flags: int) -> int:
        if _disk is not None and _disk.goes_wrong("sync"):
            return IO_SYNC
        return int(real_sync(file, flags))

    for place, function in ((_WRITE, write), (_TRUNCATE, truncate), (_SYNC, sync)):
        copy[place] = ctypes.cast(function, c_void_p).value
    _kept.extend([copy, write, truncate, sync])
    return ctypes.addressof(copy)


@contextmanager
def failing(
    folder: os.PathLike[str], fail: int, code: int | None = None, *, for_good: bool = False
) -> Iterator[Disk]:
    """Make one operation (or all from it on) of files in a folder fail while the context lasts."""
    global _disk
    lib = library()
    assert lib is not None
    lib.sqlite3_vfs_find.restype = POINTER(_Vfs)
    vfs = lib.sqlite3_vfs_find(None).contents
    open_at, delete_at = vfs.open, vfs.delete
    real_open, real_delete = _Open(open_at), _Delete(delete_at)
    tables: dict[int, int] = {}
    inside = os.fsencode(folder)

    @_Open
    def opened(itself: int, path: int | None, file: int, flags: int, out: int) -> int:
        ours = path and ctypes.string_at(path).startswith(inside) and _disk is not None
        if ours and _disk is not None and _disk.goes_wrong("open"):
            c_void_p.from_address(file).value = None
            return CANNOT_OPEN
        status = int(real_open(itself, path, file, flags, out))
        table = c_void_p.from_address(file)
        if ours and status == 0 and table.value:
            if table.value not in tables:
                tables[table.value] = _wrapped(table.value)
            table.value = tables[table.value]
        return status

    @_Delete
    def deleted(itself: int, path: int, sync_folder: int) -> int:
        ours = ctypes.string_at(path).startswith(inside)
        if ours and _disk is not None and _disk.goes_wrong("delete"):
            return IO_DELETE
        return int(real_delete(itself, path, sync_folder))

    _kept.extend([opened, deleted])
    _disk = Disk(os.fspath(folder), fail, code, for_good=for_good)
    vfs.open = ctypes.cast(opened, c_void_p).value
    vfs.delete = ctypes.cast(deleted, c_void_p).value
    try:
        yield _disk
    finally:
        _disk = None
        vfs.open, vfs.delete = open_at, delete_at
