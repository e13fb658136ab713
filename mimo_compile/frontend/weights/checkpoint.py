"""What the tensors of a model are to those who build it, however they are stored.

A storage format is one class in one file: it says by `Checkpoint.detect` whether a folder or file is its own
and reads it. Plain ones hold one float tensor a name. Quantised ones give matrices in canonical form
(`ir.formats.QuantTensor`); where several stored tensors make one matrix, `GroupedCheckpoint` finds them.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import InputError
from mimo_compile.ir.formats import QuantTensor, WeightFormat

_FLOATS = {"F32", "BF16", "F16"}
CHANGED = "changed while the model was read"
RESTART = "Start again, and leave the files as they are meanwhile"

Stamp = tuple[int, int, int, int]
"""Device, inode, bytes and time of the last change (ns) of a file: what tells it from a later one."""


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp of a file."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, unreadable or holds something else.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise InputError(f"{path.name} is not a regular file", file=path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing", file=path) from None
    except (OSError, ValueError, RecursionError) as error:  # nesting, or endless numbers
        raise InputError(f"{path.name} is not readable JSON: {error}", file=path) from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} must hold a JSON object", file=path)
    return content


def quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``config.json`` says about stored quantisation (empty: the weights are plain)."""
    for name in ("quantization_config", "compression_config"):
        if (found := config.get(name)) is not None:
            return found if isinstance(found, dict) else {"quant_method": found}
    return {}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    """Of a matrix that is stored quantised: that of the real matrix, ``(N, K)``."""
    dtype: str
    """``F32``, ``BF16``, ``F16``, ``F8_E4M3``, ``I32`` ...; of a quantised matrix its format's name."""
    fmt: WeightFormat | None = None
    """Canonical format of a matrix that is stored quantised."""
    start: int = 0
    """Offset of its bytes in the file, where they stand there by themselves."""
    stamp: Stamp | None = None
    """Of the file when its header was read, if its bytes are read later."""


