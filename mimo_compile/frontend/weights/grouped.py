"""Matrices that several stored tensors make up together: codes, scales, zero points, order of columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mimo_compile.errors import InputError
from mimo_compile.frontend.weights.checkpoint import Checkpoint, Entry, quantisation
from mimo_compile.frontend.weights.plain import Safetensors
from mimo_compile.ir.formats import QuantTensor, WeightFormat


class GroupedCheckpoint(Checkpoint):
    """A safetensors folder in which ``X.qweight``, ``X.scales`` ... stand for the matrix ``X.weight``.

    A subclass says what the parts are called, reads shape and format off their headers, and decodes them.
    Tensors that belong to no group (norms, embeddings, layers that were left out) are plain.
    """

    parts: ClassVar[tuple[str, ...]]
    """Endings of the tensors of one matrix; where the first occurs, there is a group."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Those of ``parts`` that may be missing."""

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        """Read headers and collect the groups.

        Raises:
            InputError: no group at all, a part is missing, or `describe` refuses a group.
        """
        super().__init__(source, config)
        self.settings = quantisation(config)
        """The ``quantization_config``."""
        self.stored = self.open_stored(source, config)
        """The tensors as they lie in the files."""
        self._groups: dict[str, dict[str, str]] = {}
        for name in self.stored.entries:
            if name.endswith(self.parts[0]):
                self._collect(name.removesuffix(self.parts[0]))
        if not self._groups:
            raise InputError(
                f"the matrices should be stored quantised ({self.settings.get('quant_method')}), but no "
                f"tensor ends in {self.parts[0]}",
                file=self.config_file,
                remedy="If they are ordinary floats, remove quantization_config",
            )
        taken = {name for group in self._groups.values() for name in group.values()}
        described = {m: self._described(m, group) for m, group in self._groups.items()}
        rest = {name: e for name, e in self.stored.entries.items() if name not in taken}
        self.entries = {**rest, **described}

    def open_stored(self, source: Path, config: Mapping[str, Any]) -> Checkpoint:
        """Open the files below; override it for parts that do not lie in safetensors."""
        return Safetensors(source, config)

    @abstractmethod
    def describe(
        self, name: str, parts: Mapping[str, Entry]
    ) -> tuple[tuple[int, ...], WeightFormat | None]:
        """Return shape ``(N, K)`` and canonical format of a matrix from its parts' headers.

        A matrix that no canonical format holds (groups of unequal size, say) has the format None: `decode`
        then returns its real values. Columns in another order have one: see `QuantTensor.perm`.

        Raises:
            InputError: shapes or types of the parts do not fit each other; use `fail`.
        """

    @abstractmethod
    def decode(self, name: str, parts: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        """Return a matrix from its parts: canonical, or real values ``[N, K]`` float32.

        Raises:
            InputError: values that cannot be, such as an index beyond the groups; use `fail`.
        """

    def fail(self, name: str, what: str, remedy: str = "") -> InputError:
        """Build the error for a group that is wrong."""
        first = next(iter(self._groups[name].values()))
        return InputError(f"{name}: {what}", file=self.stored.entries[first].file, remedy=remedy)

    def _collect(self, stem: str) -> None:
        found = {p: stem + p for p in self.parts if stem + p in self.stored.entries}
        missing = [p for p in self.parts if p not in found and p not in self.optional]
        if missing:
            raise InputError(
                f"tensor {stem}{missing[0]} is missing, which belongs to {stem}{self.parts[0]}",
                file=self.source,
                remedy="Download the whole folder",
            )
        self._groups[f"{stem}.weight"] = found

    def _described(self, name: str, group: Mapping[str, str]) -> Entry:
        parts = {part: self.stored.entries[stored] for part, stored in group.items()}
        shape, fmt = self.describe(name, parts)
        first = parts[self.parts[0]]
        return replace(first, shape=shape, dtype="F32" if fmt is None else fmt.name, fmt=fmt)

    def read(self, name: str) -> Tensor | QuantTensor:
        """Return a decoded group, or a plain tensor as it is stored."""
        if name not in self._groups:
            return self.stored.read(name)
        parts: dict[str, Tensor] = {}
        for part, stored in self._groups[name].items():
            found = self.stored.read(stored)
            assert isinstance(found, Tensor)
            parts[part] = found
        return self.decode(name, parts)
