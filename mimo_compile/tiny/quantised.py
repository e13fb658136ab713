"""Training through a quantiser: the product's own, with its gradient passed straight through.

During forward and backward the parameters hold the *quantised* matrices, made by
`mimo_compile.quantize` from float32 masters once a step; the gradients found there are applied to the
masters. Matrices that the product multiplies as one, and quantises as one in complex formats (query, key
and value; gate and up), are one here too. Activations are rounded to int8 in `training_model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mimo_compile.ir.formats import QuantScheme, QuantTensor, WeightFormat
from mimo_compile.quantize import quantize
from mimo_compile.tiny.training_model import MLP, Attention, Experts, MTPLayer, TinyModel


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices that are quantised as one: the published name of their product, and their parts.

    `names`: published names without `.weight`; `parts`: views of the parameters [rows, columns] f32.
    """

    name: str
    names: tuple[str, ...]
    parts: tuple[Tensor, ...]


def stacks(model: TinyModel, joined: bool) -> list[Stack]:
    """All matrices that are quantised; `joined`: query with key and value, gate with up."""
    found: list[Stack] = []

    def add(stem: str, whole: str, parts: dict[str, Tensor]) -> None:
        if joined:
            names = tuple(stem + name for name in parts)
            found.append(Stack(stem + whole, names, tuple(parts.values())))
        else:
            found.extend(Stack(stem + n, (stem + n,), (p,)) for n, p in parts.items())

    def projections(stem: str, module: nn.Module, names: str) -> dict[str, Tensor]:
        return {name: getattr(module, name).weight.data for name in names.split()}

    for path, module in model.named_modules():
        stem = f"model.{path}.".replace("model.mtp.", "model.mtp.layers.")
        if isinstance(module, Attention):
            add(stem, "qkv_proj", projections(stem, module, "q_proj k_proj v_proj"))
            add(stem, "o_proj", projections(stem, module, "o_proj"))
        elif isinstance(module, MLP):
            add(stem, "gate_up_proj", projections(stem, module, "gate_proj up_proj"))
            add(stem, "down_proj", projections(stem, module, "down_proj"))
        elif isinstance(module, MTPLayer):
            add(stem, "eh_proj", projections(stem, module, "eh_proj"))
        elif isinstance(module, Experts):
            for e in range(module.count):
                one = f"{stem}experts.{e}."
                gate, up = module.gate_proj.data[e], module.up_proj.data[e]
                add(one, "gate_up_proj", {"gate_proj": gate, "up_proj": up})
                add(one, "down_proj", {"down_proj": module.down_proj.data[e]})
    return found


class StraightThrough:
    """Swaps a model's matrices between float masters and their quantised values."""

    def __init__(self, model: TinyModel, scheme: QuantScheme) -> None:
        if scheme.weight is None or scheme.weight.is_float:
            raise ValueError(f"{scheme} quantises no weights")
        self.format: WeightFormat = scheme.weight
        self.stacks = stacks(model, joined=self.format.family == "complex")
        self._masters: list[Tensor] | None = None
        model.round_activations(self.format if scheme.act == "8" else None)

    def codes(self) -> list[tuple[Stack, QuantTensor]]:
        """Every stack with the quantised form of its masters."""
        return [
            (stack, quantize(master, self.format, what=stack.name))
            for stack, master in zip(self.stacks, self._read(), strict=True)
        ]

    def packed(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """The tensors of a checkpoint, instead of those of all stacks, and its `quantization_config`.

        Ternary: as transformers packs BitNet; widely-linear complex: see `frontend/weights/fairy.py`.
        Raises ValueError for a format that no checkpoint here is packed in.
        """
        if self.format.name == "w1.58":
            return _bitnet(self.codes())
        if self.format.name in ("complex2wl", "complex2wl2"):
            return _fairy(self.codes(), self.format)
        raise ValueError(f"no checkpoint holds {self.format}; train without it and use --quant")

    def _read(self) -> list[Tensor]:
        if self._masters is not None:
            return self._masters
        return [torch.cat(stack.parts) for stack in self.stacks]

    @torch.no_grad()
    def hide(self) -> None:
        """Put quantised values into the parameters; the masters are kept aside."""
        masters = self._read()
        for stack, master in zip(self.stacks, masters, strict=True):
            q = quantize(master, self.format, what=stack.name)
            _write(stack, torch.from_numpy(q.dequantize()))
        self._masters = masters

    @torch.no_grad()
    def reveal(self) -> None:
        """Put the masters back into the parameters."""
        if self._masters is not None:
            for stack, master in zip(self.stacks, self._masters, strict=True):
                _write(stack, master)
            self._masters = None


def _write(stack: Stack, whole: Tensor) -> None:
    for part, rows in zip(stack.parts, whole.split([len(p) for p in stack.parts]), strict=True):
        part.copy_(rows)


def _nibbles(parts: list[Tensor]) -> Tensor:
    """Four tensors of codes below 4 in one of bytes, low bits first."""
    a, b, c, d = parts
    return a | b << 2 | c << 4 | d << 6


def _bitnet(found: list[tuple[Stack, QuantTensor]]) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors: dict[str, Tensor] = {}
    for stack, q in found:
        codes = torch.from_numpy(q.codes)
        if len(codes) % 4:
            raise ValueError(f"{stack.name}: {len(codes)} rows do not fill bytes of four")
        tensors[f"{stack.name}.weight"] = _nibbles(list(codes.chunk(4)))
        tensors[f"{stack.name}.weight_scale"] = torch.from_numpy(q.scale[0]).to(torch.float16)
    settings = {"linear_class": "autobitlinear", "quantization_mode": "offline"}
    return tensors, {"quant_method": "bitnet", **settings}


def _fairy(
    found: list[tuple[Stack, QuantTensor]], fmt: WeightFormat
) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors: dict[str, Tensor] = {}
    joined: dict[str, dict[str, int]] = {}
    for stack, q in found:
        codes = torch.from_numpy(q.codes)
        if codes.shape[1] % 4:
            raise ValueError(f"{stack.name}: {codes.shape[1]} columns do not fill bytes of four")
        tensors[f"{stack.name}.codes"] = _nibbles(list(codes.unflatten(1, (-1, 4)).unbind(-1)))
        scale = torch.from_numpy(q.scale).unflatten(0, (fmt.terms, -1))[:, 0]
        tensors[f"{stack.name}.scales"] = scale.to(torch.float16)
        if stack.names != (stack.name,):
            rows = zip(stack.names, stack.parts, strict=True)
            joined[stack.name] = {name.rpartition(".")[2]: len(part) for name, part in rows}
    return tensors, {"quant_method": "fairy2i", "stages": fmt.terms // 2, "stacks": joined}
