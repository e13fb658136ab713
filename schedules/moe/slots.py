"""Slots, the (token, choice) pairs of a layer, sorted by expert: each weight is read once for all tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    choose,
    loop,
    store,
    when,
    workspace,
)
from mimo_compile.schedules.moe.problem import Problem

_ROOM = (1, 2, 3, 4, 6)
"""Slots that visits have room for which take what is left."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Slots sorted by expert, in the kernel's workspace."""

    hits: Any
    """``[1]``: number of experts that have slots."""
    expert: Any
    """``[E]``: the hit experts, ascending."""
    start: Any
    """``[E + 1]``: first sorted position of each hit expert, then the end."""
    token: Any
    """``[T * k]``: token of each sorted position."""
    place: Any
    """``[T * k]``: sorted position of each slot, -1 for an id that is no expert."""


def sorted_slots(p: Problem, ids: Any) -> Slots:
    """Emit counting, then placing of slots: stable, serial, tiny."""
    slots = Slots(*(workspace((n,), "int32") for n in (1, p.e, p.e + 1, p.slots, p.slots)))
    count = workspace((p.e,), "int32")
    with loop(p.e) as e:
        store(count, T.int32(0), e)

    def each(action: Callable[[Any, Any], None]) -> None:
        with loop(p.t) as t, loop(p.k) as j:
            e = bind(ids[t, j])
            with when(T.And(e >= 0, e < p.e)):
                action(t * p.k + j, e)

    with loop(p.slots) as s:
        store(slots.place, T.int32(-1), s)
    each(lambda s, e: store(count, count[e] + 1, e))
    total, hits = Register("int32", 1, T.int32(0)), Register("int32", 1, T.int32(0))
    with loop(p.e) as e, when(count[e] > 0):
        number = bind(count[e])
        store(
            slots.expert,
            T.cast(e, "int32") if not isinstance(e, int) else T.int32(e),
            hits.get(),
        )
        store(slots.start, total.get(), hits.get())
        store(count, total.get(), e)  # from here on: where its next slot goes
        total.set(total.get() + number)
        hits.set(hits.get() + 1)
    store(slots.start, total.get(), hits.get())
    store(slots.hits, hits.get(), 0)

    def place(s: Any, e: Any) -> None:
        at = bind(count[e])
        store(slots.token, T.cast(T.floordiv(s, p.k), "int32"), at)
        store(slots.place, at, s)
        store(count, at + 1, e)

    each(place)
    return slots


def rooms(size: int) -> list[int]:
    """Return the slots that a visit of the rest may have room for, ascending, where one takes it."""
    return [*(s for s in _ROOM if s < size), size]


def visits(
    count: Any, size: int, emit: Callable[[Any, int, int], None], *, once: bool = False
) -> None:
    """Emit visits of all slots of an expert to one tile of its rows: ``emit(done, room, sure)``.

    ``done`` of the slots come before; there is room for ``room``, of which ``sure`` are there in any case.

    Args:
        count: Slots of the expert.
        size: Room of most visits.
        emit: Emits one visit.
        once: What is left takes one visit, with room for one more at most up to 8, instead of a visit for
            each power of two; ``size`` need not be one then.
    """
    if once:
        _with_room(count, rooms(size), emit)
        return
    with T.serial(0, T.floordiv(count, size)) as i:
        emit(i * size, size, size)
    while (size := size // 2) >= 1:
        with when(T.bitwise_and(count, size) != 0):
            # what the larger visits have done: the higher bits of the count
            emit(T.bitwise_and(count, T.int32(-2 * size)), size, size)


def _with_room(count: Any, rooms: list[int], emit: Callable[[Any, int, int], None]) -> None:
    """Emit visits with the most room, and a last one with the least of ``rooms`` that holds what is left."""
    most = rooms[-1]
    with T.serial(0, T.floordiv(count + (most - 1), most)) as i:
        done = bind(i * most)
        left = bind(count - done)

        def choose_from(index: int) -> None:
            room = rooms[index]
            sure = rooms[index - 1] + 1 if index else 1
            if room == most:
                emit(done, room, sure)
                return
            choose(left <= room, lambda: emit(done, room, sure), lambda: choose_from(index + 1))

        choose_from(0)
