"""Numerical definitions that several ops share: activation quantisation, bf16 bits, error constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimo_compile.ir.formats import ActFormat, WeightFormat, parse_act_format

U32 = 2.0**-24
"""Unit round-off of float32."""
TINY = 2.0**-126
"""Smallest normal float32 and bfloat16; products of bfloat16 take and give zero below it."""
F16_MOST = 65504.0
"""Largest float16, where ``af16`` ends."""
DRAWS = 4
"""Of roundings, from which bounds of attention follow."""


def roundings(unit: float) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield what changes numbers as roundings may, each for a run of its own from which a bound follows.

    In `DRAWS` runs each number is multiplied with a factor of its own, drawn from ``1 - unit`` and ``1 +
    unit``; in a last one they take turns along the last axis: of two keys whose weights are changed alike in
    every draw, the mean of the values would not move at all.
    """
    draw = torch.Generator().manual_seed(0)

    def drawn(x: Tensor) -> Tensor:
        signs = torch.randint(0, 2, x.shape, generator=draw).to(x.dtype)
        return x * (1 + unit * (2 * signs - 1))

    def in_turns(x: Tensor) -> Tensor:
        return x * (1 + unit * (1 - 2 * (torch.arange(x.shape[-1]) % 2).to(x.dtype)))

    for _ in range(DRAWS):
        yield drawn
    yield in_turns


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row to int8 by its largest magnitude, in float32 arithmetic.

    ``q = round_half_even(x * (127 / amax))``, ``scale = amax / 127``; a zero row gives scale 0, codes 0.

    Args:
        x: ``[..., K]`` float32.

    Returns:
        ``q`` ``[..., K]`` int8 in [-127, 127] and ``scale`` ``[..., 1]`` float32.
    """
    x = x.to(torch.float32)
    amax = x.abs().amax(dim=-1, keepdim=True)
    # two tensors, since torch turns a number over a tensor into a reciprocal with its own rounding
    inverse = torch.where(amax > 0, torch.full_like(amax, 127.0) / amax, torch.zeros_like(amax))
    q = torch.round(x * inverse).clamp(-127, 127).to(torch.int8)
    return q, amax / 127.0


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return the float32 values of bfloat16 bit patterns."""
    out: npt.NDArray[np.float32] = (bits.astype(np.uint32) << 16).view(np.float32)
    return out


def f32_to_bf16(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 bit patterns, half to even (finite values)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16)


def torch_f64(array: npt.NDArray[Any]) -> Tensor:
    """Return an array as a float64 tensor."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))


def real_matrix(
    fmt: WeightFormat, codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the real weights of a canonical quantised matrix; see `ir.formats`.

    Args:
        fmt: its format.
        codes: ``[..., N, K]`` uint8 (complex: ``[..., terms * N/2, K/2]``).
        scale: ``[..., N, G]``, or two columns a group.
        zero: ``[..., N, G]``, or None: the format's own.
        dtype: arithmetic and result.

    Returns:
        ``[..., N, K]``.
    """
    columns = codes.shape[-1]
    size = fmt.group_size(columns)

    def spread(groups: Tensor) -> Tensor:
        return groups.to(dtype).repeat_interleave(size, dim=-1)[..., :columns]

    if fmt.is_integer:
        point = fmt.fixed_zero if zero is None else spread(zero)
        return spread(scale) * (codes.to(dtype) - point)
    if fmt.family == "complex":
        return _complex_matrix(fmt, codes, scale.to(dtype))
    values = torch.tensor(fmt.values, dtype=dtype)[codes.to(torch.int64)]
    if fmt.two_sided:
        above, below = spread(scale[..., 0::2]), spread(scale[..., 1::2])
        return torch.where(values >= 0, above, below) * values
    return spread(scale) * values


def complex_magnitudes(fmt: WeightFormat, codes: Tensor, scale: Tensor) -> Tensor:
    """Return ``[..., N, K]``: magnitudes of the stacked matrices added up, which cannot cancel."""
    return _complex_matrix(fmt, codes, scale, magnitudes=True)


def _complex_matrix(
    fmt: WeightFormat, codes: Tensor, scale: Tensor, *, magnitudes: bool = False
) -> Tensor:
    """Return the real matrix ``[..., N, K]`` of stacked complex ones; odd terms act on conj(x)."""
    axis = torch.tensor([1, 0, -1, 0], dtype=scale.dtype)
    index = codes.to(torch.int64)
    re, im = axis[index] * scale[..., :1], axis[(index + 3) % 4] * scale[..., 1:]
    total: Tensor | None = None
    parts = zip(re.chunk(fmt.terms, -2), im.chunk(fmt.terms, -2), strict=True)
    for term, (a, b) in enumerate(parts):
        conjugate = fmt.terms == 1 or term % 2 == 1
        top = torch.cat([a, b if conjugate else -b], -1)
        bottom = torch.cat([b, -a if conjugate else a], -1)
        matrix = torch.cat([top, bottom], -2)
        matrix = matrix.abs() if magnitudes else matrix
        total = matrix if total is None else total + matrix
    assert total is not None
    return total


def fake_quantize(x: Tensor, fmt: WeightFormat, act: str) -> Tensor:
    """Return activations ``[..., K]`` as the matmul of a format sees them, in their own dtype.

    int8 formats: quantised by `quantize_rows`, each group of columns apart (complex weights: real and
    imaginary halves), and scaled back. 16-bit ones: rounded.
    """
    how = parse_act_format(act)
    if how.rounded:
        return round_values(x, how)
    if not how.is_int8:
        return x
    if fmt.family == "complex":
        return torch.cat([_requantised(half) for half in x.chunk(2, -1)], -1)
    if how.group <= 0 or x.shape[-1] == 0:
        return _requantised(x)
    return torch.cat([_requantised(part) for part in x.split(how.group, -1)], -1)


def round_values(x: Tensor, how: ActFormat) -> Tensor:
    """Round to bfloat16 or float16, half to even, in x's own dtype; float16 saturates."""
    if how.kind == "bf16":
        return x.to(torch.bfloat16).to(x.dtype)
    return x.clamp(-F16_MOST, F16_MOST).to(torch.float16).to(x.dtype)


def _requantised(x: Tensor) -> Tensor:
    codes, scale = quantize_rows(x)
    return (codes.to(torch.promote_types(x.dtype, torch.float32)) * scale).to(x.dtype)
