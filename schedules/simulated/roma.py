"""Low-bit matmuls on ROMA (simulated), alone and with LoRA adapters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.simulated import RomaConfig
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.simulated.base import SimulatedSchedule, quantize_rows, scaled_sum
from mimo_compile.schedules.simulated.roma_units import UNITS, base_product, fp8_decode, low_rank

_MAPPING = {"mapping": ("rows", "grid"), "tokens": (1, 4, 16)}


class Roma(SimulatedSchedule):
    """The base from ROM by L-Units."""

    name = "mpgemm.sim_roma"
    op = "mpgemm"
    config = RomaConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Integer codes of one to four bits, int8 activations."""
        problem = self.problem(workload)
        low = problem.fmt.is_integer and problem.bits <= 4 and problem.act == "a8"
        return "rom" in hardware.features and low

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return how units share the base, and for how many rows it is read once."""
        return Space(RomaConfig, _MAPPING, RomaConfig())

    def work(self, workload: Workload, config: RomaConfig, hardware: Hardware) -> Counts:
        """Return multiply-adds of both kinds of unit and the bytes of both memories."""
        p = self.problem(workload)
        reads = -(-p.m // config.tokens)
        shared = UNITS if config.fusion == 2 else 1
        ranks = -(-p.rank // config.r_tile) * config.r_tile
        adapter = float(ranks * (p.n + shared * p.k * len(p.parts)))
        ops = {"dot_i8": float(p.m) * p.n * p.k, "fma_f32": p.m * adapter}
        together = min(p.m, config.tokens, p.adapters)
        packed = p.n * p.k * p.bits / 8
        return Counts(ops, {"dram": packed * reads, "l2": adapter * reads * together})

    def layouts(self, workload: Workload, config: RomaConfig) -> dict[str, str]:
        """The ROM's content depends on the mapping."""
        return {"weight": f"rom.{config.mapping}"}

    def simulate(
        self, workload: Workload, config: RomaConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Execute: int32 sums by weight group, scaled and added up in float32."""
        p = self.problem(workload)
        rom = arrays["codes"].view()
        rom.setflags(write=False)
        x, row_scale = quantize_rows(arrays["x"])
        y = scaled_sum(p, x, base_product(x, rom, p.group, config.mapping), arrays, row_scale)
        if "bias" in arrays:
            y += np.asarray(arrays["bias"], np.float32)
        return {"y": y}


class LoraRoma(Roma):
    """The same with FP8 adapters from SRAM by H-Units, row by row another one or none."""

    name = "lora_mpgemm.sim_roma"
    op = "lora_mpgemm"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """As without adapters; these are FP8."""
        stored = dict(workload.params).get("d", "bf16")
        return stored == "fp8" and super().supports(workload, hardware)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return besides where the adapters run and how their ranks are tiled."""
        knobs = {"fusion": (1, 2, 3), "r_tile": (4, 8, 16, 32), **_MAPPING}
        return Space(RomaConfig, knobs, RomaConfig(fusion=1))

    def simulate(
        self, workload: Workload, config: RomaConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Execute; rows without an adapter, and those to which it adds nothing, keep their bits."""
        p = self.problem(workload)
        y = super().simulate(workload, config, arrays)["y"]
        ids, x = arrays["adapter"], np.asarray(arrays["x"], np.float32)
        edges = np.cumsum([0, *p.parts])
        for i in range(p.adapters):
            rows = np.flatnonzero(ids == i)
            a, b = fp8_decode(arrays["lora_a"][i]), fp8_decode(arrays["lora_b"][i])
            for part, gain in enumerate(arrays["gain"][i]):
                outs = slice(edges[part], edges[part + 1])
                mine = a[part * p.rank : (part + 1) * p.rank]
                delta = low_rank(x[rows], mine, b[outs], gain, config.fusion, config.r_tile)
                at = np.ix_(rows, np.arange(edges[part], edges[part + 1]))
                y[at] = np.where(delta != 0, y[at] + delta, y[at])
        return {"y": y}
