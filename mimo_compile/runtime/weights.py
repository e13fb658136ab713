"""Weights, mapped and not read: a safetensors member whose bytes are hashed before their first use."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from mimo_compile.errors import ArtifactError
from mimo_compile.runtime import dtypes, strict_json
from mimo_compile.runtime.memory import Bytes
from mimo_compile.runtime.program import Member

MOST_CHUNKS = 4096
"""Hashes that a manifest has room for."""
CHUNK = 1 << 20
"""Bytes that one hash of the manifest covers."""

ALIGNMENT = 64
PADDING = "~pad."
"""How the names of tensors begin that only fill the gap up to the next boundary."""

_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_RUN = 8  # chunks that a thread hashes in one go
_BLOCK = 1 << 20  # bytes that are read at a time to be hashed


class Spot(NamedTuple):
    """Where a tensor lies in the member, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class OpenFile:
    """A file that is read past its mapping: what is read so leaves no pages in this process."""

    def __init__(self, descriptor: int) -> None:
        """Take over a descriptor, which is closed with this object."""
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def stamp(self) -> tuple[int, int, int]:
        """Return what changes when somebody writes: size, time of the last write and of the last change.

        Writes through a mapping may be stamped late, and two within a tick of the system's clock alike.
        """
        facts = os.fstat(self._descriptor)
        return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns

    def read(self, at: int, into: Bytes) -> None:
        """Fill memory with what lies in the file from byte `at` on.

        Raises:
            EOFError: The file ends before.
            OSError: It cannot be read.
        """
        left = into.data
        while left:
            count = os.preadv(self._descriptor, [left], at)
            if not count:
                raise EOFError(f"it ends at byte {at}")
            left, at = left[count:], at + count


class WeightSource(Protocol):
    """What a module takes its weights from."""

    @property
    def spots(self) -> dict[str, Spot]:
        """The tensors by name."""

    def prepare(self, names: Iterable[str]) -> None:
        """Make sure that these tensors are what the manifest says; cheap the second time."""

    def data(self, name: str) -> Bytes:
        """Return a prepared tensor's bytes, on a 64-byte boundary and not to be written."""


