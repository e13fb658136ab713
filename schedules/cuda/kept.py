"""Results of compilers, kept in the user's cache folder by the content that they were made of.

A file of the cache is a checksum and JSON. One that is damaged or of another version counts as absent, and
what cannot be written is not kept: everything works without.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

_MOST = 4096
"""Files, of some 50 KB each; beyond it the older half goes."""
_SUFFIX = ".built"
T = TypeVar("T")


def folder() -> Path:
    """Return where results are kept.

    Raises:
        RuntimeError: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mimo_compile" / "cuda"


def digest(parts: Sequence[str]) -> str:
    """Return the key of what is made of these texts, whose borders count."""
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]


def load(key: str, kind: type[T]) -> T | None:
    """Return what is kept under a key, or None."""
    try:
        path = folder() / f"{key}{_SUFFIX}"
        checksum, _, data = path.read_bytes().partition(b"\n")
        if checksum != _checksum(data):
            return None
        value = msgspec.json.decode(data, type=kind)
        os.utime(path)  # what is used stays longest
    except (OSError, RuntimeError, msgspec.MsgspecError):
        return None
    return value


def store(key: str, value: object) -> None:
    """Keep a dataclass of plain values under a key."""
    data = msgspec.json.encode(value)
    with contextlib.suppress(OSError, RuntimeError):
        where = folder()
        where.mkdir(parents=True, exist_ok=True)
        temporary = where / f".{key}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(_checksum(data) + b"\n" + data)
            temporary.replace(where / f"{key}{_SUFFIX}")
        finally:
            temporary.unlink(missing_ok=True)
        _prune(where)


def _prune(where: Path) -> None:
    names = [entry for entry in os.scandir(where) if entry.name.endswith(_SUFFIX)]
    if len(names) <= _MOST:
        return
    for entry in sorted(names, key=lambda e: e.stat().st_mtime)[: len(names) // 2]:
        Path(entry.path).unlink(missing_ok=True)


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
