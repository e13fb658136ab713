"""Register tiles: R blocks of 16 weight rows times a few tokens, over the whole K, in registers.

A tile leaves finding its rows and tokens, and what happens to its sums, to the kernel around it, so
that one text serves plain matmuls and routed experts. Here is what tiles of integers (`int_tile`) and
of floats (`float_tile`) share: their arguments, prefetching, storing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
CHAIN = 256
"""Columns that one float32 register sums before it is added to another: a chain of c additions is off by up
to c roundings, and results by half of that where all terms have one sign."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Buffers of one packed matrix (or of a stack of them: leading axes are part of an index)."""

    codes: Any
    scale: Any = None
    zero: Any = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One of several pieces of the columns that are summed apart."""

    index: Any
    count: int

    def span(self, units: int) -> tuple[Any, Any]:
        """Return the first of so many units (runs of columns) that lie in this piece, and their number."""
        if units % self.count == 0:
            each = units // self.count
            return bind(self.index * each), each
        first = bind(T.floordiv(self.index * units, self.count))
        return first, bind(T.floordiv((self.index + 1) * units, self.count) - first)

    def once(self, value: Any, dtype: str) -> Any:
        """Return a number that counts for all columns, in the first piece, and zero in the others."""
        return T.Select(self.index == 0, value, T.cast(T.int32(0), dtype))


@dataclass(frozen=True, slots=True)
class Share:
    """The part of another tile's weights that is asked for while one is worked on for some tokens."""

    WHOLE: ClassVar[int] = 1 << 14
    """What all of the parts come to."""
    done: Any
    """What those before have asked for."""
    part: Any
    """What is asked for meanwhile."""
    away: Any
    """How far the other tile is away: in the first axis of the weights, and in row blocks."""


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
    lines: tuple[Any, Any] | None = None
    """First line of each row block that the tile reads, and their number; None: it reads all of them."""
    share: Share | None = None
    """What is asked for instead of lines at a distance."""

    def reading(self, piece: Piece | None, first: Any, count: Any, each: int) -> TileKnobs:
        """Return these knobs for ``count`` units of ``each`` lines from the first on, if they are a piece."""
        return self if piece is None else replace(self, lines=(first * each, count * each))


def span_of(piece: Piece | None, units: int) -> tuple[Any, Any]:
    """Return the first of so many units that lie in a piece, and their number; no piece: all."""
    return (0, units) if piece is None else piece.span(units)


@contextmanager
def in_last(piece: Piece | None) -> Iterator[None]:
    """Run the statements only in the last piece."""
    if piece is None:
        yield
    else:
        with when(piece.index == piece.count - 1):
            yield


def in_runs(first: Any, count: Any, most: int, emit: Callable[[Any, Any], None]) -> None:
    """Emit ``emit(first, count)`` for runs of at most ``most`` of ``count`` units from the first on."""
    if not isinstance(count, int):
        with loop(T.floordiv(count + (most - 1), most)) as i:
            emit(bind(first + i * most), bind(T.min(T.int32(most), count - i * most)))
        return
    if count <= most:
        emit(first, count)
        return
    whole, rest = divmod(count, most)
    with loop(whole) as i:
        emit(bind(first + i * most), most)
    if rest:
        emit(first + whole * most, rest)


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
    whole = int(codes.shape[-2])
    if knobs.share is not None:
        _ask_share(codes, blocks, line, count, knobs.share)
        return
    if not knobs.prefetch:
        return
    begin, length = knobs.lines or (0, whole)
    if knobs.turn is None:
        far = knobs.next_tile * whole - length
        goes_on = knobs.next_tile and not (isinstance(far, int) and far == 0)
        far = T.int32(far) if isinstance(far, int) else far
        for i in range(count):
            at = line + i + knobs.prefetch
            if goes_on:
                at = bind(at + T.Select(at >= begin + length, far, T.int32(0)))
            for block in blocks:
                prefetch(codes, *block, at, 0)
        return
    index, turns = knobs.turn
    apart = math.lcm(count, turns)  # lines in which a share comes to whole lines
    done = line - begin if knobs.lines else line
    first = T.floordiv(index * length + done, turns) + knobs.next_tile * whole
    first = first + begin if knobs.lines else first

    def ask() -> None:
        start = bind(first)
        for i, block in ((i, block) for i in range(apart // turns) for block in blocks):
            prefetch(codes, *block, start + i, 0, near=False)

    if apart == count:
        ask()
    else:
        with when(T.floormod(done, apart) == 0):
            ask()


def _ask_share(
    codes: Any, blocks: Sequence[tuple[Any, ...]], line: Any, count: int, share: Share
) -> None:
    """Prefetch as many lines of the tile that is ``share.away``: some of them once more."""
    whole, (first, rows) = int(codes.shape[-2]), share.away
    for i in range(count):
        place = share.done * whole + (line + i) * share.part
        at = bind(T.shift_right(place, T.int32(Share.WHOLE.bit_length() - 1)))
        for block in blocks:
            other = (block[0] + first, *block[1:-1], block[-1] + rows)
            prefetch(codes, *other, at, 0, near=False)


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
