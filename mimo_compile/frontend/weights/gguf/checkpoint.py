"""A whole model in one GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import InputError
from mimo_compile.frontend.weights.checkpoint import Checkpoint, Entry
from mimo_compile.frontend.weights.gguf.blocks import BLOCKS, FLOATS, UNREAD, canonical
from mimo_compile.frontend.weights.gguf.model import (
    FREQUENCIES,
    read_config,
    rotated_rows,
    row_order,
    tensor_name,
)
from mimo_compile.frontend.weights.gguf.reader import MAGIC, GgufFile, Stored
from mimo_compile.frontend.weights.gguf.tokenizer import tokenizer_json
from mimo_compile.ir.formats import QuantTensor

_DTYPES = {0: "<f4", 1: "<f2", 30: "<u2"}


class Gguf(Checkpoint):
    """The tensors of a ``.gguf`` file under the names of model families."""

    name = "gguf"

    @classmethod
    def detect(cls, source: Path, config: Mapping[str, Any]) -> bool:
        """A file that begins as GGUF files do."""
        return source.is_file() and _begins(source)

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        """Read metadata and descriptions of tensors.

        Raises:
            InputError: damaged, of a type or architecture that is not known.
        """
        super().__init__(source, config)
        self.file = GgufFile(source)
        self.file.check_extents({t.name: self._bytes(t) for t in self.file.tensors.values()})
        self._stored: dict[str, Stored] = {}
        factors = None
        for stored in self.file.tensors.values():
            if stored.name == FREQUENCIES:
                factors = self._floats(stored).to(torch.float32).numpy()
                continue
            name = tensor_name(stored.name)
            if name in self._stored:
                raise self.file.fail(f"{stored.name} and another tensor are both {name}")
            self._stored[name] = stored
            self.entries[name] = self._entry(name, stored)
        self.config = self.configuration(config, factors)

    def configuration(self, config: Mapping[str, Any], factors: Any) -> dict[str, Any]:
        """Return the model's configuration; ``config`` is that of a folder around the file."""
        return read_config(self.file, factors)

    def read(self, name: str) -> Tensor | QuantTensor:
        """Return a tensor; rows of Llama's queries and keys in the order of Hugging Face's files."""
        stored = self._stored[name]
        heads = rotated_rows(str(self.config["model_type"]), name, self.config)
        rows = stored.shape[0]
        order = None
        if heads:
            if len(stored.shape) != 2 or rows % (2 * heads):
                raise self.file.fail(f"{stored.name} has {rows} rows for {heads} heads")
            order = row_order(rows, heads)
        found = self._matrix(name, stored)
        if order is None:
            return found
        if isinstance(found, Tensor):
            return found[torch.from_numpy(order)]
        zero = None if found.zero is None else found.zero[order]
        return QuantTensor(found.fmt, found.codes[order], found.scale[order], zero)

    def tokenizer_json(self) -> bytes | None:
        """Return the tokenizer; where it cannot be used, a note says why."""
        if "tokenizer.ggml.model" not in self.file.metadata:
            return None
        try:
            return tokenizer_json(self.file)
        except ValueError as error:
            self.notes.append(
                f"no text goes in or out, only ids: the tokenizer cannot be used, {error}"
            )
            return None

    # -- types of tensors: `i2s` adds one ------------------------------------------------------

    def _bytes(self, stored: Stored) -> int:
        """Return the bytes of a tensor."""
        kind = FLOATS.get(stored.kind) or (
            BLOCKS[stored.kind].layout if stored.kind in BLOCKS else None
        )
        if kind is None:
            named = UNREAD.get(stored.kind, f"number {stored.kind}")
            raise self.file.fail(
                f"{stored.name} is stored in the type {named}, which is not read",
                "Known: " + ", ".join(t.name for t in FLOATS.values())
                + ", " + ", ".join(t.layout.name for t in BLOCKS.values())
                + "; I2_S of bitnet.cpp in a folder with a config.json",
            )  # fmt: skip
        if stored.shape[-1] % kind.columns:
            raise self.file.fail(
                f"{stored.name} has rows of {stored.shape[-1]} columns, no whole blocks of {kind.name} "
                f"({kind.columns})"
            )
        return math.prod(stored.shape) // kind.columns * kind.size

    def _entry(self, name: str, stored: Stored) -> Entry:
        path = self.file.path
        if stored.kind in FLOATS:
            return Entry(path, stored.shape, FLOATS[stored.kind].name)
        if len(stored.shape) != 2:
            raise self.file.fail(f"{stored.name} is quantised and no matrix")
        fmt = BLOCKS[stored.kind].fmt
        return Entry(path, stored.shape, fmt.name, fmt)

    def _matrix(self, name: str, stored: Stored) -> Tensor | QuantTensor:
        if stored.kind in FLOATS:
            return self._floats(stored)
        kind = BLOCKS[stored.kind]
        try:
            return canonical(kind, self.file.rows(stored, kind.layout))
        except ValueError as error:
            raise InputError(f"{stored.name}: {error}", file=self.file.path) from error

    def _floats(self, stored: Stored) -> Tensor:
        if stored.kind not in FLOATS:
            raise self.file.fail(f"{stored.name} is not stored as floats")
        raw = self.file.raw(stored, self._bytes(stored))
        array = np.array(raw.view(_DTYPES[stored.kind]).reshape(stored.shape))
        found = torch.from_numpy(array.view(np.int16) if stored.kind == 30 else array)
        return found.view(torch.bfloat16) if stored.kind == 30 else found


def _begins(path: Path) -> bool:
    """Say whether a file begins with GGUF's four letters."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False
