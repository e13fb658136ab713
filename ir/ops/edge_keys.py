"""Heavy values where kernels' reach ends, so that inputs show a key that is missed or seen too much.

Bounds of caches whose kernels may round allow errors as large as single keys count among thousands: of N
keys with equal weights and normal values, one changes the result by ``1 / N``, while rounding each weight by
``2**-8`` changes it by ``2**-8 / sqrt(N)``. With a value ``HEAVY sqrt(N)`` times as large it changes the
result by ``HEAVY / sqrt(N)``: more than roundings do, at every length.

Such values would hide what a kernel does wrong between the edges: bounds grow with the largest value, and
within them a kernel that is exact could take other keys' values. So only every other KV head has them, of a
single one half of the columns, and bounds are by the same parts (`largest`). Where all columns share a scale
there are no parts: then values are heavy at even KV lengths and not at odd ones, and kernels are verified at
one of each (`batches.shorter`).
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


def weights_of_edges(
    kv: int, dv: int, keys: int, rng: np.random.Generator, columns: int = 1
) -> Array:
    """Return the factor ``[kv, 1]``, of one head ``[1, dv]``, on values at edges.

    Args:
        kv: KV heads.
        dv: Columns of a value.
        keys: How many keys a query sees; a single part is heavy where they are even.
        rng: Chooses the heavy ones of several parts.
        columns: Columns of a value that share a scale: a heavy one makes the others coarse.
    """
    middle = _middle(dv, columns) if kv == 1 else 0
    part = np.arange(dv)[None] >= middle if middle else np.arange(kv)[:, None]
    first = rng.integers(2) if middle or kv > 1 else keys
    loud = (part + first) % 2 == 0
    return np.where(loud, heaviness(keys), 1.0).astype(np.float32)


def largest(numbers: Array, kv: int, columns: int = 1) -> Array:
    """Return the largest of numbers ``[N, H, DV]`` by the parts that have one factor.

    Args:
        numbers: Not negative; NaN is left out.
        kv: KV heads of the cache; ``H`` may be more.
        columns: As for `weights_of_edges`.

    Returns:
        ``[1, H, 1]``: by head. Of a single KV head ``[1, H, DV]``: by both parts of the columns.
    """
    dv = numbers.shape[2]
    middle = _middle(dv, columns) if kv == 1 else 0
    if not middle:
        return np.asarray(np.nanmax(numbers, axis=(0, 2), initial=0.0, keepdims=True))
    by_column = np.nanmax(numbers, axis=0, initial=0.0, keepdims=True)
    parts = np.split(by_column, [middle], axis=2)
    most = (np.broadcast_to(x.max(axis=2, keepdims=True), x.shape) for x in parts)
    return np.concatenate(list(most), axis=2)


def _middle(dv: int, columns: int) -> int:
    """Return the first column of the second part of a single head; 0: all of its columns share a scale."""
    return dv // 2 // columns * columns or (columns if columns < dv else 0)


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


def spike_spans(
    keys: Array, queries: Iterable[Array], span: int, whole: int, channels: int,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Let single spans decide which channels of keys are chosen by their greatest magnitudes, in place.

    Of normal keys all spans have nearly the same. So for each KV head the first span and the last one, and
    some between, have one number each that is greater than all others, in a channel of its own whose other
    keys and queries are small: without that span the channel would not be chosen, with it it is.

    Args:
        keys: ``[cap, KV, D]`` float32, of which those of whole spans are finite.
        queries: ``[T, H, D]``, those that may choose; in such a channel their numbers get one sign.
        span: Positions of a span.
        whole: Spans that are complete.
        channels: How many channels are chosen.
        rng: Draws the channels, the spans between, and where in a span the number stands.
    """
    _, heads, d = keys.shape
    ends = rng.permutation(sorted({0, whole - 1}))  # where one channel is chosen: either
    between = rng.permutation(np.arange(1, max(1, whole - 1)))
    spans = [*ends, *between][: min(channels, d, whole)]
    for head in range(heads if whole else 0):
        most = np.abs(keys[: whole * span, head]).max()
        for at, c in zip(spans, rng.permutation(d), strict=False):
            keys[:, head, c] /= 8
            keys[at * span + rng.integers(span), head, c] = 32 * most
            for q in queries:
                own = q.reshape(len(q), heads, -1, d)[:, head, :, c]
                own[...] = 0.25 + np.abs(own) / 8
