"""One self-contained HTML page about an artifact or a database of records; opens without a network."""

from __future__ import annotations

import os
from pathlib import Path

from mimo_compile.errors import MimoError
from mimo_compile.report.data import gather
from mimo_compile.report.models import study
from mimo_compile.report.page import MOST_PLOTS, page

MOST_BYTES = 1_000_000
"""A page stays below this."""


def write_report(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write a report.

    Args:
        source: An artifact (``OUT.mimo``) or a database (``records.db``).
        output: The page to write, as a whole or not at all.

    Returns:
        The page's path.

    Raises:
        InputError: the source is missing or is neither.
    """
    data = gather(source)
    studies = [study(machine) for machine in data.machines]
    plots = MOST_PLOTS
    while True:
        text = page(data, plots, studies).encode(errors="backslashreplace")  # a path may be no text
        if len(text) <= MOST_BYTES or plots == 0:
            break
        plots //= 2
    if len(text) > MOST_BYTES:
        raise MimoError(f"the report would take {len(text)} bytes, more than {MOST_BYTES}")
    target = Path(output)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


__all__ = ["MOST_BYTES", "gather", "page", "write_report"]
