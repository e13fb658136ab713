"""JSON from files that may be damaged or hostile: no duplicate key, no NaN, no deep nesting."""

from __future__ import annotations

import json
from typing import Any

from mimo_compile.errors import ArtifactError


def decode(data: bytes, where: str) -> Any:
    """Decode strictly.

    Raises:
        ArtifactError: The bytes are not JSON in UTF-8, an object has a key twice, or nesting is
            too deep; `where` names the place.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        reason = "nesting is too deep" if isinstance(error, RecursionError) else str(error)
        raise ArtifactError(f"malformed JSON: {reason}", where=where) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"key {twice[:80]!r} occurs twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON has")
