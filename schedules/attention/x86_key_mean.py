"""The mean key of each KV head on x86: channels of 16 slots are summed lane by lane, and lanes at the end.

A task is a KV head with a part of its channels. It passes over its keys in the order in which they lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import layout
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import across, add, channels, lanes_of
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.elementwise.rows import PARALLEL_BYTES
from mimo_compile.schedules.emit.build import T, bind, function, load, loop, store, when, workspace
from mimo_compile.schedules.emit.vector import LANES, splat, symbol
from mimo_compile.schedules.work import Stream, Tile, busiest, work


@dataclass(frozen=True, slots=True)
class KeyMeanConfig:
    """Knobs."""

    parallel: bool = False
    """Spread the heads over threads."""


class X86KeyMean(Schedule):
    """Sums in the lanes of slots."""

    name = "key_mean.x86"
    op = "key_mean"
    config = KeyMeanConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op, on any x86-64."""
        return workload.op == self.op and hardware.kind == "cpu"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Threads or not."""
        may = get_op(self.op).full(workload)["kv"] > 1 and hardware.threads > 1
        traffic = get_op(self.op).counts(workload).bytes["dram"]
        default = KeyMeanConfig(may and traffic >= PARALLEL_BYTES)
        return Space(KeyMeanConfig, {"parallel": (False, True) if may else (False,)}, default)

    def lower(self, workload: Workload, config: KeyMeanConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = get_op(self.op).full(workload)
        name = symbol(self.op, self.name, self.version, workload, config)
        args = layout.kernel_args(workload)

        def body(pos: Any, k: Any, mean: Any) -> None:
            length = fixed(T.max(pos[0] + pos[1], T.int32(1)))
            with loop(p["kv"], parallel=config.parallel) as head:
                _average(p, k, mean, head, length)

        threads = hardware.threads if config.parallel else 1
        room = 4 * (p["d"] + 1) * LANES * threads
        return Kernel(
            name, function(name, args, body), args, self.work(workload, config, hardware), room
        )

    def work(self, workload: Workload, config: KeyMeanConfig, hardware: Hardware) -> Counts:
        """Return what the op cannot avoid: one pass over the keys."""
        p, need = get_op(self.op).full(workload), get_op(self.op).counts(workload)
        threads = hardware.threads if config.parallel else 1
        return work(
            dict(need.ops), [Stream(need.bytes["dram"])], hardware,
            tasks=p["kv"] if threads > 1 else 1, share=busiest(p["kv"], threads), useful=1.0,
            tile=Tile(1, 1, parse_cache_format(p["c"]).bytes * LANES * p["d"]),
        )  # fmt: skip

    def layouts(self, workload: Workload, config: KeyMeanConfig) -> dict[str, str]:
        """Return the name of the layout of the keys."""
        return {"k_cache": layout.layouts(workload)["k_cache"]}

    def pack(
        self, workload: Workload, config: KeyMeanConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the keys."""
        return layout.pack_caches(workload, arrays)

    def unpack_state(
        self, workload: Workload, config: KeyMeanConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return canonical keys."""
        return layout.unpack_caches(workload, arrays)


def _average(p: Mapping[str, Any], k: Any, mean: Any, head: Any, length: Any) -> None:
    """Average the first ``length`` keys of one head."""
    bits = parse_cache_format(p["c"]).bits
    pair = 32 // bits
    sums = workspace((p["d"], LANES), "float32")
    with loop(p["d"]) as c:
        store(sums, splat(0.0, LANES), c, 0, lanes=LANES)

    def take(vector: Any, seen: Any | None) -> None:
        def step(i: Any, count: int) -> None:
            found = lanes_of(k, head, vector, i, bits=bits, count=count)
            for half, value in enumerate(found):
                c = i * pair + half
                # slots that were never written may hold anything, NaN too
                own = value if seen is None else T.Select(seen, value, splat(0.0, LANES))
                store(sums, load(sums, c, 0, lanes=LANES) + own, c, 0, lanes=LANES)

        channels(p["d"], bits, step)

    whole = fixed(T.floordiv(length, T.int32(LANES)))
    with T.serial(0, whole) as vector:
        take(vector, None)
    with when(T.floormod(length, T.int32(LANES)) > 0):
        take(whole, bind(T.ramp(whole * LANES, 1, LANES)) < splat(length, LANES))
    with loop(p["d"]) as c:
        total = across(add, load(sums, c, 0, lanes=LANES))
        store(mean, total / T.cast(length, "float32"), head, c)
