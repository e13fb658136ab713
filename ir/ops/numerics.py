"""Numerical definitions that several ops share: activation quantisation, bf16 bits, error constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

U32 = 2.0**-24
"""Unit round-off of float32."""


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
    inverse = torch.where(amax > 0, 127.0 / amax, torch.zeros_like(amax))
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


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | float, dtype: torch.dtype, group: int | None = None
) -> Tensor:
    """Return ``scale * (code - zero)`` with group scales spread over columns.

    Args:
        codes: ``[..., N, K]`` uint8.
        scale: ``[..., N, G]``.
        zero: ``[..., N, G]`` or one number.
        dtype: result dtype.
        group: columns per scale; needed when the last group is shorter than the others.

    Returns:
        ``[..., N, K]``.
    """
    k, groups = codes.shape[-1], scale.shape[-1]
    size = group or -(-k // groups)

    def spread(t: Tensor) -> Tensor:
        return t.to(dtype).repeat_interleave(size, dim=-1)[..., :k]

    z = spread(zero) if isinstance(zero, Tensor) else zero
    return spread(scale) * (codes.to(dtype) - z)
