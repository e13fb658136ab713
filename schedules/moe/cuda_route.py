"""The MoE router on GPUs: a warp for each token, its experts in registers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.template import rendered

_LANES = 32
_MOST_EXPERTS = 1024
"""A lane then has 32 scores, and as many choices."""


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """Knobs of `CudaRoute`."""

    warps: int = 4
    """Of a block."""


class CudaRoute(Schedule):
    """Scores, the best groups, the best experts, and their weights in one launch."""

    name = "route.cuda"
    op = "route"
    config = RouteConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Up to 1024 experts; as many choices and groups as a warp has lanes."""
        if workload.op != self.op or hardware.kind != "cuda":
            return False
        p = get_op(self.op).full(workload)
        return bool(p["e"] <= _MOST_EXPERTS and max(p["k"], p["groups"]) <= _LANES)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Warps of a block."""
        return Space(RouteConfig, {"warps": (1, 2, 4, 8)}, RouteConfig())

    def lower(self, workload: Workload, config: RouteConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        op = get_op(self.op)
        p = op.full(workload)
        constants = {
            "T": p["t"], "E": p["e"], "TOPK": p["k"], "GROUPS": p["groups"], "TOPGROUPS": p["topgroups"],
            "FACTOR": float(np.float32(p["factor"])), "WARPS": config.warps,
            "SOFTMAX": p["scoring"] == "softmax", "BIAS": bool(p["bias"]), "NORM": bool(p["norm"]),
        }  # fmt: skip
        launch = Launch(
            "route",
            (-(-p["t"] // config.warps), 1, 1),
            _LANES * config.warps,
            # without a bias none is looked at
            ("logits", "bias" if p["bias"] else "logits", "ids", "weights"),
        )
        return Kernel(
            kernel_name(self, workload, config, hardware),
            None,
            op.args(workload),
            self.work(workload, config, hardware),
            features=frozenset({"cuda"}),
            device=DeviceCode(
                rendered(Path(__file__).with_suffix(".cu"), constants),
                (launch,),
                expected=("SHFL",),
            ),
        )

    def work(self, workload: Workload, config: RouteConfig, hardware: Hardware) -> Counts:
        """The op's own: an exponential for each expert, a pass of comparisons for each choice; the bias."""
        p = get_op(self.op).full(workload)
        necessary = get_op(self.op).counts(workload)
        far = necessary.bytes["dram"] + 4.0 * p["e"] * p["bias"]
        near = far + 4.0 * p["e"] * p["bias"] * (p["t"] - 1)
        return Counts(necessary.ops, {"dram": far, "l2": near})
