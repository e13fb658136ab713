"""Trained models on disk: JSON, written atomically, its content parsed only after its hash was checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mimo_compile.errors import InputError

SCHEMA = 2
"""Version of the file; 1 held a single model of latency."""


def _text(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def write(path: str | os.PathLike[str], content: dict[str, Any]) -> str:
    """Write the content of a model; return its SHA-256.

    Raises:
        InputError: the file cannot be written; what was there stays.
    """
    text = _text(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("w") as out:
                out.write(f'{{"schema":{SCHEMA},"sha256":"{digest}","content":{text}}}\n')
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"the cost model cannot be written: {error.strerror or error}",
            file=target,
            remedy="Check the folder, its permissions and the free space",
        ) from error
    return digest


def read(path: str | os.PathLike[str], *, sha256: str | None = None) -> dict[str, Any]:
    """Return the content of a model that `write` wrote.

    Args:
        path: The file.
        sha256: The hash known from elsewhere; a file with another one is refused.

    Raises:
        InputError: missing, damaged, of another schema, or not the expected model.
    """
    file = Path(path)
    try:
        outer = json.loads(file.read_bytes())
        schema, digest, content = outer["schema"], outer["sha256"], outer["content"]
    except OSError as error:
        raise InputError(f"cannot read the cost model: {error.strerror}", file=file) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError("this is not a cost model", file=file) from error
    if schema != SCHEMA:
        older = isinstance(schema, int) and schema < SCHEMA
        raise InputError(
            f"the cost model has schema {schema}, this version reads {SCHEMA}",
            file=file,
            remedy="train it anew: python -m mimo_compile.search.train"
            if older
            else "update mimo-compile",
        )
    text = _text(content)
    if hashlib.sha256(text.encode()).hexdigest() != digest or (sha256 or digest) != digest:
        raise InputError("the cost model does not match its SHA-256", file=file)
    if not isinstance(content, dict):
        raise InputError("this is not a cost model", file=file)
    return content
