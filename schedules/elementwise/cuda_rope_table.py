"""Cosines and sines of rotary angles on GPUs, in float64 but for the angle itself: any position."""

from __future__ import annotations

from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.elementwise.cuda_rows import CudaMap, MapConfig


class CudaRopeTable(CudaMap):
    """A thread has the cosine and the sine of an angle."""

    name = "rope_table.cuda"
    op = "rope_table"
    symbol = "rope_table"
    widths: ClassVar[tuple[int, ...]] = (1,)

    def rows(self, p: dict[str, Any]) -> tuple[int, int]:
        """Tokens, angles."""
        return p["b"] * p["t"], p["rot"] // 2

    def constants(self, p: dict[str, Any]) -> dict[str, int | float | bool | str]:
        """Extents."""
        return {"B": p["b"], "T": p["t"], "HALF": p["rot"] // 2}

    def work(self, workload: Workload, config: MapConfig, hardware: Hardware) -> Counts:
        """Frequencies and positions come from memory too."""
        need, p = get_op(self.op).counts(workload), get_op(self.op).full(workload)
        return need + Counts({}, {"dram": 2.0 * p["rot"] + 8.0 * p["b"]})
