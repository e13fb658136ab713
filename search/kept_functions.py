"""Generic functions kept beside a database, so that their workloads can be tuned again without their model.

A file for each, by content: ``records.db.functions/h0123456789abcdef.json``. Records do not need them: they
are looked up by the workload's name.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from mimo_compile.ir import functions
from mimo_compile.ir.workload import Workload

_LOG = logging.getLogger(__name__)


def folder_of(database: str | os.PathLike[str]) -> Path:
    """Return where the functions of a database are kept."""
    path = Path(database)
    return path.with_name(f"{path.name}.functions")


def keep(database: str | os.PathLike[str], workloads: Iterable[Workload]) -> int:
    """Keep the functions of generic workloads; return how many are new, or were damaged.

    What cannot be written is not kept: a search works without.
    """
    folder, new = folder_of(database), 0
    for workload in workloads:
        if not functions.is_function(workload):
            continue
        digest = workload.text("hash")
        if _read(folder, digest) is not None or not functions.known(workload):
            continue
        path = folder / f"{digest}.json"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(functions.text_of(workload), encoding="utf-8")
            temporary.replace(path)
            new += 1
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    return new


def use(database: str | os.PathLike[str]) -> None:
    """Find functions beside a database from now on."""
    folder = folder_of(database)
    if folder not in _USED:
        _USED.add(folder)
        functions.add_source(lambda digest: _read(folder, digest))


_USED: set[Path] = set()


def _read(folder: Path, digest: str) -> str | None:
    """Return the text of a function; what is damaged, or is another function's, is as good as absent."""
    if not digest.isalnum():
        return None
    path = folder / f"{digest}.json"
    try:
        text = path.read_text(encoding="utf-8")
        if functions.hash_of(text) == digest:
            return text
        _LOG.warning("%s holds another function than it is named after: ignored", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _LOG.warning("%s cannot be read: ignored (%s)", path, error)
    return None
