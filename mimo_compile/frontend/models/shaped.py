"""Stages of a model whose weights are not there: what `build` makes, without memory for any matrix."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimo_compile.frontend.models.build import Builder
from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.frontend.weights.shapes import blank
from mimo_compile.ir.formats import QuantScheme, QuantTensor, WeightFormat
from mimo_compile.quantize import quantize
from mimo_compile.quantize.complex import check_extents

Array = npt.NDArray[Any]

_SAMPLE = 256
"""Rows and columns of the matrix that is quantised to see what a format's arrays are like."""


class ShapedBuilder(Builder):
    """Turns shapes into stages; matrices have the formats and types that quantised weights would have."""

    def _stored(self, name: str) -> Tensor:
        entry = self.checkpoint.entries[name]
        return blank(entry.shape, _stored_type(entry.dtype, self.scheme))

    def _matrix(self, names: list[str], fmt: WeightFormat | None) -> Tensor | QuantTensor:
        shapes = [self.checkpoint.entries[name].shape for name in names]
        return self._blank((), sum(n for n, _ in shapes), shapes[0][-1], names[0], fmt)

    def _experts(self, spec: LayerSpec, names: list[str]) -> Tensor | QuantTensor:
        firsts = [name.replace("{e}", "0") for name in names]
        shapes = [self.checkpoint.entries[name].shape for name in firsts]
        rows, columns = sum(n for n, _ in shapes), shapes[0][-1]
        return self._blank((spec.experts,), rows, columns, firsts[0], self.scheme.codes)

    def _fused_experts(self, name: str) -> Tensor | QuantTensor:
        experts, rows, columns = self.checkpoint.entries[name].shape
        return self._blank((experts,), rows, columns, name, self.scheme.codes)

    def _blank(
        self, lead: tuple[int, ...], rows: int, columns: int, name: str, fmt: WeightFormat | None
    ) -> Tensor | QuantTensor:
        """Return a matrix ``[*lead, rows, columns]``, as floats of a tensor's type or in a format."""
        if fmt is None:
            kind = _stored_type(self.checkpoint.entries[name].dtype, self.scheme)
            return blank((*lead, rows, columns), kind)
        check_extents(fmt, rows, columns, name)
        like = _sample(fmt)
        scales = fmt.scale_shape(rows, columns)
        zero = None if like.zero is None else _spread(like.zero, (*lead, rows, fmt.groups(columns)))
        codes = _spread(like.codes, (*lead, *fmt.code_shape(rows, columns)))
        return QuantTensor(fmt, codes, _spread(like.scale, (*lead, *scales)), zero)


def _stored_type(dtype: str, scheme: QuantScheme) -> torch.dtype:
    """Return the type of a matrix that stays float, as `Builder` keeps it."""
    rounded = scheme.weight is not None and scheme.weight.is_float
    return torch.bfloat16 if rounded or dtype == "BF16" else torch.float32


@cache
def _sample(fmt: WeightFormat) -> QuantTensor:
    """Return a small quantised matrix: whether its scales fit float16 depends on the quantiser, too."""
    return quantize(np.random.default_rng(0).standard_normal((_SAMPLE, _SAMPLE), np.float32), fmt)


def _spread(like: Array, shape: tuple[int, ...]) -> Array:
    """Return an array of another shape, all of it the first number of ``like``, in memory of that number."""
    first = like.reshape(-1)[:1].copy()
    return np.lib.stride_tricks.as_strided(first, shape, (0,) * len(shape))
