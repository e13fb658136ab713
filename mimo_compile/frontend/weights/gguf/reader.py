"""A strict reader of GGUF containers: every count, length, offset and extent is checked before it is used.

Layout (little-endian): ``GGUF``, version u32, number of tensors u64, of metadata u64; then for each key its
name, type and value; for each tensor its name, extents (innermost first), type and offset; then, aligned,
the data. Reading costs time and memory in proportion to the file, whatever its numbers say.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import InputError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_KEYS, _MAX_TENSORS, _MAX_STRINGS, _MAX_NAME = 1 << 12, 1 << 17, 1 << 22, 1 << 12
_MAX_ALIGNMENT, _MAX_DIMS, _MAX_ELEMENTS = 1 << 16, 4, 1 << 48
_LEAST_KEY, _LEAST_TENSOR, _LEAST_STRING = 13, 24, 8
"""Bytes that the shortest key with its value, tensor description and string take."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a type stores numbers: ``columns`` of a row in ``size`` bytes."""

    name: str
    columns: int
    size: int


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file; its extent has been checked."""

    name: str
    shape: tuple[int, ...]
    """Outermost first."""
    kind: int
    """The type's number."""
    offset: int
    """From the start of the file."""


class GgufFile:
    """Metadata and tensors of one file, mapped."""

    def __init__(self, path: Path) -> None:
        """Read everything but the data.

        Raises:
            InputError: the file is not there, no GGUF, or its numbers do not fit it.
        """
        self.path = path
        self.metadata: dict[str, Any] = {}
        """Key -> int, float, bool, str (bytes where it is not UTF-8), numeric array, or list of strings."""
        self.tensors: dict[str, Stored] = {}
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise InputError(f"{path.name} cannot be read: {error}", file=path) from error
        self._size, self._at = len(self._map), 0
        if self._size < 24 or self._map[:4] != MAGIC:
            raise self.fail("it is no GGUF file, or cut off")
        self._at = 4
        version = self._number("<u4")
        if version not in _VERSIONS:
            swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big")
            big = "big-endian " if swapped in _VERSIONS else ""
            raise self.fail(f"{big}version {swapped if big else version} is not read (known: 2, 3)")
        tensors = self._count("tensors", self._number("<u8"), _LEAST_TENSOR, _MAX_TENSORS)
        keys = self._count("keys", self._number("<u8"), _LEAST_KEY, _MAX_KEYS)
        for _ in range(keys):
            self._key()
        for _ in range(tensors):
            self._tensor()
        self._place()

    def fail(self, what: str, remedy: str = "") -> InputError:
        """Build the error for a file that is wrong."""
        return InputError(f"{self.path.name}: {what}", file=self.path, remedy=remedy)

    def rows(self, tensor: Stored, layout: Layout) -> npt.NDArray[np.uint8]:
        """Return the blocks of a matrix ``[rows, blocks, bytes]`` (mapped).

        Raises:
            InputError: they do not lie in the file.
        """
        *lead, columns = tensor.shape
        if columns % layout.columns:
            raise self.fail(
                f"{tensor.name} has rows of {columns} columns, no whole blocks of {layout.name} "
                f"({layout.columns})"
            )
        rows = int(np.prod(lead, dtype=object)) if lead else 1
        blocks = columns // layout.columns
        raw = self.raw(tensor, rows * blocks * layout.size)
        return raw.reshape(rows, blocks, layout.size)

    def raw(self, tensor: Stored, count: int) -> npt.NDArray[np.uint8]:
        """Return ``count`` bytes of a tensor (mapped)."""
        if count > self._size - tensor.offset:
            raise self.fail(f"{tensor.name} reaches beyond the end of the file: it is cut off")
        return np.frombuffer(self._map, np.uint8, count, tensor.offset)

    def check_extents(self, sizes: dict[str, int]) -> None:
        """Check that tensors of these sizes in bytes lie in the file and apart from each other.

        Raises:
            InputError: one reaches beyond the end, or two overlap.
        """
        end, before = 0, ""
        for tensor in sorted(self.tensors.values(), key=lambda t: (t.offset, sizes[t.name])):
            if tensor.offset < end:
                raise self.fail(f"{tensor.name} overlaps {before}")
            end, before = tensor.offset + sizes[tensor.name], tensor.name
            if end > self._size:
                raise self.fail(
                    f"{tensor.name} reaches beyond the end of the file: it is cut off",
                    "Download it again",
                )

    # -- pieces of the header --------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise self.fail(f"it ends within its header (byte {self._at})", "Download it again")
        start, self._at = self._at, self._at + count
        return self._map[start : self._at]

    def _number(self, dtype: str) -> int:
        size = int(dtype[-1])
        return int.from_bytes(self._take(size), "little")

    def _count(self, what: str, count: int, least: int, most: int) -> int:
        if count > most or count * least > self._size - self._at:
            raise self.fail(f"{count} {what} do not fit into {self._size} bytes")
        return count

    def _text(self, most: int | None = None) -> str | bytes:
        length = self._number("<u8")
        if most is not None and length > most:
            raise self.fail(f"a name of {length} bytes")
        raw = self._take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw

    def _name(self) -> str:
        found = self._text(_MAX_NAME)
        if not isinstance(found, str) or not found:
            raise self.fail(f"a name that is no text, before byte {self._at}")
        return found

    def _key(self) -> None:
        name = self._name()
        if name in self.metadata:
            raise self.fail(f"the key {name} occurs twice")
        self.metadata[name] = self._value(self._number("<u4"), name)

    def _value(self, kind: int, name: str) -> Any:
        if kind in _SCALARS:
            dtype = _SCALARS[kind]
            return np.frombuffer(self._take(int(dtype[-1])), dtype)[0].item()
        if kind == _BOOL:
            byte = self._take(1)[0]
            if byte > 1:
                raise self.fail(f"{name} is {byte}, no boolean")
            return bool(byte)
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self.fail(f"{name} has the unknown type {kind}")
        inner, count = self._number("<u4"), self._number("<u8")
        if inner in _SCALARS or inner == _BOOL:
            dtype = _SCALARS.get(inner, "<u1")
            self._count(f"numbers of {name}", count, int(dtype[-1]), self._size)
            return np.frombuffer(self._take(count * int(dtype[-1])), dtype)
        if inner != _STRING:
            raise self.fail(f"{name} is an array of the type {inner}, which is not read")
        return self._strings(self._count(f"texts of {name}", count, _LEAST_STRING, _MAX_STRINGS))

    def _strings(self, count: int) -> list[str | bytes]:
        """Read many strings: as `_text`, without a call for each number."""
        out: list[str | bytes] = []
        at, size, data, unpack = self._at, self._size, self._map, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if size - at < 8 or (length := unpack(data, at)[0]) > size - at - 8:
                raise self.fail(f"it ends within its header (byte {at})", "Download it again")
            raw = data[at + 8 : at + 8 + length]
            at += 8 + length
            try:
                out.append(raw.decode("utf-8"))
            except UnicodeDecodeError:
                out.append(raw)
        self._at = at
        return out

    def _tensor(self) -> None:
        name = self._name()
        if name in self.tensors:
            raise self.fail(f"the tensor {name} occurs twice")
        dims = self._number("<u4")
        if not 0 < dims <= _MAX_DIMS:
            raise self.fail(f"{name} has {dims} dimensions")
        extents = [self._number("<u8") for _ in range(dims)]
        total = 1
        for extent in extents:
            total *= extent
        if not 0 < total < _MAX_ELEMENTS:
            raise self.fail(f"{name} has the extents {extents}")
        kind, offset = self._number("<u4"), self._number("<u8")
        self.tensors[name] = Stored(name, tuple(reversed(extents)), kind, offset)

    def _place(self) -> None:
        """Turn offsets within the data into offsets within the file."""
        align = self.metadata.get("general.alignment", 32)
        if type(align) is not int or not 0 < align <= _MAX_ALIGNMENT or align & (align - 1):
            raise self.fail(
                f"general.alignment is {align!r}, no power of two up to {_MAX_ALIGNMENT}"
            )
        start = -(-self._at // align) * align
        for name, tensor in self.tensors.items():
            if tensor.offset % align or start + tensor.offset >= self._size:
                raise self.fail(
                    f"{name} begins at {tensor.offset} of the data, which is "
                    + ("not aligned" if tensor.offset % align else "beyond the end of the file"),
                    "Download it again",
                )
            self.tensors[name] = Stored(name, tensor.shape, tensor.kind, start + tensor.offset)
