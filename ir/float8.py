"""KV caches of 8-bit floats: E4M3 codes, and a power of two for each key and value of a head.

A row of numbers (a token's key of one head, or its value) is ``2**x`` times E4M3 numbers: 3 bits of
mantissa, up to 448, no infinities. ``x`` is the least for which no number of the row is above that, from
-126 to 113; it is stored as a byte, ``x + 127`` (E8M0 of the OCP microscaling formats). Numbers are rounded
half to even; those beyond ``448 * 2**113`` saturate. A row with an infinity or a NaN is all NaN, by the byte
255: a fault stays to be seen.

In canonical form such a cache is its numbers in float32. Products of these with a power of two are exact, so
codes of one and the same row may differ by it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mimo_compile.ir.ops.base import Array

LOST = 255
"""The byte of a row that is no number."""
MOST = 448.0
"""The largest number of E4M3."""
LEAST_BYTE, MOST_BYTE = 1, 240
"""Of rows that are numbers."""
UNIT = 2.0**-4
"""Largest relative error of a number, but for small ones."""
STEP = 2.0**-9
"""The smallest number above 0, times the row's power of two."""
UNDER = 8 * 2**23 - 0x1FFFFF
"""How far its byte lies below the exponent of a row's largest number, in bits of float32: 448 is 1.75 * 2**8.
"""


def exponent_bytes(rows: Tensor) -> Tensor:
    """Return the byte of each row, int32 ``[..., 1]``, of float32 rows ``[..., W]``."""
    most = rows.abs().amax(-1, keepdim=True)
    bits = most.contiguous().view(torch.int32)
    found = ((bits - UNDER) >> 23).clamp(LEAST_BYTE, MOST_BYTE)
    return torch.where(torch.isfinite(most), found, LOST)


def _power(byte: Tensor) -> Tensor:
    """Return ``2**(byte - 127)`` of integers from 1 to 254."""
    return (byte.to(torch.int32) << 23).view(torch.float32)


def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 ``[..., W]``, and bytes, uint8 ``[..., 1]``, of float32 rows."""
    scale = exponent_bytes(rows)
    near = (rows * _power(254 - scale.clamp(max=MOST_BYTE))).clamp(-MOST, MOST)
    codes = near.to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(scale == LOST, 0, codes).to(torch.uint8), scale.to(torch.uint8)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 numbers that codes ``[..., W]`` and bytes ``[..., 1]`` stand for."""
    numbers = codes.view(torch.float8_e4m3fn).to(torch.float32) * _power(scale)
    return torch.where(scale == LOST, torch.nan, numbers)


def rounded(rows: Tensor) -> Tensor:
    """Return rows ``[..., W]`` as a cache keeps them, in float32."""
    return decode(*encode(rows.to(torch.float32)))


def rounded_array(rows: Array) -> Array:
    """Return rows ``[..., W]`` as a cache keeps them, in float32."""
    out: Array = rounded(torch.from_numpy(np.ascontiguousarray(rows))).numpy()
    return out


def most_off(rows: Array, off: float) -> Array:
    """Return how far numbers of rows ``[..., W]`` may be from these once they are rounded.

    Args:
        rows: Numbers before.
        off: By how much they may be off themselves.
    """
    near = np.abs(rows) + off
    scale = exponent_bytes(torch.from_numpy(near.astype(np.float32))).numpy()
    out: Array = off + np.maximum(UNIT * near, STEP / 2 * np.exp2(scale - 127.0))
    return out
