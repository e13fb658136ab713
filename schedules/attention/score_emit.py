"""Kernels that score blocks from keys: tiles pass over runs of slots; probabilities need a second look.

The largest probability of a block is that of its largest logit, so a first pass keeps only these and the sum
of exponentials; when the sum is known (over all parts of the keys), logits become probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.schedules.attention.pages import Table
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import NEVER, across, add, put
from mimo_compile.schedules.attention.score_rows import WholeLines, by_lines
from mimo_compile.schedules.attention.score_slots import Chosen, Slots, Tile, Whole
from mimo_compile.schedules.attention.sequences import part_of, place_of, turns
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    store,
    when,
    workspace,
)
from mimo_compile.schedules.emit.vector import LANES, LOG2E, exp2, splat

_START, _LOW = -1e30, -3e38


class Held:
    """Largest logits of blocks, and each row's maximum and sum of exponentials, by tile and part."""

    def __init__(self, s: Slots, tiles: int, splits: int) -> None:
        self.s, self.splits = s, splits
        wide = -(-s.blocks // LANES) * LANES
        # a last run may hold more blocks than there are
        self.most = workspace((tiles * s.height, wide + s.blocks_of_run + LANES), "float32")
        self.top = workspace((tiles * splits * s.height,), "float32")
        self.sum = workspace((tiles * splits * s.height,), "float32")

    def begin(self, part: Any) -> None:
        """Start the sums of a part."""
        with loop(self.s.height) as row:
            store(self.top, T.float32(_START), part * self.s.height + row)
            store(self.sum, T.float32(0), part * self.s.height + row)

    def take(self, tile: Tile, group: Any, part: Any, run: Any) -> None:
        """Keep what one run gives."""
        s = self.s
        with loop(s.height) as row:
            at = bind(part * s.height + row)
            best = Register("float32", LANES, splat(_START))
            with loop(s.run // LANES) as j:
                best.set(T.max(best.get(), load(tile.logits, row, j * LANES, lanes=LANES)))
            top = fixed_float(T.max(across(T.max, best.get()), self.top[at]))
            shrink = Register("float32", 1, self.top[at] - top)
            total = Register("float32", LANES, splat(0.0))
            with loop(s.run // LANES) as j:
                far = load(tile.logits, row, j * LANES, lanes=LANES) - splat(top)
                total.set(total.get() + exp2(far))
            whole = self.sum[at] * exp2(shrink.get(), 1) + across(add, total.get())
            store(self.sum, whole, at)
            store(self.top, top, at)

            def keep(block: Any, lanes: int, row: Any = row) -> None:
                value, _ = tile.of_block(row, block)
                place = run * s.blocks_of_run + block
                store(self.most, value, group * s.height + row, place, lanes=lanes)

            _blocks(s, keep)

    def finish(self, group: Any, head: Any, first: Any, limit: Any, score: Any) -> None:
        """Write the probabilities of a tile; blocks from ``limit`` on were never looked at."""
        s = self.s
        top, by = (workspace((s.height,), "float32") for _ in range(2))
        with loop(s.height) as row:
            most = Register("float32", 1, T.float32(_START))
            with loop(self.splits) as i:
                most.set(T.max(most.get(), self.top[(group * self.splits + i) * s.height + row]))
            total = Register("float32", 1, T.float32(0))
            with loop(self.splits) as i:
                at = (group * self.splits + i) * s.height + row
                far = Register("float32", 1, self.top[at] - most.get())
                total.set(total.get() + self.sum[at] * exp2(far.get(), 1))
            store(top, most.get(), row)
            store(by, T.float32(1) / total.get(), row)
        with loop(-(-s.blocks // LANES)) as j, loop(s.tile) as token:
            inside = T.ramp(j * LANES, 1, LANES) < splat(limit)

            def value(g: Any, token: Any = token, inside: Any = inside, j: Any = j) -> Any:
                row = bind(token * s.heads + g)
                logit = bind(load(self.most, group * s.height + row, j * LANES, lanes=LANES))
                far = Register("float32", LANES, logit - splat(top[row]))
                weight = exp2(far.get()) * splat(by[row])
                seen = T.And(inside, logit > splat(_LOW))
                return bind(T.Select(seen, weight, splat(NEVER)))

            _write(s, score, head, first + token, j * LANES, LANES, value)


def fixed_float(value: Any) -> Any:
    """Compute a number once, as `reach.fixed` does an integer."""
    return Register("float32", 1, value).get()


def _blocks(s: Slots, step: Callable[[Any, int], None]) -> None:
    """Emit ``step(block, lanes)`` for the blocks of a run."""
    lanes = LANES if s.p["block"] == 1 else 1
    with loop(s.blocks_of_run // lanes) as j:
        step(j * lanes, lanes)


def _write(
    s: Slots, score: Any, head: Any, token: Any, block: Any, lanes: int, value: Callable[[Any], Any]
) -> None:
    """Write the scores of a token and KV head; ``value(g)`` is that of one of its heads."""

    def write(own: Any, at: Any) -> None:
        if lanes == 1:
            store(score, own, token, at, block)
        else:
            put(score, own, (token, at), block, s.blocks)

    with when(token < s.p["t"]):
        if not s.together:
            with loop(s.heads) as g:
                write(value(g), head * s.heads + g)
            return
        most = s.p["agg"] == "max"
        total = Register("float32", lanes, value(0))
        if s.heads > 1:
            with loop(s.heads - 1) as i:
                own = value(i + 1)
                total.set(T.max(total.get(), own) if most else total.get() + own)
        by = 1.0 / s.heads if s.p["agg"] == "mean" else 1.0
        write(total.get() * splat(by, lanes) if by != 1.0 else total.get(), head)


def _write_run(s: Slots, tile: Tile, run: Any, score: Any) -> None:
    """Write the scores of a run's blocks."""

    def step(block: Any, lanes: int) -> None:
        place = bind(run * s.blocks_of_run + block)
        with when(place < s.blocks), loop(s.tile) as token:

            def value(g: Any, token: Any = token) -> Any:
                return tile.of_block(token * s.heads + g, block)[0]

            _write(s, score, tile.head, tile.first + token, place, lanes, value)

    _blocks(s, step)


def _write_nothing(s: Slots, tile: Tile, run: Any, score: Any) -> None:
    """Write the blocks of a run that nobody of the tile sees."""

    def step(block: Any, lanes: int) -> None:
        place = bind(run * s.blocks_of_run + block)
        with when(place < s.blocks), loop(s.tile) as token:
            never = splat(NEVER, lanes)
            _write(s, score, tile.head, tile.first + token, place, lanes, lambda g: never)

    _blocks(s, step)


def emit(
    s: Slots, splits: int, parallel: bool, scale: float,
    q: Any, pos: Any, guess: Any, peak: Any, k: Any, score: Any, pages: Any = None,
) -> None:  # fmt: skip
    """Emit the kernel; ``pages`` are block tables."""
    splits, b = min(splits, s.runs), int(s.p["b"])
    oracle, groups = s.kind == "oracle", s.p["kv"] * s.tiles
    shared = Held(s, b * groups, splits) if oracle and splits > 1 else None
    share = -(-s.runs // splits)
    with turns(b, groups * splits, parallel=parallel) as (sequence, task):
        where = place_of(pos, sequence)
        span = (fixed(where[0]), fixed(where[1]))
        queries, guesses, peaks, scores = (
            part_of(buffer, sequence, b) for buffer in (q, guess, peak, score)
        )
        table = None if pages is None else Table(pages, sequence, int(s.p["page"]))
        keys = part_of(k, sequence, b) if table is None else k
        group, part = T.floordiv(task, T.int32(splits)), T.floormod(task, T.int32(splits))
        head = fixed(T.floordiv(group, T.int32(s.tiles)))
        first = fixed(T.floormod(group, T.int32(s.tiles)) * s.tile)
        tile = _tile(s, keys, span, head, first, scale, queries, guesses, peaks, table)
        held, at = shared, (_of(sequence, groups, group), _of(sequence, groups * splits, task))
        if oracle and held is None:
            held, at = Held(s, 1, 1), (0, 0)
        if held is not None:
            held.begin(at[1])
        each = fixed(T.floordiv(tile.used + (splits - 1), T.int32(splits)))
        begin = fixed(T.min(part * each, tile.used))
        with T.serial(0, fixed(T.min(begin + each, tile.used) - begin)) as step:
            run = fixed(begin + step)
            tile.fill(run)
            if held is not None:
                held.take(tile, *at, run)
            else:
                _write_run(s, tile, run, scores)
        if held is None:
            begin = fixed(T.max(part * share, tile.used))
            end = T.min((part + 1) * share, T.int32(s.runs))
            with T.serial(0, fixed(T.max(end - begin, T.int32(0)))) as step:
                _write_nothing(s, tile, fixed(begin + step), scores)
        elif shared is None:
            limit = fixed(tile.used * s.blocks_of_run)
            held.finish(0, head, first, limit, scores)
    if shared is not None:
        _finish(s, shared, groups, parallel, pos, score)


def _of(sequence: Any | None, each: int, index: Any) -> Any:
    """Return an index among those of all sequences, of which one has so many."""
    return fixed(index + T.int32(0)) if sequence is None else fixed(sequence * each + index)


def _tile(
    s: Slots, k: Any, span: tuple[Any, Any], head: Any, first: Any, scale: float, q: Any, guess: Any,
    peak: Any, table: Table | None,
) -> Tile:  # fmt: skip
    """Return a tile with its queries loaded."""
    if s.kind == "channels":
        chosen = Chosen(s, k, span, head, first, table)
        chosen.begin(q, guess, peak)
        return chosen
    whole = (WholeLines if by_lines(s) else Whole)(s, k, span, head, first, table)
    # probabilities are powers of two
    whole.begin(q, scale * LOG2E if s.kind == "oracle" else scale)
    return whole


def _finish(s: Slots, held: Held, groups: int, parallel: bool, pos: Any, score: Any) -> None:
    """Bring the parts of each tile together."""
    b = int(s.p["b"])
    with turns(b, groups, parallel=parallel and b * groups > 1) as (sequence, group):
        where = place_of(pos, sequence)
        span = (fixed(where[0]), fixed(where[1]))
        head = fixed(T.floordiv(group, T.int32(s.tiles)))
        first = fixed(T.floormod(group, T.int32(s.tiles)) * s.tile)
        last = T.min(first + s.tile, span[1]) - 1
        seen = T.if_then_else(first < span[1], span[0] + last + 1, T.int32(0))
        used = T.floordiv(seen + (s.run - 1), T.int32(s.run))
        limit = fixed(used * s.blocks_of_run)
        at = group if sequence is None else _of(sequence, groups, group)
        held.finish(at, head, first, limit, part_of(score, sequence, b))
