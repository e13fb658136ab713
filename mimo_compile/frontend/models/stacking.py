"""Several matrices as one: along their rows, or on top of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.frontend.weights.canonical import common_format, widen
from mimo_compile.ir.formats import QuantTensor


def same_type(parts: list[Tensor]) -> list[Tensor]:
    """Widen all parts to float32 unless all are bf16."""
    if len({part.dtype for part in parts}) == 1:
        return parts
    return [part.to(torch.float32) for part in parts]


def stack(parts: list[QuantTensor]) -> QuantTensor:
    """Join quantised matrices along their rows."""
    return _join(parts, torch.cat)


def pile(parts: list[Tensor | QuantTensor]) -> Tensor | QuantTensor:
    """Put matrices of equal shape on top of each other: ``[E, N, K]``.

    Those in different formats take one that holds all of them. Where columns stand in other orders, or
    there is no such format, real values are returned.
    """
    quantised = [part for part in parts if isinstance(part, QuantTensor) and part.perm is None]
    if len(quantised) == len(parts):
        fmt = common_format([part.fmt for part in quantised], quantised[0].codes.shape[-1])
        if fmt is not None:
            return _join([widen(part, fmt) for part in quantised], torch.stack)
    return torch.stack(same_type(real(parts)))


def real(parts: list[Tensor | QuantTensor]) -> list[Tensor]:
    """Return the values of quantised matrices, with columns in their own order; floats as they are."""
    return [torch.from_numpy(p.dequantize()) if isinstance(p, QuantTensor) else p for p in parts]


def _join(parts: list[QuantTensor], how: Callable[[list[Tensor]], Tensor]) -> QuantTensor:
    def each(arrays: list[Any]) -> Any:
        return how([torch.from_numpy(array) for array in arrays]).numpy()

    zero = None if parts[0].zero is None else each([part.zero for part in parts])
    codes, scale = each([p.codes for p in parts]), each([p.scale for p in parts])
    return QuantTensor(parts[0].fmt, codes, scale, zero, parts[0].perm)


def same_order(a: QuantTensor, b: QuantTensor) -> bool:
    """Say whether the columns of two matrices stand in one order."""
    if a.perm is None or b.perm is None:
        return a.perm is b.perm
    return np.array_equal(a.perm, b.perm)
