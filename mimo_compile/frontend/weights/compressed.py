"""Checkpoints of compressed-tensors (llm-compressor): packed integers, plain int8, plain FP8.

``pack-quantized``: ``weight_packed int32 [N, K b/32]`` is along each row a little-endian stream of b-bit
codes that were made unsigned by adding ``2**(b-1)``; ``weight_scale [N, K/G]``; ``weight_zero_point`` is
packed likewise along N; ``weight_g_idx`` names the group of each column. ``int-quantized`` and
``float-quantized`` keep int8 and E4M3 numbers as ``weight``.
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
from mimo_compile.frontend.weights.gptq import unpack
from mimo_compile.frontend.weights.grouped import GroupedCheckpoint
from mimo_compile.ir.formats import E4M3_NAN, QuantTensor, WeightFormat, parse_weight_format

_FORMATS = {"pack-quantized": "I32", "int-quantized": "I8", "float-quantized": "F8_E4M3"}
_FP8 = parse_weight_format("fp8b128")


class CompressedTensors(GroupedCheckpoint):
    """A folder whose ``quant_method`` is ``compressed-tensors``, all matrices in one way."""

    name = "compressed-tensors"
    methods = ("compressed-tensors",)
    parts = (
        ".weight_scale", ".weight_packed", ".weight", ".weight_shape", ".weight_zero_point",
        ".weight_g_idx",
    )  # fmt: skip
    optional = parts[1:]

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        """Read headers and settings.

        Raises:
            InputError: settings of another way of compression, or tensors that do not fit.
        """
        self._orders: dict[str, npt.NDArray[np.int32] | None] = {}
        super().__init__(source, config)
        inputs = self._scheme().get("input_activations")
        if isinstance(inputs, dict) and (inputs.get("type"), inputs.get("num_bits")) == ("int", 8):
            self.activations = 8

    def describe(
        self, name: str, parts: Mapping[str, Entry]
    ) -> tuple[tuple[int, ...], WeightFormat | None]:
        """Check the stored tensors against the settings."""
        bits, group, symmetric, form = self._settings()
        stored, scale = parts.get(self._stored_part(form)), parts[".weight_scale"]
        if stored is None or stored.dtype != _FORMATS[form]:
            raise self.fail(name, f"no {_FORMATS[form]} codes, which {form} has")
        if len(stored.shape) != 2 or 0 in stored.shape or scale.dtype not in ("F32", "F16", "BF16"):
            raise self.fail(name, f"codes {list(stored.shape)} with {scale.dtype} scales")
        n, k = stored.shape
        if form == "pack-quantized":
            if stored.shape[1] * 32 % bits:
                raise self.fail(name, f"{k} words are no {bits}-bit codes")
            k = k * 32 // bits
        size = k if group == 0 else min(group, k)
        columns = -(-k // size)
        one = group == 0 and scale.shape in ((), (1,), (1, 1))
        if scale.shape != (n, columns) and not one and not (columns == 1 and scale.shape == (n,)):
            raise self.fail(
                name,
                f"scales {list(scale.shape)} do not fit {n} x {k} in groups of {size}",
            )
        zero = parts.get(".weight_zero_point")
        if not symmetric and (
            form != "pack-quantized" or zero is None or zero.dtype != "I32" or n * bits % 32
            or zero.shape != (n * bits // 32, columns)
        ):  # fmt: skip
            found = "missing" if zero is None else f"{zero.dtype} {list(zero.shape)}"
            raise self.fail(name, f"its zero points are {found}")
        regular = self._order(name, parts, k, columns, size)
        if form == "float-quantized":
            return (n, k), _FP8
        fmt = grouped_format(bits, not symmetric, 0 if group == 0 else size, k)
        return (n, k), fmt if regular else None

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        """Unpack; what no format holds gives real values."""
        bits, group, symmetric, form = self._settings()
        (n, k), fmt = self.entries[name].shape, self.entries[name].fmt
        scale = parts[".weight_scale"].to(torch.float32).numpy().reshape(-1, -(-k // (group or k)))
        scale = np.array(np.broadcast_to(scale, (n, scale.shape[1])))
        if not np.isfinite(scale).all():
            raise self.fail(name, "a scale is not finite")
        if form == "float-quantized":
            raw = parts[".weight"].view(torch.uint8).numpy()
            if np.isin(raw, E4M3_NAN).any():
                raise self.fail(name, "a code stands for NaN")
            return QuantTensor(_FP8, raw, np.repeat(scale, _FP8.groups(k), axis=1))
        if form == "int-quantized":
            codes = parts[".weight"].view(torch.uint8).numpy() ^ np.uint8(128)
        else:
            codes = unpack(parts[".weight_packed"].numpy(), bits)
        middle = np.float32(1 << (bits - 1))
        zero = np.full_like(scale, middle)
        if not symmetric:
            across = np.ascontiguousarray(parts[".weight_zero_point"].numpy().T)
            zero = unpack(across, bits).T.astype(np.float32)
        if fmt is None:
            index = np.arange(k) // (group or k)
            if ".weight_g_idx" in parts:
                index = parts[".weight_g_idx"].to(torch.int64).numpy()
            real = scale[:, index] * (codes.astype(np.float32) - zero[:, index])
            return torch.from_numpy(np.ascontiguousarray(real))
        order = self._orders[name]
        if order is not None:
            codes = np.ascontiguousarray(codes[:, order])
        found = regroup(zero, group, fmt, k) if fmt.has_zero else None
        return QuantTensor(fmt, codes, regroup(scale, group, fmt, k), found, order)

    def _order(
        self, name: str, parts: Mapping[str, Entry], k: int, columns: int, size: int
    ) -> bool:
        """Keep the order of a matrix's columns; say whether their groups are regular."""
        self._orders[name] = None
        if (entry := parts.get(".weight_g_idx")) is None:
            return True
        if entry.shape != (k,) or entry.dtype not in ("I32", "I64"):
            raise self.fail(name, f"g_idx {entry.dtype} {list(entry.shape)} is no index of {k}")
        stored = self.stored.read(self._groups[name][".weight_g_idx"])
        assert isinstance(stored, Tensor)
        index = stored.to(torch.int64).numpy()
        if index.max() == -1 == index.min():
            return True  # never set
        if index.min() < 0 or index.max() >= columns:
            raise self.fail(name, f"g_idx names groups outside 0 to {columns - 1}")
        self._orders[name], regular = column_order(index, size)
        return regular

    @staticmethod
    def _stored_part(form: str) -> str:
        return ".weight_packed" if form == "pack-quantized" else ".weight"

    def _scheme(self) -> dict[str, Any]:
        """Return the settings that all groups of layers share."""
        groups = self.settings.get("config_groups")
        found = list(groups.values()) if isinstance(groups, dict) else []
        kept = [
            {k: g.get(k) for k in ("weights", "input_activations")}
            for g in found
            if isinstance(g, dict)
        ]
        if not kept or len(kept) != len(found) or any(g != kept[0] for g in kept):
            raise self._refused("its layers are compressed in several ways, or in none")
        return kept[0]

    def _settings(self) -> tuple[int, int, bool, str]:
        """Return bits, group (0: rows or tensor), whether codes are symmetric, and the way of storage."""
        weights = self._scheme()["weights"]
        get = weights.get if isinstance(weights, dict) else {}.get
        form, kind, bits = self.settings.get("format"), get("type", "int"), get("num_bits")
        strategy, group = get("strategy"), get("group_size")
        if form not in _FORMATS or kind != ("float" if form == "float-quantized" else "int"):
            raise self._refused(f"the format {form!r} of {kind!r} numbers is not read")
        if bits not in ((4, 8) if form == "pack-quantized" else (8,)) or isinstance(bits, bool):
            raise self._refused(f"{form} with num_bits={bits!r} is not read")
        if strategy == "group" and form == "pack-quantized":
            if type(group) is not int or group < 1:
                raise self._refused(f"group_size={group!r} is no number of columns")
        elif strategy in ("channel", "tensor"):
            group = 0
        else:
            raise self._refused(f"{form} with strategy={strategy!r} is not read")
        assert isinstance(bits, int) and isinstance(form, str)
        return bits, group or 0, get("symmetric", True) is True, form

    def _refused(self, what: str) -> InputError:
        return InputError(
            f"compressed-tensors: {what}",
            file=self.config_file,
            remedy="Known: pack-quantized (4 and 8 bits; groups, rows, tensors), int-quantized and "
            "float-quantized (rows, tensors), the same for all layers",
        )
