"""CUDA text of a kernel: ``.cu`` files beside the schedules, behind a list of their constants.

What a config says reaches the code in a preamble only; the text below it is the file's, byte for byte, so
that it can be read and debugged where it lies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_NAME = re.compile(r"[A-Z][A-Z0-9_]*\Z")

Constant = int | float | bool | str | tuple[int, ...]
"""What a constant of a text may be."""


def rendered(path: Path, constants: Mapping[str, Constant]) -> str:
    """Return the text of a file with its constants in front.

    Args:
        path: Of a ``.cu`` file beside a schedule.
        constants: Names in capitals. Numbers become ``constexpr`` (floats to the last bit), truth values
            macros of 1 or 0 (for ``#if``), words the names of types, tuples macros of numbers without signs,
            with commas between them.

    Raises:
        ValueError: a name is not in capitals.
        FileNotFoundError: there is no such file.
    """
    for name in constants:
        if not _NAME.match(name):
            raise ValueError(f"{name!r} is not in capitals")
    lines = [f"// {path.name}", *(_definition(n, v) for n, v in constants.items())]
    return "\n".join(lines) + "\n\n" + _source(path)


def _definition(name: str, value: Constant) -> str:
    if isinstance(value, tuple):
        return f"#define {name} {', '.join(f'{number}u' for number in value)}"
    if isinstance(value, bool):
        return f"#define {name} {int(value)}"
    if isinstance(value, int):
        return f"constexpr int {name} = {value};"
    if isinstance(value, float):
        return f"constexpr float {name} = {value.hex()}f;"
    return f"using {name} = {value};"


@cache
def _source(path: Path) -> str:
    return path.read_text()
