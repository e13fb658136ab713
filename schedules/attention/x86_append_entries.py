"""Entries of new tokens on x86: each number of a row goes to the lane of its position.

A task is a head of a sequence with all its new tokens: neighbouring ones share the lines of the entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import descriptors
from mimo_compile.schedules.attention.half import upper_half
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import channels
from mimo_compile.schedules.attention.sequences import (
    pack_each,
    part_of,
    place_of,
    turns,
    unpack_each,
)
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.elementwise.rows import PARALLEL_BYTES
from mimo_compile.schedules.emit.build import T, bind, function, store
from mimo_compile.schedules.emit.vector import LANES, symbol
from mimo_compile.schedules.work import Stream, Tile, busiest, work


@dataclass(frozen=True, slots=True)
class AppendEntriesConfig:
    """Knobs."""

    parallel: bool = False
    """Spread the heads over threads."""


class X86AppendEntries(Schedule):
    """Number by number."""

    name = "append_entries.x86"
    op = "append_entries"
    config = AppendEntriesConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op, on any x86-64."""
        return workload.op == self.op and hardware.kind == "cpu"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Threads or not."""
        p = get_op(self.op).full(workload)
        may = p["b"] * p["kv"] > 1 and hardware.threads > 1
        traffic = get_op(self.op).counts(workload).bytes["dram"]
        default = AppendEntriesConfig(may and traffic >= PARALLEL_BYTES)
        return Space(AppendEntriesConfig, {"parallel": (False, True) if may else (False,)}, default)

    def lower(self, workload: Workload, config: AppendEntriesConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = get_op(self.op).full(workload)
        fmt = parse_cache_format(p["e"])
        name = symbol(self.op, self.name, self.version, workload, config)
        shape = descriptors.shape(p["cap"], p["b"] * p["kv"], 1, p["d"], fmt)
        args = tuple(
            Arg(a.name, a.role, shape, fmt.stored, a.mutated) if a.name == "desc" else a
            for a in get_op(self.op).args(workload)
        )

        def body(rows: Any, pos: Any, desc: Any) -> None:
            with turns(p["b"], p["kv"], parallel=config.parallel) as (sequence, head):
                where = place_of(pos, sequence)
                start, valid = fixed(where[0]), fixed(T.min(where[1], T.int32(p["t"])))
                own, kept = (part_of(buffer, sequence, p["b"]) for buffer in (rows, desc))
                _write(p["d"], fmt.bits, own, kept, head, start, valid)

        return Kernel(name, function(name, args, body), args, self.work(workload, config, hardware))

    def work(self, workload: Workload, config: AppendEntriesConfig, hardware: Hardware) -> Counts:
        """Return what the op cannot avoid."""
        p, need = get_op(self.op).full(workload), get_op(self.op).counts(workload)
        threads, tasks = hardware.threads if config.parallel else 1, p["b"] * p["kv"]
        return work(
            dict(need.ops), [Stream(need.bytes["dram"])], hardware,
            tasks=tasks if threads > 1 else 1, share=busiest(tasks, threads), useful=1.0,
            tile=Tile(1, 1, parse_cache_format(p["e"]).bytes * LANES * p["d"]),
        )  # fmt: skip

    def layouts(self, workload: Workload, config: AppendEntriesConfig) -> dict[str, str]:
        """Return the name of the layout of the entries."""
        fmt = parse_cache_format(get_op(self.op).full(workload)["e"])
        return {"desc": descriptors.layout_name(fmt)}

    def pack(
        self, workload: Workload, config: AppendEntriesConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the entries."""
        return pack_each(workload, arrays, self._pack)

    @staticmethod
    def _pack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
        fmt = parse_cache_format(get_op(workload.op).full(workload)["e"])
        return {n: descriptors.laid_out(a, fmt) if n == "desc" else a for n, a in arrays.items()}

    def unpack_state(
        self, workload: Workload, config: AppendEntriesConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return the entries in order."""
        return unpack_each(workload, arrays, self._unpack)

    @staticmethod
    def _unpack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
        p = get_op(workload.op).full(workload)
        fmt = parse_cache_format(p["e"])
        return {
            n: descriptors.canonical(a, p["cap"], p["d"], fmt) if n == "desc" else a
            for n, a in arrays.items()
        }


def _write(d: int, bits: int, rows: Any, desc: Any, head: Any, start: Any, valid: Any) -> None:
    """Write the new entries of one head."""
    pair = 32 // bits
    with T.serial(0, valid) as i:
        entry = fixed(start + i)
        vector, lane = (fixed(how(entry, T.int32(LANES))) for how in (T.floordiv, T.floormod))

        def step(at: Any, count: int) -> None:
            for half in range(count):
                value = bind(rows[i, head, at * pair + half])
                stored = value if bits == 32 else upper_half(value, 1)
                store(desc, stored, head, vector, 0, at, lane * pair + half)

        channels(d, bits, step)
