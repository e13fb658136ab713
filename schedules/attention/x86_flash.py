"""Attention over a KV cache on x86: one function for decode and prefill, dense, window, ring, sink.

Tasks are (KV head, tile of queries, part of the keys); parts are merged in a second phase. Only
blocks that some query of a tile can see are visited.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.caches import single_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.pages import TABLE
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.flash import Tile
from mimo_compile.schedules.attention.layout import (
    kernel_args,
    layouts,
    pack_caches,
    round_up,
    unpack_caches,
)
from mimo_compile.schedules.attention.pages import visiting
from mimo_compile.schedules.attention.phases import emit
from mimo_compile.schedules.attention.reach import Tiling
from mimo_compile.schedules.attention.work import flash_work
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.emit.build import function
from mimo_compile.schedules.emit.vector import LANES, symbol

PARALLEL_FMA = 200_000
"""Below this many multiply-adds a kernel takes less time than waking the threads does."""
FEW_BLOCKS = 16
"""Parts shorter than this many blocks cost more in merging than they gain."""
SHAPE = frozenset({"tile", "rows", "parallel", "ahead"})
"""Knobs that say which queries share their loads of keys, not how a query adds up what it sees."""


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
    ahead: int = 0
    """Steps to prefetch ahead while one register tile streams over the cache."""


class X86Flash(Schedule):
    """Online softmax with lanes over slots for scores and over dimensions for values."""

    name = "cached_attention.x86_flash"
    op = "cached_attention"
    version = 3
    config = FlashConfig
    stored = "f32"
    """Format of the caches."""
    lay = ""
    """Order of their numbers, as the op's parameter says it."""
    streamed = LANES
    """Slots of a step, by default, where one register tile streams over the cache. While it works on one, the
    next arrives: beside short ones, 32 slots take 1.1 to 1.3 times as long, over caches that memory holds."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op with these caches, on any x86-64."""
        if workload.op != self.op or hardware.kind != "cpu":
            return False
        p = get_op(self.op).full(workload)
        return bool(
            p["c"] == self.stored
            and p.get("lay", "") == self.lay
            and p.get("arith", "float") == "float"
        )

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles of queries, length of a step, parts, register tile."""
        p = get_op(self.op).full(workload)
        group, cap = p["h"] // p["kv"], round_up(p["cap"])
        reach = min(cap, round_up(p["window"] + p["t"]) + LANES if p["window"] else cap)
        tiles = tuple(
            n for n in (1, 2, 4, 8, 16, 32, 64) if n < 2 * p["t"] and n * group <= 256
        ) or (1,)
        return self.space_of(p, hardware, group, reach, tiles)

    def space_of(
        self,
        p: Mapping[str, Any],
        hardware: Hardware,
        group: int,
        reach: int,
        tiles: tuple[int, ...],
    ) -> Space:
        """Return the space of tiles of so many tokens and heads of a group, which see ``reach`` slots."""
        blocks = tuple(n for n in (16, 32, 48, 64, 96, 128, 192, 256) if n == 16 or n <= reach)
        splits = tuple(
            n for n in (1, 2, 4, 8, 16, 32) if n == 1 or (reach >= n * 64 and p["t"] <= 16)
        )
        rows = tuple(
            sorted({n for n in (1, 2, 3, 4, 6, 8) if n <= group * tiles[-1]} | {min(group, 16)})
        )
        default = self._default(p, hardware, tiles, blocks, splits, rows)
        threads = (False, True) if hardware.threads > 1 else (False,)
        return Space(
            FlashConfig,
            {
                "tile": tiles,
                "block": blocks,
                "splits": splits,
                "rows": rows,
                "parallel": threads,
                "ahead": (0, 1, 2),
            },
            default,
            lambda c: c.rows <= c.tile * group and (c.ahead == 0 or c.tile * group <= c.rows),
        )

    def _default(
        self, p: Mapping[str, Any], hardware: Hardware, tiles: tuple[int, ...], blocks: tuple[int, ...],
        splits: tuple[int, ...], rows: tuple[int, ...],
    ) -> FlashConfig:  # fmt: skip
        group = p["h"] // p["kv"]
        tile = max(n for n in tiles if n * group <= 64 or n == 1)
        height = tile * group
        # one query: all its rows in one register tile, which streams over the cache with prefetch
        stream = height == group and height in rows
        row = height if stream else max(n for n in rows if n <= 4 and (height % n == 0 or n == 1))
        # long steps rescale the output less often; where queries are many, the diagonal masks most of one
        far = not p["window"] and p["cap"] >= 8 * p["t"]
        step = max(n for n in blocks if n <= (self.streamed if stream else 256 if far else 64))
        b = p.get("b", 1)
        tasks = b * p["kv"] * -(-p["t"] // tile)
        seen = min(p["cap"], p["window"] or p["cap"])
        work = float(b * p["t"] * p["h"] * seen * (p["d"] + p["dv"]))
        threads = hardware.threads if work >= PARALLEL_FMA else 1
        # enough tasks that none of the threads waits long for another
        part = next(
            (n for n in splits if tasks * n % threads == 0 and tasks * n >= threads), splits[-1]
        )
        if p["cap"] < 2 * FEW_BLOCKS * LANES:
            part = 1
        return FlashConfig(tile, step, part, row, threads > 1 and tasks * part > 1, int(stream))

    def tiling(self, p: Mapping[str, Any], c: FlashConfig, hardware: Hardware) -> Tiling:
        """Return the compile-time sizes of a config."""
        tokens = min(c.tile, p["t"])
        blocks = min(c.block // LANES, round_up(p["cap"]) // LANES)
        rows = min(c.rows, tokens * (p["h"] // p["kv"]))
        cell = single_format(p["c"]).bytes
        return Tiling(
            p, tokens, blocks, rows, self.registers(c, hardware), c.ahead, cell, hardware.has_avx512
        )

    def registers(self, config: FlashConfig, hardware: Hardware) -> int:
        """Return how many accumulator vectors are in flight."""
        return 20 if hardware.has_avx512 else 6

    def tile(self, config: FlashConfig) -> tuple[type[Tile], AbstractContextManager[Any] | None]:
        """Return the arithmetic of a config, and the frame that its instructions need."""
        return Tile, None

    def features(self, config: FlashConfig) -> frozenset[str]:
        """Return the features that a config's instructions need."""
        return frozenset()

    def arithmetic(self, config: FlashConfig) -> str:
        """Return how `flash_work` counts."""
        return "f32"

    def lower(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        op = get_op(self.op)
        p = op.full(workload)
        s = self.tiling(p, config, hardware)
        name = symbol(self.op, self.name, self.version, workload, config, hardware.has_avx512)
        scale = float(p["scale"] or p["d"] ** -0.5)
        args = kernel_args(workload)

        names = [a.name for a in args]

        def body(*buffers: Any) -> None:
            given = dict(zip(names, buffers, strict=True))
            kind, frame = self.tile(config)
            with frame or nullcontext():
                emit(
                    s, config.splits, config.parallel, scale, given["q"], given["pos"], given.get("sink"),
                    given["k_cache"], given["v_cache"], given["out"], kind, visit=visiting(given.get(TABLE)),
                )  # fmt: skip

        workspace_bytes = 0
        if config.splits > 1:
            tasks = s.sequences * p["kv"] * s.tiles * config.splits
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
        s = self.tiling(p, config, hardware)
        return flash_work(
            s, op.lengths(p), config.splits, hardware, parallel=config.parallel,
            arith=self.arithmetic(config),
        )  # fmt: skip

    def order(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> str | None:
        """Steps begin where a tile's first query begins to see, and parts divide what all of it sees.

        So a query that is alone in its tile meets its keys in the same steps and parts whatever the call
        holds besides. Of several, each does if they begin at the same slot, without a window, or steps of
        one block: those that a query does not see add nothing to its sums. A ring must hold a block
        more than the window and a tile, or a tile sees newer positions in slots of older ones.
        """
        if self.op != "cached_attention":
            return None
        p = get_op(self.op).full(workload)
        tile = min(config.tile, p["t"])
        alone = tile == 1
        wide = p["cap"] - p["window"] >= tile + LANES - 1
        aligned = config.splits == 1 and (not p["window"] or (config.block == LANES and wide))
        if not (alone or aligned):
            return None
        knobs = self.config_to_json(config)
        kept = (f"{name}={knobs[name]}" for name in sorted(knobs.keys() - SHAPE))
        return " ".join((self.name, *kept))

    def layouts(self, workload: Workload, config: FlashConfig) -> dict[str, str]:
        """Return the names of the cache layouts."""
        return layouts(workload)

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
