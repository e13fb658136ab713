"""Who takes part in a comparison of whole models, and what the process that runs it has to offer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelAsk:
    """What peers are asked to run."""

    source: Path | None
    """The checkpoint's folder; None where an artifact does not say what it came from."""
    quant: str
    """What ours stores weights as: the `--quant` grammar."""
    threads: int
    context: int
    """Prompt and new tokens together."""
    scratch: Path
    """Folder for files that a peer needs; what is found there from before may be used."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """One implementation of a model, not loaded yet."""

    impl: str
    """Name in tables, with its version."""
    runner: str
    """``module:Class`` of its `Runner`, imported in a process of its own."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What the class is made with; JSON."""
    file_bytes: int = 0
    """Bytes of the files that it loads weights from."""
    peer: str = ""
    """Name of its peer; empty: ours."""


class Runner(Protocol):
    """What `worker` calls in the process of an entrant; the constructor imports libraries, nothing else."""

    def load(self) -> dict[str, float]:
        """Make ready to generate; return ``load_s``, and further figures."""

    def run(self, prompt: Sequence[int], new: int) -> dict[str, Any]:
        """Generate greedily from an empty cache.

        Returns:
            ``prefill`` and ``decode``, tokens/s: until the first token is known, and of those after it.
        """


def warm(paths: Iterable[Path]) -> None:
    """Read files once, so that loading times of all are those of files in the page cache."""
    buffer = bytearray(_PIECE)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
