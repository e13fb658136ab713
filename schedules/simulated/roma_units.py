"""ROMA's units in numpy: base products from ROM, adapters in FP8 from SRAM, three ways to join them.

Source: W. Wang et al., arXiv 2503.12988; what it does not say is our reading. L-Units multiply int8 rows
by ROM codes into int32. H-Units see the activations unquantised and accumulate in float32. The adapter is
never merged into the base, whose codes cannot change: ``y = W_q x + B ((alpha / r) A x)``.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.ops.base import Array

UNITS, ROWS, COLUMNS = 256, 16, 16
FP8_MAX = 448.0


def fp8_decode(codes: Array) -> Array:
    """Return the values float32 of E4M3 codes (0x7f and 0xff are NaN)."""
    return np.array(parse_weight_format("fp8b128").values, np.float32)[codes]


def fp8_encode(values: Array) -> tuple[Array, float]:
    """Return the nearest E4M3 codes of ``values / scale`` and the scale ``max|values| / 448``."""
    scale = float(np.abs(values).max(initial=0.0)) / FP8_MAX
    positive = np.array(parse_weight_format("fp8b128").values[:127])
    size = np.minimum(np.abs(values) / (scale or 1.0), FP8_MAX)
    above = np.clip(np.searchsorted(positive, size), 1, len(positive) - 1)
    nearer = size - positive[above - 1] <= positive[above] - size
    codes = np.where(nearer, above - 1, above).astype(np.uint8)
    return codes | (np.signbit(values).astype(np.uint8) << 7), scale or 1.0


def base_product(x: Array, codes: Array, group: int, mapping: str) -> Array:
    """Return int32 sums ``[groups, M, N]`` of int8 rows ``[M, K]`` and ROM codes ``[N, K]`` by weight group.

    ``rows``: a unit has whole rows. ``grid``: the units of a row of the array hold a sixteenth of K each,
    and their partial sums are added on the way out.

    Raises:
        OverflowError: a sum left int32.
    """
    k = x.shape[1]
    cuts = {0, k} if mapping == "rows" else {-(-k // COLUMNS) * c for c in range(COLUMNS)}
    edges = sorted({e for e in cuts | set(range(0, k, group)) if e < k} | {k})
    sums = np.zeros((-(-k // group), len(x), len(codes)), np.int64)
    for start, stop in pairwise(edges):
        # float64 holds these integers exactly and multiplies faster
        part = x[:, start:stop].astype(np.float64) @ codes[:, start:stop].astype(np.float64).T
        sums[start // group] += part.astype(np.int64)
    if sums.size and np.abs(sums).max() >= 2**31:
        raise OverflowError("an L-Unit's sum left int32")
    return sums.astype(np.int32)


def low_rank(x: Array, a: Array, b: Array, gain: float, fusion: int, r_tile: int) -> Array:
    """Return ``B (gain A x)`` float32 ``[M, N]`` as the H-Units add it up, ``r_tile`` ranks a turn.

    With fusion 1 and 3 t is made once, with fusion 2 by each unit for its own rows: the same numbers.

    Args:
        x: Activations ``[M, K]``, not quantised.
        a: Values ``[r, K]`` float32.
        b: Values ``[N, r]`` float32.
        gain: alpha / r, and the scales of both matrices.
        fusion: See `RomaConfig`.
        r_tile: See `RomaConfig`.
    """
    x = np.asarray(x, np.float32)
    y = np.zeros((len(x), len(b)), np.float32)
    for start in range(0, len(a), r_tile):
        ranks = slice(start, start + r_tile)
        if fusion == 2:
            for unit in range(min(UNITS, len(b))):
                t = np.float32(gain) * (x @ a[ranks].T)
                y[:, unit::UNITS] += t @ b[unit::UNITS, ranks].T
        else:
            t = np.float32(gain) * (x @ a[ranks].T)
            y += t @ b[:, ranks].T
    return y
