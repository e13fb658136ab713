"""Two schedules of `swiglu` that are never built: spaces for tests of search and planning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int = 1
    cols: int = 1
    unroll: int = 1
    prefetch: int = 0
    layout: str = "a"


class Tiled(Schedule):
    name = "swiglu.tiled"
    op = "swiglu"
    config = Tile

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        return True

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        powers = (1, 2, 4, 8, 16, 32)
        knobs = {
            "rows": powers, "cols": powers, "unroll": powers[:4], "prefetch": (0, 2, 4, 8),
            "layout": ("a", "b"),
        }  # fmt: skip
        return Space(Tile, knobs, Tile(), lambda c: c.rows * c.cols <= 256)

    def lower(self, workload: Workload, config: Tile, hardware: Hardware) -> Kernel:
        raise AssertionError("never built")

    def work(self, workload: Workload, config: Tile, hardware: Hardware) -> Counts:
        n = float(workload.integer("t") * workload.integer("f"))
        return Counts(
            {"fma_f32": 2 * n * (1 + 0.1 / config.unroll)},
            {"dram": 12 * n, "l1": 4 * n / config.rows},
        )

    def layouts(self, workload: Workload, config: Tile) -> dict[str, str]:
        return {"x": config.layout}


class Other(Tiled):
    name = "swiglu.other"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        return Space(Tile, {"rows": (1, 2, 4), "layout": ("b", "c")}, Tile(layout="b"))


def latency_us(schedule: str, c: Any) -> float:
    """A smooth bowl with a ridge: best for tiled at rows=8, cols=16, unroll=4, prefetch=4, layout b."""
    import math

    if schedule == "swiglu.other":
        return 60.0 + 3 * c["rows"]
    log = {k: math.log2(1 + c[k]) for k in ("rows", "cols", "unroll", "prefetch")}
    t = 20.0 + 6 * (log["rows"] - math.log2(9)) ** 2 + 4 * (log["cols"] - math.log2(17)) ** 2
    t += 3 * (log["unroll"] - math.log2(5)) ** 2 + 2 * (log["prefetch"] - math.log2(5)) ** 2
    return t + (0.0 if c["layout"] == "b" else 2.5)
