"""Descriptors of blocks of keys on x86: each entry that tokens were written to is made anew from its keys.

A task is a KV head of a sequence with the entries that share vectors of descriptors. Lanes of a cache are
slots, so a channel's least, greatest and sum are folded over the lanes once for each entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.describe_blocks import PARTS
from mimo_compile.ir.ops.pages import paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import descriptors, layout, sequences
from mimo_compile.schedules.attention.describe_entries import emit, sizes_of
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.elementwise.rows import PARALLEL_BYTES
from mimo_compile.schedules.emit.build import function
from mimo_compile.schedules.emit.vector import LANES, symbol
from mimo_compile.schedules.work import Stream, Tile, busiest, work


@dataclass(frozen=True, slots=True)
class DescribeConfig:
    """Knobs."""

    parallel: bool = False
    """Spread the tasks over threads."""


class X86Describe(Schedule):
    """Entries anew from their keys, whatever was there before."""

    name = "describe_blocks.x86"
    op = "describe_blocks"
    version = 2
    config = DescribeConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op, on any x86-64."""
        return workload.op == self.op and hardware.kind == "cpu"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Threads or not."""
        s = sizes_of(workload)
        may = s.p["b"] * s.p["kv"] * s.groups > 1 and hardware.threads > 1
        traffic = get_op(self.op).counts(workload).bytes["dram"]
        default = DescribeConfig(may and traffic >= PARALLEL_BYTES)
        return Space(DescribeConfig, {"parallel": (False, True) if may else (False,)}, default)

    def lower(self, workload: Workload, config: DescribeConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        s = sizes_of(workload)
        name = symbol(self.op, self.name, self.version, workload, config)
        shapes = {"k_cache": layout.cache_shapes(s.p)["k_cache"], "desc": s.shape()}
        stored = {"k_cache": s.keys.stored, "desc": s.format.stored}
        args = tuple(
            Arg(a.name, a.role, shapes[a.name], stored[a.name], a.mutated)
            if a.name in shapes
            else a
            for a in get_op(self.op).args(workload)
        )

        def body(pos: Any, *rest: Any) -> None:
            emit(s, config.parallel, pos, rest[0] if paged(s.p) else None, *rest[-2:])

        return Kernel(name, function(name, args, body), args, self.work(workload, config, hardware))

    def work(self, workload: Workload, config: DescribeConfig, hardware: Hardware) -> Counts:
        """Return what the op cannot avoid, in whole vectors of slots."""
        s, need = sizes_of(workload), get_op(self.op).counts(workload)
        tasks = s.p["b"] * s.p["kv"] * s.groups
        threads = hardware.threads if config.parallel else 1
        return work(
            dict(need.ops),
            [Stream(need.bytes["dram"])],
            hardware,
            tasks=tasks if threads > 1 else 1,
            share=busiest(tasks, threads),
            useful=min(1.0, s.size / (-(-s.size // LANES) * LANES)),
            tile=Tile(PARTS[s.p["kind"]], 1, s.keys.bytes * LANES * s.p["d"]),
        )

    def layouts(self, workload: Workload, config: DescribeConfig) -> dict[str, str]:
        """Return the names of the layouts of the cache and, where entries stand in lanes, of them."""
        s = sizes_of(workload)
        out = {"k_cache": layout.layouts(workload)["k_cache"]}
        if s.laned:
            out["desc"] = descriptors.layout_name(s.format, s.lanes)
        return out

    def pack(
        self, workload: Workload, config: DescribeConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the cache and the descriptors."""
        return sequences.pack_each(workload, arrays, self._pack)

    @staticmethod
    def _pack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
        s = sizes_of(workload)
        out = layout.pack_caches(workload, arrays)
        if "desc" in out and s.laned:
            out["desc"] = descriptors.laid_out(out["desc"], s.format, s.lanes)
        return out

    def unpack_state(
        self, workload: Workload, config: DescribeConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return the canonical cache and descriptors."""
        return sequences.unpack_each(workload, arrays, self._unpack)

    @staticmethod
    def _unpack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
        s = sizes_of(workload)
        out = dict(layout.unpack_caches(workload, arrays))
        if "desc" in out and s.laned:
            rows = s.p["pool"] * s.lanes if paged(s.p) else s.entries
            out["desc"] = descriptors.canonical(out["desc"], rows, s.p["d"], s.format, s.lanes)
        return out
