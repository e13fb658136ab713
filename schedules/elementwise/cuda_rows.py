"""What kernels of small ops on GPUs share: one launch, whose threads have some neighbouring numbers each."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.limits import fits
from mimo_compile.schedules.cuda.template import rendered

THREADS = (64, 128, 256, 512)
WIDTH = 4
"""Neighbouring numbers of a thread without a record: 16 bytes of float32."""
MOST_INT = 2**31


@dataclass(frozen=True, slots=True)
class MapConfig:
    """Knobs of a kernel whose threads do not know of each other."""

    threads: int = 256
    """Of a block."""
    width: int = WIDTH
    """Neighbouring numbers of a thread: its loads and stores have 16 bytes at most."""


class CudaRows(Schedule):
    """Base: a subclass names the symbol, the rows, the widths and the constants of its ``.cu`` file."""

    symbol: ClassVar[str]
    widths: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)
    expected: ClassVar[tuple[str, ...]] = ()
    """Opcodes that must occur with the widest loads."""

    @abstractmethod
    def rows(self, p: dict[str, Any]) -> tuple[int, int]:
        """Return how many rows of results there are for the op's parameters, and their numbers."""

    @abstractmethod
    def constants(self, p: dict[str, Any]) -> dict[str, int | float | bool | str]:
        """Return the constants of the text that follow from the op's parameters."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op, on any GPU."""
        return workload.op == self.op and hardware.kind == "cuda"

    def order(self, workload: Workload, config: Any, hardware: Hardware) -> str | None:
        """Each number has an arithmetic of its own, the same with all knobs."""
        return "each"

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        op = get_op(self.op)
        p = op.full(workload)
        args = op.args(workload)
        constants = self.constants(p) | {"THREADS": config.threads} | self.knobs(p, config)
        launch = Launch(
            self.symbol,
            (self.blocks(p, config), 1, 1),
            config.threads,
            tuple(a.name for a in args),
            self.shared_bytes(config),
        )
        return Kernel(
            kernel_name(self, workload, config, hardware), None, args,
            self.work(workload, config, hardware), features=frozenset({"cuda"}),
            device=DeviceCode(
                rendered(self.path, constants), (launch,),
                expected=self.expected if config.width >= 4 else (),
            ),
        )  # fmt: skip

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return what the op cannot avoid: no byte is read or written twice."""
        return get_op(self.op).counts(workload)

    def shared_bytes(self, config: Any) -> int:
        """Return the shared memory of a block."""
        return 0

    @property
    def path(self) -> Path:
        """The text."""
        return Path(__file__).with_name(f"cuda_{self.op}.cu")

    @abstractmethod
    def knobs(self, p: dict[str, Any], config: Any) -> dict[str, int | float | bool | str]:
        """Return the constants of the text that follow from a config."""

    @abstractmethod
    def blocks(self, p: dict[str, Any], config: Any) -> int:
        """Return the blocks of the launch."""


class CudaMap(CudaRows):
    """Base of kernels whose results are each of some inputs: threads have ``width`` of them."""

    config = MapConfig

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Threads of a block, and how wide they read, as far as rows are whole such pieces."""
        p = get_op(self.op).full(workload)
        widths = tuple(w for w in self.widths if self.rows(p)[1] % w == 0)
        return Space(
            MapConfig,
            {"threads": THREADS, "width": widths},
            MapConfig(width=max(w for w in widths if w <= WIDTH)),
            lambda c: fits(hardware, threads=c.threads) and self.blocks(p, c) < MOST_INT,
        )

    def blocks(self, p: dict[str, Any], config: MapConfig) -> int:
        """As many as threads that have all results."""
        rows, numbers = self.rows(p)
        return -(-(rows * numbers // config.width) // config.threads)

    def knobs(self, p: dict[str, Any], config: MapConfig) -> dict[str, int | float | bool | str]:
        """The width, and the type that counts threads."""
        threads = self.blocks(p, config) * config.threads
        return {"WIDTH": config.width, "INDEX": "int" if threads < MOST_INT else "long long"}
