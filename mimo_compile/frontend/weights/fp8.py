"""Block-FP8 checkpoints: E4M3 codes ``[N, K]`` with one scale for each block of rows and columns.

A matrix is quantised if its ``weight_scale_inv`` is there, whatever lists of exceptions say; despite the
name, weights are multiplied by it. Last blocks may be short. Scales of MiMo-V2-Flash's keys and values come
in two layouts, told apart by their number of rows: each matrix in blocks of its own (uniform), or head by
head, where blocks run down a head's key rows and on into its value rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimo_compile.errors import InputError
from mimo_compile.frontend.weights.checkpoint import Entry
from mimo_compile.frontend.weights.grouped import GroupedCheckpoint
from mimo_compile.ir.formats import E4M3_NAN, QuantTensor, WeightFormat, parse_weight_format

Array = npt.NDArray[np.float32]
_FORMAT = parse_weight_format("fp8b128")
_SCALE, _KEYS, _VALUES = ".weight_scale_inv", ".k_proj.weight", ".v_proj.weight"


class BlockFp8(GroupedCheckpoint):
    """A folder whose ``quant_method`` is ``fp8`` with a ``weight_block_size``."""

    name = "fp8"
    methods = ("fp8",)
    parts = (_SCALE, ".weight")

    def describe(
        self, name: str, parts: Mapping[str, Entry]
    ) -> tuple[tuple[int, ...], WeightFormat | None]:
        """Check types and that the scales are as many as the blocks of one of the layouts."""
        weight, scale = parts[".weight"], parts[_SCALE]
        if weight.dtype != "F8_E4M3" or scale.dtype not in ("F32", "BF16", "F16"):
            raise self.fail(
                name, f"stored as {weight.dtype} with {scale.dtype} scales, not as E4M3 with floats"
            )
        if len(weight.shape) != 2 or len(scale.shape) != 2 or 0 in weight.shape:
            raise self.fail(name, "codes and scales must be matrices")
        (n, k), (rows, columns) = weight.shape, self._block()
        uniform = (-(-n // rows), -(-k // columns))
        other = scale.shape[1] == uniform[1] and self._per_head(name) is not None
        if scale.shape != uniform and not other:
            raise self.fail(
                name,
                f"scales {list(scale.shape)} do not fit {n} x {k} in blocks of {rows} x {columns}",
            )
        wide = columns % 128 == 0 or columns >= k
        return (n, k), _FORMAT if wide else None

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        """Return codes with a scale for each row and 128 columns; finer blocks give real values."""
        codes = parts[".weight"].view(torch.uint8).numpy()
        if np.isin(codes, E4M3_NAN).any():
            raise self.fail(name, "a code stands for NaN")
        rows, columns = self._block()
        (n, k), scale = codes.shape, self._scale(name)
        heads = None if self._uniform(name) else self._per_head(name)
        lines = scale[np.arange(n) // rows] if heads is None else self._by_head(name, *heads)
        if not np.isfinite(lines).all():
            raise self.fail(name, "a scale is not finite")
        if self.entries[name].fmt is None:
            real = parts[".weight"].to(torch.float32).numpy()
            return torch.from_numpy(real * np.repeat(lines, columns, axis=1)[:, :k])
        times = -(-min(columns, k) // _FORMAT.group)
        spread = np.repeat(lines, times, axis=1)[:, : _FORMAT.groups(k)]
        return QuantTensor(_FORMAT, np.ascontiguousarray(codes), np.ascontiguousarray(spread))

    def _block(self) -> tuple[int, int]:
        block, form = self.settings.get("weight_block_size"), self.settings.get("fmt", "e4m3")
        sizes = block if isinstance(block, list) else []
        good = len(sizes) == 2 and all(type(b) is int and 0 < b < 1 << 30 for b in sizes)
        if not good or form != "e4m3":
            raise InputError(
                f"FP8 with weight_block_size={block!r}, fmt={form!r} is not read",
                file=self.config_file,
                remedy="Known: e4m3 with a scale for each block of rows and columns",
            )
        return sizes[0], sizes[1]

    def _scale(self, name: str) -> Array:
        found = self.stored.read(name.removesuffix(".weight") + _SCALE)
        assert isinstance(found, Tensor)
        values: Array = found.to(torch.float32).numpy()
        return values

    # -- the two layouts of keys and values ----------------------------------------------------

    def _pair(self, name: str) -> tuple[str, str] | None:
        """Return the names of the key and value matrix of the same attention block."""
        for end in (_KEYS, _VALUES):
            if name.endswith(end):
                stem = name.removesuffix(end)
                pair = stem + _KEYS, stem + _VALUES
                return pair if all(p in self._groups for p in pair) else None
        return None

    def _uniform(self, name: str) -> bool:
        """Say whether all matrices that share blocks with this one have as many scales as blocks."""
        rows = self._block()[0]
        names = self._pair(name) or (name,)
        return all(self._rows(n, scales=True) == -(-self._rows(n) // rows) for n in names)

    def _rows(self, name: str, *, scales: bool = False) -> int:
        stored = self._groups[name][_SCALE if scales else ".weight"]
        return self.stored.entries[stored].shape[0]

    def _per_head(self, name: str) -> tuple[int, int, int] | None:
        """Return KV heads and widths of a head's keys and values if scales are laid out head by head."""
        pair = self._pair(name)
        if pair is None:
            return None
        rows, (keys, values) = self._block()[0], pair
        get = self.config.get
        for prefix in ("", "swa_"):
            heads, d = get(f"{prefix}num_key_value_heads", 0), get(f"{prefix}head_dim", 0)
            dv = get(f"{prefix}v_head_dim", d)
            if not all(type(x) is int and x > 0 for x in (heads, d, dv)):
                continue
            of_keys, total = -(-d // rows), -(-(d + dv) // rows)
            stored = self._rows(keys, scales=True), self._rows(values, scales=True)
            fits = (self._rows(keys), self._rows(values)) == (heads * d, heads * dv)
            if fits and stored == (heads * of_keys, heads * (total - of_keys)):
                return heads, d, dv
        return None

    def _by_head(self, name: str, heads: int, d: int, dv: int) -> Array:
        """Return the scales of each row, ``[N, blocks of K]``."""
        pair = self._pair(name)
        assert pair is not None
        rows = self._block()[0]
        both = [self._scale(n).reshape(heads, -1, self._scale(n).shape[-1]) for n in pair]
        blocks = np.concatenate(both, axis=1)  # [heads, blocks of a head, columns]
        each = blocks[:, np.arange(d + dv) // rows]
        part: Array = each[:, :d] if name.endswith(_KEYS) else each[:, d:]
        return part.reshape(-1, part.shape[-1])
