"""What attention kernels for GPUs share: blocks of query rows, stages of keys, parts that are merged.

16 rows of a matrix tile are tokens and heads that share keys (``row = token * group + head``). Queries and
weights are rounded to bfloat16, sums are float32: the op's `bound` for 16-bit caches is for such kernels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware, gpu_of
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.pages import TABLE, paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_layout as layout
from mimo_compile.schedules.attention.cuda_work import HEIGHT, STATE, copied_counts
from mimo_compile.schedules.base import Kernel, Schedule, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.limits import array_bytes, fits
from mimo_compile.schedules.cuda.template import rendered

LOG2_E = 1.4426950408889634
_SPARE = 48
"""Registers for all that is neither query, sum, logit nor weight: addresses, masks, fragments in flight."""
_MOST_SUMS = 208
"""Columns of values up to which softmax steps may have more than 16 keys: of more, nvcc spills registers."""

_PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, slots=True)
class StagesConfig:
    """Knobs of attention whose keys pass through shared memory."""

    keys: int = 64
    """Of a stage."""
    stages: int = 2
    """Of which all but one are on their way while one is worked on."""
    warps: int = 4
    """Of a block."""


@dataclass(frozen=True, slots=True)
class PartsConfig(StagesConfig):
    """Knobs of attention whose keys are split: over blocks, and each stage over a block's warps."""

    parts: int = 1
    """Of the keys, in blocks of their own, which a second launch merges."""


