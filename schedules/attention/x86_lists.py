"""Attention over listed blocks of a KV cache on x86: decode and prefill, window, sink, pages, logarithms.

Tasks are (group of query heads, tile of queries, part of its list); parts are merged in a second phase. What
the unions of lists and windows hold is visited in parts of 16 slots (see `lists`), so blocks of 16, 32, ...
slots are read once, in whole vectors; of smaller ones the parts that they lie in are.

Kernels trust a list to be as `block_lists` says, and read whatever slots it names: lists come from
`select_blocks`, whose kernels are proved to make no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.layout import kernel_args, round_up
from mimo_compile.schedules.attention.lists import ListTiling, visiting
from mimo_compile.schedules.attention.lists_work import lists_work
from mimo_compile.schedules.attention.phases import emit
from mimo_compile.schedules.attention.reach import NEAR_BYTES
from mimo_compile.schedules.attention.x86_flash import (
    FEW_BLOCKS,
    PARALLEL_FMA,
    FlashConfig,
    X86Flash,
)
from mimo_compile.schedules.attention.x86_flash_pairs import X86FlashPairs
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.emit.build import function
from mimo_compile.schedules.emit.vector import LANES, symbol


class X86Lists(X86Flash):
    """The tiles of dense attention over what lists name."""

    name = "sparse_attention.x86_lists"
    op = "sparse_attention"
    streamed = 128
    """Most slots of a default step that nothing but prefetching brings in time."""
    distance = 1
    """Steps that a default prefetches ahead in blocks of more than one part."""

    def visit(self, s: ListTiling, buffers: Mapping[str, Any]) -> Callable[..., Any]:
        """Return what a tile visits, see `phases.emit`."""
        return visiting(s, buffers)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles of queries with one list, length of a step, parts, register tile."""
        p = get_op(self.op).full(workload)
        group = p["h"] // max(p["hs"], p["kv"])
        return self.space_of(p, hardware, group, _reach(p), self.tiles(p))

    def tiles(self, p: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the tokens that a tile may have."""
        group = p["h"] // max(p["hs"], p["kv"])
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        return tuple(n for n in sizes if _fits(n, p) and n * group <= 256) or (1,)

    def _default(
        self, p: Mapping[str, Any], hardware: Hardware, tiles: tuple[int, ...], blocks: tuple[int, ...],
        splits: tuple[int, ...], rows: tuple[int, ...],
    ) -> FlashConfig:  # fmt: skip
        group, groups = p["h"] // max(p["hs"], p["kv"]), max(p["hs"], p["kv"])
        tile = max(n for n in tiles if n * group <= 64 or n == 1)
        height = tile * group
        stream = height == group and height in rows
        row = height if stream else max(n for n in rows if n <= 4 and (height % n == 0 or n == 1))
        step = max(n for n in blocks if n <= (self.streamed if stream else 64))
        tasks = p["b"] * groups * -(-p["t"] // tile)
        work = float(p["b"] * p["t"] * p["h"] * _reach(p) * (p["d"] + p["dv"]))
        threads = hardware.threads if work >= PARALLEL_FMA else 1
        part = next(
            (n for n in splits if tasks * n % threads == 0 and tasks * n >= threads), splits[-1]
        )
        if _reach(p) < 2 * FEW_BLOCKS * LANES:
            part = 1
        wide = parse_cache_format(p["c"]).bytes * (p["d"] + p["dv"])
        near = p["block"] > LANES and (self.distance + 1) * step * wide <= NEAR_BYTES
        ahead = int(stream) * (self.distance if near else 1)
        return FlashConfig(tile, step, part, row, threads > 1 and tasks * part > 1, ahead)

    def tiling(self, p: Mapping[str, Any], c: FlashConfig, hardware: Hardware) -> ListTiling:
        """Return the compile-time sizes of a config."""
        tokens = min(c.tile, p["t"])
        blocks = min(c.block // LANES, round_up(p["cap"]) // LANES)
        rows = min(c.rows, tokens * (p["h"] // max(p["hs"], p["kv"])))
        cell = parse_cache_format(p["c"]).bytes
        return ListTiling(
            p, tokens, blocks, rows, self.registers(c, hardware), c.ahead, cell, hardware.has_avx512
        )

    def lower(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        s = self.tiling(p, config, hardware)
        name = symbol(self.op, self.name, self.version, workload, config, hardware.has_avx512)
        args = kernel_args(workload)
        names = [a.name for a in args]

        def body(*buffers: Any) -> None:
            b = dict(zip(names, buffers, strict=True))
            kind, frame = self.tile(config)
            with frame or nullcontext():
                emit(
                    s, config.splits, config.parallel, op.softmax_scale(p), b["q"], b["pos"],
                    b.get("sink"), b["k_cache"], b["v_cache"], b["out"], kind, b["lse"],
                    self.visit(s, b),
                )  # fmt: skip

        workspace_bytes = 0
        if config.splits > 1:
            tasks = s.sequences * s.groups * s.tiles * config.splits
            workspace_bytes = 4 * tasks * s.height * (s.columns * LANES + 2)
        return Kernel(
            name,
            function(name, args, body),
            args,
            self.work(workload, config, hardware),
            workspace_bytes,
            self.features(config),
        )

    def work(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        return lists_work(
            self.tiling(p, config, hardware), op.lengths(p), config.splits, hardware,
            parallel=config.parallel, arith=self.arithmetic(config),
        )  # fmt: skip


class X86ListsPairs(X86FlashPairs, X86Lists):
    """`X86Lists` over bfloat16 caches."""

    name = "sparse_attention.x86_lists_pairs"
    op = "sparse_attention"
    version = 6
    streamed = LANES
    distance = 2


def short_step(p: Mapping[str, Any], most: int) -> int:
    """Return the slots of a step, of which one is read while the next one arrives, if not ``most``."""
    wide = parse_cache_format(p["c"]).bytes * (p["d"] + p["dv"])
    return most if 2 * most * wide <= NEAR_BYTES else LANES


def _reach(p: Mapping[str, Any]) -> int:
    """Return how many slots a list and its window may hold, in whole vectors."""
    return min(round_up(p["cap"]), round_up(p["kmax"] * p["block"] + p["window"]))


def _fits(tile: int, p: Mapping[str, Any]) -> bool:
    """Say whether tiles of so many tokens never have two lists."""
    if p["rows"] >= p["t"]:
        return bool(tile < 2 * p["t"])
    return math.gcd(tile, p["rows"]) == tile
