"""BitNet b1.58 checkpoints as transformers packs them: four ternary weights to a byte, one scale a matrix.

Byte row r of ``weight uint8 [N/4, K]`` holds output features r, r + N/4, r + N/2, r + 3N/4 from its low bits
up, as codes 0, 1, 2 for -1, 0, 1. What ``weight_scale`` means depends on the layer that wrote it:
``bitlinear`` divides by it (it is 1/gamma), ``autobitlinear`` multiplies by it (gamma).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import InputError
from mimo_compile.frontend.weights.checkpoint import Entry
from mimo_compile.frontend.weights.grouped import GroupedCheckpoint
from mimo_compile.ir.formats import QuantTensor, WeightFormat, parse_weight_format

_EXTENTS = ("hidden_size", "intermediate_size", "vocab_size")


class Bitnet(GroupedCheckpoint):
    """A folder whose ``quant_method`` is ``bitnet``, weights packed."""

    name = "bitnet"
    methods = ("bitnet",)
    parts = (".weight_scale", ".weight")
    activations = 8

    def describe(
        self, name: str, parts: Mapping[str, Entry]
    ) -> tuple[tuple[int, ...], WeightFormat | None]:
        """Check types and shapes; N is four times the byte rows, or up to 3 less."""
        weight, scale = parts[".weight"], parts[".weight_scale"]
        if self.settings.get("use_rms_norm"):
            raise InputError(
                "BitNet layers with a norm of their own (use_rms_norm) are not read",
                file=self.config_file,
            )
        if weight.dtype != "U8":
            raise self.fail(
                name,
                f"stored as {weight.dtype}; packed BitNet weights are bytes",
                "Unpacked weights (quantization_mode online) load without quantization_config, "
                "as floats that --quant w1.58a8 quantises",
            )
        if len(weight.shape) != 2 or 0 in weight.shape or scale.shape not in ((), (1,)):
            raise self.fail(
                name, f"bytes {list(weight.shape)} and scale {list(scale.shape)} do not fit"
            )
        if scale.dtype not in ("F16", "BF16", "F32"):
            raise self.fail(name, f"its scale is stored as {scale.dtype}")
        rows, k = weight.shape
        return (self._height(rows), k), parse_weight_format("w1.58")

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> QuantTensor:
        """Unpack, with the matrix's gamma as the scale of every row."""
        n, _ = self.entries[name].shape
        packed = parts[".weight"].numpy()
        codes = np.concatenate([(packed >> shift) & 3 for shift in (0, 2, 4, 6)])[:n]
        if (codes == 3).any():
            raise self.fail(name, "the code 3 stands for no ternary weight")
        gamma = self._gamma(name, float(parts[".weight_scale"].to(torch.float32).item()))
        scale = np.full((n, 1), gamma, np.float32)
        return QuantTensor(parse_weight_format("w1.58"), np.ascontiguousarray(codes), scale)

    def _gamma(self, name: str, stored: float) -> np.float32:
        """Return what multiplies the codes; never guessed where both meanings are possible."""
        kind = self.settings.get("linear_class")
        if not 0 < stored < float("inf"):
            raise self.fail(name, f"weight_scale is {stored}")
        if kind == "autobitlinear":
            return np.float32(stored)
        if kind == "bitlinear" or (kind is None and stored > 1):
            return np.float32(1) / np.float32(stored)
        if kind is not None:
            raise InputError(
                f"BitNet layers of the class {kind!r} are not known",
                file=self.config_file,
                remedy="Known: bitlinear, autobitlinear",
            )
        raise self.fail(
            name,
            f"weight_scale {stored:g} may be gamma or 1/gamma, and quantization_config does not say",
            'Add "linear_class": "autobitlinear" (gamma) or "bitlinear" (1/gamma) to it',
        )

    def _height(self, rows: int) -> int:
        """Return N: the extent of the model that so many byte rows hold, else four times as many."""
        get = self.config.get
        known = [get(name) for name in _EXTENTS]
        heads, hidden = get("num_attention_heads"), get("hidden_size")
        if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            width = get("head_dim") or hidden // heads
            known += [h * width for h in (heads, get("num_key_value_heads")) if isinstance(h, int)]
        fits = {n for n in known if isinstance(n, int) and 4 * rows - 4 < n <= 4 * rows}
        return next(iter(fits)) if len(fits) == 1 else 4 * rows
