"""Joules in tables: a column for each source, so that none holds measured values beside modelled ones."""

from __future__ import annotations

from collections.abc import Sequence

from mimo_compile.cli.console import number

MODELLED = "modelled"
NOTE = "mJ, modelled: computed from time, operations and bytes, not measured; for ranking only"


def energy_columns(
    values: Sequence[tuple[float | None, str | None]],
) -> tuple[list[str], list[list[str]]]:
    """Return the titles (``mJ, rapl``; ``mJ, modelled``), and the cells of each row.

    Args:
        values: For each row millijoules (None: none are known) and the meter, or ``modelled``.

    Meters come first, the model last; there is no column where nothing is known.
    """
    found = {source or MODELLED for mj, source in values if mj is not None}
    sources = [*sorted(found - {MODELLED}), *(found & {MODELLED})]
    rows = [
        [number(mj) if mj is not None and (source or MODELLED) == s else "-" for s in sources]
        for mj, source in values
    ]
    return [f"mJ, {s}" for s in sources], rows


def title(source: str | None) -> str:
    """Return what a row or column of one source is called."""
    return f"mJ, {source or MODELLED}"
