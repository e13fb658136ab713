"""Scores that are a softmax, second phase: of gates over blocks, of compressed keys shared out to blocks."""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import NEVER, across, add, put
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, store
from mimo_compile.schedules.emit.vector import LANES, LOG2E, exp2, splat

_LOW = -3e38


def _softmax(held: Any, row: Any, head: Any, vectors: Any, value: Any) -> Any:
    """Replace logits by exponentials of their distance to the largest; returns one over their sum.

    ``value(at)`` gives the 16 logits at ``at``, -inf where there is none.
    """
    top = Register("float32", LANES, splat(_LOW))
    with T.serial(0, vectors) as j:
        top.set(T.max(top.get(), value(j * LANES)))
    most = bind(across(T.max, top.get()))
    total = Register("float32", LANES, splat(0.0))
    with T.serial(0, vectors) as j:
        # from memory, since TVM simplifies what stands in an exponential twice, and in two ways
        power = Register("float32", LANES, (value(j * LANES) - splat(most)) * splat(LOG2E))
        weight = bind(exp2(power.get()))
        store(held, weight, row, head, j * LANES, lanes=LANES)
        total.set(total.get() + weight)
    return bind(T.float32(1) / across(add, total.get()))


def softened(
    vectors: int, blocks: int, held: Any, score: Any, row: Any, head: Any, known: Any, started: Any
) -> None:
    """Emit a gate's softmax over the blocks that have begun: complete ones' logits, 0 for others.

    Args:
        vectors: Vectors of a row of ``held``.
        blocks: Blocks of a row of scores.
        held: ``[rows, heads, 16 * vectors]`` logits.
        score: ``[rows, heads, blocks]``.
        row: Which one.
        head: Likewise.
        known: How many blocks are complete.
        started: How many have begun.
    """

    def value(at: Any) -> Any:
        place = bind(T.ramp(at, 1, LANES))
        logit = T.Select(place < splat(known), load(held, row, head, at, lanes=LANES), splat(0.0))
        return bind(T.Select(place < splat(started), logit, splat(NEVER)))

    used = fixed(T.floordiv(started + (LANES - 1), T.int32(LANES)))
    by = _softmax(held, row, head, used, value)
    with loop(vectors) as j:
        place = bind(T.ramp(j * LANES, 1, LANES))
        soft = load(held, row, head, j * LANES, lanes=LANES) * splat(by)
        put(
            score,
            T.Select(place < splat(started), soft, splat(NEVER)),
            (row, head),
            j * LANES,
            blocks,
        )


def overlapped(
    s: Any, held: Any, score: Any, row: Any, head: Any, known: Any, started: Any
) -> None:
    """Emit the softmax over complete compressed keys, and each block's share of it.

    ``s``: sizes; else as for `softened`, with ``known`` compressed keys and ``started`` blocks.
    """
    together = s.p["agg"] == "sum"
    used = fixed(T.floordiv(known + (LANES - 1), T.int32(LANES)))
    base = head * s.heads
    with loop(s.heads) as g:
        own = bind(base + g)

        def value(at: Any, own: Any = own) -> Any:
            place = bind(T.ramp(at, 1, LANES))
            logit = load(held, row, own, at, lanes=LANES)
            return bind(T.Select(place < splat(known), logit, splat(NEVER)))

        by = _softmax(held, row, own, used, value)
        with T.serial(0, used) as j:
            soft = bind(load(held, row, own, j * LANES, lanes=LANES) * splat(by))
            store(held, soft, row, own, j * LANES, lanes=LANES)
            if together and s.heads > 1:
                with T.If(g > 0), T.Then():
                    total = load(held, row, base, j * LANES, lanes=LANES) + soft
                    store(held, total, row, base, j * LANES, lanes=LANES)
    scored = 1 if together else s.heads
    with loop(s.blocks) as block:
        begin, end = bind(block * s.p["block"]), bind((block + 1) * s.p["block"])
        low = T.max(T.floordiv(begin - s.size, T.int32(s.stride)) + 1, T.int32(0))
        low = fixed(low)
        high = fixed(T.min(T.floordiv(end - 1, T.int32(s.stride)) + 1, known))
        with loop(scored) as g:
            total = Register("float32", 1, T.float32(0))
            with T.serial(0, fixed(T.max(high - low, T.int32(0)))) as i:
                at = bind((low + i) * s.stride)
                share = T.min(at + s.size, end) - T.max(at, begin)
                part = T.cast(share, "float32") * T.float32(1.0 / s.size)
                total.set(total.get() + held[row, base + g, low + i] * part)
            value = T.if_then_else(block < started, total.get(), T.float32(NEVER))
            store(score, value, row, head * scored + g, block)
