"""The mean key of each KV head on GPUs: threads add up every so manyth key, and sums are added in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_layout as layout
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.template import rendered

_PAIRS = 8
"""Threads that share a key's 16 columns: 32 bytes, which memory moves at a time."""


@dataclass(frozen=True, slots=True)
class PartsOfKeysConfig:
    """Knobs."""

    parts: int = 64
    """Of the keys: sums of a block's threads."""


class CudaKeyMean(Schedule):
    """A block for 16 columns of a KV head."""

    name = "key_mean.cuda"
    op = "key_mean"
    config = PartsOfKeysConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op over bfloat16 keys."""
        return workload.op == self.op and layout.takes(workload, hardware)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Parts of the keys: at least the op's, and no more than its bound leaves roundings for."""
        return Space(PartsOfKeysConfig, {"parts": (16, 32, 64)}, PartsOfKeysConfig())

    def lower(self, workload: Workload, config: PartsOfKeysConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = get_op(self.op).full(workload)
        wide = layout.whole(p["d"])
        constants = {"D": p["d"], "DK": wide, "CAP": p["cap"], "PARTS": config.parts}
        threads = _PAIRS * config.parts
        launch = Launch(
            "key_mean", (p["kv"] * wide // (2 * _PAIRS), 1, 1), threads, ("pos", "k_cache", "mean"),
            8 * threads,
        )  # fmt: skip
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        return Kernel(
            kernel_name(self, workload, config, hardware), None, layout.kernel_args(workload),
            self.work(workload, config, hardware), features=layout.NEEDS,
            device=DeviceCode(text, (launch,), expected=("FADD",)),
        )  # fmt: skip

    def work(self, workload: Workload, config: PartsOfKeysConfig, hardware: Hardware) -> Counts:
        """Return what the op cannot avoid, of rows in whole sixteens."""
        p, need = get_op(self.op).full(workload), get_op(self.op).counts(workload)
        more = layout.whole(p["d"]) / p["d"]
        moved = more * need.bytes["dram"]
        return Counts({n: more * x for n, x in need.ops.items()}, {"dram": moved, "l2": moved})

    def layouts(self, workload: Workload, config: PartsOfKeysConfig) -> dict[str, str]:
        """Return the name of the layout of the keys."""
        return {"k_cache": layout.layouts(workload)["k_cache"]}

    def pack(
        self, workload: Workload, config: PartsOfKeysConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the keys."""
        return layout.pack(workload, arrays)

    def unpack_state(
        self, workload: Workload, config: PartsOfKeysConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return canonical keys."""
        return layout.unpack(workload, arrays)
