"""Prepare one attention step on GPUs and append to KV caches in groups: rows to the tail, then codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.pages import TABLE, paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_group_layout as layout
from mimo_compile.schedules.attention.cuda_append import CudaAppend, WarpsConfig, append_constants
from mimo_compile.schedules.attention.cuda_layout import NEEDS, whole
from mimo_compile.schedules.base import Kernel, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.limits import fits
from mimo_compile.schedules.cuda.template import rendered


@dataclass(frozen=True, slots=True)
class PackersConfig(WarpsConfig):
    """Knobs of a step whose full groups are quantised by a second launch."""

    packers: int = 128
    """Threads of a block of it."""


class CudaAppendGroups(CudaAppend):
    """A warp for each head of each token; then a block for the keys, and one for the values, of a group."""

    name = "kv_append.cuda_groups"
    version: ClassVar[int] = 3
    config = PackersConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op with caches in groups, of heads that shared memory holds as codes."""
        if workload.op != self.op or not layout.takes(workload, hardware):
            return False
        shared = _shared_bytes(get_op(self.op).full(workload))
        return fits(hardware, threads=128, shared_bytes=shared)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Warps of a block, threads of a block that quantises."""
        knobs = {"warps": (1, 2, 4, 8), "packers": (64, 128, 256)}
        return Space(PackersConfig, knobs, PackersConfig())

    def lower(self, workload: Workload, config: WarpsConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        assert isinstance(config, PackersConfig)
        p = get_op(self.op).full(workload)
        new = _filled(p)
        constants = layout.constants(workload) | append_constants(p) | {
            "WARPS": config.warps, "PACKERS": config.packers, "NEW": new,
        }  # fmt: skip
        table = TABLE if paged(p) else "pos"  # which is not looked at then, as for norms
        norms = ("q_norm", "k_norm") if p["norm"] else ("pos", "pos")
        heads = p["b"] * p["t"] * (p["h"] + 2 * p["kv"])
        rows = Launch(
            "kv_append",
            (-(-heads // config.warps), 1, 1),
            32 * config.warps,
            ("qkv", "table", "pos", *norms, "k_tail", "v_tail", "q"),
        )
        packed = Launch(
            "quantise",
            (p["b"] * p["kv"] * new, 2, 1),
            config.packers,
            ("pos", table, "k_tail", "v_tail", "k_cache", "k_scale", "v_cache", "v_scale"),
            _shared_bytes(p),
        )
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        return Kernel(
            kernel_name(self, workload, config, hardware), None, layout.kernel_args(workload),
            self.work(workload, config, hardware), features=NEEDS,
            device=DeviceCode(text, (rows, packed)),
        )  # fmt: skip

    def work(self, workload: Workload, config: WarpsConfig, hardware: Hardware) -> Counts:
        """Rows to the tail; of each position its share of a group that is read there and becomes codes."""
        p = get_op(self.op).full(workload)
        fmt = layout.format_of(p)
        tokens, columns = float(p["b"] * p["t"] * p["kv"]), float(whole(p["d"]) + whole(p["dv"]))
        first = self.rows_work(p, 4.0 * columns)
        # the range, then codes: less zero, times the inverse, rounded, held within levels
        ops = {"add_f32": 7.0 * tokens * columns, "int_op": 3.0 * tokens * columns}
        codes = tokens * layout.group_bytes(p) / fmt.group
        second = Counts(ops, {"dram": codes, "l2": codes + tokens * 8.0 * columns}, name="quantise")
        return in_turn(first.named("append"), second)

    def layouts(self, workload: Workload, config: WarpsConfig) -> dict[str, str]:
        """Return the names of the layouts of the cache's arrays."""
        return layout.layouts(workload)

    def pack(
        self, workload: Workload, config: WarpsConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the cache; norms stay as they are."""
        return layout.pack(workload, arrays)

    def unpack_state(
        self, workload: Workload, config: WarpsConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return the canonical cache."""
        return layout.unpack(workload, arrays)


def _filled(p: Mapping[str, Any]) -> int:
    """Return how many groups a step may fill."""
    return int(-(-p["t"] // layout.format_of(p).group))


def _shared_bytes(p: Mapping[str, Any]) -> int:
    """Return the shared memory of a block that quantises: a group's codes, one by one."""
    return int(layout.format_of(p).group * max(layout.key_channels(p), whole(p["dv"])))
