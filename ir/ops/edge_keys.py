"""Heavy values where kernels' reach ends, so that inputs show a key that is missed or seen too much.

Bounds of caches whose kernels may round allow errors as large as single keys count among thousands: of N
keys with equal weights and normal values, one changes the result by ``1 / N``, while rounding each weight by
``2**-8`` changes it by ``2**-8 / sqrt(N)``. With a value ``HEAVY sqrt(N)`` times as large it changes the
result by ``HEAVY / sqrt(N)``: more than roundings do, at every length.

Such values would hide what a kernel does wrong between the edges, so only every other KV head has them; of a
single one half of the draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.block_lists import listed_keys

HEAVY = 4.0
"""Values at edges relative to the square root of how many keys are seen."""


def heaviness(keys: int) -> float:
    """Return the factor on values at edges where a query sees so many keys."""
    return HEAVY * math.sqrt(max(1, keys))


def weights_of_edges(kv: int, keys: int, rng: np.random.Generator) -> Array:
    """Return the factor ``[kv, 1]`` on values at edges, where a query sees so many keys."""
    loud = (np.arange(kv) + rng.integers(2)) % 2 == 0
    return np.where(loud, heaviness(keys), 1.0).astype(np.float32)[:, None]


def edges_of_range(start: int, tokens: int, window: int, group: int = 0) -> list[int]:
    """Return positions at the ends of what the first and the last of a call's queries see, ascending.

    They are the oldest one and, with a window, the one before it; the query's own; in a call of several
    tokens the one behind the first query's; with ``group`` both sides of the begin of a query's own group.
    """
    found: set[int] = set()
    last = start + tokens - 1
    for query in (start, last):
        oldest = max(0, query - window + 1) if window else 0
        found |= {oldest, max(0, oldest - 1), query, min(query + 1, last)}
        if group and query >= group:
            own = query // group * group
            found |= {own - 1, own}
    return sorted(found)


def edges_of_lists(
    idx: Array, cnt: Array, queries: Iterable[tuple[int, int]], block: int, window: int
) -> list[list[int]]:
    """Return for each list head positions at the ends of some runs of keys that rows of lists see.

    Args:
        idx: ``[R, HS, kmax]``.
        cnt: ``[R, HS]``.
        queries: List rows, each with a query's position.
        block: Positions in a block.
        window: Last positions that are always seen.
    """
    found: list[set[int]] = [set() for _ in range(idx.shape[1])]
    for row, query in queries:
        for head, mine in enumerate(found):
            ids = torch.from_numpy(idx[row, head][: int(cnt[row, head])])
            keys = listed_keys(ids, query, block, window).numpy()
            if not len(keys):
                continue
            gaps = np.flatnonzero(np.diff(keys) > 1)
            runs = np.stack([np.r_[0, gaps + 1], np.r_[gaps, len(keys) - 1]], 1)
            # many heavy keys would hide each other: those of the first run, one between, the last
            for first, last in runs[[0, len(runs) // 2, -1]] if len(runs) > 3 else runs:
                mine |= {int(keys[first]), int(keys[last])}
    return [sorted(mine) for mine in found]
