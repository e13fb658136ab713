"""Amounts of memory as people write them: ``512MiB``, ``2GiB``."""

from __future__ import annotations

import re

_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_size(text: str) -> int | None:
    """Return the bytes that a text states, None if it states none."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)([KMG]iB)", text)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def spell_size(count: int) -> str:
    """Spell a number of bytes in the largest unit of which there is at least one."""
    for unit, size in reversed(_UNITS.items()):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"
