"""Scores of blocks from the keys themselves on x86: lanes are slots, so nothing is summed over lanes.

A task is a KV head of a sequence with a tile of queries and a part of the keys, which it passes over in runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import batches, get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.pages import TABLE, paged, table_bytes
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import channel_layout, layout
from mimo_compile.schedules.attention.score_emit import emit
from mimo_compile.schedules.attention.score_rows import by_lines
from mimo_compile.schedules.attention.score_slots import Slots
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.emit.build import function
from mimo_compile.schedules.emit.vector import LANES, symbol
from mimo_compile.schedules.work import Stream, Tile, busiest, work

FORMATS = ("f32", "bf16")
"""Of the caches that are read."""
PARALLEL_FMA = 200_000
"""Below this many multiply-adds a kernel takes less time than waking the threads does."""


@dataclass(frozen=True, slots=True)
class KeysConfig:
    """Knobs."""

    tile: int = 1
    """Queries of a task; they and the heads of a group share the loads of keys."""
    run: int = 64
    """Slots that are scored before their blocks are; whole blocks."""
    rows: int = 4
    """Rows (query, head) of a register tile."""
    wide: int = 4
    """Vectors of slots of a register tile."""
    splits: int = 1
    """Parts of the keys that are worked on independently."""
    parallel: bool = True
    ahead: int = 0
    """Register tiles to prefetch ahead while keys are read once."""


class X86ScoreKeys(Schedule):
    """A few rows of queries times vectors of 16 slots."""

    name = "score_keys.x86"
    op = "score_keys"
    config = KeysConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op over float caches, on any x86-64."""
        if workload.op != self.op or hardware.kind != "cpu":
            return False
        return get_op(self.op).full(workload)["c"] in FORMATS

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles of queries, runs, register tile, parts, prefetch."""
        s = Slots.of(workload, KeysConfig())
        p, heads = s.p, s.heads
        tiles = tuple(n for n in (1, 4, 16) if n < 2 * p["t"] and n * heads <= 128) or (1,)
        runs = tuple(n for n in (16, 64, 256, 1024) if n == 16 or n < 2 * p["cap"])
        rows = tuple(sorted({n for n in (1, 2, 4, 8) if n <= heads * tiles[-1]} | {min(heads, 8)}))
        splits = tuple(
            n for n in (1, 2, 4, 8, 16) if n == 1 or (p["cap"] >= 256 * n and p["t"] <= 16)
        )
        threads = (False, True) if hardware.threads > 1 else (False,)
        most = 24 if hardware.has_avx512 else 8
        tile = tiles[-1]
        row = max(n for n in rows if n <= 4)
        side = max(n for n in (1, 2, 4, 8) if n * row <= most - 4 or n == 1)
        heavy = get_op(self.op).counts(workload).ops["fma_f32"] >= PARALLEL_FMA
        crew, tasks = hardware.threads if heavy else 1, p["b"] * p["kv"] * -(-p["t"] // tile)
        part = next((n for n in splits if tasks * n >= crew and tasks * n % crew == 0), splits[-1])
        run = max(n for n in runs if n * tile * heads <= 4096 or n == 16)
        streams = (tile * heads <= row or p["kind"] == "channels") and not paged(p)
        default = KeysConfig(
            tile, run, row, side, part, crew > 1 and tasks * part > 1, 2 if streams else 0
        )
        return Space(
            KeysConfig,
            {
                "tile": tiles, "run": runs, "rows": rows, "wide": (1, 2, 4, 8), "splits": splits,
                "parallel": threads, "ahead": (0,) if paged(p) else (0, 1, 2, 4),
            },
            default,
            lambda c: c.rows * c.wide <= most and c.rows <= c.tile * heads,
        )  # fmt: skip

    def lower(self, workload: Workload, config: KeysConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        s, op = Slots.of(workload, config), get_op(self.op)
        p, factor = s.p, self._scale(workload)
        name = symbol(self.op, self.name, self.version, workload, config, hardware.has_avx512)
        args = tuple(
            channel_layout.peaks(a, p["b"], s.format.stored if p["span"] else a.dtype)
            if a.name == "peak"
            else a
            for a in layout.kernel_args(workload)
        )

        names = [a.name for a in args]

        def body(*buffers: Any) -> None:
            given = dict(zip(names, buffers, strict=True))
            emit(
                s, config.splits, config.parallel, factor, given["q"], given["pos"], given.get("guess"),
                given.get("peak"), given["k_cache"], given["score"], given.get(TABLE),
            )  # fmt: skip

        room = 4 * s.height * (s.run + p["d"])
        if p["span"]:
            room += 4 * p["d"]
        if p["kind"] == "oracle":
            room += 4 * p["b"] * p["kv"] * s.tiles * s.height * (s.blocks + s.blocks_of_run)
        counts = self.work(workload, config, hardware)
        assert op.name == self.op
        return Kernel(name, function(name, args, body), args, counts, room)

    def _scale(self, workload: Workload) -> float:
        op: Any = get_op(self.op)
        return float(op.softmax_scale(op.full(workload)))

    def work(self, workload: Workload, config: KeysConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it: whole runs up to each tile's last query."""
        s = Slots.of(workload, config)
        p, need = s.p, get_op(self.op).counts(workload)
        b, lengths = p["b"], batches.lengths(int(p["len"] or p["cap"]), p)
        length, firsts = sum(lengths), range(0, p["t"], s.tile)
        ends = (n - p["t"] + min(first + s.tile, p["t"]) for n in lengths for first in firsts)
        slots = float(sum(-(-end // s.run) * s.run for end in ends))
        deep = p["d"] if by_lines(s) else p["channels"] or p["d"]
        rows = float(p["kv"] * s.height)
        ops = {"fma_f32": rows * slots * deep, "int_op": 2.0 * rows * slots}
        if p["kind"] == "oracle":
            ops["exp_f32"] = rows * slots
        row_tiles = -(-s.height // min(s.rows, s.height))
        each = s.format.bytes * deep
        once = each * p["kv"] * length
        step = each * s.side_by_side() * LANES
        state = 4.0 * s.height * (s.run + deep)
        written = 4.0 * p["t"] * s.scored * length / p["block"]
        passes = max(slots / length, 1.0)
        streams = [
            Stream(once, ((passes, once / b / p["kv"] + state), (row_tiles, step + state))),
            Stream(4.0 * b * p["t"] * p["h"] * p["d"]),
            Stream(written),
            Stream(s.format.bytes * p["kv"] * p["d"] * (length // p["span"] if p["span"] else 0)),
        ]
        if paged(p):
            streams.append(Stream(table_bytes(lengths, p["page"])))
        tasks = b * p["kv"] * s.tiles * config.splits
        threads = hardware.threads if config.parallel else 1
        return work(
            ops, streams, hardware, tasks=tasks if threads > 1 else 1, share=busiest(tasks, threads),
            useful=min(1.0, need.ops["fma_f32"] / ops["fma_f32"]),
            tile=Tile(s.side_by_side(), min(s.rows, s.height), step + state),
        )  # fmt: skip

    def layouts(self, workload: Workload, config: KeysConfig) -> dict[str, str]:
        """Return the name of the layout of the keys."""
        return {"k_cache": layout.layouts(workload)["k_cache"]}

    def pack(
        self, workload: Workload, config: KeysConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the keys; peaks stay as they are, as `descriptors` says."""
        return layout.pack_caches(workload, arrays)

    def unpack_state(
        self, workload: Workload, config: KeysConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return canonical keys."""
        return layout.unpack_caches(workload, arrays)
