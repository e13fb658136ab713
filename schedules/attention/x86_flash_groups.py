"""Attention over KV caches in groups of few bits on x86: `x86_flash` with codes that are read as they are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.kv_groups import GROUPED, GroupedFormat, read_bytes
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.pages import paged, table_bytes
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import int8_dot
from mimo_compile.schedules.attention.fours import ROWS
from mimo_compile.schedules.attention.group_integers import Madd, Vnni
from mimo_compile.schedules.attention.group_layout import elements, key_channels
from mimo_compile.schedules.attention.group_reach import GROUP, GroupReach, group_steps
from mimo_compile.schedules.attention.group_tile import GroupTile, Real
from mimo_compile.schedules.attention.layout import kernel_args
from mimo_compile.schedules.attention.pages import Table
from mimo_compile.schedules.attention.phases import Turn, emit
from mimo_compile.schedules.attention.reach import Tiling
from mimo_compile.schedules.attention.work import spread
from mimo_compile.schedules.attention.x86_flash import FlashConfig, X86Flash
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.emit.build import function
from mimo_compile.schedules.emit.vector import LANES, symbol
from mimo_compile.schedules.work import Stream, Tile, work

MANY = 16
"""Rows of a register tile from which on integers would not fit the registers."""
TILES: dict[str, type[GroupTile]] = {"vnni": Vnni, "madd": Madd, "real": Real}
"""By the knob ``arith``."""
EXACT = frozenset({"real"})
"""Arithmetic that `CachedAttention.exact_bound` holds for."""


@dataclass(frozen=True, slots=True)
class GroupsConfig(FlashConfig):
    """Knobs of flash attention over caches in groups; a step is one group."""

    arith: str = "real"
    """``real``: codes become float32 in scratch memory; ``vnni``, ``madd``: codes are multiplied by integers
    of 8 or 16 bits, in dots of bytes."""


class X86FlashGroups(X86Flash):
    """The same tiles and parts; steps over groups of codes, then over the tail."""

    name = "cached_attention.x86_flash_groups"
    version = 8
    config = GroupsConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op with caches in groups, on any x86-64."""
        if workload.op != self.op or hardware.kind != "cpu":
            return False
        return get_op(self.op).full(workload)["c"] in GROUPED

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return the float32 kernel's space with one length of steps, and how codes are multiplied."""
        base = super().space(workload, hardware)
        p = get_op(self.op).full(workload)
        group, best = p["h"] // p["kv"], int8_dot.best_way(hardware)
        kinds = ("real",) if best is None else (best, "real")
        knobs = {**base.knobs, "block": (GROUP,), "arith": kinds}

        def legal(c: GroupsConfig) -> bool:
            return base.legal(c) and (c.arith == "real" or c.rows < MANY)

        default = GroupsConfig(**self.config_to_json(base.default))
        default = replace(default, block=GROUP)
        if best == "vnni":
            height = default.tile * group
            rows = max(n for n in knobs["rows"] if int(n) <= min(8, height))
            ahead = 1 if height <= int(rows) else 0
            default = replace(default, rows=int(rows), ahead=ahead, arith=best)
        return Space(GroupsConfig, knobs, default, legal)

    def format(self, workload: Workload) -> GroupedFormat:
        """Return the format of a workload's caches."""
        return GROUPED[get_op(self.op).full(workload)["c"]]

    def tiling(self, p: Any, c: FlashConfig, hardware: Hardware) -> Tiling:
        """Return the compile-time sizes of a config."""
        tokens = min(c.tile, p["t"])
        rows = min(c.rows, tokens * (p["h"] // p["kv"]))
        return Tiling(
            p, tokens, GROUP // LANES, rows, self.registers(c, hardware), c.ahead,
            GROUPED[p["c"]].bits / 8, hardware.has_avx512,
        )  # fmt: skip

    def exact(self, config: FlashConfig) -> bool:
        """Codes made real are."""
        return self._arith(config) in EXACT

    def features(self, config: FlashConfig) -> frozenset[str]:
        """Return the features that a config's instructions need."""
        return int8_dot.WAYS.get(self._arith(config), frozenset())

    def lower(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p, fmt = get_op(self.op).full(workload), self.format(workload)
        s, arith = self.tiling(p, config, hardware), self._arith(config)
        name = symbol(self.op, self.name, self.version, workload, config, hardware.has_avx512)
        scale = float(p["scale"] or p["d"] ** -0.5)
        args = kernel_args(workload)
        kind = TILES[arith]

        def made(s: Tiling, k: Any, v: Any, head: Any, lead: Any) -> Any:
            return kind(s, fmt, k, v, head, lead)

        def body(q: Any, pos: Any, *rest: Any) -> None:
            sink, out, states = (rest[0] if p["sink"] else None), rest[-1], rest[-7:-1]
            pages = rest[-8] if paged(p) else None
            frame: AbstractContextManager[None] = (
                nullcontext() if arith == "real" else int8_dot.frame(arith)
            )
            with frame:
                emit(
                    s, config.splits, config.parallel, scale, q, pos, sink, states[:3], states[3:],
                    out, made, visit=partial(_visit, fmt, pages),
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
        p, fmt = op.full(workload), self.format(workload)
        s, arith = self.tiling(p, config, hardware), self._arith(config)
        return groups_work(s, fmt, op.lengths(p), config.splits, hardware, config.parallel, arith)

    @staticmethod
    def _arith(config: FlashConfig) -> str:
        assert isinstance(config, GroupsConfig)
        return config.arith


def _visit(
    fmt: GroupedFormat, pages: Any, s: Tiling, turn: Turn, first: Any, head: Any
) -> GroupReach:
    table = None if pages is None else Table(pages, turn.sequence, int(s.p["page"]))
    return GroupReach(s, fmt, turn.pos, first, table)


def groups_work(
    s: Tiling, fmt: GroupedFormat, lengths: Sequence[int], splits: int, hardware: Hardware,
    parallel: bool, arith: str,
) -> Counts:  # fmt: skip
    """Return the counts on whole steps, at the op's nominal KV length.

    Args:
        s: Sizes of the kernel.
        fmt: Format of the caches.
        lengths: Positions in the cache of each sequence, those of this step's tokens among them.
        splits: Parts of the keys.
        hardware: Whose caches and threads count.
        parallel: Tasks are spread over threads.
        arith: See `GroupsConfig`.
    """
    p, height, heads = s.p, float(s.height), float(s.p["kv"])
    d, width, per = float(p["d"]), float(s.columns * LANES), elements(fmt)
    packed_d = float(-(-p["d"] // per) * per)
    first = np.arange(0, p["t"], s.tokens)
    each = [group_steps(s, length - p["t"], first) for length in lengths]
    old, new, live = (np.concatenate(parts) for parts in zip(*each, strict=True))
    codes, tail, rows_read = (float(n.sum()) for n in (old * GROUP, new * GROUP, live))
    row_tiles = sum(count for _, count in s.row_tiles())
    ops = {
        # the last term: what was summed shrinks where a step raises the maximum
        "fma_f32": heads * height * (tail * d + rows_read * width + (codes + tail) / GROUP * LANES),
        "exp_f32": heads * height * (codes + tail),
        "add_f32": heads * height * (2.0 * (codes + tail) + (codes + tail) / GROUP * width),
    }
    numbers = heads * codes * (packed_d + width)
    if arith == "real":
        ops["fma_f32"] += heads * height * codes * (d + width) + numbers
        ops["int_op"] = 3.0 * numbers
    else:
        wide, groups = key_channels(p["d"], fmt), heads * codes / GROUP
        # dots sum up integers, too: of queries in fours, of weights where codes count from the middle
        fours = -(-s.height // ROWS) * ROWS
        summed = float(fours * fmt.query_terms * wide)
        summed += height * fmt.value_groups(p["dv"]) * GROUP if fmt.bits < 8 else 0.0
        ops["dot_i8"] = heads * height * codes * (fmt.query_terms * packed_d + width)
        ops["dot_i8"] += groups * summed
        # scales folded into queries, once in a group, and into weights
        folded = heads * height * codes * (wide / GROUP + fmt.value_groups(p["dv"]))
        ops["fma_f32"] += 3.0 * folded
        # codes of fewer than 8 bits are moved and masked; integers are split into bytes
        ops["int_op"] = 6.0 * folded + (0.5 * row_tiles * numbers if fmt.bits < 8 else 0.0)
    if splits > 1:
        ops["fma_f32"] += heads * s.sequences * s.tiles * height * splits * width
    tasks, share = spread(s, old + new + 1.0, splits, hardware.threads if parallel else 1)
    step = GROUP * (fmt.bytes_of(p["d"], keys=True) + fmt.bytes_of(p["dv"], keys=False))
    made = 4.0 * GROUP * (d + width) if arith == "real" else 0.0
    state = 4.0 * height * (d + width + GROUP) + made
    b, once = s.sequences, sum(read_bytes(p, length, fmt) for length in lengths)
    most = (old * GROUP + live).reshape(b, -1).max(1).sum()
    passes = (codes + rows_read) / max(1.0, float(most))
    streams = [
        Stream(once, ((passes, once / b / splits + state), (float(row_tiles), step + state))),
        Stream(4.0 * b * p["t"] * p["h"] * p["d"]),
        Stream(4.0 * b * p["t"] * p["h"] * p["dv"]),
    ]
    if paged(p):
        streams.append(Stream(table_bytes(lengths, p["page"])))
    if splits > 1:
        parts = 4.0 * b * heads * s.tiles * splits * height * (width + 2)
        streams.append(Stream(parts, ((2, 0.0),), made=True))
    rows = min(s.rows, s.height)
    return work(
        ops,
        streams,
        hardware,
        tasks=tasks,
        share=share,
        useful=float(p["t"]) / (s.tiles * s.tokens) * (p["dv"] + d) / (width + packed_d),
        tile=Tile(max(1, s.registers // rows), rows, step + 4.0 * height * d),
    )
