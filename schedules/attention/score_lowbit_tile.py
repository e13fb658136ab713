"""Low-bit estimates of a tile of queries: exact sums over sinks and near keys, then the blocks between."""

from __future__ import annotations

import math
from typing import Any

from mimo_compile.ir.ops.score_lowbit import MOST
from mimo_compile.schedules.attention import int8_dot
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import NEVER, across, add, channels, lanes_of
from mimo_compile.schedules.attention.score_lowbit_codes import UP, KeyCodes, QueryCodes, Sizes
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
from mimo_compile.schedules.emit.vector import LANES, LOG2E, exp2, log2, splat

_START = -1e30


class Tile:
    """One head's queries from token ``first`` on, and the slots that they are compared with."""

    def __init__(
        self, s: Sizes, keys: KeyCodes, span: tuple[Any, Any], head: Any, tile: Any
    ) -> None:
        self.s, self.keys, self.head = s, keys, head
        p = s.p
        self.start, self.valid = span
        self.kv = fixed(T.floordiv(head, T.int32(s.group)))
        self.first = fixed(tile * p["rows"])
        some = self.first < self.valid
        self.count = fixed(
            T.if_then_else(some, T.min(T.int32(p["rows"]), self.valid - self.first), T.int32(0))
        )
        """Queries that are no padding."""
        self.estimated = fixed(T.floordiv(self.count + (p["every"] - 1), T.int32(p["every"])))
        """Those of them that are estimated."""
        few = self.start + self.valid <= p["least"]
        block = T.int32(p["block"])
        begin = self.start + self.first
        own = T.floordiv(begin, block) - (p["last"] - 1)
        near = T.if_then_else(few, T.int32(0), T.max(own, T.int32(0)))
        self.near = fixed(near * p["block"])
        """First slot of the near keys; 0 where there are so few keys that all are."""
        self.sinks = fixed(T.min(T.int32(p["first"] * p["block"]), self.near))
        """Slots of the sinks before them."""
        end = begin + self.count - 1
        self.seen = fixed(T.if_then_else(some, T.floordiv(end, block) + 1, T.int32(0)))
        """Blocks up to that of the last query."""
        self.end = fixed(T.if_then_else(T.And(some, T.Not(few)), end + 1, T.int32(0)))
        """Slot behind the last query's own; a tile of padding would look behind the cache, and where all keys
        are near no sum is needed."""
        self.queries = QueryCodes(s)
        self.lse = workspace((s.sampled,), "float32")

    # -- the exact region ----------------------------------------------------------------------------

    def sum_region(self, q: Any, k: Any, k_mean: Any, scale: float) -> None:
        """Find the logarithm of each row's sum over its sinks and near keys."""
        s = self.s
        top, total = (workspace((s.sampled,), "float32") for _ in range(2))
        with loop(s.sampled) as row:
            store(top, T.float32(_START), row)
            store(total, T.float32(0), row)
        sinks = T.floordiv(self.sinks + (LANES - 1), T.int32(LANES))
        near = T.floordiv(self.near, T.int32(LANES))
        last = T.floordiv(self.end + (LANES - 1), T.int32(LANES))
        for begin, end, sink in ((T.int32(0), sinks, True), (near, last, False)):
            low = fixed(begin)
            with T.serial(0, fixed(T.max(end - low, T.int32(0)))) as step:
                vector = fixed(low + step)
                slots = bind(T.ramp(vector * LANES, 1, LANES))
                part = slots < splat(self.sinks) if sink else slots >= splat(self.near)
                self._add(q, k, k_mean, scale, vector, slots, part, top, total)
        with loop(s.sampled) as row:
            held = Register("float32", 1, total[row])
            high = bind(top[row] + log2(held.get(), 1))
            store(self.lse, high * T.float32(math.log(2)), row)

    def _add(
        self, q: Any, k: Any, k_mean: Any, scale: float, vector: Any, slots: Any, part: Any,
        top: Any, total: Any,
    ) -> None:  # fmt: skip
        """Add the exponentials of 16 slots to each row's sum."""
        s = self.s
        near = workspace((s.p["d"], LANES), "float32")
        pair = 32 // s.format.bits

        def less(i: Any, count: int) -> None:
            found = lanes_of(k, self.kv, vector, i, bits=s.format.bits, count=count)
            for half, value in enumerate(found):
                c = i * pair + half
                store(near, value - splat(k_mean[self.kv, c]), c, 0, lanes=LANES)

        channels(s.p["d"], s.format.bits, less)
        every, size = s.p["every"], min(4, s.sampled)
        with loop(-(-s.sampled // size)) as group:
            rows = [bind(T.min(group * size + r, T.int32(s.sampled - 1))) for r in range(size)]
            source = [bind(T.min(self.first + row * every, T.int32(s.p["t"] - 1))) for row in rows]
            acc = [Register("float32", LANES, splat(0.0)) for _ in rows]
            with loop(s.p["d"]) as c:
                value = bind(load(near, c, 0, lanes=LANES))
                for token, register in zip(source, acc, strict=True):
                    register.set(register.get() + value * splat(q[token, self.head, c]))
            for r, register in enumerate(acc):
                row = bind(group * size + r)
                with when(row < s.sampled):
                    seen = T.And(part, slots <= splat(self.start + self.first + row * every))
                    logit = T.Select(seen, register.get() * splat(scale * LOG2E), splat(NEVER))
                    self._take(Register("float32", LANES, logit), row, top, total)

    def _take(self, logit: Register, row: Any, top: Any, total: Any) -> None:
        most = Register("float32", 1, T.max(across(T.max, logit.get()), top[row]))
        shrink = Register("float32", 1, top[row] - most.get())
        far = Register("float32", LANES, logit.get() - splat(most.get()))
        weight = across(add, exp2(far.get()))
        store(total, total[row] * exp2(shrink.get(), 1) + weight, row)
        store(top, most.get(), row)

    # -- the middle ----------------------------------------------------------------------------------

    def estimate(self, best: Any, scale: float) -> None:
        """Write to ``best[slot]`` the greatest logarithm of a weight of each slot of the middle."""
        s = self.s
        low = fixed(T.floordiv(self.sinks, T.int32(LANES)))
        high = T.floordiv(self.near + (LANES - 1), T.int32(LANES))
        turns = T.floordiv(high - low + (s.wide - 1), T.int32(s.wide))
        some = T.And(self.near > self.sinks, self.count > 0)
        with T.serial(0, fixed(T.if_then_else(some, turns, T.int32(0)))) as step:
            at = [bind(low + step * s.wide + u) for u in range(s.wide)]
            vectors = [bind(T.min(v, T.int32(s.vectors - 1))) for v in at]
            found = [Register("float32", LANES, splat(_START)) for _ in at]
            scales = [
                bind(load(self.keys.scales, self.kv, v * LANES, lanes=LANES)) for v in vectors
            ]
            with T.serial(
                0, fixed(T.floordiv(self.estimated + (s.rows - 1), T.int32(s.rows)))
            ) as group:
                rows = [bind(T.min(group * s.rows + r, self.estimated - 1)) for r in range(s.rows)]
                for r, own in enumerate(self._dots(vectors, rows)):
                    by = bind(splat(self.queries.scales[rows[r]] * T.float32(scale)))
                    less = bind(splat(self.lse[rows[r]]))
                    for u, register in enumerate(own):
                        dots = T.cast(register.get(), "float32x16") * scales[u]
                        found[u].set(T.max(found[u].get(), dots * by - less))
            for u, register in enumerate(found):
                mean = load(self.keys.means, self.head, vectors[u] * LANES, lanes=LANES)
                value = register.get() + mean * splat(scale)
                store(best, value, at[u] * LANES, lanes=LANES)

    def _dots(self, vectors: list[Any], rows: list[Any]) -> list[list[Register]]:
        s = self.s
        start = [
            bind(load(self.keys.sums, self.kv, v * LANES, lanes=LANES) * splat(T.int32(-UP)))
            for v in vectors
        ]
        acc = [[Register("int32", LANES, own) for own in start] for _ in rows]
        with loop(s.words) as w:
            codes = [bind(load(self.keys.codes, self.kv, v, w, 0, lanes=LANES)) for v in vectors]
            for r, row in enumerate(rows):
                query = bind(splat(self.queries.words[row, w]))
                for register, key in zip(acc[r], codes, strict=True):
                    register.set(int8_dot.dot(s.way, register.get(), query, key))
        return acc

    def write(self, best: Any, score: Any, tile: Any) -> None:
        """Write the scores of all blocks."""
        s = self.s
        p = s.p
        with loop(s.blocks) as block:
            value = Register("float32", 1, T.float32(math.inf))
            begin = bind(block * p["block"])
            middle = T.And(begin >= self.sinks, begin < self.near)
            with when(T.And(middle, block < self.seen)):
                most = self._most(best, begin)
                power = T.min(most, T.float32(MOST)) * T.float32(LOG2E)
                far = Register("float32", 1, power)
                value.set(exp2(far.get(), 1))
            out = T.if_then_else(block < self.seen, value.get(), T.float32(NEVER))
            store(score, out, tile, self.head, block)

    def _most(self, best: Any, begin: Any) -> Any:
        size = self.s.p["block"]
        if size % LANES == 0:
            found = Register("float32", LANES, load(best, begin, lanes=LANES))
            if size > LANES:
                with loop(size // LANES - 1) as i:
                    own = load(best, begin + (i + 1) * LANES, lanes=LANES)
                    found.set(T.max(found.get(), own))
            return across(T.max, found.get())
        one = Register("float32", 1, T.float32(_START))
        with loop(size) as i:
            one.set(T.max(one.get(), best[begin + i]))
        return one.get()
