"""LMMA, the lookup instruction of LUT Tensor Core, bit by bit: tables, stored weights, accumulation.

Source: Z. Mo et al., ISCA 2025. Weights of b bits are read as b planes of plus or minus one:
``q' = 2 q - (2**b - 1)`` with ``s' = s / 2`` and ``z' = 2 z + 1 - 2**b``, so ``s (q - z) = s' (q' - z')``. A
plane's k consecutive bits index a table of signed sums of k activations. The table is odd, so only entries
with the sign bit set are kept, and the weights are stored as (negate, address) with the address inverted
beforehand where the sign bit is clear.
"""

from __future__ import annotations

import numpy as np

from mimo_compile.ir.ops.base import Array

INT32_MAX = 2**31 - 1
FP32_EXACT = 2**24
"""Integers up to this magnitude are exact in float32."""


def reinterpret(codes: Array, zero: Array, bits: int) -> tuple[Array, Array]:
    """Return odd codes ``q'`` and zero points ``z'``: a weight is half its scale times their difference."""
    top = (1 << bits) - 1
    return 2 * codes.astype(np.int64) - top, 2 * zero - np.float32(top)


def index_planes(codes: Array, bits: int, k: int) -> Array:
    """Return table indices ``[bits, K / k, N]`` uint8 of codes ``[N, K]``, low bits first."""
    n, columns = codes.shape
    groups = codes.reshape(n, columns // k, k).astype(np.uint16)
    planes = [(((groups >> i) & 1) << np.arange(k, dtype=np.uint16)).sum(-1).T for i in range(bits)]
    return np.stack(planes).astype(np.uint8)


def encode(index: Array, k: int, sign: int) -> Array:
    """Return stored weights: ``k - 1`` bits of address, and above them whether to negate the entry."""
    index = index.astype(np.uint8)
    low = index & ((1 << sign) - 1)
    address = low | ((index >> (sign + 1)) << sign)
    negate = 1 - ((index >> sign) & 1)
    address = np.where(negate == 1, ~address & ((1 << (k - 1)) - 1), address)
    return (address | (negate << (k - 1))).astype(np.uint8)


def decode(stored: Array, k: int, sign: int) -> Array:
    """Return the indices that `encode` stored."""
    mask = (1 << (k - 1)) - 1
    negate = stored >> (k - 1)
    address = np.where(negate == 1, ~stored & mask, stored & mask)
    low = address & ((1 << sign) - 1)
    return (low | ((1 - negate) << sign) | ((address >> sign) << (sign + 1))).astype(np.uint8)


def full_tables(a: Array, k: int) -> Array:
    """Return all ``2**k`` signed sums of groups of k activations: ``[M, K]`` -> ``[M, K / k, 2**k]``."""
    groups = a.reshape(a.shape[0], -1, k)
    signs = 2 * ((np.arange(1 << k)[:, None] >> np.arange(k)) & 1) - 1
    out: Array = groups @ signs.T.astype(a.dtype)
    return out


def kept(k: int, sign: int) -> Array:
    """Return the indices whose sign bit is set, by address ``[2**(k - 1)]``."""
    address = np.arange(1 << (k - 1))
    low = address & ((1 << sign) - 1)
    return low | (1 << sign) | ((address >> sign) << (sign + 1))


def half_tables(a: Array, k: int, sign: int) -> Array:
    """Return the entries that are kept, as a kernel of its own makes them: ``[M, K / k, 2**(k - 1)]``.

    Every entry is the sum of its k signed activations ``[M, K]``.
    """
    return full_tables(a, k)[..., kept(k, sign)]


def grown_tables(a: Array, k: int, sign: int) -> Array:
    """Return the same entries as the producer of the activations makes them: sums of pairs, then of those."""
    groups = a.reshape(a.shape[0], -1, k)
    parts = [np.stack([-groups[..., j], groups[..., j]], -1) for j in range(k)]
    while len(parts) > 1:  # the later activation's bit is the higher one
        pairs = zip(parts[::2], parts[1::2], strict=True)
        joined = [high[..., :, None] + low[..., None, :] for low, high in pairs]
        parts = [p.reshape(*p.shape[:-2], -1) for p in joined]
    return parts[0][..., kept(k, sign)]


def quantize_tables(tables: Array, per_scale: int) -> tuple[Array, Array]:
    """Bring integer tables ``[M, G, E]`` to int8; ``per_scale`` groups share one of the scales ``[M, S]``.

    The scale is the largest entry over 127, so none is clipped and -128 never occurs; a group of zeros has
    scale 0 and entries 0.
    """
    m, groups, entries = tables.shape
    blocks = -(-groups // per_scale)
    padded = np.zeros((m, blocks * per_scale, entries))
    padded[:, :groups] = tables
    padded = padded.reshape(m, blocks, per_scale * entries)
    scale = (np.abs(padded).max(-1) / 127).astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, 1 / scale.astype(np.float64), 0.0)
    codes = np.clip(np.rint(padded * inverse[..., None]), -127, 127).astype(np.int8)
    return codes.reshape(m, blocks * per_scale, entries)[:, :groups], scale


def lmma(tables: Array, stored: Array, acc: Array, k: int) -> None:
    """Add ``G`` LMMA instructions in a row to accumulators, in place.

    Args:
        tables: ``[M, G, 2**(k - 1)]`` int8, int16 or float16.
        stored: ``[bits, G, N]`` uint8, see `encode`.
        acc: ``[M, N]`` int32 (integer tables) or float32.
        k: Activations of a table.

    Raises:
        OverflowError: an accumulator left its width (int32), or the integers that float32 holds exactly.
    """
    floating = tables.dtype == np.float16
    wide = acc.astype(np.float64 if floating else np.int64)
    at = np.arange(tables.shape[1])[:, None]
    for plane, bits in enumerate(stored):
        entry = tables[:, at, bits & ((1 << (k - 1)) - 1)]  # [M, G, N]
        # a flip of the sign keeps int8 only because -128 does not occur
        value = np.where((bits >> (k - 1)) == 1, -entry, entry)
        wide += value.sum(axis=1, dtype=wide.dtype) * (1 << plane)
    limit = FP32_EXACT if floating else INT32_MAX
    if wide.size and np.abs(wide).max() > limit:
        raise OverflowError(f"an accumulator reached {np.abs(wide).max():.0f}, past {limit}")
    acc[...] = wide
