"""Prepare one attention step on GPUs and append to KV caches of 8-bit floats: a power of two for each row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_float8_layout as layout
from mimo_compile.schedules.attention.cuda_append import CudaAppend, WarpsConfig, append_constants
from mimo_compile.schedules.attention.cuda_layout import NEEDS, whole
from mimo_compile.schedules.base import Kernel, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.template import rendered


class CudaAppendFloat8(CudaAppend):
    """A warp for each head of each token, which finds the row's power of two and writes its codes."""

    name = "kv_append.cuda_float8"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op with caches of 8-bit floats."""
        return workload.op == self.op and layout.takes(workload, hardware)

    def lower(self, workload: Workload, config: WarpsConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = get_op(self.op).full(workload)
        constants = layout.constants(workload) | append_constants(p) | {"WARPS": config.warps}
        norms = ("q_norm", "k_norm") if p["norm"] else ("pos", "pos")  # the latter not looked at
        heads = p["b"] * p["t"] * (p["h"] + 2 * p["kv"])
        launch = Launch(
            "kv_append",
            (-(-heads // config.warps), 1, 1),
            32 * config.warps,
            ("qkv", "table", "pos", *norms, "k_cache", "v_cache", "q"),
        )
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        return Kernel(
            kernel_name(self, workload, config, hardware), None, layout.kernel_args(workload),
            self.work(workload, config, hardware), features=NEEDS, device=DeviceCode(text, (launch,)),
        )  # fmt: skip

    def work(self, workload: Workload, config: WarpsConfig, hardware: Hardware) -> Counts:
        """Rows read once and written once, with a byte for each."""
        p = get_op(self.op).full(workload)
        numbers = whole(p["d"]) + whole(p["dv"])
        tokens = float(p["b"] * p["t"] * p["kv"] * numbers)
        # scaled, held within the range, rounded and moved
        more = Counts({"fma_f32": 3.0 * tokens, "int_op": 6.0 * tokens}, {})
        return self.rows_work(p, numbers + 2.0) + more

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
