"""Writes artifacts: one file with manifest, programs, code and weights; and reads them for a look.

The same contents give the same bytes. A file appears whole or not at all, and one that was there
before stays as it was until then.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from mimo_compile import _tvm
from mimo_compile.errors import ArtifactError, MimoError
from mimo_compile.runtime import check, dtypes, zipform
from mimo_compile.runtime.container import MAX_MANIFEST, Parts, open_artifact
from mimo_compile.runtime.machine import code_member
from mimo_compile.runtime.memory import Bytes
from mimo_compile.runtime.module import Module
from mimo_compile.runtime.program import Manifest, Member, Programs
from mimo_compile.runtime.weights import ALIGNMENT, PADDING, Spot, chunk_bytes

Array = npt.NDArray[Any]

_PIECE = 4 << 20  # bytes that are hashed and written in one go
_AHEAD = 4  # pieces that may wait to be hashed
_UNKNOWN = "0" * 64  # stands for a hash until it is known; as long as one


@dataclass(frozen=True)
class Deferred:
    """A weight that is made only when it is written, so that not all need memory at once.

    Attributes:
        dtype: Name of its element type, e.g. `int8`.
        shape: Its extents.
        make: Returns the array.
    """

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Array]


@dataclass
class Artifact:
    """What a compilation makes, complete but for its hashes, which `save` adds to the manifest.

    Attributes:
        manifest: What the artifact says about itself; its `members` are ignored here.
        programs: The entry points.
        code: Object code with all kernels.
        weights: Tensors by name, in the order in which they are to lie in the file.
        config: The model's `config.json`.
        tokenizer: The model's `tokenizer.json`.
        records: The measurements the plan rests on, as JSON lines.
    """

    manifest: Manifest
    programs: Programs
    code: bytes
    weights: Mapping[str, Array | Deferred] = field(default_factory=dict)
    config: bytes | None = None
    tokenizer: bytes | None = None
    records: bytes | None = None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the artifact.

        Args:
            path: Where; a file there is replaced once the new one is complete and durable.

        Returns:
            The path.

        Raises:
            MimoError: It cannot be written; what was there before is untouched.
            ArtifactError: The contents contradict each other, or the manifest is too long.
        """
        target = Path(path)
        header, tensors, spots = _weights_header(self.weights)
        check.check_programs(self.manifest, self.programs, spots, str(target))
        check.check_code(self.manifest, self.programs, self.code, str(target))
        weights_bytes = len(header) + sum(nbytes for nbytes, _ in tensors)
        members = self._small_members()
        facts = {
            name: Member(len(data), hashlib.sha256(data).hexdigest())
            for name, data in members.items()
        }
        size = chunk_bytes(weights_bytes)
        hashes = (_UNKNOWN,) * -(-weights_bytes // size)
        facts[zipform.WEIGHTS] = Member(weights_bytes, _UNKNOWN, hashes, size)
        # All hashes are equally long, so the manifest's length is known before they are.
        draft = _encode_manifest(self.manifest, facts)
        members[zipform.MANIFEST] = draft
        sizes = {name: len(data) for name, data in members.items()} | {
            zipform.WEIGHTS: weights_bytes
        }
        order = zipform.member_order(list(sizes))
        crcs = {name: zlib.crc32(data) for name, data in members.items()} | {zipform.WEIGHTS: 0}

        def slots() -> list[zipform.Slot]:
            return [zipform.Slot(name, sizes[name], crcs[name]) for name in order]

        with _published(target) as file:
            places = dict(zip(order, zipform.layout(slots()), strict=True))
            for slot in slots():
                file.write(zipform.local_header(slot, places[slot.name][0]))
                if slot.name != zipform.WEIGHTS:
                    file.write(members[slot.name])
                    continue
                sums = _Sums(weights_bytes)
                with sums:
                    sums.add(header)
                    file.write(header)
                    for piece in self._data(tensors):
                        sums.add(piece)
                        if self.manifest.shapes_only:
                            file.skip(len(piece))
                        else:
                            file.write(piece)
                facts[slot.name], crcs[slot.name] = sums.result()
            manifest = _encode_manifest(self.manifest, facts)
            crcs[zipform.MANIFEST] = zlib.crc32(manifest)
            file.write(zipform.directory(slots(), hashlib.sha256(manifest).hexdigest()))
            for slot in slots():
                if slot.name in (zipform.MANIFEST, zipform.WEIGHTS):
                    at = places[slot.name][0]
                    file.write_at(at, zipform.local_header(slot, at))
            file.write_at(places[zipform.MANIFEST][1], manifest)
        return target

    def _data(self, tensors: list[tuple[int, Callable[[], Array]]]) -> Iterator[memoryview]:
        """Give out the bytes of the tensors; of a model of shapes alone nothing is made."""
        return _zeros(sum(n for n, _ in tensors)) if self.manifest.shapes_only else _pieces(tensors)

    def _small_members(self) -> dict[str, bytes]:
        found = {
            code_member(self.manifest, self.manifest.name): self.code,
            zipform.PROGRAMS: msgspec.json.encode(self.programs),
            "config.json": self.config,
            "tokenizer.json": self.tokenizer,
            "records.jsonl": self.records,
        }
        return {name: data for name, data in found.items() if data is not None}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Read an artifact to look at it, also one for another machine; nothing is executed.

        The weights stay in the file: each is a `Deferred` that checks and copies nothing until
        it is made.

        Raises:
            InputError: The file cannot be read.
            ArtifactError: It is damaged, of another schema, or no artifact.
        """
        parts = open_artifact(path, for_this_machine=False)
        return cls(
            parts.manifest,
            parts.programs,
            parts.code,
            {name: _deferred(parts, name, spot) for name, spot in parts.weights.spots.items()},
            parts.texts.get("config.json"),
            parts.texts.get("tokenizer.json"),
            parts.texts.get("records.jsonl"),
        )

    def module(self, *, threads: int | None = None) -> Module:
        """Run the artifact from memory, without a file; arguments as in `load`."""
        texts = {"config.json": self.config, "tokenizer.json": self.tokenizer}
        weights = _MemoryWeights(self.weights, zeros=self.manifest.shapes_only)
        where = f"{self.manifest.name}, not saved"
        check.check_programs(self.manifest, self.programs, weights.spots, where)
        check.check_code(self.manifest, self.programs, self.code, where)
        parts = Parts(
            self.manifest,
            self.programs,
            self.code,
            weights,
            {name: data for name, data in texts.items() if data is not None},
            where,
        )
        return Module(parts, threads=threads)


class _MemoryWeights:
    """Weights that are not in a file: made and aligned on first use; zeros if of shapes alone."""

    def __init__(self, weights: Mapping[str, Array | Deferred], *, zeros: bool) -> None:
        self._weights = weights
        self._zeros = zeros
        self._ready: dict[str, Bytes] = {}
        self.spots = {
            name: Spot(*_type(value), 0, dtypes.size(*_type(value)))
            for name, value in weights.items()
        }

    def prepare(self, names: Any) -> None:
        for name in names:
            if name in self._ready:
                continue
            if self._zeros:
                self._ready[name] = _blank(self.spots[name].end)
            else:
                array = _tvm.as_aligned(_made(name, self._weights[name]))
                self._ready[name] = array.reshape(-1).view(np.uint8)

    def data(self, name: str) -> Bytes:
        return self._ready[name]


def _blank(nbytes: int) -> Bytes:
    """Return zero bytes on a boundary for kernels: pages that are read only take no memory of their own."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8, nbytes)


def _deferred(parts: Parts, name: str, spot: Spot) -> Deferred:
    def make() -> Array:
        parts.weights.prepare([name])
        return parts.weights.data(name).view(dtypes.numpy_dtype(spot.dtype)).reshape(spot.shape)

    return Deferred(spot.dtype, spot.shape, make)


def _type(value: Array | Deferred) -> tuple[str, tuple[int, ...]]:
    if isinstance(value, Deferred):
        return value.dtype, tuple(value.shape)
    return value.dtype.name, value.shape


def _made(name: str, value: Array | Deferred) -> Array:
    """Return a weight as a contiguous array of the type that it was announced with."""
    array = value.make() if isinstance(value, Deferred) else value
    if _type(array) != _type(value):
        raise ArtifactError(
            f"weight {name} was announced as {dtypes.spell(*_type(value))} and made as "
            f"{dtypes.spell(*_type(array))}"
        )
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return np.ascontiguousarray(array).reshape(array.shape)


def _encode_manifest(manifest: Manifest, members: dict[str, Member]) -> bytes:
    text = msgspec.json.encode(
        msgspec.structs.replace(manifest, members=dict(sorted(members.items())))
    )
    if len(text) > MAX_MANIFEST:
        raise ArtifactError(
            f"the manifest would take {len(text)} bytes, at most {MAX_MANIFEST} are allowed",
            remedy="It lists every kernel and its alternatives: compile fewer entry points.",
        )
    return text


def _weights_header(
    weights: Mapping[str, Array | Deferred],
) -> tuple[bytes, list[tuple[int, Callable[[], Array]]], dict[str, Spot]]:
    """Lay out the tensors: each begins on a boundary, padding tensors fill the gaps.

    Returns:
        The safetensors header with its length in front, the tensors as (bytes, function that
        makes it) in their order, and where each of the weights lies.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mimo"}}
    tensors: list[tuple[int, Callable[[], Array]]] = []
    spots: dict[str, Spot] = {}
    at = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], Array]) -> int:
        nbytes = dtypes.size(dtype, shape)
        header[name] = {
            "dtype": dtypes.to_safetensors(dtype),
            "shape": list(shape),
            "data_offsets": [at, at + nbytes],
        }
        tensors.append((nbytes, make))
        return at + nbytes

    for name, value in weights.items():
        dtype, shape = _type(value)
        if not dtypes.known(dtype) or name == "__metadata__" or name.startswith(PADDING):
            raise ArtifactError(f"weight {name!r} of {dtype} cannot be stored")
        spots[name] = Spot(dtype, shape, at, at + dtypes.size(dtype, shape))
        at = add(name, dtype, shape, partial(_made, name, value))
        gap = -at % ALIGNMENT
        if gap:
            at = add(f"{PADDING}{len(tensors)}", "uint8", (gap,), partial(np.zeros, gap, np.uint8))
    text = msgspec.json.encode(header)
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, tensors, spots


def _pieces(tensors: list[tuple[int, Callable[[], Array]]]) -> Iterator[memoryview]:
    """Make the tensors one after the other and give out their bytes."""
    for nbytes, make in tensors:
        array = make() if nbytes else None
        if array is None:
            continue
        data = array.reshape(-1).view(np.uint8).data
        for begin in range(0, nbytes, _PIECE):
            yield data[begin : begin + _PIECE]


def _zeros(count: int) -> Iterator[memoryview]:
    """Give out so many zero bytes."""
    piece = memoryview(bytes(min(count, _PIECE)))
    for begin in range(0, count, _PIECE):
        yield piece[: count - begin]


class _Sums:
    """Hashes of a member, whole and by chunk, and its CRC: computed by two threads beside the writer."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._each = chunk_bytes(size)
        self._seen = 0
        self._whole = hashlib.sha256()
        self._chunk = hashlib.sha256()
        self._chunks: list[str] = []
        self._crc = 0
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            self._threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2)]
            self._stack = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, piece: bytes | memoryview) -> None:
        """Add the next bytes; they must stay as they are until `result`."""
        for thread, work in zip(self._threads, (self._whole.update, self._parts), strict=True):
            self._waiting.append(thread.submit(work, piece))
        while len(self._waiting) > 2 * _AHEAD:
            self._waiting.popleft().result()

    def _parts(self, piece: bytes | memoryview) -> None:
        view = memoryview(piece)
        self._crc = zlib.crc32(view, self._crc)
        while view:
            part = view[: self._each - self._seen % self._each]
            self._chunk.update(part)
            self._seen += len(part)
            view = view[len(part) :]
            if self._seen % self._each == 0 or self._seen == self._size:
                self._chunks.append(self._chunk.hexdigest())
                self._chunk = hashlib.sha256()

    def result(self) -> tuple[Member, int]:
        """Return size and hashes, and the CRC, of all that was added."""
        while self._waiting:
            self._waiting.popleft().result()
        facts = Member(self._size, self._whole.hexdigest(), tuple(self._chunks), self._each)
        return facts, self._crc


