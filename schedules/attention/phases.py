"""The two phases of a flash attention kernel: parts of the keys for each tile of queries, and their merge."""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.attention.flash import START, Tile, factor, write_row
from mimo_compile.schedules.attention.reach import Reach, Tiling, fixed
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, store, workspace
from mimo_compile.schedules.emit.vector import LANES, LOG2E, exp2, splat


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
    kind: type[Tile] = Tile,
) -> None:
    """Emit both phases; ``kind`` says how the caches are read and multiplied."""
    p = s.p
    shape = (p["kv"] * s.tiles * splits, s.height)
    if splits > 1:
        part_out = workspace((*shape, s.columns * LANES), "float32")
        part_top, part_sum = workspace(shape, "float32"), workspace(shape, "float32")

    def sink_of(head: Any) -> Any:
        return None if sink is None else bind(sink[head] * T.float32(LOG2E))

    with loop(shape[0], parallel=parallel) as task:
        head, tile = bind(task // (s.tiles * splits)), bind(task // splits % s.tiles)
        # alternately from both ends, so that threads with a contiguous share get equal causal work
        tile = bind(T.if_then_else(tile % 2 == 0, tile // 2, s.tiles - 1 - tile // 2))
        first = fixed(tile * s.tokens)
        reach = Reach(s, pos, first)
        state = kind(s, k, v, head)
        state.begin(q, first, scale)
        share = fixed(T.floordiv(reach.steps + (splits - 1), splits))
        begin = fixed(T.min(task % splits * share, reach.steps))
        state.run(reach, first, begin, fixed(T.min(begin + share, reach.steps)))
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
                by = factor(state.top[row], total, sink_of(query_head))
                at = bind(first + token)
                with T.If(at < p["t"]), T.Then():
                    write_row(
                        out, at, query_head, p["dv"], at < reach.valid,
                        lambda j, n, row=row, by=by: load(state.out, row, j, lanes=n) * splat(by, n),
                    )  # fmt: skip
    if splits > 1:
        _merge(s, splits, pos, sink_of, part_out, part_top, part_sum, out)


def _merge(
    s: Tiling,
    splits: int,
    pos: Any,
    sink_of: Any,
    part_out: Any,
    part_top: Any,
    part_sum: Any,
    out: Any,
) -> None:
    """Add the parts of each row, weighted by their maxima."""
    p = s.p
    with loop(p["kv"] * s.tiles) as task, loop(s.tokens) as token, loop(s.group) as g:
        tile = bind(task % s.tiles)
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
        head = bind(task // s.tiles * s.group + g)
        by = factor(top.get(), total.get(), sink_of(head))

        def value(j: Any, n: int) -> Any:
            acc = Register("float32", n, splat(0.0, n))
            with loop(splits) as i:
                acc.set(
                    acc.get()
                    + load(part_out, task * splits + i, row, j, lanes=n) * splat(weights[i], n)
                )
            return acc.get() * splat(by, n)

        with T.If(at < p["t"]), T.Then():
            write_row(out, at, head, p["dv"], at < pos[1], value)
