"""4-bit checkpoints of bitsandbytes (QLoRA's NF4): blocks along the flattened matrix, high nibble first.

``weight uint8 [numel/2, 1]`` comes with ``absmax`` for each block, the table ``quant_map`` of 16 values and a
``quant_state`` in JSON. Doubly quantised scales are bytes: ``nested_quant_map[absmax] *
nested_absmax[block of absmax] + nested_offset``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimo_compile.errors import InputError
from mimo_compile.frontend.weights.canonical import regroup
from mimo_compile.frontend.weights.checkpoint import Entry, quantisation
from mimo_compile.frontend.weights.grouped import GroupedCheckpoint
from mimo_compile.ir.formats import QuantTensor, WeightFormat, parse_weight_format

_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
_STATE_BYTES = 1 << 16
"""Bytes of the largest state that is read."""


class Nf4(GroupedCheckpoint):
    """A folder whose ``quant_method`` is ``bitsandbytes``, 4 bits."""

    name = "bitsandbytes"
    methods = ("bitsandbytes",)
    parts = (
        ".weight.absmax", ".weight.quant_map", ".weight",
        ".weight.nested_absmax", ".weight.nested_quant_map", *_STATES,
    )  # fmt: skip
    optional = (".weight.nested_absmax", ".weight.nested_quant_map", *_STATES)

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        """Read headers and the state of each matrix.

        Raises:
            InputError: 8-bit weights, or states that do not fit their tensors.
        """
        self._states: dict[str, dict[str, Any]] = {}
        settings = quantisation(config)
        if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
            raise InputError(
                "8-bit weights of bitsandbytes are not read",
                file=source / "config.json",
                remedy="Known: 4 bits; or load the float checkpoint with --quant w8a8",
            )
        super().__init__(source, config)

    def describe(
        self, name: str, parts: Mapping[str, Entry]
    ) -> tuple[tuple[int, ...], WeightFormat | None]:
        """Check counts of codes and scales against the state's shape."""
        state = self._states[name] = self._state(name, parts)
        (n, k), block = state["shape"], state["blocksize"]
        blocks = -(-n * k // block)
        nested = ".weight.nested_absmax" in parts
        counts = {".weight": -(-n * k // 2), ".weight.absmax": blocks, ".weight.quant_map": 16}
        if nested:
            counts[".weight.nested_absmax"] = -(-blocks // state["nested_blocksize"])
            counts[".weight.nested_quant_map"] = 256
        types = {".weight": "U8", ".weight.absmax": "U8" if nested else "F32"}
        for part, count in counts.items():
            if part not in parts:
                raise self.fail(name, f"{part} is missing")
            entry = parts[part]
            if math.prod(entry.shape) != count or entry.dtype != types.get(part, "F32"):
                raise self.fail(
                    name,
                    f"{part} is {entry.dtype} {list(entry.shape)}; {n} x {k} weights in blocks of "
                    f"{block} have {count} of {types.get(part, 'F32')}",
                )
        return (n, k), self._format(name, k, block)

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        """Unpack; other tables, or blocks that run across rows, give real values."""
        (n, k), fmt = self.entries[name].shape, self.entries[name].fmt
        block = self._states[name]["blocksize"]
        packed = parts[".weight"].numpy().reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: n * k]
        scale = self._scales(name, parts)
        if not np.isfinite(scale).all():
            raise self.fail(name, "a scale is not finite")
        if fmt is None:
            table = parts[".weight.quant_map"].to(torch.float32).numpy()
            real = table[codes] * scale[np.arange(n * k) // block]
            return torch.from_numpy(real.reshape(n, k))
        scale = regroup(scale.reshape(n, -1), block, fmt, k)
        return QuantTensor(fmt, codes.reshape(n, k), scale)

    def _format(self, name: str, k: int, block: int) -> WeightFormat | None:
        stored = self.stored.read(self._groups[name][".weight.quant_map"])
        assert isinstance(stored, Tensor)
        book = parse_weight_format("nf4").values
        same = np.array_equal(stored.numpy().reshape(-1), np.array(book, np.float32))
        if not same or k % block:
            return None
        size = next((g for g in (256, 128, 64, 32, 16) if block % g == 0), None)
        return None if size is None else parse_weight_format(f"nf4g{size}")

    def _scales(self, name: str, parts: Mapping[str, Tensor]) -> npt.NDArray[np.float32]:
        absmax = parts[".weight.absmax"].numpy().reshape(-1)
        if ".weight.nested_absmax" not in parts:
            return absmax.astype(np.float32)
        state = self._states[name]
        table = parts[".weight.nested_quant_map"].numpy().reshape(-1)
        outer = parts[".weight.nested_absmax"].numpy().reshape(-1)
        outer = outer[np.arange(len(absmax)) // state["nested_blocksize"]]
        out: npt.NDArray[np.float32] = table[absmax] * outer + np.float32(state["nested_offset"])
        return out

    def _state(self, name: str, parts: Mapping[str, Entry]) -> dict[str, Any]:
        """Return the checked state: shape, blocksize, and those of nested scales."""
        entry = next((parts[p] for p in _STATES if p in parts), None)
        if entry is None:
            raise self.fail(name, "its quant_state is missing, or of another kind than nf4 and fp4")
        if entry.dtype != "U8" or math.prod(entry.shape) > _STATE_BYTES:
            raise self.fail(name, f"its quant_state is {entry.dtype} {list(entry.shape)}")
        part = next(p for p in _STATES if p in parts)
        stored = self.stored.read(self._groups[name][part])
        assert isinstance(stored, Tensor)
        try:
            state = json.loads(stored.numpy().tobytes())
            shape, block = state["shape"], state["blocksize"]
            numbers = [*shape, block]
            if ".weight.nested_absmax" in parts:
                numbers.append(state["nested_blocksize"])
                state["nested_offset"] = float(state["nested_offset"])
            if len(shape) != 2 or not all(type(x) is int and 0 < x < 1 << 40 for x in numbers):
                raise ValueError(f"shape {shape!r}, blocksize {block!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.fail(name, f"its quant_state is damaged: {error!r}") from error
        found: dict[str, Any] = state
        return found
