"""Where the states of a module lie: in memory, and on request some keys and values in a file.

Layers that look for tokens by an index of their keys read of keys and values only what they list. These may
lie in a file: where memory is short, the system writes them there and brings back the pages that are listed,
where anonymous memory would have to be swapped. A prompt reads all of them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Collection
from pathlib import Path

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.runtime.entry import state_spans
from mimo_compile.runtime.memory import Bytes, Zeroed
from mimo_compile.runtime.program import Manifest


class Stored:
    """A shared mapping of a file without a name: zero at first, page aligned, gone with its last view.

    It belongs to the process that made it: one that is forked from it shares the file, not a copy of it.
    """

    def __init__(self, size: int, folder: Path) -> None:
        """Make a file of `size` bytes in a folder, all of which the disk has to have.

        Raises:
            UsageError: There is no such folder, it cannot be written to, or it has no room.
        """
        self._folder, self._size, self._process = folder, max(size, 1), os.getpid()
        try:
            with tempfile.TemporaryFile(prefix="mimo-kv-", dir=folder, buffering=0) as file:
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise UsageError(
                f"--kv-store {folder}: no file can be made there: {error.strerror}",
                remedy="name a folder that exists and can be written to",
            ) from error
        weakref.finalize(self, os.close, self._file)
        self._fill()
        self._map = mmap.mmap(self._file, self._size, flags=mmap.MAP_SHARED)
        self._map.madvise(mmap.MADV_RANDOM)  # neighbours of a listed token are seldom listed
        self.bytes: Bytes = np.frombuffer(self._map, np.uint8, size)
        """The memory; views of it keep the mapping alive."""

    def _fill(self) -> None:
        """Take the file's blocks: a disk that is full at the first touch of a page would end the process."""
        try:
            os.posix_fallocate(self._file, 0, self._size)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"--kv-store {self._folder}: {self._size / 2**20:.0f} MiB do not fit: {reason}",
                remedy="name a folder with more room, or compile for fewer positions (--max-context)",
            ) from error

    def check(self) -> None:
        """Check that this is the process that made it.

        Raises:
            UsageError: It is another one.
        """
        if os.getpid() != self._process:
            raise UsageError(
                f"--kv-store {self._folder}: the module's keys and values lie in a file that belongs to "
                f"process {self._process}, from which this one was forked",
                remedy="load the artifact in each process",
            )

    def clear(self) -> None:
        """Make everything zero again by giving the file's blocks back and taking others.

        Raises:
            UsageError: In a forked process; or others have taken the room meanwhile.
        """
        self.check()
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, self._size)  # whatever comes next, no view lies beyond the end
        self._fill()


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
            UsageError: There are none such, or the folder is no path or cannot hold them.
        """
        if folder is not None:
            check_folder(folder)
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

    def check(self) -> None:
        """Check that this process may use them: those in a file are of the one that loaded the module.

        Raises:
            UsageError: It may not.
        """
        for block in self._blocks:
            if isinstance(block, Stored):
                block.check()

    def clear(self) -> None:
        """Make all of them zero.

        Raises:
            UsageError: As `check`; or a file's room was taken by others.
        """
        self.check()
        for block in self._blocks:
            block.clear()


def check_folder(folder: object) -> None:
    """Check that something names a folder, whether or not that exists.

    Raises:
        UsageError: It does not.
    """
    text = os.fspath(folder) if isinstance(folder, os.PathLike) else folder
    if not isinstance(text, str) or not text or "\0" in text:
        raise UsageError(
            f"--kv-store (kv_store): {folder!r} is not a path",
            remedy="name a folder, as text or a Path",
        )


def listed(manifest: Manifest) -> list[str]:
    """Return the states of which a decoded token reads no more than it lists."""
    layers = manifest.decoder.layers if manifest.decoder is not None else ()
    return [
        f"{layer.name}.{part}"
        for layer in layers
        for part in ("k_cache", "v_cache")
        if f"{layer.name}.k_copy" in layer.states
    ]
