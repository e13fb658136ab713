"""What policies choose by that models were trained with: tensors of a checkpoint, or a file of their own."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mimo_compile.errors import ArtifactError, InputError
from mimo_compile.frontend.models.decoder import DecoderConfig, LayerSpec
from mimo_compile.frontend.weights.checkpoint import Checkpoint, Entry
from mimo_compile.frontend.weights.plain import read_header
from mimo_compile.ir.policies import AttentionPolicy
from mimo_compile.ir.policies.base import MOST
from mimo_compile.runtime.program import GateFile
from mimo_compile.runtime.strict_json import decode

Shapes = dict[str, tuple[tuple[int, ...], ...]]
"""Name of a tensor -> the shapes that it may have."""


@dataclass(frozen=True)
class Stored:
    """Tensors as their headers describe them."""

    entries: Mapping[str, Entry]
    checkpoint: Checkpoint | None
    """Where they are, unless in a file."""
    file: Path

    what: ClassVar[str]
    """One of them, for messages: ``gate``."""

    @property
    def record(self) -> GateFile | None:
        """Say which file they come from; None: from the checkpoint."""
        return None if self.checkpoint is not None else gate_record(self.file)

    def check_one(self, layer: int, name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
        """Check that a tensor is there, holds floats, and has one of some shapes.

        Raises:
            InputError: it is not so; names the tensor.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise self.wrong(f"{name} is missing, which layer {layer} needs")
        if entry.fmt is not None or entry.dtype not in ("F32", "BF16", "F16"):
            raise self.wrong(f"{name} is stored as {entry.dtype}, not as floats")
        if entry.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise self.wrong(f"{name} has shape {list(entry.shape)}, this model needs {wanted}")

    def read(self, name: str) -> Tensor:
        """Return a tensor, bfloat16 as it is stored, all else in float32.

        Raises:
            InputError: it cannot be read, or holds what is no finite number.
        """
        if self.checkpoint is not None:
            tensor = self.checkpoint.tensor(name)
        else:
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(self.file, framework="pt") as file:
                    tensor = file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise self.wrong(f"{name} cannot be read: {error}") from error
        if not bool(torch.isfinite(tensor.float()).all()):
            raise self.wrong(f"{name} holds what is no finite number")
        return tensor if tensor.dtype == torch.bfloat16 else tensor.float()

    def wrong(self, what: str) -> InputError:
        """Build the error for tensors that do not fit."""
        return InputError(
            what, file=self.file, remedy=f"Give {self.what}s that were trained for this model"
        )


@dataclass(frozen=True)
class Trained(Stored, ABC):
    """Tensors that an attention policy chooses by."""

    policy: AttentionPolicy
    """The one that was asked for, with the sizes that the tensors have."""

    @abstractmethod
    def shapes(self, layer: int, spec: LayerSpec, hidden: int) -> Shapes:
        """Return the shapes that each tensor of a layer may have, by name."""

    @abstractmethod
    def unfit(self, spec: LayerSpec) -> str:
        """Return why tensors of this size are of no use in a layer that chooses; empty: they are."""

    @abstractmethod
    def of(self, stage: str, spec: LayerSpec) -> Any:
        """Read what a layer's stage (``layers.3``) chooses by.

        Raises:
            InputError: it cannot be read, or holds what is no finite number.
        """

    def check(self, config: DecoderConfig) -> None:
        """Check names, types and shapes of all layers that choose; those of other layers are left unread.

        Raises:
            InputError: a tensor is missing, is another one than the model needs, or has no place in it.
        """
        layers = list(enumerate(config.layers))
        known = {name for i, spec in layers for name in self.shapes(i, spec, config.hidden)}
        if odd := sorted(set(self.entries) - known):
            raise self.wrong(
                f"{odd[0]} belongs to no {self.what} of this model of {len(layers)} layers"
            )
        for i, spec in layers:
            if config.roles[i].kind != "select":
                continue
            if problem := self.unfit(spec):
                raise self.wrong(f"{problem}, in layer {i}")
            for name, shapes in self.shapes(i, spec, config.hidden).items():
                self.check_one(i, name, shapes)


def gate_record(file: Path) -> GateFile:
    """Return what an artifact says of a file of gates or indexers.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    try:
        with file.open("rb") as opened:
            return GateFile(file.name, hashlib.file_digest(opened, "sha256").hexdigest())
    except OSError as error:
        raise InputError(
            f"the gates cannot be read: {error.strerror or error}", file=file,
            remedy="Give the file of gates that was compiled with (--gates)",
        ) from error  # fmt: skip


def file_entries(file: Path) -> dict[str, Entry]:
    """Read the header of a file.

    Raises:
        InputError: it is missing or damaged, or holds pickled tensors.
    """
    if file.suffix in (".pth", ".pt", ".bin"):
        raise InputError(
            "the file holds pickled tensors, which may run code when they are read", file=file,
            remedy="Save them as safetensors: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'gates.safetensors')",
        )  # fmt: skip
    return read_header(file)


def file_says(file: Path, key: str) -> dict[str, Any]:
    """Return the JSON object that a file's metadata hold under a key; nothing without it.

    Raises:
        InputError: they cannot be read, or hold something else there.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(key, "{}")
        said = decode(text.encode(), key)
    except (SafetensorError, OSError, ArtifactError) as error:
        raise InputError(f"its metadata cannot be read: {error}", file=file) from error
    if not isinstance(said, dict):
        raise InputError(f"{key} of its metadata must be a JSON object, found {said!r}", file=file)
    return said


def asked(policy: AttentionPolicy) -> set[str]:
    """Return the arguments that were asked for: those that the text names, or that are no default."""
    other = {f.name for f in fields(policy) if f.metadata and getattr(policy, f.name) != f.default}
    return other | set(policy.given)


def positive(value: Any, what: str, file: Path) -> int | None:
    """Return a number of tokens that a file names, if it does.

    Raises:
        InputError: it is no such number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise InputError(
            f"the {what} must be a number of tokens up to {MOST}, found {value!r}", file=file
        )
    return value
