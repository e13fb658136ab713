"""Which slots of a KV cache a tile of queries sees, and in which order kernels visit them.

A *step* is a run of blocks of 16 slots; a *tile* is ``tokens`` queries with all G heads of one KV
head, whose rows ``token * G + g`` share every load of keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile.schedules.attention.layout import round_up
from mimo_compile.schedules.emit.build import Register, T, bind
from mimo_compile.schedules.emit.vector import LANES, splat

NEAR_BYTES = 36 << 10
"""Of what is read and what arrives meanwhile, which a first-level cache of 48 KiB holds beside all else."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Compile-time sizes of one kernel."""

    p: Mapping[str, Any]
    tokens: int
    """Queries of a tile."""
    blocks: int
    """Blocks of 16 slots in a step."""
    rows: int
    """Rows of a register tile."""
    registers: int
    """Accumulator vectors in flight."""
    ahead: int
    """Steps that keys and values are prefetched ahead, where a tile reads them once (0: none)."""
    cell: float = 4.0
    """Bytes of a cache's element."""
    avx512: bool = False
    """Vectors of 16 lanes are those of the processor."""

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return int(self.p["h"] // self.p["kv"])

    @property
    def groups(self) -> int:
        """Groups of query heads that go over the same keys together."""
        return int(self.p["kv"])

    @property
    def sequences(self) -> int:
        """Sequences of the batch."""
        return int(self.p.get("b", 1))

    @property
    def height(self) -> int:
        """Rows of a tile."""
        return self.tokens * self.group

    @property
    def tiles(self) -> int:
        """Tiles that cover the queries."""
        return -(-int(self.p["t"]) // self.tokens)

    @property
    def cache_blocks(self) -> int:
        """Blocks of the cache."""
        return round_up(self.p["cap"]) // LANES

    @property
    def align(self) -> int:
        """Blocks of which a multiple lies before the first block of a step; the cache's end, too."""
        return 1

    @property
    def columns(self) -> int:
        """Vectors of an output row."""
        return round_up(self.p["dv"]) // LANES

    def row_tiles(self) -> list[tuple[int, int]]:
        """Return (rows, count) of the register tiles that cover the tile, in order."""
        full, rest = divmod(self.height, self.rows)
        return [(n, c) for n, c in ((self.rows, full), (rest, 1)) if n and c]


def fixed(value: Any, dtype: str = "int32") -> Any:
    """Compute a number once, as a value that TVM's simplifier and its analysis of bounds do not look into.

    They would inline nested conditions wherever the number is used, at exponential cost.
    """
    return Register(dtype, 1, value).get()


class Reach:
    """The slots that a tile of queries from token ``first`` sees, as run-time expressions."""

    touches = 0
    """Steps behind those that are prefetched whose pages are asked for; 0: they are next to each other."""
    apart = False
    """Parts lie anywhere, so that nothing but prefetching brings one in time."""
    alone = False
    """So does each by itself, not some of them next to each other."""

    def __init__(self, s: Tiling, pos: Any, first: Any) -> None:
        cap, window = T.int32(s.p["cap"]), s.p["window"]
        self.sizes = s
        self.start, self.valid = fixed(pos[0]), fixed(pos[1])
        last = fixed(self.start + self.valid - 1)
        self.low_query = fixed(self.start + first)
        self.high_query = fixed(T.min(self.low_query + (s.tokens - 1), last))
        low = T.max(last - cap + 1, T.int32(0))
        if window:
            low = T.max(low, self.low_query - (window - 1))
        low = fixed(low)
        count = fixed(T.if_then_else(first < self.valid, self.high_query - low + 1, T.int32(0)))
        slot = fixed(low % cap)
        run = s.align * LANES
        self.first_block = fixed(slot // run * s.align)
        self.turn = fixed(T.max(last, T.int32(0)) % cap)
        """Slot of the newest position: those behind it are one lap older."""
        self.base = fixed(last - self.turn)
        self.written = fixed(T.min(last + 1, cap))
        end = fixed(slot + count)
        straight = T.floordiv(end + (LANES - 1), LANES) - self.first_block
        around = (s.cache_blocks - self.first_block) + T.min(
            T.floordiv(end - cap + (LANES - 1), LANES), self.first_block
        )
        total = T.if_then_else(end <= cap, straight, around)
        self.total = fixed(T.if_then_else(count > 0, total, T.int32(0)))
        """Blocks to visit, from ``first_block`` on, around the end of the cache if need be."""
        self.steps = fixed(T.floordiv(self.total + (s.blocks - 1), s.blocks))

    def block(self, step: Any, u: Any) -> Any:
        """Return the cache block of part ``u`` of a step."""
        return self.place(step, u)

    def place(self, step: Any, u: Any) -> Any:
        """Return which block part ``u`` of a step is, of those that the positions of the cache fill."""
        blocks = self.sizes.cache_blocks
        at = fixed(self.first_block + step * self.sizes.blocks + u)
        # parts behind the last that is seen may go round a ring once more: they are masked, but read
        around = T.min(at - blocks, T.int32(blocks - 1))
        return fixed(T.if_then_else(at < blocks, at, around))

    def lower(self, query: Any) -> Any:
        """Return the oldest position that a query sees."""
        window = self.sizes.p["window"]
        return T.max(query - (window - 1), T.int32(0)) if window else T.int32(0)

    def clean(self, step: Any) -> Any:
        """Say whether every row sees every slot of the step (then no mask is needed)."""
        first = fixed(self.place(step, 0) * LANES)
        end = fixed(first + (self.sizes.blocks * LANES - 1))
        older = fixed(T.if_then_else(first > self.turn, self.base - self.sizes.p["cap"], self.base))
        one_lap = T.Or(first > self.turn, end <= self.turn)
        inside = T.And(end < self.sizes.p["cap"], (step + 1) * self.sizes.blocks <= self.total)
        seen = T.And(older + first >= self.lower(self.high_query), older + end <= self.low_query)
        return T.And(T.And(one_lap, inside), seen)

    def whole(self, step: Any) -> Any:
        """Say whether the step's slots follow each other and each was written, so holds a number."""
        first = self.place(step, 0) * LANES
        return fixed(first + self.sizes.blocks * LANES) <= self.written

    def positions(self, step: Any, u: Any) -> Any:
        """Return the position in each slot of part ``u`` (16 lanes); -1 where nothing is to be seen."""
        block = self.place(step, u)
        slots = bind(T.ramp(block * LANES, 1, LANES))
        laps = T.Select(
            slots <= T.broadcast(self.turn, LANES),
            T.broadcast(self.base, LANES),
            T.broadcast(self.base - self.sizes.p["cap"], LANES),
        )
        end = T.if_then_else(
            step * self.sizes.blocks + u < self.total, T.int32(self.sizes.p["cap"]), T.int32(0)
        )
        return bind(
            T.Select(slots < T.broadcast(end, LANES), slots + laps, T.broadcast(T.int32(-1), LANES))
        )

    def prepare(self, begin: Any, end: Any) -> None:
        """Do what is left to do before the steps ``begin .. end-1``."""

    def seat(self, step: Any, u: Any, i: Any) -> Any:
        """Return the slot of key ``i`` of part ``u`` of a step."""
        return fixed(self.block(step, u) * LANES + i)

    def limits(self, query: Any) -> tuple[Any, Any]:
        """Return what `sees` compares positions with, in 16 lanes, for the query at a position."""
        return bind(splat(self.lower(query))), bind(splat(query))

    @staticmethod
    def sees(positions: Any, limits: tuple[Any, Any]) -> Any:
        """Say in 16 lanes whether a query sees `positions`."""
        low, high = limits
        return T.And(positions >= low, positions <= high)

    def further(self, step: Any, u: Any) -> Any:
        """Return how many blocks behind part ``u`` of a step that of ``ahead`` steps later lies."""
        return self.sizes.ahead * self.sizes.blocks

    def kept(self, step: Any, u: Any) -> Any | None:
        """Return a bit for each of 16 slots whose values count among the first `live`; None: all do."""
        return None

    def live(self, step: Any, u: Any) -> Any:
        """Return how many slots of part ``u`` were ever written and belong to the step's run."""
        left = T.min(T.max(self.written - self.place(step, u) * LANES, T.int32(0)), T.int32(LANES))
        return fixed(T.if_then_else(step * self.sizes.blocks + u < self.total, left, T.int32(0)))


def visited(s: Tiling, start: int, valid: int, first: Any) -> tuple[Any, Any]:
    """Return (steps, written slots whose values are read) of the tile from token ``first`` on.

    ``first`` may be an array of tokens, then so are the results.
    """
    written = min(start + valid, int(s.p["cap"]))
    block, total, around, turned = _extent(s, start, valid, first)
    live = np.minimum(np.where(turned, written, (block + total) * LANES), written) - block * LANES
    live = np.maximum(live, 0) + np.where(turned, np.minimum(around * LANES, written), 0)
    return -(-total // s.blocks), np.where(total > 0, live, 0)


def visited_whole(s: Tiling, start: int, valid: int, first: Any) -> tuple[Any, Any]:
    """Return (steps that are `Reach.whole`, those of their slots that `visited` counts), as it does."""
    written = min(start + valid, int(s.p["cap"]))
    block, total, _, _ = _extent(s, start, valid, first)
    steps, slots = np.zeros_like(total), np.zeros_like(total)
    for step in range(int(np.max(-(-total // s.blocks), initial=0))):
        at = block + step * s.blocks
        at = np.where(at < s.cache_blocks, at, np.minimum(at - s.cache_blocks, s.cache_blocks - 1))
        parts = np.clip(total - step * s.blocks, 0, s.blocks)
        whole = (parts > 0) & ((at + s.blocks) * LANES <= written)
        steps, slots = steps + whole, slots + np.where(whole, parts * LANES, 0)
    return steps, slots


def _extent(s: Tiling, start: int, valid: int, first: Any) -> tuple[Any, Any, Any, Any]:
    """Return first block, blocks, those from the cache's begin on, and whether there are any."""
    cap, window = int(s.p["cap"]), int(s.p["window"])
    last = start + valid - 1
    oldest = start + first - window + 1 if window else 0
    low = np.maximum(max(0, last - cap + 1), oldest)
    count = np.minimum(start + first + s.tokens - 1, last) - low + 1
    count = np.where(first < valid, np.maximum(count, 0), 0)
    block, end = low % cap // (s.align * LANES) * s.align, low % cap + count
    around = np.minimum(-(-(end - cap) // LANES), block)
    turned = end > cap
    total = np.where(turned, s.cache_blocks - block + around, -(-end // LANES) - block)
    return block, np.where(count > 0, total, 0), around, turned
