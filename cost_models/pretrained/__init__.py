"""Latency models that come with the package, one JSON file for each machine that records exist for.

``python -m mimo_compile.search.train`` makes them from records.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path


def shipped() -> Iterator[Path]:
    """Yield the files, in a fixed order."""
    folder = Path(str(files(__name__)))
    yield from sorted(folder.glob("*.json"))
