"""Scores of blocks from their descriptors on x86: lanes are entries, so nothing is summed over lanes.

A task is a KV head of a sequence with a tile of score rows and a part of the entries; its queries'
coefficients (for `quest`: their negative and positive halves, since a maximum of products is the product with
one of the bounds) stay in the first-level cache while the descriptors stream by. Where a softmax follows,
logits go to scratch memory and a second phase turns them into scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import batches, get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.pages import TABLE, paged, table_bytes
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import descriptors, sequences
from mimo_compile.schedules.attention.reach import NEAR_BYTES
from mimo_compile.schedules.attention.score_entries import Entries, emit
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.emit.build import function
from mimo_compile.schedules.emit.vector import LANES, symbol
from mimo_compile.schedules.work import Stream, Tile, busiest, work

PARALLEL_FMA = 200_000
"""Below this many multiply-adds a kernel takes less time than waking the threads does."""


@dataclass(frozen=True, slots=True)
class BlocksConfig:
    """Knobs."""

    tile: int = 1
    """Score rows of a task, which share the loads of descriptors."""
    rows: int = 4
    """Heads of a register tile."""
    wide: int = 4
    """Vectors of entries of a register tile."""
    splits: int = 1
    """Parts of the entries that are worked on independently."""
    parallel: bool = True
    ahead: int = 0
    """Register tiles to prefetch ahead while descriptors are read once."""


class X86ScoreBlocks(Schedule):
    """Coefficients of a few heads times vectors of 16 entries."""

    name = "score_blocks.x86"
    op = "score_blocks"
    version = 2
    config = BlocksConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op, on any x86-64."""
        return workload.op == self.op and hardware.kind == "cpu"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles of rows, register tile, parts, prefetch."""
        s = Entries.of(workload, BlocksConfig(), hardware)
        count, heads = s.count, s.heads
        tiles = tuple(n for n in (1, 4, 16, 64) if n < 2 * count) or (1,)
        rows = tuple(sorted({n for n in (1, 2, 4, 8) if n <= heads} | {min(heads, 8)}))
        wide = tuple(n for n in (1, 2, 4, 8) if n == 1 or n <= s.vectors)
        splits = tuple(n for n in (1, 2, 4, 8, 16) if n == 1 or n * 4 <= s.vectors)
        threads = (False, True) if hardware.threads > 1 else (False,)
        most = 24 if hardware.has_avx512 else 8
        tile = max(n for n in tiles if n <= 16)
        row = max(n for n in rows if n <= 4)
        # pages are put together before they are multiplied
        steps = (0,) if paged(s.p) else (0, 1, 2, 4)
        ahead = int(tile == 1 and len(steps) > 1)
        # a register tile is read while the next one arrives
        vector = s.format.bytes * LANES * s.parts * s.p["d"]
        room = NEAR_BYTES // (2 * vector) if ahead else wide[-1]
        side = max(
            n
            for n in wide
            if (n * row <= (16 if hardware.has_avx512 else 4) and n <= room) or n == 1
        )
        tasks = s.p["b"] * s.p["kv"] * -(-count // tile)
        heavy = get_op(self.op).counts(workload).ops["fma_f32"] >= PARALLEL_FMA
        crew = hardware.threads if heavy else 1
        part = next((n for n in splits if tasks * n >= crew and tasks * n % crew == 0), splits[-1])
        default = BlocksConfig(tile, row, side, part, crew > 1 and tasks * part > 1, ahead)
        return Space(
            BlocksConfig,
            {
                "tile": tiles, "rows": rows, "wide": wide, "splits": splits, "parallel": threads,
                "ahead": steps,
            },
            default,
            lambda c: c.rows * c.wide <= most and (c.ahead == 0 or c.tile == 1),
        )  # fmt: skip

    def lower(self, workload: Workload, config: BlocksConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        s = Entries.of(workload, config, hardware)
        op: Any = get_op(self.op)
        name = symbol(self.op, self.name, self.version, workload, config, hardware.has_avx512)
        args = tuple(
            Arg(a.name, a.role, s.shape(), s.format.stored) if a.name == "desc" else a
            for a in op.args(workload)
        )

        names = [a.name for a in args]

        def body(*buffers: Any) -> None:
            given = dict(zip(names, buffers, strict=True))
            emit(
                s, config, op.softmax_scale(s.p), given["q"], given["pos"], given.get("weight"),
                given.get(TABLE), given["desc"], given["score"],
            )  # fmt: skip

        room = 0
        if s.raw:
            room = 4 * s.p["b"] * s.count * s.p["kv"] * s.heads * s.vectors * LANES
        if paged(s.p):  # of each task
            room += int(s.format.bytes * s.wide * s.parts * LANES * s.p["d"])
        counts = self.work(workload, config, hardware)
        return Kernel(name, function(name, args, body), args, counts, room)

    def work(self, workload: Workload, config: BlocksConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it: whole vectors of entries, read once a tile."""
        s = Entries.of(workload, config, hardware)
        p, need = s.p, get_op(self.op).counts(workload)
        b, lengths = p["b"], batches.lengths(int(p["len"] or p["cap"]), p)
        entries = sum(float(s.filled_groups(n) * s.wide * LANES) for n in lengths)
        heads = float(s.count * p["kv"] * s.heads)
        ops = {
            **need.ops,
            "fma_f32": heads * entries * s.parts * p["d"],
            "add_f32": heads * entries,
        }
        if s.raw:
            ops["exp_f32"] = heads * entries
        tiles = -(-s.count // s.tile)
        row_tiles = -(-s.tile * s.heads // config.rows)
        whole = s.format.bytes * p["kv"] * entries * s.parts * p["d"]
        step = s.format.bytes * config.wide * LANES * s.parts * p["d"]
        state = 4.0 * s.tile * s.heads * s.parts * p["d"]
        streams = [
            Stream(whole, ((tiles, whole / b / p["kv"] + state), (row_tiles, step + state))),
            Stream(4.0 * b * s.count * p["h"] * p["d"]),
            Stream(4.0 * s.count * s.scored * s.blocks * sum(lengths) / p["cap"]),
        ]
        if paged(p):
            streams.append(Stream(table_bytes(lengths, p["page"])))
        if s.raw:
            streams.append(
                Stream(4.0 * b * heads * s.vectors * LANES, ((3, 4.0 * entries),), made=True)
            )
        tasks = b * p["kv"] * tiles * config.splits
        threads = hardware.threads if config.parallel else 1
        return work(
            ops, streams, hardware, tasks=tasks if threads > 1 else 1, share=busiest(tasks, threads),
            useful=need.ops["fma_f32"] / ops["fma_f32"],
            tile=Tile(config.wide, min(config.rows, s.heads), step + state),
        )  # fmt: skip

    def layouts(self, workload: Workload, config: BlocksConfig) -> dict[str, str]:
        """Return the name of the layout of the descriptors."""
        p = get_op(self.op).full(workload)
        name = descriptors.layout_name(parse_cache_format(p["e"]), descriptors.lanes_of(p))
        return {"desc": name}

    def pack(
        self, workload: Workload, config: BlocksConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the descriptors."""
        return sequences.pack_each(workload, arrays, self._pack)

    @staticmethod
    def _pack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
        p = get_op(workload.op).full(workload)
        fmt, lanes = parse_cache_format(p["e"]), descriptors.lanes_of(p)
        return {
            n: descriptors.laid_out(a, fmt, lanes) if n == "desc" else a for n, a in arrays.items()
        }

    def unpack_state(
        self, workload: Workload, config: BlocksConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return the canonical descriptors."""
        return sequences.unpack_each(workload, arrays, self._unpack)

    @staticmethod
    def _unpack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
        op = get_op(workload.op)
        p = op.full(workload)
        fmt, lanes = parse_cache_format(p["e"]), descriptors.lanes_of(p)
        entries, *_, d = next(a.shape for a in op.args(workload) if a.name == "desc")
        return {
            n: descriptors.canonical(a, entries, d, fmt, lanes) if n == "desc" else a
            for n, a in arrays.items()
        }
