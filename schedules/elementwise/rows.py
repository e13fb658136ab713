"""What the row-wise kernels share: their config, its space, and how rows are spread over threads."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.emit.vector import T, symbol
from mimo_compile.schedules.work import Stream, Tile, busiest, work

PARALLEL_BYTES = 256 << 10
"""Below this traffic a kernel takes less time than waking the threads does (some microseconds)."""


@dataclass(frozen=True, slots=True)
class RowConfig:
    """Knobs of a kernel that treats rows alike."""

    parallel: bool = False
    """Spread the rows over threads."""
    unroll: int = 4
    """Vectors of 16 lanes in flight in the inner loop."""


class RowSchedule(Schedule):
    """Base of the row-wise schedules: a subclass says how one workload's function is made."""

    config = RowConfig
    rows_param = "t"
    """Extent that is spread over threads."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op, on any x86-64."""
        return workload.op == self.op and hardware.kind == "cpu"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Threads or not, and how far the inner loop is unrolled."""
        p = get_op(self.op).full(workload)
        may = p[self.rows_param] > 1 and hardware.threads > 1
        traffic = get_op(self.op).counts(workload).bytes.get("dram", 0.0)
        default = RowConfig(parallel=may and traffic >= PARALLEL_BYTES)
        return Space(
            RowConfig,
            {"parallel": (False, True) if may else (False,), "unroll": (1, 2, 4, 8)},
            default,
        )

    def order(self, workload: Workload, config: RowConfig, hardware: Hardware) -> str | None:
        """Rows are treated alike; sums over a row have as many parts as vectors are in flight."""
        return f"unroll={config.unroll}"

    def lower(self, workload: Workload, config: RowConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        name = symbol(self.op, self.name, self.version, workload, config, sorted(hardware.features))
        func = _made(type(self), workload, config).with_attr("global_symbol", name)
        return Kernel(name, func, self.kernel_args(workload), self.work(workload, config, hardware))

    def work(self, workload: Workload, config: RowConfig, hardware: Hardware) -> Counts:
        """Return what the op cannot avoid, since no byte is read twice, and how it is spread."""
        op = get_op(self.op)
        p, need = op.full(workload), op.counts(workload)
        rows = p[self.rows_param]
        threads = hardware.threads if config.parallel else 1
        row_bytes = need.bytes.get("dram", 0.0) / rows
        return work(
            dict(need.ops),
            [Stream(need.bytes.get("dram", 0.0))],
            hardware,
            tasks=rows if threads > 1 else 1,
            share=busiest(rows, threads),
            useful=1.0,
            tile=Tile(config.unroll, 1, row_bytes),
        )

    def kernel_args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return the kernel's arguments: the op's, unless the schedule packs some."""
        return get_op(self.op).args(workload)

    @abstractmethod
    def make(self, p: dict[str, Any], rows: Any, unroll: int) -> Any:
        """Return the PrimFunc for the op's parameters ``p``; ``rows`` makes the loop over rows."""


@lru_cache(maxsize=256)
def _made(schedule: type[RowSchedule], workload: Workload, config: RowConfig) -> Any:
    """Return the PrimFunc of a config; parsing one takes long, and compilations of one shape ask again."""
    rows = T.parallel if config.parallel else T.serial
    return schedule().make(get_op(schedule.op).full(workload), rows, config.unroll)
