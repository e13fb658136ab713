"""What scores blocks from their descriptors: products with the entries, and what follows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.caches import CacheFormat, parse_cache_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import batches, get_op
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.ops.pages import paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import descriptors
from mimo_compile.schedules.attention.pages import Table
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import (
    NEVER,
    channels,
    lanes_of,
    most_complete,
    over,
    put,
    row_end,
)
from mimo_compile.schedules.attention.score_soft import overlapped, softened
from mimo_compile.schedules.attention.sequences import part_of, place_of, turns
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
class Entries:
    """Compile-time sizes of one kernel."""

    p: Mapping[str, Any]
    entries: int
    size: int
    stride: int
    parts: int
    count: int
    """Rows of scores."""
    scored: int
    """Heads of the scores."""
    blocks: int
    tile: int
    wide: int

    @classmethod
    def of(cls, workload: Workload, config: Any, hardware: Hardware) -> Entries:
        """Return the sizes of a workload and a config."""
        op: Any = get_op(workload.op)
        p = op.full(workload)
        args = {a.name: a.shape for a in op.args(batches.alone(workload))}
        count, scored, blocks = args["score"]
        size, stride = op.sizes(p)
        desc = args["desc"]
        vectors = -(-desc[0] // LANES)
        return cls(
            p, desc[0], size, stride, desc[2], count, scored, blocks, min(config.tile, count),
            min(config.wide, vectors),
        )  # fmt: skip

    @property
    def kind(self) -> str:
        """The op's."""
        return str(self.p["kind"])

    @property
    def heads(self) -> int:
        """Products of a row with each KV head's entries."""
        if self.kind == "gate" or self.p["agg"] == "query":
            return 1
        return int(self.p["h"] // self.p["kv"])

    @property
    def fold(self) -> str:
        """How the heads' products are brought together at once; ``none`` keeps them apart."""
        if self.kind == "indexer":
            return "indexer"
        if self.kind in ("gate", "compressed") or self.p["agg"] == "query":
            return "none"
        return str(self.p["agg"])

    @property
    def raw(self) -> bool:
        """A second phase turns logits into scores."""
        return self.kind == "compressed" or bool(self.p["soft"])

    @property
    def format(self) -> CacheFormat:
        """Format of the entries."""
        return parse_cache_format(self.p["e"])

    @property
    def vectors(self) -> int:
        """Vectors of 16 entries."""
        return -(-self.entries // LANES)

    @property
    def groups(self) -> int:
        """Register tiles that cover the entries."""
        return -(-self.vectors // self.wide)

    def shape(self) -> tuple[int, ...]:
        """Return the extents of the descriptors as they lie."""
        p, heads, lanes = self.p, self.p["kv"], descriptors.lanes_of(self.p)
        if paged(p):
            rows = p["pool"] * lanes
            return descriptors.shape(rows, heads, self.parts, p["d"], self.format, lanes)
        return descriptors.shape(self.entries, p["b"] * heads, self.parts, p["d"], self.format)

    def filled_groups(self, length: int) -> int:
        """Return the register tiles that hold an entry that has begun at a length."""
        count = min(blocks_of(length, self.stride), self.entries)
        return -(-count // (LANES * self.wide))


class Rows:
    """A tile of score rows: coefficients of their queries, and how many entries each may see."""

    def __init__(self, s: Entries, q: Any, pos: tuple[Any, Any], head: Any, first: Any) -> None:
        self.s, self.head, self.first = s, head, first
        self.coef = workspace((s.tile * s.heads, s.parts, s.p["d"]), "float32")
        self.known = workspace((s.tile,), "int32")
        with loop(s.tile) as row:
            source = bind(T.min(first + row, T.int32(s.count - 1)))
            end = row_end(*pos, first + row, s.p["rows"])
            store(self.known, most_complete(end, s.size, s.stride, s.entries), row)
            with loop(s.heads) as g:
                self._load(q, source, row * s.heads + g, g)
        last = T.min(first + s.tile, T.int32(s.count)) * s.p["rows"]
        # tiles of padding only have no token; otherwise their last one sees most
        end = T.if_then_else(
            first * s.p["rows"] < pos[1], pos[0] + T.min(last, pos[1]) - 1, T.int32(-1)
        )
        self.most = fixed(most_complete(end, s.size, s.stride, s.entries))

    def _load(self, q: Any, source: Any, row: Any, g: Any) -> None:
        s = self.s
        group = s.p["h"] // s.p["kv"] if s.p["agg"] == "query" else 1

        def step(at: Any, lanes: int) -> None:
            if group > 1:
                total = Register("float32", lanes, splat(0.0, lanes))
                with loop(group) as i:
                    total.set(total.get() + load(q, source, self.head * group + i, at, lanes=lanes))
                value = bind(total.get() * splat(1.0 / group, lanes))
            else:
                value = bind(load(q, source, self.head * s.heads + g, at, lanes=lanes))
            if s.parts == 1:
                store(self.coef, value, row, 0, at, lanes=lanes)
                return
            zero = splat(0.0, lanes)
            store(self.coef, T.min(value, zero), row, 0, at, lanes=lanes)
            store(self.coef, T.max(value, zero), row, 1, at, lanes=lanes)

        over(s.p["d"], step)


class Products:
    """Products of one row's heads with the entries of one register tile, brought together."""

    def __init__(
        self, s: Entries, config: Any, desc: Any, tile: Rows, near: Near | None = None
    ) -> None:
        """``near`` holds the entries of a register tile where they lie in pages."""
        self.s, self.config, self.tile, self.near = s, config, tile, near
        self.desc: Any = desc if near is None else near.held
        self.head: Any = tile.head if near is None else 0

    def emit(self, group: Any, row: Any, weight: Any, out: Any) -> None:
        """Emit them; ``out(head, u, value)`` takes unscaled scores of vector u of the group."""
        s = self.s
        vectors = list(range(s.wide))
        if self.near is None:
            vectors = [bind(T.min(group * s.wide + u, T.int32(s.vectors - 1))) for u in vectors]
        size = min(self.config.rows, s.heads)
        full, rest = divmod(s.heads, size)
        start = splat(NEVER if s.fold == "max" else 0.0)
        total = []
        if s.fold != "none":
            total = [Register("float32", LANES, start) for _ in vectors]
        for base, rows, count in ((0, size, full), (size * full, rest, 1)):
            if not rows:
                continue
            with loop(count) as part:
                first = part * rows + base
                acc = self._dots(vectors, row * s.heads + first, rows)
                for r in range(rows):
                    for u, register in enumerate(acc[r]):
                        if s.fold == "none":
                            out(first + r, u, register.get())
                        else:
                            self._join(total[u], register.get(), weight, row, first + r)
        for u, register in enumerate(total):
            value = register.get()
            out(0, u, value * splat(1.0 / s.heads) if s.fold == "mean" else value)

    def _join(self, total: Register, value: Any, weight: Any, row: Any, head: Any) -> None:
        if self.s.fold == "max":
            total.set(T.max(total.get(), value))
            return
        if self.s.fold == "indexer":
            source = T.min(self.tile.first + row, T.int32(self.s.count - 1))
            value = T.max(value, splat(0.0)) * splat(weight[source, head])
        total.set(total.get() + value)

    def _dots(self, vectors: list[Any], row: Any, rows: int) -> list[list[Register]]:
        s, tile = self.s, self.tile
        bits = s.format.bits
        pair = 32 // bits
        acc = [[Register("float32", LANES, splat(0.0)) for _ in vectors] for _ in range(rows)]
        ahead = self.config.ahead * s.wide if s.tile == 1 and self.near is None else 0

        def step(i: Any, count: int) -> None:
            for part in range(s.parts):
                for u, vector in enumerate(vectors):
                    if ahead:
                        prefetch(self.desc, self.head, vector + ahead, part, i, 0)
                    found = lanes_of(self.desc, self.head, vector, part, i, bits=bits, count=count)
                    for r in range(rows):
                        for half, value in enumerate(found):
                            by = splat(tile.coef[row + r, part, i * pair + half])
                            acc[r][u].set(acc[r][u].get() + value * by)

        channels(s.p["d"], bits, step)
        return acc


class Near:
    """The entries of a register tile, which lie in pages, put together in vectors of 16."""

    def __init__(self, s: Entries, desc: Any, tile: Rows, table: Table) -> None:
        self.s, self.desc, self.tile, self.table = s, desc, tile, table
        self.pair = 32 // s.format.bits
        self.depth = -(-int(s.p["d"]) // self.pair)
        shape = (1, s.wide, s.parts, self.depth, LANES * self.pair)
        self.held = workspace(shape, s.format.stored)

    def fill(self, group: Any) -> None:
        """Copy a register tile; behind the last entry that its rows may see, that one's neighbours again."""
        s, each = self.s, descriptors.lanes_of(self.s.p)
        run = math.gcd(each, LANES)  # entries that lie in one page
        last = fixed(T.truncdiv(T.max(self.tile.most - 1, T.int32(0)), run) * run)
        with loop(s.wide) as u, loop(LANES // run) as n:
            first = fixed(T.min((group * s.wide + u) * LANES + n * run, last))
            page, place = self.table.row(first, s.size)
            with loop(s.parts) as part, loop(self.depth) as i:
                lanes = run * self.pair
                found = load(
                    self.desc, self.tile.head, page, part, i, place * self.pair, lanes=lanes
                )
                store(self.held, found, 0, u, part, i, n * lanes, lanes=lanes)


def emit(
    s: Entries, config: Any, scale: float, q: Any, pos: Any, weight: Any, pages: Any, desc: Any, score: Any
) -> None:  # fmt: skip
    """Emit the kernel; ``pages`` are block tables, or None."""
    tiles = -(-s.count // s.tile)
    splits = min(config.splits, s.groups)
    b, held = s.p["b"], None
    if s.raw:
        held = workspace((b * s.count, s.p["kv"] * s.heads, s.vectors * LANES), "float32")
    whole = {"q": q, "weight": weight, "score": score, "held": held}
    if pages is None:
        whole["desc"] = desc
    share = -(-s.groups // splits)
    with turns(b, s.p["kv"] * tiles * splits, parallel=config.parallel) as (sequence, task):
        where = place_of(pos, sequence)
        span = (fixed(where[0]), fixed(where[1]))
        own = {name: part_of(buffer, sequence, b) for name, buffer in whole.items()}
        head = bind(T.floordiv(task, T.int32(tiles * splits)))
        first = fixed(T.floormod(T.floordiv(task, T.int32(splits)), T.int32(tiles)) * s.tile)
        part = T.floormod(task, T.int32(splits))
        rows = Rows(s, own["q"], span, head, first)
        near = None
        if pages is not None:
            near = Near(s, desc, rows, Table(pages, sequence, int(s.p["page"])))
        products = Products(s, config, own.get("desc"), rows, near)
        used = fixed(T.floordiv(rows.most + (LANES * s.wide - 1), T.int32(LANES * s.wide)))
        # the entries that there are now are what is shared out, so that no part is idle
        each = fixed(T.floordiv(used + (splits - 1), T.int32(splits)))
        begin = fixed(T.min(part * each, used))
        with T.serial(0, fixed(T.min(begin + each, used) - begin)) as step:
            group = fixed(begin + step)
            if near is not None:
                near.fill(group)
            with loop(s.tile) as row, when(first + row < s.count):
                _score(
                    s, products, rows, group, row, scale, own["weight"], own["held"], own["score"]
                )
        if held is None:
            begin = fixed(T.max(part * share, used))
            with T.serial(
                0, fixed(T.max(T.min((part + 1) * share, T.int32(s.groups)) - begin, 0))
            ) as step:
                _nothing(s, rows, fixed(begin + step), own["score"])
    if held is not None:
        _finish(s, config, pos, held, score)


def _score(
    s: Entries, products: Products, rows: Rows, group: Any, row: Any, scale: float, weight: Any,
    held: Any, score: Any,
) -> None:  # fmt: skip
    """Score one row's entries of one register tile."""
    known = bind(splat(rows.known[row]))
    own = s.heads if s.fold == "none" else 1

    def out(head: Any, u: int, value: Any) -> None:
        at = bind((group * s.wide + u) * LANES)
        value = value * splat(scale)
        place = (rows.first + row, rows.head * own + head)
        if held is not None:
            with when(at < s.vectors * LANES):
                store(held, value, *place, at, lanes=LANES)
            return
        value = T.Select(T.ramp(at, 1, LANES) < known, value, splat(NEVER))
        _put(s, score, value, place, at)

    products.emit(group, row, weight, out)


def _put(s: Entries, score: Any, value: Any, place: tuple[Any, Any], at: Any) -> None:
    if s.vectors % s.wide == 0:
        put(score, value, place, at, s.blocks)
        return
    with when(at < s.blocks):
        put(score, value, place, at, s.blocks)


def _nothing(s: Entries, rows: Rows, group: Any, score: Any) -> None:
    """Fill a register tile of entries that nobody of the tile may see."""
    own = s.heads if s.fold == "none" else 1
    with loop(s.tile) as row, when(rows.first + row < s.count), loop(own) as g:
        for u in range(s.wide):
            at = bind((group * s.wide + u) * LANES)
            place = (rows.first + row, rows.head * own + g)
            _put(s, score, splat(NEVER), place, at)


def _finish(s: Entries, config: Any, pos: Any, logits: Any, scores: Any) -> None:
    """Turn logits into scores, a row of a KV head at a time."""
    b = s.p["b"]
    with turns(b, s.count * s.p["kv"], parallel=config.parallel) as (sequence, task):
        where = place_of(pos, sequence)
        span = (fixed(where[0]), fixed(where[1]))
        held, score = (part_of(buffer, sequence, b) for buffer in (logits, scores))
        row = bind(T.floordiv(task, T.int32(s.p["kv"])))
        head = bind(T.floormod(task, T.int32(s.p["kv"])))
        end = fixed(row_end(*span, row, s.p["rows"]))
        known = fixed(most_complete(end, s.size, s.stride, s.entries))
        started = fixed(T.min(T.floordiv(end, T.int32(s.p["block"])) + 1, T.int32(s.blocks)))
        if s.kind == "gate":
            softened(s.vectors, s.blocks, held, score, row, head, known, started)
        else:
            overlapped(s, held, score, row, head, known, started)
