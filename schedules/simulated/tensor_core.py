"""The rival on the simulated A100: weights unpacked to int8, then int8 tensor cores."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.simulated import MmaConfig, offered
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.simulated.base import SimulatedSchedule, quantize_rows, scaled_sum

STEP = 32
"""Columns of one int8 instruction, which adds them into int32."""


class TensorCore(SimulatedSchedule):
    """Exact integers; attention keeps such units on the machine anyway."""

    name = "mpgemm.sim_tensor_core"
    op = "mpgemm"
    config = MmaConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Integer codes of one to four bits, int8 activations."""
        problem = self.problem(workload)
        low = problem.fmt.is_integer and problem.bits <= 4 and problem.act == "a8"
        return "lmma" in hardware.features and low

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return tiles that fit, and the register files that the target offers."""
        bits = self.problem(workload).bits
        registers = tuple(int(v[:-1]) for v in offered(hardware, "registers"))
        knobs = {
            "tile_m": (16, 32, 64, 128, 256), "tile_n": (32, 64, 128, 256, 512),
            "tile_k": (32, 64, 128), "registers": registers,
        }  # fmt: skip
        return Space(MmaConfig, knobs, MmaConfig(registers=registers[0]), lambda c: c.fits(bits))

    def work(self, workload: Workload, config: MmaConfig, hardware: Hardware) -> Counts:
        """Return multiply-adds, unpacked weights (again for each tile of rows), and bytes."""
        p = self.problem(workload)
        passes = -(-p.m // config.tile_m)
        packed = p.n * p.k * p.bits / 8
        ops = {"dot_i8": float(p.m) * p.n * p.k, "unpack_u8": float(p.n) * p.k * passes}
        again = packed * passes + -(-p.n // config.tile_n) * float(p.m) * p.k
        return Counts(ops, {"dram": packed + p.m * p.k + 4.0 * p.m * p.n, "l2": again})

    def simulate(
        self, workload: Workload, config: MmaConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Execute tile by tile, 32 columns an instruction, int32 accumulators by weight group.

        Raises:
            OverflowError: an accumulator left int32.
        """
        p = self.problem(workload)
        x, row_scale = quantize_rows(arrays["x"])
        codes = arrays["codes"].astype(np.int64)
        sums = np.zeros((-(-p.k // p.group), p.m, p.n), np.int64)
        step = min(STEP, p.group)
        for start in range(0, p.k, step):
            columns = slice(start, min(start + step, p.k))
            for r in range(0, p.m, config.tile_m):
                rows = slice(r, r + config.tile_m)
                for c in range(0, p.n, config.tile_n):
                    outs = slice(c, c + config.tile_n)
                    sums[start // p.group, rows, outs] += x[rows, columns] @ codes[outs, columns].T
        if np.abs(sums).max(initial=0) >= 2**31:
            raise OverflowError("an accumulator left int32")
        y = scaled_sum(p, x, sums.astype(np.int32), arrays, row_scale)
        if "bias" in arrays:
            y += np.asarray(arrays["bias"], np.float32)
        return {"y": y}
