"""Where the states of a module lie: in memory, and on request some keys and values in a file.

Layers that look for tokens by an index of their keys read of keys and values only what they list. These may
lie in a file: where memory is short, the system writes them there and brings back the pages that are listed,
where anonymous memory would have to be swapped. A prompt reads all of them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.runtime.entry import state_spans
from mimo_compile.runtime.memory import Bytes, Zeroed
from mimo_compile.runtime.program import Manifest


class Stored:
    """A shared mapping of a file without a name: zero at first, page aligned, gone with its last view."""

    def __init__(self, size: int, folder: Path) -> None:
        """Make a file of `size` bytes in a folder, all of which the disk has to have.

        Raises:
            UsageError: There is no such folder, it cannot be written to, or it has no room.
        """
        try:
            descriptor, name = tempfile.mkstemp(prefix="mimo-kv-", dir=folder)
        except OSError as error:
            raise UsageError(
                f"--kv-store {folder}: no file can be made there: {error.strerror}",
                remedy="name a folder that exists and can be written to",
            ) from error
        try:
            os.unlink(name)
            # a disk that is full at the first touch of a page would end the process
            os.posix_fallocate(descriptor, 0, max(size, 1))
            self._map = mmap.mmap(descriptor, max(size, 1), flags=mmap.MAP_SHARED)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"--kv-store {folder}: {size / 2**20:.0f} MiB do not fit: {reason}",
                remedy="name a folder with more room, or compile for fewer positions (--max-context)",
            ) from error
        finally:
            os.close(descriptor)  # the mapping has one of its own
        self._map.madvise(mmap.MADV_RANDOM)  # neighbours of a listed token are seldom listed
        self.bytes: Bytes = np.frombuffer(self._map, np.uint8, size)
        """The memory; views of it keep the mapping alive."""

    def clear(self) -> None:
        """Make everything zero again."""
        self.bytes[...] = 0


class States:
    """Memory of all states of a module."""

    def __init__(
        self,
        manifest: Manifest,
        sequences: int,
        shared: Collection[str],
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """Reserve it.

        Args:
            manifest: Says which states there are.
            sequences: That may be in progress at once.
            shared: States that these have together.
            folder: Where keys and values lie that are read by lists alone; None: in memory.

        Raises:
            UsageError: There are none such, or the folder cannot hold them.
        """
        away = frozenset(listed(manifest)) if folder is not None else frozenset()
        if folder is not None and not away:
            raise UsageError(
                f"--kv-store: no layer of {manifest.name} reads its keys and values by lists alone",
                remedy="leave it out, or compile with --attention tailorkv",
            )
        self._blocks: list[Zeroed | Stored] = []
        self.bytes: dict[str, Bytes] = {}
        """Of each state, by name."""
        for far in (False, True) if folder is not None else (False,):
            own = {name: s for name, s in manifest.states.items() if (name in away) == far}
            spans, size = state_spans(own, sequences, shared=shared)
            block = Stored(size, Path(folder)) if far and folder is not None else Zeroed(size)
            self._blocks.append(block)
            self.bytes |= {name: block.bytes[span] for name, span in spans.items()}

    def clear(self) -> None:
        """Make all of them zero."""
        for block in self._blocks:
            block.clear()


def listed(manifest: Manifest) -> list[str]:
    """Return the states of which a decoded token reads no more than it lists."""
    layers = manifest.decoder.layers if manifest.decoder is not None else ()
    return [
        f"{layer.name}.{part}"
        for layer in layers
        for part in ("k_cache", "v_cache")
        if f"{layer.name}.k_copy" in layer.states
    ]
