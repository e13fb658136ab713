"""What scores blocks from the keys themselves: logits of a run of slots, then what they are to their blocks.

A tile is a few queries with the heads that share a KV head. It passes over runs of slots: products with the
run's keys go to scratch memory, unseen slots are masked there, and every block of the run gives one number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.caches import CacheFormat, parse_cache_format
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.channel_layout import slots_of
from mimo_compile.schedules.attention.layout import round_up
from mimo_compile.schedules.attention.pages import Table
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import (
    NEVER,
    across,
    channels,
    lanes_of,
    over,
    single,
)
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    prefetch,
    store,
    when,
    workspace,
)
from mimo_compile.schedules.emit.vector import LANES, splat


@dataclass(frozen=True, slots=True)
class Slots:
    """Compile-time sizes of one kernel."""

    p: Mapping[str, Any]
    scored: int
    """Heads of the scores."""
    blocks: int
    tile: int
    """Queries of a tile."""
    run: int
    """Slots of a run: whole vectors and whole blocks."""
    rows: int
    wide: int
    ahead: int

    @classmethod
    def of(cls, workload: Workload, config: Any) -> Slots:
        """Return the sizes of a workload and a config."""
        op: Any = get_op(workload.op)
        p = op.full(workload)
        _, scored, blocks = op.args(workload)[-1].shape
        unit = math.lcm(LANES, p["block"])
        most = -(-round_up(p["cap"]) // unit) * unit
        run = min(max(config.run // unit, 1) * unit, most)
        tile = min(config.tile, p["t"])
        return cls(p, scored, blocks, tile, run, config.rows, config.wide, config.ahead)

    @property
    def kind(self) -> str:
        """The op's."""
        return str(self.p["kind"])

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return int(self.p["h"] // self.p["kv"])

    @property
    def heads(self) -> int:
        """Rows of a query: heads that are multiplied apart."""
        return 1 if self.kind == "channels" and self.p["agg"] == "mean" else self.group

    @property
    def together(self) -> bool:
        """Whether the heads of a group give one score."""
        return self.p["agg"] != "none" and self.kind != "channels"

    @property
    def height(self) -> int:
        """Rows of a tile."""
        return self.tile * self.heads

    @property
    def tiles(self) -> int:
        """Tiles that cover the queries."""
        return -(-int(self.p["t"]) // self.tile)

    @property
    def runs(self) -> int:
        """Runs that cover the cache."""
        return -(-int(self.p["cap"]) // self.run)

    @property
    def blocks_of_run(self) -> int:
        """Blocks of a run."""
        return int(self.run // self.p["block"])

    @property
    def vectors(self) -> int:
        """Vectors of slots of the cache."""
        return round_up(self.p["cap"]) // LANES

    @property
    def format(self) -> CacheFormat:
        """Format of the cache."""
        return parse_cache_format(self.p["c"])

    def side_by_side(self) -> int:
        """Return how many vectors are multiplied at once."""
        count = self.run // LANES
        return max(w for w in range(1, min(self.wide, count) + 1) if count % w == 0)


class Tile:
    """Queries of one tile, and the logits of one run."""

    def __init__(
        self, s: Slots, k: Any, pos: tuple[Any, Any], head: Any, first: Any, table: Table | None
    ) -> None:
        """``table``: of pages that the keys lie in; None: they are the sequence's own."""
        self.s, self.k, self.head, self.first, self.table = s, k, head, first, table
        self.start, self.valid = pos
        self.logits = workspace((s.height, s.run), "float32")
        last = T.min(first + s.tile, self.valid) - 1
        some = first < self.valid
        self.seen = fixed(T.if_then_else(some, self.start + last + 1, T.int32(0)))
        """Slots that the tile's last query sees; 0 of a tile of padding."""
        self.used = fixed(T.floordiv(self.seen + (s.run - 1), T.int32(s.run)))
        """Runs that hold them."""

    def load(self, q: Any, scale: float, out: Any, mean: bool) -> None:
        """Load queries, scaled, or with ``mean`` that of a group's heads."""
        s = self.s
        with loop(s.tile) as token:
            source = bind(T.min(self.first + token, T.int32(s.p["t"] - 1)))
            with loop(s.heads) as g:

                def step(
                    at: Any, lanes: int, token: Any = token, source: Any = source, g: Any = g
                ) -> None:
                    if mean and s.group > 1:
                        total = Register("float32", lanes, splat(0.0, lanes))
                        with loop(s.group) as i:
                            own = load(q, source, self.head * s.group + i, at, lanes=lanes)
                            total.set(total.get() + own)
                        value = total.get() * splat(1.0 / s.group, lanes)
                    else:
                        value = load(q, source, self.head * s.group + g, at, lanes=lanes)
                    value = value * splat(scale, lanes) if scale != 1.0 else value
                    store(out, value, token * s.heads + g, at, lanes=lanes)

                over(s.p["d"], step)

    def fill(self, run: Any) -> None:
        """Compute the logits of a run; -inf of what a query does not see."""
        s = self.s
        wide = s.side_by_side()
        with loop(s.run // (LANES * wide)) as part:
            at = bind((run * (s.run // LANES)) + part * wide)
            vectors = [self.held(at + u) for u in range(wide)]
            full, rest = divmod(s.height, s.rows)
            for base, rows, count in ((0, s.rows, full), (s.rows * full, rest, 1)):
                if rows and count:
                    with loop(count) as i:
                        row = bind(i * rows + base)
                        for r, own in enumerate(self.products(vectors, row, rows)):
                            for u, register in enumerate(own):
                                place = (part * wide + u) * LANES
                                store(self.logits, register.get(), row + r, place, lanes=LANES)
        self._mask(run)

    def held(self, vector: Any) -> Any:
        """Return where a vector of slots lies; behind what is seen, in pages, that is the last one."""
        if self.table is None:
            return fixed(T.min(vector, T.int32(self.s.vectors - 1)))
        last = T.max(T.truncdiv(self.seen - 1, LANES), T.int32(0))
        return self.table.block(fixed(T.min(vector, last)))

    def products(self, vectors: list[Any], row: Any, rows: int) -> list[list[Register]]:
        """Return the products of ``rows`` rows with the keys of some vectors of slots."""
        raise NotImplementedError

    def _mask(self, run: Any) -> None:
        s = self.s
        first = bind(run * s.run)
        # every query of a tile without padding sees the slots up to that of its first one
        behind = first + s.run > self.start + self.first + 1
        with when(T.Or(behind, self.first + s.tile > self.valid)), loop(s.tile) as token:
            own = self.first + token
            last = T.if_then_else(own < self.valid, self.start + own, T.int32(-1))
            last = bind(splat(fixed(last)))
            with loop(s.run // LANES) as j:
                inside = T.ramp(first + j * LANES, 1, LANES) <= last
                with loop(s.heads) as g:
                    row = token * s.heads + g
                    value = load(self.logits, row, j * LANES, lanes=LANES)
                    value = T.Select(inside, value, splat(NEVER))
                    store(self.logits, value, row, j * LANES, lanes=LANES)

    def of_block(self, row: Any, block: Any) -> tuple[Any, int]:
        """Return the scores of the run's blocks from ``block`` on: 16 single slots, or one block."""
        size = self.s.p["block"]
        if size == 1:
            return load(self.logits, row, block, lanes=LANES), LANES
        if size % LANES:
            most = Register("float32", 1, T.float32(NEVER))
            with loop(size) as i:
                most.set(T.max(most.get(), self.logits[row, block * size + i]))
            return bind(most.get()), 1
        best = Register("float32", LANES, load(self.logits, row, block * size, lanes=LANES))
        if size > LANES:
            with loop(size // LANES - 1) as i:
                at = block * size + (i + 1) * LANES
                best.set(T.max(best.get(), load(self.logits, row, at, lanes=LANES)))
        return across(T.max, best.get()), 1


class Whole(Tile):
    """All channels."""

    def begin(self, q: Any, scale: float) -> None:
        """Load the queries, scaled."""
        self.q = workspace((self.s.height, self.s.p["d"]), "float32")
        self.load(q, scale, self.q, mean=False)

    def products(self, vectors: list[Any], row: Any, rows: int) -> list[list[Register]]:
        """See `Tile.products`."""
        s, bits = self.s, self.s.format.bits
        pair = 32 // bits
        acc = [[Register("float32", LANES, splat(0.0)) for _ in vectors] for _ in range(rows)]
        ahead = s.ahead * len(vectors) if s.height <= s.rows and self.table is None else 0

        def step(i: Any, count: int) -> None:
            for u, vector in enumerate(vectors):
                if ahead:
                    prefetch(self.k, self.head, vector + ahead, i, 0)
                found = lanes_of(self.k, self.head, vector, i, bits=bits, count=count)
                for r in range(rows):
                    for half, value in enumerate(found):
                        by = splat(self.q[row + r, i * pair + half])
                        acc[r][u].set(acc[r][u].get() + value * by)

        channels(s.p["d"], bits, step)
        return acc


class Chosen(Tile):
    """The channels of each row that matter most."""

    def begin(self, q: Any, guess: Any, peak: Any) -> None:
        """Choose channels by ``|q_c| peak_c`` (of ``guess``, if there is one) and keep q's numbers there.

        ``peak [KV, D]`` float32, or with ``span`` the entries ``[E, KV, D]`` in the format of the keys.
        """
        s = self.s
        d, count = s.p["d"], s.p["channels"]
        mean = s.p["agg"] == "mean"
        whole = workspace((s.height, d), "float32")
        self.load(q, 1.0, whole, mean)
        chooser = whole
        if guess is not None:
            chooser = workspace((s.height, d), "float32")
            self.load(guess, 1.0, chooser, mean)
        self.which = workspace((s.height, count), "int32")
        self.by = workspace((s.height, count), "float32")
        size = workspace((d,), "float32")
        most = workspace((d,), "float32") if s.p["span"] else None
        with loop(s.height) as row:
            if most is not None:
                self.peaks(peak, bind(self.first + T.floordiv(row, T.int32(s.heads))), most)
            with loop(d) as c:
                own_peak = peak[self.head, c] if most is None else most[c]
                store(size, T.abs(chooser[row, c]) * own_peak, c)
            with loop(count) as i:
                best, at = Register("float32", 1, T.float32(-1)), Register("int32", 1, T.int32(0))
                with loop(d) as c:
                    own = bind(size[c])
                    at.set(T.Select(own > best.get(), c, at.get()))
                    best.set(T.max(best.get(), own))
                channel = fixed(at.get())
                store(size, T.float32(-2), channel)
                store(self.which, channel, row, i)
                store(self.by, whole[row, channel], row, i)

    def peaks(self, peak: Any, token: Any, most: Any) -> None:
        """Set ``most [D]`` to the greatest of the entries that are complete at a token; 1 where none is."""
        s, d = self.s, self.s.p["d"]
        span, entries = int(s.p["span"]), blocks_of(s.p["cap"], s.p["span"])
        end = self.start + T.min(token + 1, self.valid)
        complete = fixed(T.min(T.floordiv(end, T.int32(span)), T.int32(entries)))
        least = bind(T.if_then_else(complete > 0, T.float32(0), T.float32(1)))
        over(d, lambda at, lanes: store(most, splat(least, lanes), at, lanes=lanes))
        with T.serial(0, complete) as e:

            def step(at: Any, lanes: int) -> None:
                own = single(peak, e, self.head, at, bits=s.format.bits, lanes=lanes)
                store(most, T.max(load(most, at, lanes=lanes), own), at, lanes=lanes)

            over(d, step)

    def products(self, vectors: list[Any], row: Any, rows: int) -> list[list[Register]]:
        """See `Tile.products`."""
        s = self.s
        acc = [[Register("float32", LANES, splat(0.0)) for _ in vectors] for _ in range(rows)]
        for r in range(rows):
            with loop(s.p["channels"]) as i:
                channel = fixed(self.which[row + r, i])
                by = bind(splat(self.by[row + r, i]))
                for u, vector in enumerate(vectors):
                    value = self._channel(vector, channel, s.ahead * len(vectors))
                    acc[r][u].set(acc[r][u].get() + value * by)
        return acc

    def _channel(self, vector: Any, channel: Any, ahead: int) -> Any:
        s = self.s
        each = slots_of(s.format.name) // LANES
        line, part = vector, T.int32(0)
        if each > 1:
            line, part = T.floordiv(vector, T.int32(each)), T.floormod(vector, T.int32(each))
        if ahead:
            prefetch(self.k, self.head, T.floordiv(vector + ahead, T.int32(each)), channel, 0)
        return single(
            self.k, self.head, line, channel, part * LANES, bits=s.format.bits, lanes=LANES
        )
