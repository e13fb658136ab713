"""Prepare one attention step on GPUs: QK-norm, partial rotation, and k, v into their rows of the caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.pages import TABLE, paged, table_bytes
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_layout as layout
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.template import rendered


@dataclass(frozen=True, slots=True)
class WarpsConfig:
    """Knobs of a kernel whose warps do not know of each other."""

    warps: int = 4
    """Of a block."""


class CudaAppend(Schedule):
    """A warp for each head of each token."""

    name = "kv_append.cuda"
    op = "kv_append"
    config = WarpsConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op with bfloat16 caches."""
        return workload.op == self.op and layout.takes(workload, hardware)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Warps of a block."""
        return Space(WarpsConfig, {"warps": (1, 2, 4, 8)}, WarpsConfig())

    def lower(self, workload: Workload, config: WarpsConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = get_op(self.op).full(workload)
        constants = layout.constants(workload) | append_constants(p) | {
            "FIRST": p["first"], "WARPS": config.warps,
        }  # fmt: skip
        args = layout.kernel_args(workload)
        given = {a.name for a in args}
        order = ("qkv", "table", "pos", "q_norm", "k_norm", TABLE, "k_cache", "v_cache", "q")
        heads = p["b"] * p["t"] * (p["h"] + 2 * p["kv"])
        launch = Launch(
            "kv_append",
            (-(-heads // config.warps), 1, 1),
            32 * config.warps,
            tuple(
                name if name in given else "pos" for name in order
            ),  # the others are not looked at
        )
        return Kernel(
            kernel_name(self, workload, config, hardware),
            None,
            args,
            self.work(workload, config, hardware),
            features=frozenset({"cuda"}),
            device=DeviceCode(rendered(Path(__file__).with_suffix(".cu"), constants), (launch,)),
        )

    def work(self, workload: Workload, config: WarpsConfig, hardware: Hardware) -> Counts:
        """Rows read once and written once, with their padding; angles once for each token's heads."""
        p = get_op(self.op).full(workload)
        return self.rows_work(p, 2.0 * (layout.whole(p["d"]) + layout.whole(p["dv"])))

    @staticmethod
    def rows_work(p: Mapping[str, Any], row: float) -> Counts:
        """Return the work of a step whose caches take so many bytes of a KV head for each token."""
        tokens, heads = float(p["b"] * p["t"]), p["h"] + p["kv"]
        width = heads * p["d"] + p["kv"] * p["dv"]
        caches = p["kv"] * row
        far = tokens * (4.0 * (width + p["h"] * p["d"] + p["rot"]) + caches) + 8.0 * p["b"]
        if paged(p):
            far += table_bytes([p["t"]] * p["b"], p["page"])
        norms = 4.0 * tokens * heads * p["d"] * p["norm"]
        ops = {
            "fma_f32": tokens * heads * (2.0 * p["rot"] + 2.0 * p["d"] * p["norm"]),
            "add_f32": tokens * p["kv"] * p["dv"],
        }
        near = far + tokens * heads * 4.0 * p["rot"] + norms
        return Counts(ops, {"dram": far, "l2": near})

    def layouts(self, workload: Workload, config: WarpsConfig) -> dict[str, str]:
        """Return the names of the cache layouts."""
        return layout.layouts(workload)

    def pack(
        self, workload: Workload, config: WarpsConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the caches; norms stay as they are."""
        return layout.pack(workload, arrays)

    def unpack_state(
        self, workload: Workload, config: WarpsConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return canonical caches."""
        return layout.unpack(workload, arrays)


def append_constants(p: Mapping[str, Any]) -> dict[str, int | float | bool]:
    """Return what ``append.cuh`` is told of a workload besides the extents of its caches."""
    return {
        "B": p["b"], "HALF": p["rot"] // 2, "NORM": bool(p["norm"]), "EPS": layout.float32(p["eps"]),
        "GAIN": layout.float32(p["vscale"]),
    }  # fmt: skip
