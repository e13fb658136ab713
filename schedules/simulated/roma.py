"""Low-bit matmul with a resident LoRA adapter on ROMA (simulated)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.simulated import RANK, RomaConfig
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.simulated.base import SimulatedSchedule, quantize_rows, scaled_sum
from mimo_compile.schedules.simulated.roma_units import (
    Adapter,
    base_product,
    idle_adapter,
    low_rank,
)


class Roma(SimulatedSchedule):
    """Base from ROM, adapter beside it; ranked with an adapter of rank 16 in place, verified with B = 0.

    The op knows no adapter, so its reference is the base alone: what an adapter in its initial state must
    give to the last bit.
    """

    name = "mpgemm.sim_roma"
    op = "mpgemm"
    config = RomaConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Integer codes of one to four bits, int8 activations."""
        problem = self.problem(workload)
        low = problem.fmt.is_integer and problem.bits <= 4 and problem.act == "a8"
        return "rom" in hardware.features and low

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return where the adapter runs, how ranks are tiled, and how units share the base."""
        knobs = {
            "fusion": (1, 2, 3), "r_tile": (4, 8, 16, 32), "mapping": ("rows", "grid"),
            "tokens": (1, 4, 16),
        }  # fmt: skip
        return Space(RomaConfig, knobs, RomaConfig(fusion=1))

    def work(self, workload: Workload, config: RomaConfig, hardware: Hardware) -> Counts:
        """Return multiply-adds of both kinds of unit and the bytes of both memories."""
        p = self.problem(workload)
        reads = -(-p.m // config.tokens)
        repeated = 256 if config.fusion == 2 else 1
        ranks = -(-RANK // config.r_tile) * config.r_tile
        ops = {
            "dot_i8": float(p.m) * p.n * p.k, "fma_f32": float(p.m) * ranks * (p.n + repeated * p.k),
        }  # fmt: skip
        adapter = float(ranks * (p.n + repeated * p.k) * reads)
        return Counts(ops, {"dram": p.n * p.k * p.bits / 8 * reads, "l2": adapter})

    def layouts(self, workload: Workload, config: RomaConfig) -> dict[str, str]:
        """The ROM's content depends on the mapping."""
        return {"weight": f"rom.{config.mapping}"}

    def simulate(
        self, workload: Workload, config: RomaConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Execute with an adapter as training starts it."""
        p = self.problem(workload)
        start = idle_adapter(p.n, p.k, RANK, np.random.default_rng(p.n * p.k))
        return {"y": self.qlora(workload, config, arrays, start)}

    def qlora(
        self, workload: Workload, config: RomaConfig, arrays: Mapping[str, Array],
        adapter: Adapter | None,
    ) -> Array:  # fmt: skip
        """Return ``y [m, n]`` float32 of the base with an adapter (None: base only)."""
        p = self.problem(workload)
        rom = arrays["codes"].view()
        rom.setflags(write=False)
        x, row_scale = quantize_rows(arrays["x"])
        sums = base_product(x, rom, p.group, config.mapping)
        y = scaled_sum(p, x, sums, arrays, row_scale)
        if adapter is not None:
            y += low_rank(arrays["x"], adapter, config.fusion, config.r_tile)
        if "bias" in arrays:
            y += np.asarray(arrays["bias"], np.float32)
        return y
