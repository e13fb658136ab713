"""Flash attention over bfloat16 pairs on matrix tiles: what differs from `pairs.Dots`.

Both caches lie as tiles want their right side: a row is a pair of channels (keys) or of slots (values) of 16
columns. All scores come from tiles. Values do where the slots of a step follow each other and each was
written: weights of those that a query does not see are 0. Elsewhere slots may hold anything, and values are
added as `Dots` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from mimo_compile.schedules.attention.pairs import Dots
from mimo_compile.schedules.attention.reach import Reach, Tiling
from mimo_compile.schedules.emit.amx import SIDE, AmxTiles, Row, Tiles
from mimo_compile.schedules.emit.build import (
    T,
    bind,
    choose,
    load,
    loop,
    splat,
    store,
    when,
    workspace,
)
from mimo_compile.schedules.emit.vector import LANES

DEPTH = 32
"""Channels or slots that one tile product sums over."""
TOGETHER = 2
"""Blocks of 16 rows, and of 16 columns, that are multiplied with each other at once."""


class AmxTile(Dots):
    """Rows of a whole number of tiles; steps of a whole number of `DEPTH` slots; keys as deep."""

    tiles_class: ClassVar[Callable[[], Tiles]] = AmxTiles

    def __init__(self, s: Tiling, k: Any, v: Any, head: Any, lead: Any = None) -> None:
        super().__init__(s, k, v, head, lead)
        assert s.height % SIDE == 0 and s.blocks * LANES % DEPTH == 0 and s.p["d"] % DEPTH == 0
        self.sums = workspace((TOGETHER * TOGETHER * SIDE, SIDE), "float32")
        self.tiles = type(self).tiles_class()

    def begin(self, q: Any, first: Any, scale: float) -> None:
        """See `Tile.begin`."""
        super().begin(q, first, scale)
        self.tiles.begin([(SIDE, 4 * SIDE)] * (TOGETHER * TOGETHER + 2 * TOGETHER))

    def end(self) -> None:
        """Give the tiles back."""
        self.tiles.end()

    def run(self, reach: Reach, first: Any, begin: Any, end: Any) -> None:
        """See `Tile.run`."""
        with T.serial(begin, end) as step:
            self.scores(reach, step)
            with when(T.Not(reach.clean(step))):
                self.mask(reach, step, first)
            self.weigh()
            whole = bind(reach.whole(step))
            choose(whole, lambda: self.whole_values(reach, step), lambda: self.values(reach, step))

    def scores(self, reach: Reach, step: Any) -> None:
        """See `Tile.scores`."""
        s = self.s
        for row, n, rows in _runs(s.height // SIDE):
            for part, m, parts in _runs(s.blocks):
                with loop(rows) as i, loop(parts) as u:
                    at, j = bind((row + i * n) * SIDE), part + u * m
                    blocks = [reach.block(step, j + y) for y in range(m)]
                    self._multiply(
                        n, m, int(s.p["d"]) // DEPTH,
                        lambda x, z, at=at: _rows(self.queries, at + x * SIDE, z * DEPTH, 0),
                        2 * self.wide,
                        lambda y, z, b=blocks: _rows(self.k, z * SIDE, 0, self.head, b[y]),
                        4 * SIDE,
                    )  # fmt: skip
                    for x in range(n):
                        for y in range(m):
                            place = _rows(self.score, at + x * SIDE, (j + y) * LANES)
                            self.tiles.store(x * m + y, place, 4 * s.blocks * LANES)

    def whole_values(self, reach: Reach, step: Any) -> None:
        """Add the weighted values of a step that is `Reach.whole`."""
        s = self.s
        pair = bind(reach.block(step, 0) * (LANES // 2))
        for row, n, rows in _runs(s.height // SIDE):
            for column, m, columns in _runs(s.columns):
                with loop(rows) as i, loop(columns) as u:
                    at, j = bind((row + i * n) * SIDE), column + u * m
                    self._multiply(
                        n, m, s.blocks * LANES // DEPTH,
                        lambda x, z, at=at: _rows(self.weights, at + x * SIDE, z * DEPTH),
                        2 * s.blocks * LANES,
                        lambda y, z, j=j: _rows(
                            self.v, pair + z * SIDE, (j + y) * 2 * LANES, self.head
                        ),
                        4 * s.columns * LANES,
                    )  # fmt: skip
                    for tile in range(n * m):
                        self.tiles.store(tile, _rows(self.sums, tile * SIDE, 0), 4 * SIDE)
                    self._join(at, j, n, m)

    def _join(self, at: Any, column: Any, n: int, m: int) -> None:
        """Add sums of tiles to the rows from ``at`` on."""
        for x in range(n):
            with loop(SIDE) as i:
                row = bind(at + x * SIDE + i)
                shrink = bind(splat(self.shrink[row], LANES))
                for y in range(m):
                    place = (row, (column + y) * LANES)
                    more = load(self.sums, (x * m + y) * SIDE + i, 0, lanes=LANES)
                    value = load(self.out, *place, lanes=LANES) * shrink + more
                    store(self.out, value, *place, lanes=LANES)

    def _multiply(
        self, n: int, m: int, depth: int, left: Callable[..., Row], left_stride: int,
        right: Callable[..., Row], right_stride: int,
    ) -> None:  # fmt: skip
        """Sum ``n`` x ``m`` tiles, row by row, over ``depth`` tiles of each side."""
        a, b = TOGETHER * TOGETHER, TOGETHER * TOGETHER + TOGETHER
        for tile in range(n * m):
            self.tiles.zero_f32(tile)
        with loop(depth) as z:
            for x in range(n):
                self.tiles.load(a + x, left(x, z), left_stride)
            for y in range(m):
                self.tiles.load(b + y, right(y, z), right_stride)
            for x in range(n):
                for y in range(m):
                    self.tiles.dot_bf16(x * m + y, a + x, b + y)


def _runs(count: int) -> list[tuple[int, int, int]]:
    """Return the first block, blocks taken together, and turns of the loops over ``count`` blocks."""
    whole, rest = divmod(count, TOGETHER)
    parts = [(0, TOGETHER, whole), (whole * TOGETHER, rest, 1)]
    return [part for part in parts if part[1] and part[2]]


def _rows(buffer: Any, row: Any, column: Any, *outer: Any) -> Row:
    """Return the rows of a tile that begins at ``row`` and ``column``."""
    return lambda i: (buffer, (*outer, row + i, column))
