"""JSON files in which a calibration keeps what it found of a model, for a policy that needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mimo_compile.errors import ArtifactError, InputError
from mimo_compile.runtime.strict_json import decode

FORMAT = 1
AGAIN = "write it with `mimo-compile calibrate`"
"""Remedy."""
_LARGEST = 1 << 26


def read_found(path: Path, what: str, model: str) -> dict[str, Any]:
    """Read a file.

    Args:
        path: Relative to the current folder.
        what: It has, for messages: ``thresholds``.
        model: Family of the model that it must be of.

    Raises:
        InputError: the file is missing, no such JSON, or of another model.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"the file of {what} is not a regular file", file=path)
        if path.stat().st_size > _LARGEST:
            raise InputError(f"the file is too large for one of {what}", file=path)
        found = decode(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(
            f"the {what} cannot be read: {error.strerror or error}", file=path, remedy=AGAIN
        ) from error
    except ArtifactError as error:
        raise InputError(
            f"this is no file of {what}: {error.what}", file=path, remedy=AGAIN
        ) from error
    # by its text: true and 1.0 equal 1
    if not isinstance(found, dict) or repr(found.get("format")) != str(FORMAT):
        raise InputError(f"this is no file of {what} of format {FORMAT}", file=path, remedy=AGAIN)
    if found.get("model") != model:
        raise InputError(
            f"these {what} are those of a {found.get('model')} model, this is a {model}",
            file=path, remedy=f"Give this model's file, or {AGAIN}",
        )  # fmt: skip
    return found
