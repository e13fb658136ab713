"""One list for all heads, merged rank by rank: each head's best blocks in order, then a walk over them."""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import reduced
from mimo_compile.schedules.attention.select_lists import Choice, Frame, List
from mimo_compile.schedules.attention.select_order import MOST
from mimo_compile.schedules.attention.sequences import part_of
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
from mimo_compile.schedules.emit.vector import LANES, splat

BITS = 8
"""Of a digit of the radix sort."""
_DIGITS = 1 << BITS


class Ranking:
    """The best blocks of each row and head, best first."""

    def __init__(self, s: Choice, ids: Any = None, counts: Any = None) -> None:
        """Take room for all sequences, or what one of them has of it."""
        lists = s.p["b"] * s.rows * s.p["hs"]
        self.s = s
        self.ids = workspace((lists, s.kmax), "int32") if ids is None else ids
        self.counts = workspace((lists,), "int32") if counts is None else counts

    def of(self, sequence: Any | None) -> Ranking:
        """Return the ranking of a sequence."""
        parts = (part_of(held, sequence, self.s.p["b"]) for held in (self.ids, self.counts))
        return Ranking(self.s, *parts)

    def fill(self, span: tuple[Any, Any], score: Any, task: Any) -> None:
        """Rank one head's blocks."""
        s = self.s
        heads = T.int32(s.p["hs"])
        row, head = fixed(T.floordiv(task, heads)), fixed(T.floormod(task, heads))
        frame = Frame(s, span, row)
        own = List(s, frame, score, row, head)
        own.without_forced()
        own.best(frame.room)
        keys, ids, total = own.taken()
        with T.serial(0, fixed(T.floordiv(total + (LANES - 1), T.int32(LANES)))) as j:
            # greater keys first, as unsigned numbers in ascending order
            key = T.bitwise_xor(load(keys, j * LANES, lanes=LANES), splat(T.int32(MOST)))
            store(keys, key, j * LANES, lanes=LANES)
        pairs = [[keys, ids], [workspace((s.kmax,), "int32") for _ in range(2)]]
        store(self.counts, total, task)
        for digit in range(32 // BITS):
            last = digit == 32 // BITS - 1
            _pass(pairs[digit % 2], pairs[1 - digit % 2], total, digit * BITS,
                  (self.ids, task) if last else None)  # fmt: skip

    def merge(self, span: tuple[Any, Any], idx: Any, cnt: Any, row: Any) -> None:
        """Walk over the heads' rankings, rank by rank, and write the list of what comes up first."""
        s = self.s
        frame = Frame(s, span, row)
        vectors = -(-s.blocks // LANES)
        mark = workspace((vectors * LANES,), "int32")
        with loop(vectors) as j:
            store(mark, splat(T.int32(0)), j * LANES, lanes=LANES)
        frame.each_forced(lambda i: store(mark, T.int32(1), i))
        taken = Register("int32", 1, T.int32(0))
        with T.serial(0, frame.room) as rank, when(taken.get() < frame.room), loop(s.p["hs"]) as h:
            at = bind(row * s.p["hs"] + h)
            with when(T.And(rank < self.counts[at], taken.get() < frame.room)):
                index = bind(self.ids[at, rank])
                with when(mark[index] == 0):
                    store(mark, T.int32(1), index)
                    taken.set(taken.get() + 1)
        _listed(s, mark, vectors, idx, cnt, row)


def _listed(s: Choice, mark: Any, vectors: int, idx: Any, cnt: Any, row: Any) -> None:
    """Write the ids of marked blocks, ascending."""
    out = Register("int32", 1, T.int32(0))
    with loop(vectors) as j:
        some = reduced("smax", load(mark, j * LANES, lanes=LANES)) > 0
        with when(some), T.serial(0, LANES) as i:
            marked = mark[j * LANES + i] > 0
            with when(marked):
                store(idx, j * LANES + i, row, 0, out.get())
                out.set(out.get() + 1)
    finish(s, idx, cnt, (row, 0), fixed(out.get()))


def finish(s: Choice, idx: Any, cnt: Any, place: tuple[Any, Any], count: Any) -> None:
    """Write a list's length, and -1 behind its end."""
    store(cnt, count, *place)
    with T.serial(0, fixed(T.int32(s.kmax) - count)) as i:
        store(idx, T.int32(-1), *place, count + i)


def _pass(
    source: list[Any], target: list[Any], count: Any, shift: int, ids: tuple[Any, Any] | None
) -> None:
    """Sort pairs by one digit, keeping the order of equal ones; the last pass writes ids only."""
    place = workspace((_DIGITS,), "int32")
    with loop(_DIGITS) as i:
        store(place, T.int32(0), i)

    def digit(key: Any) -> Any:
        return bind(T.bitwise_and(T.shift_right(key, T.int32(shift)), T.int32(_DIGITS - 1)))

    with T.serial(0, count) as i:
        own = digit(source[0][i])
        store(place, place[own] + 1, own)
    total = Register("int32", 1, T.int32(0))
    with loop(_DIGITS) as i:
        here = bind(place[i])
        store(place, total.get(), i)
        total.set(total.get() + here)
    with T.serial(0, count) as i:
        key = bind(source[0][i])
        own = digit(key)
        at = bind(place[own])
        store(place, at + 1, own)
        if ids is not None:
            store(ids[0], source[1][i], ids[1], at)
        else:
            store(target[0], key, at)
            store(target[1], source[1][i], at)