class MappedWeights:
    """The weights member of an artifact, checked chunk by chunk as its tensors are needed."""

    def __init__(
        self, member: Bytes, facts: Member, where: str, file: OpenFile, start: int
    ) -> None:
        """Check and read the header.

        Args:
            member: The member's bytes, mapped.
            facts: Its size and hashes from the manifest.
            where: Path of the artifact, for messages.
            file: What is mapped.
            start: Byte of it at which the member begins.

        Raises:
            ArtifactError: The header is malformed, or differs from its hash.
        """
        self._where = f"weights.safetensors of {where}"
        self._member, self._file, self._start = member, file, start
        self._hashes, self._size = facts.chunks, facts.chunk_bytes
        self._good = bytearray(len(facts.chunks))
        self._stamp = file.stamp()  # of what the good ones were hashed in
        self._lock = threading.Lock()
        wanted = chunk_bytes(facts.bytes)
        if member.size != facts.bytes or (facts.chunk_bytes, len(facts.chunks)) != (
            wanted,
            -(-facts.bytes // wanted),
        ):
            raise ArtifactError(
                f"the manifest has {len(facts.chunks)} hashes of chunks of {facts.chunk_bytes} bytes, "
                f"and {facts.bytes} bytes, for a member of {member.size} bytes",
                where=self._where,
            )
        if member.size < 8:
            raise ArtifactError(
                "the member is too short for a safetensors header", where=self._where
            )
        self._check([(0, 8)])
        header_bytes = int.from_bytes(member[:8].tobytes(), "little")
        if not 2 <= header_bytes <= min(member.size - 8, _MAX_HEADER):
            raise ArtifactError(
                f"the header states {header_bytes} bytes in a member of {member.size}",
                where=self._where,
            )
        start = 8 + header_bytes
        self._check([(0, start)])
        header = strict_json.decode(member[8:start].tobytes(), self._where)
        self._spots = _read_spots(header, start, member.size, self._where)

    @property
    def spots(self) -> dict[str, Spot]:
        """The tensors by name, without the padding."""
        return self._spots

    def prepare(self, names: Iterable[str]) -> None:
        """Hash what these tensors cover, unless that was done before.

        Raises:
            ArtifactError: A chunk differs from its hash.
        """
        self._check([(self._spots[name].begin, self._spots[name].end) for name in names])

    def prepare_all(self) -> None:
        """Hash everything that was not hashed before, past the mapping: no pages of it come into memory.

        Raises:
            ArtifactError: A chunk differs from its hash, or cannot be read.
        """

        def one(chunk: int) -> None:
            try:
                self._read_hashed(chunk, 0, np.empty(0, np.uint8), self._good)
            except (EOFError, OSError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ArtifactError(
                    f"the weights cannot be read: {reason}", where=self._where
                ) from error

        self._check([(0, self._member.size)], one)

    def data(self, name: str) -> Bytes:
        """Return a tensor's bytes as they lie in the file."""
        spot = self._spots[name]
        return self._member[spot.begin : spot.end]

    def piece(self, name: str, begin: int, most: int) -> int:
        """Return how many bytes from a byte of a tensor on are best read at once, about `most`.

        What is still to be hashed is read as a whole chunk whatever is asked of it.
        """
        at = self._spots[name].begin + begin
        chunk = at // self._size
        return most if self._good[chunk] else max(most, (chunk + 1) * self._size - at)

    def read(self, name: str, begin: int, into: Bytes) -> int:
        """Read a part of a tensor, from its byte `begin` on, past the mapping.

        Chunks that were not hashed before are read as a whole, a block at a time, and what lies in `into`
        is of the very bytes that were hashed. If somebody has written to the file since, nothing counts as
        hashed any more, and all is read again, until nobody writes meanwhile.

        Returns:
            How many bytes were read.

        Raises:
            ArtifactError: A chunk differs from its hash.
            EOFError: The file is shorter than it was.
            OSError: It cannot be read.
        """
        begin += self._spots[name].begin
        total = 0
        while True:
            with self._lock:
                stamp, good = self._stamp, self._good
            total += self._read(begin, into, good)
            with self._lock:
                if (now := self._file.stamp()) == stamp:
                    return total
                if self._stamp == stamp:  # else another thread has met the change
                    self._stamp, self._good = now, bytearray(len(good))

    def _read(self, begin: int, into: Bytes, good: bytearray) -> int:
        end, total = begin + into.size, 0
        for chunk in range(begin // self._size, -(-end // self._size)):
            low, high = max(begin, chunk * self._size), min(end, (chunk + 1) * self._size)
            part = into[low - begin : high - begin]
            if good[chunk]:
                self._file.read(self._start + low, part)
                total += part.size
            else:
                total += self._read_hashed(chunk, low, part, good)
        return total

    def _read_hashed(self, chunk: int, low: int, part: Bytes, good: bytearray) -> int:
        """Read and hash a chunk, and copy what it has from byte `low` on; returns the chunk's bytes.

        It is noted in `good`, which is of one stamp: what is hashed before a change does not count after it.
        """
        first, end = chunk * self._size, min((chunk + 1) * self._size, self._member.size)
        digest, block = hashlib.sha256(), np.empty(min(_BLOCK, end - first), np.uint8)
        for at in range(first, end, _BLOCK):
            piece = block[: end - at]
            self._file.read(self._start + at, piece)
            digest.update(piece.data)
            begin, stop = max(at, low), min(at + piece.size, low + part.size)
            if begin < stop:
                part[begin - low : stop - low] = piece[begin - at : stop - at]
        self._take(chunk, digest.hexdigest(), good)
        return end - first

    def _check(
        self, ranges: Iterable[tuple[int, int]], check: Callable[[int], None] | None = None
    ) -> None:
        """Hash the chunks of these ranges that were not hashed before, each by ``check``."""
        check = check or self._check_mapped
        with self._lock:
            wanted = {
                chunk
                for begin, end in ranges
                for chunk in range(begin // self._size, -(-end // self._size))
                if not self._good[chunk]
            }

            def run(chunks: list[int]) -> None:
                for chunk in chunks:
                    check(chunk)

            if len(wanted) <= 1:
                run(sorted(wanted))
                return
            threads = min(len(os.sched_getaffinity(0)), 8, len(wanted))
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(run, _runs(sorted(wanted), threads)):
                    pass

    def _check_mapped(self, chunk: int) -> None:
        # hashlib lets other threads run meanwhile
        found = hashlib.sha256(self._member[chunk * self._size : (chunk + 1) * self._size].data)
        self._take(chunk, found.hexdigest(), self._good)

    def _take(self, chunk: int, found: str, good: bytearray) -> None:
        """Note in `good` that a chunk was hashed.

        Raises:
            ArtifactError: Its hash is another one.
        """
        if found != self._hashes[chunk]:
            raise ArtifactError(
                f"the weights are damaged: what follows byte {chunk * self._size} differs from its hash",
                where=self._where,
                remedy="Copy the file again or compile it again.",
            )
        good[chunk] = 1


def chunk_bytes(total: int) -> int:
    """Return the bytes of a chunk of a member: the least doubling of `CHUNK` that needs few hashes."""
    size = CHUNK
    while size * MOST_CHUNKS < total:
        size *= 2
    return size


def _runs(chunks: list[int], threads: int) -> Iterator[list[int]]:
    """Split chunks into runs that keep all threads busy and the file reads sequential."""
    length = max(1, min(_RUN, len(chunks) // threads))
    return (chunks[i : i + length] for i in range(0, len(chunks), length))


def _read_spots(header: Any, start: int, stop: int, where: str) -> dict[str, Spot]:
    """Check a safetensors header: its tensors tile the member's bytes from `start` to `stop`."""

    def wrong(name: object, what: str) -> ArtifactError:
        return ArtifactError(f"tensor {str(name)[:80]!r} {what}", where=where)

    if not isinstance(header, dict):
        raise ArtifactError("the header is not a JSON object", where=where)
    if start % ALIGNMENT:
        raise ArtifactError(f"the header does not end on a {ALIGNMENT}-byte boundary", where=where)
    spots: dict[str, Spot] = {}
    for name, fact in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(fact, dict) or set(fact) != {"dtype", "shape", "data_offsets"}:
            raise wrong(name, "needs exactly dtype, shape and data_offsets")
        shape, offsets, short = fact["shape"], fact["data_offsets"], fact["dtype"]
        dtype = dtypes.from_safetensors(short) if isinstance(short, str) else None
        if dtype is None:
            raise wrong(name, f"is of unknown dtype {str(short)[:20]!r}")
        if not _extents(shape) or not _extents(offsets) or len(offsets) != 2:
            raise wrong(name, "has a shape or offsets that are not whole numbers from 0 on")
        begin, end = start + offsets[0], start + offsets[1]
        if end > stop or end - begin != dtypes.size(dtype, tuple(shape)):
            raise wrong(name, "lies outside of the member or is not as long as its shape")
        spots[name] = Spot(dtype, tuple(shape), begin, end)
    at = start
    for name, spot in sorted(spots.items(), key=lambda item: (item[1].begin, item[1].end)):
        if spot.begin != at:
            raise wrong(name, "does not begin where the one before it ends")
        if spot.begin % ALIGNMENT and not name.startswith(PADDING):
            raise wrong(name, f"does not begin on a {ALIGNMENT}-byte boundary")
        at = spot.end
    if at != stop:
        raise ArtifactError(f"{stop - at} bytes follow the last tensor", where=where)
    return {name: spot for name, spot in spots.items() if not name.startswith(PADDING)}


def _extents(value: object) -> bool:
    """Whether a value is a list of whole numbers from 0 on, few and small enough to multiply."""
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(n) is int and 0 <= n < 1 << 48 for n in value)
    )
