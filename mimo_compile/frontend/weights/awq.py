"""AWQ checkpoints in AutoAWQ's ``gemm`` packing: 4-bit codes and zero points packed along N.

Nibble i (lowest first) of word c of ``qweight int32 [K, N/8]`` and ``qzeros int32 [K/G, N/8]`` belongs to
output feature ``8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]``; ``scales [K/G, N]``. The scaling of activations, from
which the method has its name, is already part of the weights and of what feeds them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimo_compile.errors import InputError
from mimo_compile.frontend.weights.canonical import grouped_format, regroup
from mimo_compile.frontend.weights.checkpoint import Entry
from mimo_compile.frontend.weights.grouped import GroupedCheckpoint
from mimo_compile.ir.formats import QuantTensor, WeightFormat

_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble that holds the output feature of this rest modulo 8."""


class Awq(GroupedCheckpoint):
    """A folder whose ``quant_method`` is ``awq``."""

    name = "awq"
    methods = ("awq",)
    parts = (".qweight", ".qzeros", ".scales")

    def describe(
        self, name: str, parts: Mapping[str, Entry]
    ) -> tuple[tuple[int, ...], WeightFormat | None]:
        """Check settings and shapes of one matrix."""
        group = self._group()
        weight, zeros, scales = (parts[part] for part in self.parts)
        if (
            weight.dtype != "I32"
            or zeros.dtype != "I32"
            or scales.dtype not in ("F16", "BF16", "F32")
        ):
            types = ", ".join(f"{part} {e.dtype}" for part, e in parts.items())
            raise self.fail(name, f"stored as {types}; AWQ has int32 codes and float scales")
        if {len(e.shape) for e in (weight, zeros, scales)} != {2} or 0 in weight.shape:
            raise self.fail(name, "codes, zero points and scales must be matrices")
        k, n = weight.shape[0], weight.shape[1] * 8
        size = k if group == -1 else group
        if k % size or scales.shape != (k // size, n) or zeros.shape != (k // size, n // 8):
            raise self.fail(
                name,
                f"scales {list(scales.shape)} and zero points {list(zeros.shape)} do not fit "
                f"{n} rows of {k} columns in groups of {size} (packing gemm)",
            )
        return (n, k), grouped_format(4, True, size, k)

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        """Unpack; a group size without a canonical form gives real values."""
        (_, k), fmt, group = self.entries[name].shape, self.entries[name].fmt, self._group()
        codes = np.ascontiguousarray(_columns(parts[".qweight"]).T)
        zero = _columns(parts[".qzeros"]).T.astype(np.float32)
        scale = parts[".scales"].to(torch.float32).numpy().T
        if not np.isfinite(scale).all():
            raise self.fail(name, "a scale is not finite")
        if fmt is None:
            wide = [np.repeat(part, group, axis=1) for part in (scale, zero)]
            real = wide[0] * (codes.astype(np.float32) - wide[1])
            return torch.from_numpy(np.ascontiguousarray(real))
        return QuantTensor(fmt, codes, regroup(scale, group, fmt, k), regroup(zero, group, fmt, k))

    def _group(self) -> int:
        """Return the group size (-1: rows) after checking what else the settings say."""
        get, file = self.settings.get, self.config_file
        version, bits = get("version", get("format", "gemm")), get("bits", get("w_bit", 4))
        group = get("group_size", get("q_group_size", 128))
        if str(version).lower() != "gemm":
            raise InputError(
                f"AWQ weights in the packing {version!r} are not read",
                file=file,
                remedy="Only the packing gemm is; convert the checkpoint",
            )
        if bits != 4 or get("zero_point", True) is not True:
            raise InputError(
                f"AWQ with bits={bits!r}, zero_point={get('zero_point', True)!r} is not read",
                file=file,
                remedy="Known: 4 bits with zero points",
            )
        if type(group) is not int or (group < 1 and group != -1):
            raise InputError(f"group_size={group!r} is no number of columns, nor -1", file=file)
        return group


def _columns(words: Tensor) -> npt.NDArray[np.uint8]:
    """Return the nibbles ``[R, N]`` of packed words ``[R, N/8]``, output features in order."""
    shifts = np.array([4 * place for place in _PLACE], np.uint32)
    raw = np.ascontiguousarray(words.numpy()).view(np.uint32)
    return ((raw[..., None] >> shifts) & 15).astype(np.uint8).reshape(raw.shape[0], -1)
