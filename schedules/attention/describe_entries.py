"""Entries of descriptors: which slots they stand for, what is folded over them, where the results go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.caches import CacheFormat, parse_cache_format
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.describe_blocks import PARTS, entries_of
from mimo_compile.ir.ops.pages import paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import descriptors
from mimo_compile.schedules.attention.half import upper_half
from mimo_compile.schedules.attention.pages import Table
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import NEVER, across, add, channels, lanes_of
from mimo_compile.schedules.attention.sequences import part_of, place_of, turns
from mimo_compile.schedules.emit.build import Register, T, bind, store
from mimo_compile.schedules.emit.vector import LANES, splat

FOLDS = {
    "bounds": ("least", "most"), "mean": ("sum",), "peak": ("size",), "pool3": ("most", "least", "sum"),
}  # fmt: skip
"""What the parts of each kind are folded by, in their order."""
_START = {"least": -NEVER, "most": NEVER, "size": 0.0, "sum": 0.0}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Compile-time sizes."""

    p: Mapping[str, Any]
    entries: int
    size: int
    stride: int

    @property
    def keys(self) -> CacheFormat:
        """Format of the cache."""
        return parse_cache_format(self.p["c"])

    @property
    def format(self) -> CacheFormat:
        """Format of the entries."""
        return parse_cache_format(self.p["e"])

    @property
    def laned(self) -> bool:
        """Entries stand in lanes."""
        return bool(self.p["kind"] in descriptors.LANED)

    @property
    def lanes(self) -> int:
        """Entries of a vector, as they lie."""
        return descriptors.lanes_of(self.p)

    @property
    def groups(self) -> int:
        """Vectors of entries that a call touches at most."""
        most = min(self.entries, -(-(int(self.p["t"]) + self.size) // self.stride) + 1)
        return min(-(-self.entries // LANES), -(-most // LANES) + 1)

    def shape(self) -> tuple[int, ...]:
        """Return the extents of the descriptors as they lie."""
        p, parts = self.p, PARTS[self.p["kind"]]
        if paged(p):
            rows = p["pool"] * self.lanes
            return descriptors.shape(rows, p["kv"], parts, p["d"], self.format, self.lanes)
        if self.laned:
            return descriptors.shape(self.entries, p["b"] * p["kv"], parts, p["d"], self.format)
        return (p["b"] * self.entries, p["kv"], parts, p["d"])


def sizes_of(workload: Workload) -> Sizes:
    """Return the sizes of a workload."""
    p = get_op(workload.op).full(workload)
    stride = p["stride"] or p["size"]
    return Sizes(p, entries_of(p["cap"], p["size"], stride), p["size"], stride)


def _folded(how: str, a: Any, b: Any) -> Any:
    if how == "sum":
        return a + b
    return T.min(a, b) if how == "least" else T.max(a, b)


class Entry:
    """One entry: its slots, and the channels that are folded over them."""

    def __init__(
        self, s: Sizes, k: Any, desc: Any, head: Any, index: Any, end: Any, table: Table | None
    ) -> None:
        """``table``: of pages that keys and entries lie in; None: both are the sequence's own."""
        self.s, self.k, self.desc, self.head, self.index = s, k, desc, head, index
        self.table = table
        self.begin = fixed(index * s.stride)
        self.end = fixed(T.min(self.begin + s.size, end))
        aligned = s.stride % LANES == 0 and s.size % LANES == 0
        self.most = s.size // LANES if aligned else (s.size + LANES - 2) // LANES + 1
        self.first = fixed(self.begin // LANES)
        self.count = fixed((self.end - 1) // LANES - self.first + 1)
        if table is not None:
            self.place = table.row(index, s.size)
        elif s.laned:
            self.place = index // LANES, index % LANES

    def emit(self) -> None:
        """Emit all channels."""
        channels(self.s.p["d"], self.s.keys.bits, self._channel)

    def _channel(self, i: Any, count: int) -> None:
        folds = FOLDS[self.s.p["kind"]]
        acc = [[Register("float32", LANES, splat(_START[f])) for f in folds] for _ in range(count)]

        def block(at: Any) -> None:
            place = bind(self.first + at)
            slots = bind(T.ramp(place * LANES, 1, LANES))
            inside = T.And(slots >= splat(self.begin), slots < splat(self.end))
            held = place if self.table is None else self.table.block(place)
            found = lanes_of(self.k, self.head, held, i, bits=self.s.keys.bits, count=count)
            for value, own in zip(found, acc, strict=True):
                for how, register in zip(folds, own, strict=True):
                    # slots of other entries, and what was never written, take no part: NaN neither
                    some = T.Select(inside, value, splat(_START[how]))
                    some = T.abs(some) if how == "size" else some
                    register.set(_folded(how, register.get(), some))

        if self.most == 1:
            block(0)
        else:
            with T.serial(0, self.count) as at:
                block(at)
        for half, own in enumerate(acc):
            for part, (how, register) in enumerate(zip(folds, own, strict=True)):
                self._write(part, i, half, self._number(how, register.get()))

    def _number(self, how: str, value: Any) -> Any:
        number = across(add if how == "sum" else lambda a, b: _folded(how, a, b), value)
        if how == "sum":
            number = bind(number / T.cast(self.end - self.begin, "float32"))
        return number

    def _write(self, part: int, i: Any, half: int, value: Any) -> None:
        s = self.s
        pair = 32 // s.keys.bits
        channel = i * pair + half
        if s.format.bits == 16:
            value = upper_half(value, 1)
        if not s.laned:
            store(self.desc, value, self.index, self.head, part, channel)
            return
        wide = 32 // s.format.bits
        vector, lane = self.place
        if wide == pair:
            at, place = i, lane * wide + half
        else:  # bfloat16 keys, float32 entries: each channel has a vector of its own
            at, place = channel, lane
        store(self.desc, value, self.head, vector, part, at, place)


def emit(s: Sizes, parallel: bool, pos: Any, pages: Any, k: Any, desc: Any) -> None:
    """Emit the kernel; ``pages`` are block tables, or None."""
    b = s.p["b"]
    with turns(b, s.p["kv"] * s.groups, parallel=parallel) as (sequence, task):
        where = place_of(pos, sequence)
        start, valid = fixed(where[0]), fixed(where[1])
        end = fixed(start + valid)
        first = fixed(T.max(T.floordiv(start - s.size, T.int32(s.stride)) + 1, T.int32(0)))
        last = end - s.size if s.p["whole"] else end - 1
        stop = T.min(T.floordiv(last, T.int32(s.stride)) + 1, T.int32(s.entries))
        stop = fixed(T.if_then_else(valid > 0, stop, T.int32(0)))
        head = bind(task // s.groups) if s.groups > 1 else task
        table = None if pages is None else Table(pages, sequence, int(s.p["page"]))
        keys, entries = k, desc
        if table is None:
            keys, entries = (part_of(buffer, sequence, b) for buffer in (k, desc))
        group = fixed(first // LANES + (task % s.groups if s.groups > 1 else 0))
        low = fixed(T.max(first, group * LANES))
        high = fixed(T.max(T.min(stop, group * LANES + LANES), low))
        with T.serial(0, high - low) as e:
            Entry(s, keys, entries, head, fixed(low + e), end, table).emit()