class CudaFlash(Schedule):
    """Base of attention on GPUs; a subclass says which launches, and what they do."""

    caches: ClassVar[Any] = layout
    """Module that lays out the caches: `takes`, `kernel_args`, `constants`, `layouts`, `pack`, `unpack`."""
    expected: ClassVar[tuple[str, ...]] = ("HMMA", "LDSM", "LDGSTS")
    """Prefixes of opcodes that must occur."""
    needs: ClassVar[frozenset[str]] = layout.NEEDS
    """Features of a GPU."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Workloads of the op with bfloat16 caches and float arithmetic, of heads that registers hold."""
        if workload.op != self.op or not self.caches.takes(workload, hardware):
            return False
        space = self.space(workload, hardware)
        return space.legal(space.default)

    def can(self, p: Mapping[str, Any], config: Any, own: int, hardware: Hardware) -> bool:
        """Say whether a block of a config can be launched, and needs no registers that a thread lacks.

        Args:
            p: Parameters of the workload.
            config: Its keys, stages and warps count.
            own: Keys of a stage that one warp works on.
            hardware: A GPU.
        """
        return (own == HEIGHT or layout.whole(p["dv"]) <= _MOST_SUMS) and fits(
            hardware,
            threads=32 * config.warps,
            shared_bytes=self.shared_bytes(p, config),
            registers=self.registers(p, config, own),
        )

    def registers(self, p: Mapping[str, Any], config: Any, own: int) -> int:
        """Return about how many registers a thread needs; arguments as for `can`.

        What is beside queries, sums, logits and weights is from what ptxas gives heads of 128 to 256 numbers.
        """
        queries, sums = layout.whole(p["d"]) // 4, layout.whole(p["dv"]) // 2
        more = 12 if own > HEIGHT else 0
        return int(queries + sums + own // 2 + own // 4 + _SPARE + more)

    def resident(self, p: Mapping[str, Any], config: Any, own: int, hardware: Hardware) -> int:
        """Return about how many blocks of a config the GPU holds at a time; arguments as for `can`."""
        gpu = gpu_of(hardware)
        shared = gpu.shared_per_sm // (self.shared_bytes(p, config) + gpu.shared_reserved)
        threads = gpu.registers_per_sm // self.registers(p, config, own)
        held = min(shared, threads // (32 * int(config.warps)))
        return hardware.cores * max(1, held)

    def shared_bytes(self, p: Mapping[str, Any], config: Any) -> int:
        """Return the shared memory of a block: keys and values of all stages, 16 bytes behind each row."""
        row = 2 * (layout.whole(p["d"]) + layout.whole(p["dv"])) + 32
        return int(config.stages * config.keys * row)

    def constants(self, workload: Workload) -> dict[str, int | float | bool]:
        """Return what the text is told of a workload."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        found: dict[str, int | float | bool] = self.caches.constants(workload)
        return found | {
            "WINDOW": p["window"],
            "SINK": bool(p["sink"]),
            "SCALE": layout.float32(op.softmax_scale(p) * LOG2_E),
        }

    def knobs_of(self, config: Any) -> dict[str, int | float | bool]:
        """Return what the text is told of a config."""
        return {name.upper(): value for name, value in self.config_to_json(config).items()}

    @abstractmethod
    def template(self) -> Path:
        """Return the file of the text."""

    @abstractmethod
    def launches(self, workload: Workload, config: Any) -> tuple[Launch, ...]:
        """Return the launches of a call."""

    def given(self, p: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of what launches take of the caches; where there are no pages `pos` stands in."""
        return (TABLE if paged(p) else "pos", "k_cache", "v_cache")

    def counted(
        self,
        p: Mapping[str, Any],
        copied: float,
        held: float,
        scored: float,
        own: int,
        parts: int = 1,
    ) -> Counts:
        """Return the counts of passing over keys; see `copied_counts`."""
        return copied_counts(p, p["kv"], copied, held, scored, own, parts)

    def scratch(self, workload: Workload, config: Any) -> dict[str, Arg]:
        """Return the arrays that the launches share."""
        return {}

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        text = rendered(self.template(), self.constants(workload) | self.knobs_of(config))
        launches, scratch = self.launches(workload, config), self.scratch(workload, config)
        code = DeviceCode(text, launches, scratch, expected=self.expected)
        bytes_of_scratch = sum(array_bytes(a) for a in scratch.values())
        return Kernel(
            kernel_name(self, workload, config, hardware), None, self.caches.kernel_args(workload),
            self.work(workload, config, hardware), bytes_of_scratch, self.needs, device=code,
        )  # fmt: skip

    def layouts(self, workload: Workload, config: Any) -> dict[str, str]:
        """Return the names of the cache layouts."""
        layouts: dict[str, str] = self.caches.layouts(workload)
        return layouts

    def pack(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the caches; the sink stays as it is."""
        packed: dict[str, Array] = self.caches.pack(workload, arrays)
        return packed

    def unpack_state(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return canonical caches."""
        canonical: dict[str, Array] = self.caches.unpack(workload, arrays)
        return canonical


class CudaParts(CudaFlash):
    """Base of attention of few rows, whose keys are split into parts."""

    config: ClassVar[type] = PartsConfig

    def registers(self, p: Mapping[str, Any], config: Any, own: int) -> int:
        """Return about how many registers a thread needs: more for each stage beyond two."""
        more = 16 if own > HEIGHT else 0
        return super().registers(p, config, own) + 4 * (int(config.stages) - 2) + more

    @abstractmethod
    def units(self, p: Mapping[str, Any]) -> int:
        """Return how many tiles of 16 rows there are."""

    @abstractmethod
    def reach(self, p: Mapping[str, Any]) -> int:
        """Return how many keys the rows of a tile may see."""

    def parts_of(self, p: Mapping[str, Any], config: Any, name: str) -> str:
        """Return the name of a scratch array, or where there are no parts any array, not looked at."""
        return name if config.parts > 1 else "out"

    def scratch(self, workload: Workload, config: Any) -> dict[str, Arg]:
        """Return what the parts leave to be merged: weighted values, greatest logits and sums."""
        if config.parts == 1:
            return {}
        p = get_op(self.op).full(workload)
        shape = (self.units(p), config.parts, HEIGHT)
        sizes = {"parts": layout.whole(p["dv"]), "states": STATE}
        return {n: Arg(n, "output", (*shape, size), "float32") for n, size in sizes.items()}

    def knobs(self, p: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the values of each knob."""
        most = max(1, self.reach(p) // (2 * HEIGHT))
        return {
            "keys": (32, 64, 128),
            "stages": (2, 3, 4),
            "warps": (2, 4, 8),
            "parts": tuple(n for n in _PARTS if n <= most),
        }

    def legal(self, p: Mapping[str, Any], config: PartsConfig, hardware: Hardware) -> bool:
        """Say whether a config can be launched: warps have whole tiles of a stage's keys, 64 at most."""
        own, rest = divmod(config.keys, config.warps)
        whole = rest == 0 and own % HEIGHT == 0 and own <= 64
        return whole and self.can(p, config, own, hardware)

    def default(self, p: Mapping[str, Any], hardware: Hardware) -> PartsConfig:
        """Return a config with as many parts as the GPU holds at a time, of two stages at least."""
        first = PartsConfig()
        if not self.legal(p, first, hardware):
            first = PartsConfig(32, 2, 2)
        own = first.keys // first.warps
        room = self.resident(p, first, own, hardware) // self.units(p)
        most = max(1, min(room, self.reach(p) // (2 * first.keys)))
        return replace(first, parts=max(n for n in self.knobs(p)["parts"] if n <= most))


def merge_threads(p: Mapping[str, Any]) -> int:
    """Return the threads of a block that merges a row: one for each column, in whole warps, 256 at most."""
    return int(min(-(-p["dv"] // 32) * 32, 256))
