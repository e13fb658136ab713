"""Gates that decide experts one layer earlier, as a file of their own: checked against the model, read.

The gate of layer i chooses the experts of layer i + 1: ``model.layers.i.mlp.pre_gate.weight`` ``[E, D]`` and,
where it has one, ``model.layers.i.mlp.pre_gate.bias`` ``[E]``, floats. Layers before which there is no gate
keep their routers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from mimo_compile.frontend.models.decoder import DecoderConfig, LayerSpec
from mimo_compile.frontend.models.early import PreGate
from mimo_compile.frontend.models.stages import QuantLinear
from mimo_compile.frontend.trained import Stored, file_entries

TENSOR = re.compile(r"model\.layers\.(0|[1-9]\d{0,4})\.mlp\.pre_gate\.(weight|bias)")


@dataclass(frozen=True)
class PreGates(Stored):
    """Gates as their headers describe them."""

    what: ClassVar[str] = "pre-gate"

    @property
    def layers(self) -> frozenset[int]:
        """Layers whose experts are chosen by the layer before."""
        found = (TENSOR.fullmatch(name) for name in self.entries)
        return frozenset(int(match[1]) + 1 for match in found if match is not None)

    def check(self, config: DecoderConfig) -> None:
        """Check that each gate stands before a layer with experts, and has the shape for it.

        Raises:
            InputError: a tensor is missing, is another one than the model needs, or has no place in it.
        """
        if odd := sorted(name for name in self.entries if not TENSOR.fullmatch(name)):
            raise self.wrong(f"{odd[0]} is no pre-gate (tensors {_name('N', 'weight')} ...)")
        if not self.entries:
            raise self.wrong(f"the file holds no pre-gates (tensors {_name('N', 'weight')} ...)")
        for layer in sorted(self.layers):
            if layer >= len(config.layers) or config.layers[layer].mlp != "moe":
                why = "has no experts" if layer < len(config.layers) else "is not there"
                raise self.wrong(
                    f"{_name(layer - 1, 'weight')} chooses for layer {layer}, which {why} in this model"
                )
            experts = config.layers[layer].experts
            self.check_one(layer, _name(layer - 1, "weight"), ((experts, config.hidden),))
            if (bias := _name(layer - 1, "bias")) in self.entries:
                self.check_one(layer, bias, ((experts,),))

    def of(self, layer: int, spec: LayerSpec, choice_bias: Tensor | None) -> PreGate:
        """Read the gate that chooses for a layer of ``spec`` whose router has such a bias for the choice.

        Raises:
            InputError: it cannot be read, or holds what is no finite number.
        """
        bias = _name(layer - 1, "bias")
        added = self.read(bias).float() if bias in self.entries else None
        weight = self.read(_name(layer - 1, "weight")).float()
        return PreGate(spec, QuantLinear(weight, added), choice_bias)


def find_pre_gates(file: Path | None) -> PreGates | None:
    """Return the gates of a file; None: there is none.

    Raises:
        InputError: the file is missing or damaged, or holds pickled tensors.
    """
    return None if file is None else PreGates(file_entries(file), None, file)


def _name(layer: int | str, part: str) -> str:
    return f"model.layers.{layer}.mlp.pre_gate.{part}"