class _File:
    """A file being written, all or nothing."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[_some(os.write(self._descriptor, view)) :]

    def skip(self, count: int) -> None:
        """Leave so many zero bytes out, which take no room on file systems that know holes."""
        os.lseek(self._descriptor, count, os.SEEK_CUR)

    def write_at(self, at: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = _some(os.pwrite(self._descriptor, view, at))
            at, view = at + done, view[done:]


def _some(done: int) -> int:
    if not done:
        raise OSError(errno.EIO, "nothing could be written")
    return done


@contextmanager
def _published(target: Path) -> Iterator[_File]:
    """Write a file beside the target and put it in the target's place when it is durable.

    Raises:
        MimoError: A system call failed; the target is as it was and nothing is left behind.
    """
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not target.is_file():  # a device would be replaced, not written to
            raise OSError(errno.EINVAL, "it is not a regular file")
        _sweep(target)
        descriptor, beside = _create_beside(target)
        try:
            yield _File(descriptor)
            os.fsync(descriptor)
            os.replace(beside, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside)
            raise
        finally:
            os.close(descriptor)
        _sync_folder(target.parent)
    except OSError as error:
        raise MimoError(
            f"the artifact cannot be written: {error.strerror or error} "
            f"({errno.errorcode.get(error.errno or 0, 'no errno')})",
            where=target,
            remedy="Check the folder, its permissions and the free space.",
        ) from error


def _create_beside(target: Path) -> tuple[int, Path]:
    """Create a file in the target's folder, and lock it: without a lock it counts as left over."""
    while True:
        path = target.parent / f".{target.name}.tmp-{os.getpid()}-{uuid.uuid4().hex}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks: there nobody sweeps either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return descriptor, path
        os.close(descriptor)  # another writer swept it away before it was locked


def _sweep(target: Path) -> None:
    """Remove what writers of this target left that were killed: nobody holds its lock any more."""
    for left in target.parent.glob(f".{_literal(target.name)}.tmp-*"):
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(descriptor)


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
