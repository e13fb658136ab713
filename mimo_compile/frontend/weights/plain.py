"""Plain weights in safetensors files, one or several with an index.

Each tensor is mapped by itself when it is asked for, and no longer than it is used: a model that is quantised
on the way never lies in memory as a whole, however many files it has. Files may not change meanwhile: one
that is not what its header was read from is refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimo_compile.errors import InputError
from mimo_compile.frontend.weights.checkpoint import (
    CHANGED,
    RESTART,
    Checkpoint,
    Entry,
    Stamp,
    quantisation,
    read_json,
    stamp_of,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000
"""Bytes of the largest header that the format allows."""
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of the format that torch has, by their names in it."""


class Safetensors(Checkpoint):
    """The tensors of a folder with ``model.safetensors``, or with shards and their index."""

    name = "safetensors"

    @classmethod
    def detect(cls, source: Path, config: Mapping[str, Any]) -> bool:
        """A folder with such a file, whose configuration does not speak of quantisation."""
        found = (source / SINGLE).exists() or (source / INDEX).exists()
        return found and not quantisation(config)

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        """Read the headers of all files.

        Raises:
            InputError: no weights, a missing or damaged file, an index that does not fit its shards.
        """
        super().__init__(source, config)
        if (source / SINGLE).exists():
            self.entries = read_header(source / SINGLE)
        else:
            self._read_shards(source / INDEX)

    def _read_shards(self, index: Path) -> None:
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
            raise InputError("the index has no weight_map of names to files", file=index)
        for shard in sorted(set(listed.values())):
            if Path(shard).name != shard:
                raise InputError(f"the index names {shard!r}, outside the folder", file=index)
            if not _there(self.source / shard):
                raise InputError(
                    f"shard {shard} is missing, which the index names",
                    file=self.source / shard,
                    remedy="Download the whole folder",
                )
            self.entries |= read_header(self.source / shard)
        for name, shard in listed.items():
            entry = self.entries.get(name)
            if entry is None or entry.file.name != shard:
                raise InputError(f"tensor {name} is not in {shard}, as the index says", file=index)

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored, mapped from its file; what is written to it stays in memory.

        Raises:
            InputError: the file cannot be read or has changed, or torch has no such type.
        """
        entry = self.entries[name]
        kind = _TYPES.get(entry.dtype)
        if kind is None:
            raise InputError(
                f"{name} is stored as {entry.dtype}, which cannot be read",
                file=entry.file,
                remedy="Convert the checkpoint",
            )
        nbytes = math.prod(entry.shape) * kind.itemsize
        if nbytes == 0:  # nothing can be mapped
            return torch.empty(entry.shape, dtype=kind)
        try:
            data: npt.NDArray[np.uint8]
            with entry.file.open("rb") as file:
                if stamp_of(os.fstat(file.fileno())) != entry.stamp:
                    raise ValueError(f"{entry.file.name} {CHANGED}")
                data = np.memmap(file, np.uint8, "c", entry.start, (nbytes,))
            if entry.start % kind.itemsize:  # not aligned to its elements
                data = np.array(data)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{name} cannot be read: {error}", file=entry.file, remedy=RESTART
            ) from error
        return torch.from_numpy(data).view(kind).view(entry.shape)


def read_header(path: Path) -> dict[str, Entry]:
    """Read and check the header of one safetensors file without touching the data.

    Raises:
        InputError: missing, too short, damaged, or the data is shorter than the header says.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise InputError(f"{path.name} is not a regular file", file=path)
    try:
        with path.open("rb") as file:
            stamp = stamp_of(os.fstat(file.fileno()))
            size, length = stamp[2], int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise InputError(
                    f"{path.name} is truncated or no safetensors file ({size} bytes)",
                    file=path,
                    remedy="Download it again",
                )
            header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing", file=path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the header of {path.name} is damaged: {error}", file=path) from error
    if not isinstance(header, dict):
        raise InputError(f"the header of {path.name} is damaged: no object", file=path)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(
            f"the header of {path.name} is damaged: __metadata__ must hold texts", file=path
        )
    entries: dict[str, Entry] = {}
    name, end = "", 0
    try:
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            entries[name] = _entry(path, info, 8 + length, end, stamp)
            end = info["data_offsets"][1]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise InputError(
            f"the header of {path.name} is damaged at {name!r}: {error}", file=path
        ) from error
    if 8 + length + end != size:
        raise InputError(
            f"{path.name} has {size} bytes, its header describes {8 + length + end}: "
            + ("truncated" if size < 8 + length + end else "bytes after the data"),
            file=path,
            remedy="Download it again",
        )
    return entries


def _entry(path: Path, info: Mapping[str, Any], data: int, end: int, stamp: Stamp) -> Entry:
    """Return what a header says of a tensor whose bytes follow those that end at ``end``.

    Raises:
        ValueError: they do not, or are not so many as its shape and type take; something is no integer.
    """
    dtype, numbers = info["dtype"], (info["shape"], info["data_offsets"])
    if not isinstance(dtype, str) or not all(
        isinstance(part, list) and all(type(n) is int for n in part) for part in numbers
    ):
        raise ValueError("its type must be a name, its shape and offsets lists of integers")
    shape = tuple(info["shape"])
    begin, stop = info["data_offsets"]
    if begin != end:
        raise ValueError(f"its data begin at {begin}, and what stands before ends at {end}")
    kind = _TYPES.get(dtype)
    wrong = kind is not None and stop - begin != math.prod(shape) * kind.itemsize
    if stop < begin or wrong or any(n < 0 for n in shape):
        raise ValueError(f"{dtype} of {list(shape)} cannot have {stop - begin} bytes")
    return Entry(path, shape, dtype, start=data + begin, stamp=stamp)


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
