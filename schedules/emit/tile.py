"""Register tiles: R blocks of 16 weight rows times a few tokens, over the whole K, in registers.

A tile leaves finding its rows and tokens, and what happens to its sums, to the kernel around it, so
that one text serves plain matmuls and routed experts. Here is what tiles of integers (`int_tile`) and
of floats (`float_tile`) share: their arguments, prefetching, storing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    choose,
    loop,
    prefetch,
    splat,
    store,
    when,
)
from mimo_compile.schedules.emit.layout import ROWS

Out = Callable[[int, int, int, Any], None]
"""``out(r, m, lane, value)``: sums of rows ``16 * block[r] + lane`` and following, for token m."""
Sums = dict[tuple[int, int, int], list[Register]]
"""By row block, part of it, and token: registers that share a sum."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Buffers of one packed matrix (or of a stack of them: leading axes are part of an index)."""

    codes: Any
    scale: Any = None
    zero: Any = None


@dataclass(frozen=True, slots=True)
class TileKnobs:
    """What a tile may vary without changing its result."""

    prefetch: int = 0
    """Blocks of 64 bytes to ask for ahead, in each row block; 0: leave it to the CPU."""
    unroll: int = 1
    """Blocks of columns in the loop's body."""
    lookup: bool = False
    """Float tiles: turn codes of up to 4 bits into floats by a permutation (AVX-512)."""
    next_tile: int = 0
    """Row blocks from this tile to the one that the thread reads next, which prefetches behind the end
    of a row go to; 0: unknown."""
    turn: tuple[Any, int] | None = None
    """Which of how many tiles of tokens this is that read the same weights: each asks for its share of
    the next tile's, whatever the distance. None: weights are read once."""


def ask_ahead(
    codes: Any, blocks: Sequence[tuple[Any, ...]], line: Any, count: int, knobs: TileKnobs
) -> None:
    """Prefetch, in each row block, what a tile needs later while it reads some lines.

    Distances go on behind a row block's end in the next tile's rows, which lie ``next_tile - 1`` row
    blocks further on: without that, each tile would begin in memory.

    Args:
        codes: The packed weights ``[..., lines, 64 bytes]``.
        blocks: For each row block its index into the weights' leading axes.
        line: The first of the lines, a multiple of ``count``.
        count: How many.
        knobs: See there.
    """
    if not knobs.prefetch:
        return
    end = int(codes.shape[-2])
    if knobs.turn is None:
        for i in range(count):
            at = line + i + knobs.prefetch
            if knobs.next_tile not in (0, 1):
                jump = T.Select(at >= end, T.int32((knobs.next_tile - 1) * end), T.int32(0))
                at = bind(at + jump)
            for block in blocks:
                prefetch(codes, *block, at, 0)
        return
    index, turns = knobs.turn
    apart = math.lcm(count, turns)  # lines in which a share comes to whole lines
    first = T.floordiv(index * end + line, turns) + knobs.next_tile * end

    def ask() -> None:
        start = bind(first)
        for i, block in ((i, block) for i in range(apart // turns) for block in blocks):
            prefetch(codes, *block, start + i, 0, near=False)

    if apart == count:
        ask()
    else:
        with when(T.floormod(line, apart) == 0):
            ask()


def store_rows(
    y: Any, token: Any, block: Any, lane: int, lanes: int, value: Any, n: int, *, last: bool
) -> None:
    """Store sums of rows ``16 * block + lane`` and following to ``y[token]``, none behind row ``n``.

    Args:
        y: ``[M, n]`` float32.
        token: Its row.
        block: The block of 16 rows.
        lane: First row in the block.
        lanes: Rows in ``value``.
        value: The sums.
        n: Rows that exist.
        last: False if the block cannot be the last one.
    """
    final = -(-n // ROWS) - 1
    valid = n - final * ROWS

    def whole() -> None:
        store(y, value, token, block * ROWS + lane, lanes=lanes)

    def cut() -> None:
        if lane + lanes <= valid:
            whole()
        elif lane < valid:
            register = Register("float32", lanes, value)
            with loop(valid - lane) as i:
                store(y, register.lane(i), token, final * ROWS + lane + i)

    if valid == ROWS or not last:
        whole()
    elif isinstance(block, int):
        (cut if block == final else whole)()
    else:
        choose(block < final, whole, cut)


def grid_of(lanes: int, rows: int, tokens: int) -> list[tuple[int, int, int]]:
    """Return the places of a tile's vectors: row block, part of it, and token."""
    halves = ROWS // lanes
    return [(r, h, m) for r in range(rows) for h in range(halves) for m in range(tokens)]


def zeros(lanes: int) -> Any:
    """Return a float32 vector of zeros."""
    return splat(T.float32(0), lanes)


def __getattr__(name: str) -> Any:
    """Return the two kinds of tiles where callers look for them here."""
    if name == "int_tile":
        from mimo_compile.schedules.emit.int_tile import int_tile

        return int_tile
    if name == "float_tile":
        from mimo_compile.schedules.emit.float_tile import float_tile

        return float_tile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
