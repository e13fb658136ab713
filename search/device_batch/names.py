"""What a device batch may use as names: they become names of files on both sides."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from mimo_compile.search.device_batch.files import Batch

_ID = re.compile(r"[0-9a-f]{16}")
_FILE = re.compile(r"[0-9a-f]{64}\.(npy|cubin)")
_ARGUMENT = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class _Named(msgspec.Struct, frozen=True):
    name: str


class _Facts(msgspec.Struct, frozen=True):
    """Of a job's facts, what becomes names of files."""

    args: tuple[_Named, ...] = ()


def is_file(name: str) -> bool:
    """Say whether a name is one of the files of a batch: a hash, and what it is the hash of."""
    return _FILE.fullmatch(name) is not None


def strange_name(batch: Batch) -> str | None:
    """Return a name in a batch that is none of its kind, and so might lead out of a folder; None: all are.

    Raises:
        msgspec.MsgspecError: the facts of a job have no names where they should be.
    """
    if not _ID.fullmatch(batch.header.id):
        return batch.header.id
    for job in (job for unit in batch.units for job in unit.jobs):
        names = {a.name for a in msgspec.convert(job.facts, _Facts).args}
        names.update(*job.cases)
        if bad := sorted(name for name in names if not _ARGUMENT.fullmatch(name)):
            return bad[0]
    return None
