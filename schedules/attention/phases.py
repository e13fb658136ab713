"""The two phases of a flash attention kernel: parts of the keys for each tile of queries, and their merge."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mimo_compile.ir.ops.pages import paged
from mimo_compile.schedules.attention.flash import MASKED, START, Tile, factor, write_row
from mimo_compile.schedules.attention.reach import Reach, Tiling, fixed
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, store, workspace
from mimo_compile.schedules.emit.vector import LANES, LOG2E, exp2, log2, splat


class Turn:
    """Whose turn it is: a sequence of a batch, or the only one."""

    def __init__(self, s: Tiling, pos: Any, sequence: Any | None) -> None:
        self.sequence = sequence
        """None: there is one."""
        self.pos = pos if sequence is None else (pos[sequence, 0], pos[sequence, 1])
        """Start and valid."""
        self.before = None if sequence is None else bind(sequence * s.p["t"])
        """Rows of the sequences before it."""

    def row(self, token: Any) -> Any:
        """Return the row of a token in queries and results."""
        return token if self.before is None else self.before + token


def emit(
    s: Tiling,
    splits: int,
    parallel: bool,
    scale: float,
    q: Any,
    pos: Any,
    sink: Any,
    k: Any,
    v: Any,
    out: Any,
    kind: Callable[..., Tile] = Tile,
    lse: Any = None,
    visit: Callable[[Tiling, Any, Any, Any], Any] | None = None,
) -> None:
    """Emit both phases.

    Args:
        s: Sizes.
        splits: Parts of the keys.
        parallel: Spread tasks over threads.
        scale: Factor on q.k.
        q: Queries.
        pos: Start and valid, of each sequence of a batch.
        sink: Logits of phantom keys, or None.
        k: Cache of keys.
        v: Cache of values.
        out: Results.
        kind: How the caches are read and multiplied.
        lse: Where the logarithms (base e) of the denominators go; None: nowhere.
        visit: Returns the slots to visit (a `Reach`, or what answers as one) from the sizes, whose `Turn` it
            is, the first token of a tile and its group of query heads; None: all that causality and window
            leave.
    """
    p = s.p
    batch, run = s.sequences, s.tiles * splits
    shape = (s.groups * batch * run, s.height)
    if splits > 1:
        part_out = workspace((*shape, s.columns * LANES), "float32")
        part_top, part_sum = workspace(shape, "float32"), workspace(shape, "float32")

    def sink_of(head: Any) -> Any:
        if sink is None:
            return None
        # the limit keeps LLVM from fusing the product with a later sum, which it does in some loops only
        return bind(T.max(T.float32(MASKED), sink[head] * T.float32(LOG2E)))

    with loop(shape[0], parallel=parallel) as task:
        # sequences differ in length: threads, which take runs of tasks, get a part of each
        head, tile = bind(task // (run * batch)), bind(task // splits % s.tiles)
        turn = Turn(s, pos, None if batch == 1 else bind(task // run % batch))
        # alternately from both ends, so that threads with a contiguous share get equal causal work
        tile = bind(T.if_then_else(tile % 2 == 0, tile // 2, s.tiles - 1 - tile // 2))
        first = fixed(tile * s.tokens)
        reach = Reach(s, turn.pos, first) if visit is None else visit(s, turn, first, head)
        state = _tile_of(s, kind, k, v, head, turn)
        state.begin(q, first, scale)
        share = fixed(T.floordiv(reach.steps + (splits - 1), splits))
        begin = fixed(T.min(task % splits * share, reach.steps))
        state.run(reach, first, begin, fixed(T.min(begin + share, reach.steps)))
        state.end()
        with loop(s.tokens) as token, loop(s.group) as g:
            row, query_head = token * s.group + g, bind(head * s.group + g)
            total = state.denominator(row)
            if splits > 1:
                store(part_top, state.top[row], task, row)
                store(part_sum, total, task, row)
                with loop(s.columns) as j:
                    store(
                        part_out,
                        load(state.out, row, j * LANES, lanes=LANES),
                        task,
                        row,
                        j * LANES,
                        lanes=LANES,
                    )
            else:
                own_sink = sink_of(query_head)
                by = factor(state.top[row], total, own_sink)
                at = bind(first + token)
                with T.If(at < p["t"]), T.Then():
                    if lse is not None:
                        high = log_sum(state.top[row], total, own_sink)
                        write_lse(lse, turn.row(at), query_head, at < reach.valid, high)
                    write_row(
                        out, turn.row(at), query_head, p["dv"], at < reach.valid,
                        lambda j, n, row=row, by=by: load(state.out, row, j, lanes=n) * splat(by, n),
                    )  # fmt: skip
    if splits > 1:
        _merge(s, splits, pos, sink_of, part_out, part_top, part_sum, out, lse)


def _tile_of(s: Tiling, kind: Callable[..., Tile], k: Any, v: Any, head: Any, turn: Turn) -> Tile:
    """Return the tile of a group of query heads, over the caches of its sequence and KV head."""
    own = head if s.groups == s.p["kv"] else bind(head * s.p["kv"] // s.groups)
    if turn.sequence is not None and not paged(s.p):
        own = bind(turn.sequence * s.p["kv"] + own)
    state = kind(s, k, v, own, head)
    state.before = turn.before
    return state


def _merge(
    s: Tiling,
    splits: int,
    pos: Any,
    sink_of: Any,
    part_out: Any,
    part_top: Any,
    part_sum: Any,
    out: Any,
    lse: Any,
) -> None:
    """Add the parts of each row, weighted by their maxima."""
    p, batch = s.p, s.sequences
    with loop(s.groups * batch * s.tiles) as task, loop(s.tokens) as token, loop(s.group) as g:
        tile = bind(task % s.tiles)
        turn = Turn(s, pos, None if batch == 1 else bind(task // s.tiles % batch))
        tile = bind(T.if_then_else(tile % 2 == 0, tile // 2, s.tiles - 1 - tile // 2))
        row, at = bind(token * s.group + g), bind(tile * s.tokens + token)
        top = Register("float32", 1, T.float32(START))
        total = Register("float32", 1, T.float32(0))
        weights = workspace((splits,), "float32")
        with loop(splits) as i:
            top.set(T.max(top.get(), part_top[task * splits + i, row]))
        with loop(splits) as i:
            weight = bind(exp2(part_top[task * splits + i, row] - top.get(), 1))
            store(weights, weight, i)
            total.set(total.get() + part_sum[task * splits + i, row] * weight)
        head = bind(task // (s.tiles * batch) * s.group + g)
        own_sink = sink_of(head)
        by = factor(top.get(), total.get(), own_sink)

        def value(j: Any, n: int) -> Any:
            acc = Register("float32", n, splat(0.0, n))
            with loop(splits) as i:
                acc.set(
                    acc.get()
                    + load(part_out, task * splits + i, row, j, lanes=n) * splat(weights[i], n)
                )
            return acc.get() * splat(by, n)

        with T.If(at < p["t"]), T.Then():
            if lse is not None:
                high = log_sum(top.get(), total.get(), own_sink)
                write_lse(lse, turn.row(at), head, at < turn.pos[1], high)
            write_row(out, turn.row(at), head, p["dv"], at < turn.pos[1], value)


def log_sum(top: Any, total: Any, sink: Any | None) -> Any:
    """Return the logarithm, base e, of a row's denominator, whose maximum and sink are to base 2."""
    if sink is None:
        return (top + log2(total, 1)) * T.float32(math.log(2))
    high = bind(T.max(top, sink))
    total = total * exp2(top - high, 1) + exp2(sink - high, 1)
    return (high + log2(bind(total), 1)) * T.float32(math.log(2))


def write_lse(lse: Any, token: Any, head: Any, valid: Any, value: Any) -> None:
    """Write the logarithm of a row's denominator; of padding it is that of nothing."""
    store(lse, T.if_then_else(valid, value, T.float32(-math.inf)), token, head)
