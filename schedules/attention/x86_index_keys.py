"""The index of keys by channels on x86: each number of a new key goes to the lane of its slot.

A task is a KV head of a sequence with all new tokens: neighbouring ones share the lines of the copy. Peaks of
a span are those of its keys as the cache holds them, channel by channel in the lanes.
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
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import channel_layout, rows_layout
from mimo_compile.schedules.attention.half import upper_half
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import over, single
from mimo_compile.schedules.attention.sequences import (
    pack_each,
    part_of,
    place_of,
    turns,
    unpack_each,
)
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.elementwise.rows import PARALLEL_BYTES
from mimo_compile.schedules.emit.build import Register, T, function, loop, store
from mimo_compile.schedules.emit.vector import splat, symbol
from mimo_compile.schedules.work import Stream, Tile, busiest, work


@dataclass(frozen=True, slots=True)
class IndexKeysConfig:
    """Knobs."""

    parallel: bool = False
    """Spread the heads over threads."""


class X86IndexKeys(Schedule):
    """Number by number, and span by span."""

    name = "index_keys.x86"
    op = "index_keys"
    version = 2
    config = IndexKeysConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op, on any x86-64."""
        return workload.op == self.op and hardware.kind == "cpu"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Threads or not."""
        p = get_op(self.op).full(workload)
        may = p["b"] * p["kv"] > 1 and hardware.threads > 1
        traffic = get_op(self.op).counts(workload).bytes["dram"]
        default = IndexKeysConfig(may and traffic >= PARALLEL_BYTES)
        return Space(IndexKeysConfig, {"parallel": (False, True) if may else (False,)}, default)

    def lower(self, workload: Workload, config: IndexKeysConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = get_op(self.op).full(workload)
        fmt = parse_cache_format(p["c"])
        name = symbol(self.op, self.name, self.version, workload, config)
        shapes = {
            "k_cache": rows_layout.row_shapes(p)["k_cache"], "k_copy": channel_layout.shape(p),
        }  # fmt: skip
        pos, *states = get_op(self.op).args(workload)
        args = (pos, *(
            Arg(a.name, a.role, shapes[a.name], fmt.stored, a.mutated)
            if a.name in shapes
            else channel_layout.peaks(a, p["b"], fmt.stored)
            for a in states
        ))  # fmt: skip

        def body(pos: Any, *states: Any) -> None:
            with turns(p["b"], p["kv"], parallel=config.parallel) as (sequence, head):
                where = place_of(pos, sequence)
                start, valid = fixed(where[0]), fixed(T.min(where[1], T.int32(p["t"])))
                k, copy, peak = (part_of(buffer, sequence, p["b"]) for buffer in states)
                _copy(p, k, copy, head, start, valid)
                _peaks(p, fmt.bits, k, peak, head, start, valid)

        return Kernel(name, function(name, args, body), args, self.work(workload, config, hardware))

    def work(self, workload: Workload, config: IndexKeysConfig, hardware: Hardware) -> Counts:
        """Return what the op cannot avoid."""
        p, need = get_op(self.op).full(workload), get_op(self.op).counts(workload)
        threads, tasks = hardware.threads if config.parallel else 1, p["b"] * p["kv"]
        return work(
            dict(need.ops), [Stream(need.bytes["dram"])], hardware,
            tasks=tasks if threads > 1 else 1, share=busiest(tasks, threads), useful=1.0,
            tile=Tile(1, 1, 64.0 * p["d"]),
        )  # fmt: skip

    def layouts(self, workload: Workload, config: IndexKeysConfig) -> dict[str, str]:
        """Return the names of the layouts of cache and copy."""
        c = get_op(self.op).full(workload)["c"]
        return {"k_cache": rows_layout.LAYOUTS["k_cache"], "k_copy": channel_layout.name(c)}

    def pack(
        self, workload: Workload, config: IndexKeysConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out cache and copy; peaks stay as they are."""
        return pack_each(workload, arrays, self._pack)

    @staticmethod
    def _pack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
        p, out = get_op(workload.op).full(workload), dict(arrays)
        if "k_cache" in out:
            out["k_cache"] = rows_layout.pack_rows(p, "k_cache", out["k_cache"])
        if "k_copy" in out:
            out["k_copy"] = channel_layout.pack(p, out["k_copy"])
        return out

    def unpack_state(
        self, workload: Workload, config: IndexKeysConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return all in order."""
        return unpack_each(workload, arrays, self._unpack)

    @staticmethod
    def _unpack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
        p, out = get_op(workload.op).full(workload), dict(arrays)
        if "k_cache" in out:
            out["k_cache"] = rows_layout.unpack_rows(p, "k_cache", out["k_cache"])
        if "k_copy" in out:
            out["k_copy"] = channel_layout.unpack(p, out["k_copy"])
        return out


def _copy(p: Mapping[str, Any], k: Any, copy: Any, head: Any, start: Any, valid: Any) -> None:
    """Copy the new keys of one head."""
    slots = channel_layout.slots_of(p["c"])
    with T.serial(0, valid) as i:
        slot = fixed(start + i)
        line, lane = (fixed(how(slot, T.int32(slots))) for how in (T.floordiv, T.floormod))
        with loop(p["d"]) as c:
            store(copy, k[head, slot, c], head, line, c, lane)


def _peaks(
    p: Mapping[str, Any], bits: int, k: Any, peak: Any, head: Any, start: Any, valid: Any
) -> None:
    """Take the greatest magnitudes of the spans that new keys completed, of one head."""
    span = T.int32(p["span"])
    first = fixed(T.floordiv(start, span))
    stop = T.min(T.floordiv(start + valid, span), T.int32(blocks_of(p["cap"], p["span"])))
    with T.serial(0, fixed(T.max(stop - first, T.int32(0)))) as at:
        e = fixed(first + at)

        def step(c: Any, lanes: int) -> None:
            most = Register("float32", lanes, splat(0.0, lanes))
            with loop(p["span"]) as i:
                value = single(k, head, e * span + i, c, bits=bits, lanes=lanes)
                most.set(T.max(most.get(), T.abs(value)))
            value = most.get() if bits == 32 else upper_half(most.get(), lanes)
            store(peak, value, e, head, c, lanes=lanes)

        over(p["d"], step)
