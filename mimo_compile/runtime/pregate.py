"""Gates that were trained to say which experts a layer will choose, before its router can.

A gate is linear: of rows float32 ``[T, D]`` that an earlier layer's experts get it makes logits ``[T, E]``,
and their logistic function is the probability that a row gets an expert. Gates stand in a file of their own
beside an artifact, and decide what is loaded ahead of need, nothing else: outputs are the same bits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mimo_compile.errors import InputError
from mimo_compile.runtime import tensor_file

if TYPE_CHECKING:
    from mimo_compile.runtime.entry import Array
    from mimo_compile.runtime.expert_file import Stack

FORMAT = "mimo-compile pre-gates 1"
BEGIN = -1
"""In place of a layer's number: what a gate sees are the rows that the first layer gets, embeddings."""
Pair = tuple[int, int]
"""Of the layer whose rows a gate sees, and of the one that it foresees. If that one is no later one, it is
foreseen for the token after the one that is seen."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Foresees one layer from the rows of one other."""

    weight: Array
    """float32 ``[E, D]``."""
    bias: Array
    """float32 ``[E]``."""

    def __call__(self, rows: Array) -> Array:
        """Return probabilities float32 ``[T, E]`` of rows ``[T, D]``; computed on the calling thread."""
        logits = np.einsum("td,ed->te", rows, self.weight, optimize=False) + self.bias
        with np.errstate(over="ignore"):
            found: Array = 1 / (1 + np.exp(-logits))
        return found


@dataclass(frozen=True, slots=True)
class PreGates:
    """The gates of a model."""

    layers: tuple[str, ...]
    """Where its experts stand, in running order: ``layers.3.feed.experts``."""
    gates: Mapping[Pair, Gate]
    source: str = ""
    """File that they were read from."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as safetensors: ``SEEN.FORESEEN.weight`` and ``.bias`` by numbers of layers.

        Raises:
            OSError: The file cannot be written; what was there before is as it was.
        """
        tensors = {}
        for (seen, foreseen), gate in sorted(self.gates.items()):
            tensors[f"{seen}.{foreseen}.weight"] = gate.weight
            tensors[f"{seen}.{foreseen}.bias"] = gate.bias
        tensor_file.write(path, tensors, {"format": FORMAT, "layers": ",".join(self.layers)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PreGates:
        """Read a file that `save` wrote.

        Raises:
            InputError: It cannot be read, is damaged, or has no such gates.
        """
        tensors, facts = tensor_file.read(path)
        if facts.get("format") != FORMAT:
            raise _wrong(path, f"its format is {facts.get('format', 'not said')!r}, not {FORMAT!r}")
        layers = tuple(facts.get("layers", "").split(","))
        gates = {}
        for name, weight in tensors.items():
            found = re.fullmatch(r"(-1|\d{1,4})\.(\d{1,4})\.(weight|bias)", name)
            if not found or max(int(found[1]), int(found[2])) >= len(layers):
                what = f"{name[:80]!r} is no gate between two of its {len(layers)} layers"
                raise _wrong(path, what)
            if found[3] == "bias":
                continue
            bias = tensors.get(f"{found[1]}.{found[2]}.bias")
            gates[int(found[1]), int(found[2])] = _gate(path, name, weight, bias)
        if 2 * len(gates) != len(tensors) or not gates:
            raise _wrong(path, "it has no gates, or a bias without a weight")
        return cls(layers, gates, os.fspath(path))

    def check(self, stacks: Sequence[Stack], widths: Collection[int]) -> None:
        """Check that they are of a model with these experts, whose rows have so many columns.

        Raises:
            InputError: They are not.
        """
        labels = tuple(stack.label for stack in stacks)
        where = self.source or "pre-gates"
        if self.layers != labels:
            raise InputError(
                f"the gates are of experts in {_spell(self.layers)}, the model has them in {_spell(labels)}",
                file=where, remedy="use gates that were trained with this model",
            )  # fmt: skip
        for (seen, foreseen), gate in self.gates.items():
            wanted = [[stacks[foreseen].shape.experts, width] for width in sorted(widths)]
            if [list(gate.weight.shape)] != wanted:
                raise InputError(
                    f"gate {seen}.{foreseen} is {list(gate.weight.shape)}, the model needs {wanted[0]}",
                    file=where, remedy="use gates that were trained with this model",
                )  # fmt: skip


def _spell(layers: Sequence[str]) -> str:
    return f"{len(layers)} layers ({layers[0]} to {layers[-1]})"


def _wrong(path: str | os.PathLike[str], what: str) -> InputError:
    return InputError(
        f"this is no file of pre-gates: {what}",
        file=path,
        remedy="benchmarks/expert_gates.py writes one",
    )


def _gate(path: str | os.PathLike[str], name: str, weight: Array, bias: Array | None) -> Gate:
    """Make a gate of two tensors; refuse those that make none."""
    if bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise _wrong(path, f"{name!r} has no bias of as many rows, or is no matrix")
    for tensor in (weight, bias):
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise _wrong(path, f"{name!r} is not of finite float32 numbers")
    return Gate(weight, bias)
