"""Fairy2i weights: widely-linear complex codes, four to a byte, and two scales for each of their matrices.

``X.codes uint8 [T * N/2, K/8]`` holds the codes 0, 1, 2, 3 for 1, i, -1, -i of T stacked matrices (U and W
of ``y = U x + W conj(x)``, with two stages those of what is left, too), low bits first; ``X.scales [T, 2]``
in float16 or float32 those of the real and the imaginary axis. ``quantization_config`` says
``"quant_method": "fairy2i"``, ``"stages"`` 1 or 2, and in ``"stacks"`` which X stand for several matrices on
top of each other, whose rows a complex one mixes:
``{"model.layers.0.self_attn.qkv_proj": {"q_proj": 256, "k_proj": 64, "v_proj": 64}}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import InputError
from mimo_compile.frontend.weights.checkpoint import Entry
from mimo_compile.frontend.weights.grouped import GroupedCheckpoint
from mimo_compile.ir.formats import QuantTensor, WeightFormat, parse_weight_format

_FORMATS = {1: "complex2wl", 2: "complex2wl2"}


class Fairy(GroupedCheckpoint):
    """A folder whose ``quant_method`` is ``fairy2i``."""

    name = "fairy2i"
    methods = ("fairy2i",)
    parts = (".codes", ".scales")
    activations = 8

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        """Read headers, and put the matrices of stacks in the place of the stacks.

        Raises:
            InputError: see `GroupedCheckpoint`; stacks that do not fit the tensors.
        """
        super().__init__(source, config)
        self._stacks: dict[tuple[str, ...], tuple[str, Entry]] = {}
        self._rows: dict[str, tuple[str, int, int]] = {}
        stacks = self.settings.get("stacks", {})
        if not isinstance(stacks, dict):
            raise self._wrong("stacks is no object")
        for stem, parts in stacks.items():
            self._spread(str(stem), parts)

    def _wrong(self, what: str) -> InputError:
        return InputError(f"quantization_config: {what}", file=self.config_file)

    def _spread(self, stem: str, parts: Any) -> None:
        """Replace the entry of a stack by those of its parts."""
        whole = self.entries.pop(f"{stem}.weight", None)
        if whole is None:
            raise self._wrong(f"there is no tensor {stem}.codes for the stack {stem}")
        heights = list(parts.values()) if isinstance(parts, dict) else []
        if not all(type(h) is int and h > 0 for h in heights) or sum(heights) != whole.shape[0]:
            raise self._wrong(f"the stack {stem} has {whole.shape[0]} rows, its parts {parts}")
        start, names = 0, []
        for part, height in parts.items():
            name = f"{stem.rpartition('.')[0]}.{part}.weight"
            if name in self.entries:
                raise self._wrong(f"{name} is there twice")
            self.entries[name] = replace(whole, shape=(height, whole.shape[1]))
            self._rows[name] = (f"{stem}.weight", start, start + height)
            names.append(name)
            start += height
        self._stacks[tuple(names)] = (f"{stem}.weight", whole)

    def describe(
        self, name: str, parts: Mapping[str, Entry]
    ) -> tuple[tuple[int, ...], WeightFormat | None]:
        """Check types and shapes."""
        codes, scales = parts[".codes"], parts[".scales"]
        stages = self.settings.get("stages")
        fmt = _FORMATS.get(stages) if type(stages) is int else None
        if fmt is None:
            raise self._wrong(f"stages is {stages!r}, not 1 or 2")
        found = parse_weight_format(fmt)
        if codes.dtype != "U8" or scales.dtype not in ("F16", "F32"):
            raise self.fail(name, f"stored as {codes.dtype} with scales in {scales.dtype}")
        if (
            len(codes.shape) != 2
            or 0 in codes.shape
            or codes.shape[0] % found.terms
            or scales.shape != (found.terms, 2)
        ):
            raise self.fail(
                name,
                f"codes {list(codes.shape)} and scales {list(scales.shape)} do not fit {fmt}",
            )
        return (found.rows(codes.shape[0]), 8 * codes.shape[1]), found

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> QuantTensor:
        """Unpack, with the scales of a matrix in each of its rows."""
        packed = parts[".codes"].numpy()
        codes = np.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
        scales = parts[".scales"].to(torch.float32).numpy()
        if not np.isfinite(scales).all() or (scales < 0).any():
            raise self.fail(name, f"the scales are {scales.tolist()}")
        fmt = parse_weight_format(_FORMATS[self.settings["stages"]])
        rows = np.repeat(scales, len(packed) // fmt.terms, axis=0)
        return QuantTensor(fmt, codes.reshape(len(packed), -1), np.ascontiguousarray(rows))

    def read(self, name: str) -> Tensor | QuantTensor:
        """Return a matrix; one of a stack as its real values."""
        if name not in self._rows:
            return super().read(name)
        stack, start, stop = self._rows[name]
        found = super().read(stack)
        assert isinstance(found, QuantTensor)
        return torch.from_numpy(found.dequantize()[start:stop])

    def joined(self, names: Sequence[str]) -> QuantTensor | None:
        """Return a stack of matrices as it is stored."""
        stack = self._stacks.get(tuple(names))
        found = None if stack is None else super().read(stack[0])
        return found if isinstance(found, QuantTensor) else None
