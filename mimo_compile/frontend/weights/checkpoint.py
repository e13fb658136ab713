"""A folder of safetensors files as one map of tensors, checked before and read on demand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimo_compile.errors import InputError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = {"F32", "BF16", "F16"}
_HEADER_LIMIT = 100_000_000
"""Bytes of the largest header that the format allows."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, unreadable or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing", file=path) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path.name} is not readable JSON: {error}", file=path) from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} must hold a JSON object", file=path)
    return content


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """The format's name: ``F32``, ``BF16``, ``F16``, ``F8_E4M3``, ``I32`` ..."""


def read_header(path: Path) -> dict[str, Entry]:
    """Read and check the header of one safetensors file without touching the data.

    Raises:
        InputError: missing, too short, damaged, or the data is shorter than the header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise InputError(
                    f"{path.name} is truncated or no safetensors file ({size} bytes)",
                    file=path,
                    remedy="Download it again",
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing", file=path) from None
    except (OSError, ValueError) as error:
        raise InputError(f"the header of {path.name} is damaged: {error}", file=path) from error
    if not isinstance(header, dict):
        raise InputError(f"the header of {path.name} is damaged: no object", file=path)
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    end = 0
    try:
        for name, info in header.items():
            entries[name] = Entry(path, tuple(int(n) for n in info["shape"]), str(info["dtype"]))
            end = max(end, int(info["data_offsets"][1]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
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


class Checkpoint:
    """The tensors of a model folder; data is mapped, and read when a tensor is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of ``model.safetensors``, or of all shards of its index.

        Raises:
            InputError: no weights, a missing or damaged file, an index that does not fit its shards.
        """
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.used: set[str] = set()
        self._open: dict[Path, Any] = {}
        if (folder / _SINGLE).exists():
            self.entries = read_header(folder / _SINGLE)
        elif (folder / _INDEX).exists():
            self._read_shards(folder / _INDEX)
        else:
            others = sorted(p.name for p in folder.glob("*.bin")) + sorted(
                p.name for p in folder.glob("*.gguf")
            )
            found = f"; found {', '.join(others[:3])}" if others else ""
            raise InputError(
                f"no weights: neither {_SINGLE} nor {_INDEX}{found}",
                file=folder,
                remedy="Save the model as safetensors",
            )

    def _read_shards(self, index: Path) -> None:
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
            raise InputError("the index has no weight_map of names to files", file=index)
        for shard in sorted(set(listed.values())):
            if Path(shard).name != shard:
                raise InputError(f"the index names {shard!r}, outside the folder", file=index)
            if not (self.folder / shard).exists():
                raise InputError(
                    f"shard {shard} is missing, which the index names",
                    file=self.folder / shard,
                    remedy="Download the whole folder",
                )
            self.entries |= read_header(self.folder / shard)
        for name, shard in listed.items():
            entry = self.entries.get(name)
            if entry is None or entry.file.name != shard:
                raise InputError(f"tensor {name} is not in {shard}, as the index says", file=index)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, None if there is no such tensor."""
        entry = self.entries.get(name)
        return None if entry is None else entry.shape

    def require(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Check that all expected tensors are there, in the right shape and a float type.

        Raises:
            InputError: names the first offenders and how many there are.
        """
        missing = [name for name in expected if name not in self.entries]
        if missing:
            raise InputError(_several("tensor", missing, "missing"), file=self.folder)
        for name, shape in expected.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise InputError(
                    f"{name} has shape {list(entry.shape)}, config.json says {list(shape)}",
                    file=entry.file,
                )
            if entry.dtype not in _FLOATS:
                raise InputError(
                    f"{name} is stored as {entry.dtype}",
                    file=entry.file,
                    remedy="Only F32, BF16 and F16 weights are read; convert the checkpoint",
                )

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as it is stored (mapped from its file)."""
        entry = self.entries[name]
        self.used.add(name)
        try:
            if entry.file not in self._open:
                self._open[entry.file] = safe_open(entry.file, framework="pt")
            tensor: Tensor = self._open[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{name} cannot be read: {error}", file=entry.file) from error
        return tensor

    def real(self, name: str) -> Tensor:
        """Return a tensor in float32."""
        return self.tensor(name).to(torch.float32)

    def unused(self) -> list[str]:
        """Return the names that were never read, sorted."""
        return sorted(set(self.entries) - self.used)


def _several(noun: str, names: list[str], what: str) -> str:
    """Name the first three of a list and count the rest."""
    shown = ", ".join(names[:3])
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{noun}{'s' if len(names) > 1 else ''} {shown}{rest} {'are' if len(names) > 1 else 'is'} {what}"
