"""Preplan the arena of an entry point: where each temporary lives, from liveness alone."""

from __future__ import annotations

from collections.abc import Mapping

from mimo_compile.ir.graph import Value

ALIGN = 64
"""Every buffer starts on a multiple of this; kernels use aligned vector loads."""
SLACK = 64
"""Bytes kept free after each buffer, so that a full-vector load of a ragged tail stays inside."""


def plan_arena(spans: Mapping[Value, tuple[int, int]]) -> tuple[dict[Value, int], int]:
    """Assign byte offsets so that values alive at the same time never overlap.

    Greedy by size: the largest value first, each at the lowest offset that is free during its life.

    Args:
        spans: Value -> first and last call that touch it (both included).

    Returns:
        Offsets by value, and the arena's size in bytes.
    """
    placed: list[tuple[int, int, int, int]] = []
    offsets: dict[Value, int] = {}
    total = 0
    order = sorted(spans, key=lambda v: (-v.nbytes, spans[v], v.name))
    for value in order:
        first, last = spans[value]
        size = -(-(max(value.nbytes, 1) + SLACK) // ALIGN) * ALIGN
        offset = 0
        busy = sorted((o, o + s) for o, s, a, b in placed if a <= last and first <= b)
        for start, end in busy:
            if start - offset >= size:
                break
            offset = max(offset, end)
        placed.append((offset, size, first, last))
        offsets[value] = offset
        total = max(total, offset + size)
    return offsets, total