class Checkpoint(ABC):
    """The tensors of a model with its configuration and tokenizer; nothing is read before it is asked for.

    A format sets `entries` in its constructor and implements `read`. One that is a single file of its own
    overrides `detect`, and `config`, `tokenizer_json` and `generation` for what it holds itself.
    """

    name: ClassVar[str]
    """What the format is called in messages, and in the table of formats."""
    methods: ClassVar[tuple[str, ...]] = ()
    """Values of ``quant_method`` in ``config.json`` that this format reads."""
    activations: int = 16
    """Bits of activations that the models of this format were trained with (8: int8, row by row)."""
    has_tensors: ClassVar[bool] = True
    """False: there are no tensors, only what a configuration says of them."""
    entries: dict[str, Entry]
    """Every tensor by the name that model families use, known before any data is read."""

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        """Describe a model.

        Args:
            source: Folder or file.
            config: ``config.json`` of a folder, empty where there is none.

        Raises:
            InputError: Subclasses check headers here: missing, damaged or inconsistent files.
        """
        self.source = source
        self.config = dict(config)
        """In the form of Hugging Face's ``config.json``, whatever the file's own is."""
        self.entries = {}
        self.notes: list[str] = []
        """What a user should know about values that were read, one sentence each."""

    @classmethod
    def detect(cls, source: Path, config: Mapping[str, Any]) -> bool:
        """Say whether a folder or file is of this format; arguments as for the constructor.

        Looks at names and a few bytes at most, and never raises for a file of another format.
        """
        return quantisation(config).get("quant_method") in cls.methods

    @abstractmethod
    def read(self, name: str) -> Tensor | QuantTensor:
        """Return one of `entries`: canonical if it has a ``fmt``, else as it is stored.

        Raises:
            InputError: it cannot be read, or its values are impossible.
        """

    def note(self, text: str) -> None:
        """Tell the user something about the model, once."""
        if text not in self.notes:
            self.notes.append(text)

    # -- what stands beside the weights --------------------------------------------------------

    @property
    def config_file(self) -> Path:
        """Where the configuration comes from, for messages."""
        return self.source / "config.json" if self.source.is_dir() else self.source

    def config_json(self) -> bytes:
        """Return the configuration as text, which an artifact keeps."""
        if self.config_file.name == "config.json":
            return self.config_file.read_bytes()
        return json.dumps(self.config, indent=1, sort_keys=True).encode()

    def tokenizer_json(self) -> bytes | None:
        """Return the tokenizer in the form of ``tokenizer.json`` (None: there is none).

        Raises:
            InputError: the file cannot be read, or is no tokenizer.
        """
        path = self.source / "tokenizer.json"
        if not path.is_file():
            return None
        from tokenizers import Tokenizer

        try:
            data = path.read_bytes()
            Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the package raises nothing more special
            raise InputError(
                f"tokenizer.json cannot be read: {error}", file=path, remedy="Download it again"
            ) from error
        return data

    def generation(self) -> dict[str, Any]:
        """Return defaults of generation, in the form of ``generation_config.json``."""
        path = self.source / "generation_config.json"
        if not path.is_file():
            return {}
        return {k: v for k, v in read_json(path).items() if v is not None}

    def require_unchanged(self) -> None:
        """Check that the files are those whose headers were read: floats stay mapped until they are packed.

        Raises:
            InputError: one has changed, or is gone.
        """
        for file, stamp in {(e.file, e.stamp) for e in self.entries.values() if e.stamp}:
            try:
                same = stamp_of(file.stat()) == stamp
            except OSError:
                same = False
            if not same:
                raise InputError(f"{file.name} {CHANGED}", file=file, remedy=RESTART)

    # -- for families and builders -------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, None if there is no such tensor."""
        entry = self.entries.get(name)
        return None if entry is None else entry.shape

    def require(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Check that all expected tensors are there, in the right shape, as floats or quantised.

        Raises:
            InputError: names the first offenders and how many there are.
        """
        missing = [name for name in expected if name not in self.entries]
        if missing:
            raise InputError(_several("tensor", missing, "missing"), file=self.source)
        for name, shape in expected.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise InputError(
                    f"{name} has shape {list(entry.shape)}, config.json says {list(shape)}",
                    file=entry.file,
                )
            if entry.dtype not in _FLOATS and entry.fmt is None:
                raise InputError(
                    f"{name} is stored as {entry.dtype}",
                    file=entry.file,
                    remedy="Only F32, BF16 and F16 weights are read; convert the checkpoint",
                )

    def ignorable(self, name: str) -> bool:
        """Say whether a tensor that no family reads may be left out."""
        return False

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as floats: as it is stored, or the real values of a quantised matrix."""
        found = self.read(name)
        return torch.from_numpy(found.dequantize()) if isinstance(found, QuantTensor) else found

    def real(self, name: str) -> Tensor:
        """Return a tensor in float32."""
        return self.tensor(name).to(torch.float32)

    def joined(self, names: Sequence[str]) -> QuantTensor | None:
        """Return matrices that are stored as one, stacked along their rows (None: each by itself)."""
        return None

    def quantised(self, name: str) -> QuantTensor:
        """Return a matrix that is stored quantised (whose entry has a ``fmt``), canonical.

        Raises:
            InputError: what is read does not fit what the headers promised.
        """
        entry, found = self.entries[name], self.read(name)
        if not isinstance(found, QuantTensor) or found.fmt != entry.fmt:
            raise InputError(f"{name} is not stored as {entry.fmt}", file=entry.file)
        lead, matrix = entry.shape[:-2], entry.shape[-2:]
        want = (*lead, *found.fmt.code_shape(*matrix)), (*lead, *found.fmt.scale_shape(*matrix))
        if (found.codes.shape, found.scale.shape) != want:
            raise InputError(
                f"{name}: codes {list(found.codes.shape)} and scales {list(found.scale.shape)} "
                f"do not fit {found.fmt} of {list(entry.shape)}",
                file=entry.file,
            )
        if found.perm is not None and not np.array_equal(
            np.sort(found.perm), np.arange(entry.shape[-1])
        ):
            raise InputError(f"{name}: the order of its columns is no permutation", file=entry.file)
        return found


def _several(noun: str, names: list[str], what: str) -> str:
    """Name the first three of a list and count the rest."""
    shown = ", ".join(names[:3])
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{noun}{'s' if len(names) > 1 else ''} {shown}{rest} {'are' if len(names) > 1 else 'is'} {what}"
