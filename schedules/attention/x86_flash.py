"""Attention over a KV cache on x86: one function for decode and prefill, dense, window, ring and sink.

Tasks are (KV head, tile of queries, part of the keys); parts are merged in a second phase. Only blocks that some
query of a tile can see are visited.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.flash import START, Tile, factor, write_row
from mimo_compile.schedules.attention.layout import (
    LAYOUTS,
    kernel_args,
    pack_caches,
    round_up,
    unpack_caches,
)
from mimo_compile.schedules.attention.reach import Reach, Tiling, fixed
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    function,
    load,
    loop,
    store,
    workspace,
)
from mimo_compile.schedules.emit.vector import LANES, LOG2E, exp2, splat, symbol

PARALLEL_FMA = 200_000
"""Below this many multiply-adds a kernel takes less time than waking the threads does."""
FEW_BLOCKS = 16
"""Parts shorter than this many blocks cost more in merging than they gain."""


@dataclass(frozen=True, slots=True)
class FlashConfig:
    """Knobs of flash attention."""

    tile: int = 1
    """Query tokens of a task; they and the heads of a group share the loads of keys and values."""
    block: int = 64
    """Slots of a softmax step; a multiple of 16."""
    splits: int = 1
    """Parts of the KV length that are worked on independently and merged."""
    rows: int = 4
    """Rows (token, head) of a register tile."""
    parallel: bool = True


class X86Flash(Schedule):
    """Online softmax with lanes over slots for scores and over dimensions for values."""

    name = "cached_attention.x86_flash"
    op = "cached_attention"
    config = FlashConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op, on any x86-64."""
        return workload.op == self.op and hardware.kind == "cpu"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles of queries, length of a step, parts, register tile."""
        p = get_op(self.op).full(workload)
        group, cap = p["h"] // p["kv"], round_up(p["cap"])
        reach = min(cap, round_up(p["window"] + p["t"]) + LANES if p["window"] else cap)
        tiles = tuple(
            n for n in (1, 2, 4, 8, 16, 32, 64) if n < 2 * p["t"] and n * group <= 256
        ) or (1,)
        blocks = tuple(n for n in (16, 32, 64, 128, 256) if n == 16 or n <= reach)
        splits = tuple(
            n for n in (1, 2, 4, 8, 16, 32) if n == 1 or (reach >= n * 64 and p["t"] <= 16)
        )
        rows = tuple(n for n in (1, 2, 3, 4, 6, 8) if n <= max(1, group * tiles[-1]))
        default = self._default(p, hardware, tiles, blocks, splits, rows)
        threads = (False, True) if hardware.threads > 1 else (False,)
        return Space(
            FlashConfig,
            {"tile": tiles, "block": blocks, "splits": splits, "rows": rows, "parallel": threads},
            default,
            lambda c: c.rows <= c.tile * group,
        )

    def _default(
        self, p: Mapping[str, Any], hardware: Hardware, tiles: tuple[int, ...], blocks: tuple[int, ...],
        splits: tuple[int, ...], rows: tuple[int, ...],
    ) -> FlashConfig:  # fmt: skip
        group = p["h"] // p["kv"]
        tile = max(n for n in tiles if n * group <= 64 or n == 1)
        height = tile * group
        step = max(n for n in blocks if n <= 64)
        row = max(n for n in rows if n <= 4 and n <= height and (height % n == 0 or n == 1))
        tasks = p["kv"] * -(-p["t"] // tile)
        work = float(p["t"] * p["h"] * min(p["cap"], p["window"] or p["cap"]) * (p["d"] + p["dv"]))
        threads = hardware.threads if work >= PARALLEL_FMA else 1
        # enough tasks that none of the threads waits long for another
        part = next(
            (n for n in splits if tasks * n % threads == 0 and tasks * n >= threads), splits[-1]
        )
        if p["cap"] < 2 * FEW_BLOCKS * LANES:
            part = 1
        return FlashConfig(tile, step, part, row, threads > 1 and tasks * part > 1)

    def tiling(self, p: Mapping[str, Any], c: FlashConfig, hardware: Hardware) -> Tiling:
        """Return the compile-time sizes of a config."""
        tokens = min(c.tile, p["t"])
        blocks = min(c.block // LANES, round_up(p["cap"]) // LANES)
        registers = 20 if hardware.has_avx512 else 6
        return Tiling(p, tokens, blocks, min(c.rows, tokens * (p["h"] // p["kv"])), registers)

    def lower(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        op = get_op(self.op)
        p = op.full(workload)
        s = self.tiling(p, config, hardware)
        name = symbol(self.op, self.name, self.version, workload, config, hardware.has_avx512)
        scale = float(p["scale"] or p["d"] ** -0.5)
        args = kernel_args(workload)

        def body(q: Any, pos: Any, *rest: Any) -> None:
            sink, (k, v, out) = (rest[0] if p["sink"] else None), rest[-3:]
            _emit(s, config, scale, q, pos, sink, k, v, out)

        workspace_bytes = 0
        if config.splits > 1:
            tasks = p["kv"] * s.tiles * config.splits
            workspace_bytes = 4 * tasks * s.height * (s.columns * LANES + 2)
        return Kernel(
            name,
            function(name, args, body),
            args,
            self.counts(workload, config, hardware),
            workspace_bytes,
        )

    def counts(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Counts:
        """Return the work on whole steps: scores of every visited slot, values of the written ones."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        s = self.tiling(p, config, hardware)
        length = op.kv_length(p)
        scored = valued = 0
        for first in range(0, p["t"], s.tokens):
            steps, live = visited(s, length - p["t"], p["t"], first)
            scored, valued = scored + steps * s.blocks * LANES, valued + live
        rows = float(s.group * s.tokens * p["kv"])
        read = 4.0 * p["kv"] * (scored * p["d"] + valued * s.columns * LANES)
        once = op.counts(workload).bytes["dram"]
        return Counts(
            {
                "fma_f32": rows * (scored * p["d"] + valued * s.columns * LANES),
                "exp_f32": rows * scored,
            },
            {"dram": once, "l2": max(read, once)},
        )

    def layouts(self, workload: Workload, config: FlashConfig) -> dict[str, str]:
        """Return the names of the cache layouts."""
        return LAYOUTS

    def pack(
        self, workload: Workload, config: FlashConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the caches; the sink stays as it is."""
        return pack_caches(workload, arrays)

    def unpack_state(
        self, workload: Workload, config: FlashConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return canonical caches."""
        return unpack_caches(workload, arrays)


def visited(s: Tiling, start: int, valid: int, first: int) -> tuple[int, int]:
    """Return (steps, written slots whose values are read) of the tile from token ``first`` on."""
    cap, window = int(s.p["cap"]), int(s.p["window"])
    last = start + valid - 1
    low = max(0, last - cap + 1, start + first - window + 1 if window else 0)
    count = min(start + first + s.tokens - 1, last) - low + 1 if first < valid else 0
    if count <= 0:
        return 0, 0
    block, end = low % cap // LANES, low % cap + count
    if end <= cap:
        total = -(-end // LANES) - block
    else:
        total = s.cache_blocks - block + min(-(-(end - cap) // LANES), block)
    written = min(last + 1, cap)
    live = sum(
        min(max(written - (block + i) % s.cache_blocks * LANES, 0), LANES) for i in range(total)
    )
    return -(-total // s.blocks), live


def _emit(
    s: Tiling, c: FlashConfig, scale: float, q: Any, pos: Any, sink: Any, k: Any, v: Any, out: Any
) -> None:
    """Emit both phases."""
    p, splits = s.p, c.splits
    shape = (p["kv"] * s.tiles * splits, s.height)
    if splits > 1:
        part_out = workspace((*shape, s.columns * LANES), "float32")
        part_top, part_sum = workspace(shape, "float32"), workspace(shape, "float32")

    def sink_of(head: Any) -> Any:
        return None if sink is None else bind(sink[head] * T.float32(LOG2E))

    with loop(shape[0], parallel=c.parallel) as task:
        head, tile = bind(task // (s.tiles * splits)), bind(task // splits % s.tiles)
        # alternately from both ends, so that threads with a contiguous share get equal causal work
        tile = bind(T.if_then_else(tile % 2 == 0, tile // 2, s.tiles - 1 - tile // 2))
        first = fixed(tile * s.tokens)
        reach = Reach(s, pos, first)
        state = Tile(s, k, v, head)
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
