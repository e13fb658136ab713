"""GPTQ checkpoints (AutoGPTQ, GPTQModel): codes packed along K, zero points along N, 2, 3, 4 and 8 bits.

``qweight int32 [K b/32, N]`` is, down each column, a little-endian stream of b-bit codes; ``qzeros int32
[groups, N b/32]`` one along each row; ``scales [groups, N]``; ``g_idx int32 [K]`` names the group of each
input feature. The first version of the format stores zero points less 1. Where features were quantised
in order of activation (``desc_act``), columns are sorted by group and the tensor keeps their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimo_compile.errors import InputError
from mimo_compile.frontend.weights.canonical import column_order, grouped_format, regroup
from mimo_compile.frontend.weights.checkpoint import Entry
from mimo_compile.frontend.weights.grouped import GroupedCheckpoint
from mimo_compile.ir.formats import QuantTensor, WeightFormat

_BITS = (2, 3, 4, 8)
_SCALES = {"F16", "BF16", "F32"}


class Gptq(GroupedCheckpoint):
    """A folder whose ``quant_method`` is ``gptq``."""

    name = "gptq"
    methods = ("gptq",)
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")
    optional = (".g_idx",)

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        """Read headers, settings and the groups of input features.

        Raises:
            InputError: settings or tensors that are no GPTQ checkpoint, or one of another packing.
        """
        self._orders: dict[str, npt.NDArray[np.int32] | None] = {}
        super().__init__(source, config)

    def describe(
        self, name: str, parts: Mapping[str, Entry]
    ) -> tuple[tuple[int, ...], WeightFormat | None]:
        """Read bits and group size off the settings, N and K off the shapes; the order of columns."""
        bits, group, _ = self._settings()
        weight, zeros, scales = parts[".qweight"], parts[".qzeros"], parts[".scales"]
        if weight.dtype != "I32" or zeros.dtype != "I32" or scales.dtype not in _SCALES:
            types = ", ".join(f"{part} {e.dtype}" for part, e in parts.items())
            raise self.fail(name, f"stored as {types}; GPTQ has int32 codes and float scales")
        if {len(e.shape) for e in (weight, zeros, scales)} != {2} or 0 in weight.shape:
            raise self.fail(name, "codes, zero points and scales must be matrices")
        (words, n), groups = weight.shape, scales.shape[0]
        k = words * 32 // bits
        size = k if group <= 0 else min(group, k)
        if words * 32 % bits or n * bits % 32:
            raise self.fail(name, f"{words} x {n} words are no {bits}-bit codes")
        if scales.shape != (-(-k // size), n) or zeros.shape != (groups, n * bits // 32):
            raise self.fail(
                name,
                f"scales {list(scales.shape)} and zero points {list(zeros.shape)} do not fit "
                f"{n} rows of {k} columns in groups of {size}",
            )
        # ``sym`` is believed only when it is said, and proved when the zero points are read
        fmt = grouped_format(bits, self.settings.get("sym") is not True, size, k)
        index = self._index(name, parts, k, groups)
        self._orders[name], regular = (None, True) if index is None else column_order(index, size)
        return (n, k), fmt if regular else None

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        """Unpack; columns sorted by group. Groups of unequal size give real values."""
        bits, group, first_version = self._settings()
        k, fmt = self.entries[name].shape[1], self.entries[name].fmt
        packed = np.ascontiguousarray(parts[".qweight"].numpy().T)
        codes = unpack(packed, bits)
        zero = unpack(parts[".qzeros"].numpy(), bits).astype(np.float32).T + first_version
        scale = parts[".scales"].to(torch.float32).numpy().T
        if not np.isfinite(scale).all():
            raise self.fail(name, "a scale is not finite")
        if self.settings.get("sym") is True and not (zero == 1 << (bits - 1)).all():
            raise self.fail(
                name,
                f"zero points differ from {1 << (bits - 1)} though the settings say sym",
                '"sym": false in quantization_config makes them count',
            )
        if first_version and (high := int((zero == 1 << bits).sum())):
            self.notes.append(
                f"{name}: {high} zero points are {1 << bits}, probably 0 that the writer let wrap around"
            )
        order = self._orders[name]
        if fmt is None:
            index = np.arange(k) // group
            if ".g_idx" in parts:
                index = parts[".g_idx"].to(torch.int64).numpy()
            real = scale[:, index] * (codes.astype(np.float32) - zero[:, index])
            return torch.from_numpy(np.ascontiguousarray(real))
        if order is not None:
            codes = np.ascontiguousarray(codes[:, order])
        scale = regroup(scale, group, fmt, k)
        found = regroup(zero, group, fmt, k) if fmt.has_zero else None
        return QuantTensor(fmt, codes, scale, found, order)

    def ignorable(self, name: str) -> bool:
        """Biases of zeros, which old writers add to every layer."""
        stem, _, last = name.rpartition(".")
        if last != "bias" or f"{stem}.weight" not in self._groups:
            return False
        return not bool(self.tensor(name).any())

    def _settings(self) -> tuple[int, int, int]:
        """Return bits, group size (-1: rows), and what is to be added to stored zero points."""
        bits, group = self.settings.get("bits"), self.settings.get("group_size", -1)
        version = self.settings.get("checkpoint_format", "gptq")
        file = self.config_file
        if bits not in _BITS or isinstance(bits, bool):
            raise InputError(
                f"GPTQ with bits={bits!r} is not read", file=file, remedy="Known: 2, 3, 4, 8"
            )
        if type(group) is not int or (group < 1 and group != -1):
            raise InputError(f"group_size={group!r} is no number of columns, nor -1", file=file)
        if version not in ("gptq", "gptq_v2"):
            raise InputError(
                f"GPTQ weights in the packing {version!r} are not read",
                file=file,
                remedy="Known: gptq and gptq_v2; convert the checkpoint",
            )
        if self.settings.get("dynamic"):
            raise InputError("GPTQ with settings for each module (dynamic) is not read", file=file)
        return bits, group, 1 if version == "gptq" else 0

    def _index(
        self, name: str, parts: Mapping[str, Entry], k: int, groups: int
    ) -> npt.NDArray[np.int64] | None:
        if (entry := parts.get(".g_idx")) is None:
            return None
        if entry.shape != (k,) or entry.dtype not in ("I32", "I64"):
            raise self.fail(name, f"g_idx {entry.dtype} {list(entry.shape)} is no index of {k}")
        stored = self.stored.read(self._groups[name][".g_idx"])
        assert isinstance(stored, Tensor)
        index = stored.to(torch.int64).numpy()
        if index.min() < 0 or index.max() >= groups:
            raise self.fail(name, f"g_idx names groups outside 0 to {groups - 1}")
        return index


def unpack(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """Return the codes ``[R, W 32/bits]`` of rows of int32 words, each row a little-endian stream.

    Codes of 3 bits may lie across words: 32 of them fill 3 words.
    """
    raw = np.ascontiguousarray(words).astype("<i4").view(np.uint8)
    rows = raw.shape[0]
    if bits == 8:
        return raw
    if bits == 3:
        wide = np.zeros((rows, raw.shape[1] // 3, 4), np.uint8)
        wide[..., :3] = raw.reshape(rows, -1, 3)  # 8 codes in 3 bytes
        shifts = np.arange(0, 24, 3, dtype=np.uint32)
        return ((wide.view("<u4") >> shifts) & 7).astype(np.uint8).reshape(rows, -1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((raw[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(rows, -1)
