"""Attention over KV caches in groups of few bits on GPUs: codes are bytes of products, the tail is float32.

Queries and weights become the integers that the op knows (`ir.kv_rounding`), so results are as exact as
those of any kernel that takes these. Nothing else is rounded more coarsely than float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.kv_groups import STATES
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.pages import TABLE, paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_group_layout as layout
from mimo_compile.schedules.attention.cuda_decode import CudaDecode
from mimo_compile.schedules.attention.cuda_flash import CudaFlash
from mimo_compile.schedules.attention.cuda_group_work import (
    Visits,
    group_counts,
    position_bytes,
    visits,
)
from mimo_compile.schedules.attention.cuda_layout import whole
from mimo_compile.schedules.attention.cuda_prefill import CudaPrefill
from mimo_compile.schedules.attention.cuda_work import HEIGHT, STATE, in_pages, with_merge
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.cuda.limits import MOST_REGISTERS, fits

_SPARE = 84
"""Registers that nvcc gives heads of 64 to 192 numbers beside what a step holds."""
_MOST_HELD, _MOST_SUMS, _MOST_KEY = 180, 160, 256
"""Registers that a step may hold, columns of values and of keys: of more, nvcc spills some."""


@dataclass(frozen=True, slots=True)
class GroupStagesConfig:
    """Knobs of attention whose groups pass through shared memory."""

    stages: int = 2
    """Groups, of which all but one are on their way while one is worked on."""
    warps: int = 4
    """Of a block."""


@dataclass(frozen=True, slots=True)
class GroupPartsConfig(GroupStagesConfig):
    """Knobs of attention whose groups are split over blocks, and over a block's warps."""

    parts: int = 1
    """Of the groups, in blocks of their own, which a second launch merges."""


class GroupsFlash(CudaFlash):
    """What attention over groups has in common, whoever shares them."""

    caches: ClassVar[Any] = layout
    expected: ClassVar[tuple[str, ...]] = ("IMMA", "HMMA", "LDGSTS")

    def constants(self, workload: Workload) -> dict[str, int | float | bool]:
        """Return what the text is told of a workload; there are no windows."""
        return {n: x for n, x in super().constants(workload).items() if n != "WINDOW"}

    def given(self, p: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the block tables (`pos` where there are none) and of the cache's arrays."""
        return (TABLE if paged(p) else "pos", *STATES)

    def registers(self, p: Mapping[str, Any], config: Any, own: int) -> int:
        """Return about how many registers a thread needs."""
        return int(min(self._held(p) + _SPARE, MOST_REGISTERS))

    @staticmethod
    def _held(p: Mapping[str, Any]) -> int:
        """Return the registers of integers of queries, logits or weights of a group, and sums."""
        fmt = layout.format_of(p)
        queries = fmt.query_terms * layout.key_channels(p) // 8
        return int(queries + fmt.group // 2 + whole(p["dv"]) // 2 + 2 * fmt.value_groups(p["dv"]))

    def legal(self, p: Mapping[str, Any], config: Any, hardware: Hardware) -> bool:
        """Say whether a config can be launched, and needs no registers that a thread lacks."""
        columns = whole(p["dv"]) <= _MOST_SUMS and p["d"] <= _MOST_KEY
        held = columns and self._held(p) <= _MOST_HELD
        shared, threads = self.shared_bytes(p, config), 32 * config.warps
        return held and fits(
            hardware, threads=threads, shared_bytes=shared, registers=self.registers(p, config, 0)
        )


def _queries_bytes(p: Mapping[str, Any]) -> int:
    """Return the shared memory of 16 rows of queries."""
    return 4 * HEIGHT * (layout.key_channels(p) + 4)


class CudaGroupsDecode(GroupsFlash, CudaDecode):
    """Tiles of 16 rows; each warp has groups, and runs of the tail, of its own."""

    name = "cached_attention.cuda_groups_decode"
    version: ClassVar[int] = 2
    config: ClassVar[type] = GroupPartsConfig

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Stages, warps, parts."""
        p = get_op(self.op).full(workload)
        parts = tuple(n for n in self.knobs(p)["parts"] if n == 1 or n <= self.reach(p) // 128)
        knobs = {"stages": (2, 3, 4), "warps": (1, 2, 4, 8), "parts": parts}
        tries = (GroupPartsConfig(2, warps) for warps in (4, 2, 1))
        first = next((c for c in tries if self.legal(p, c, hardware)), GroupPartsConfig(2, 1))
        room = self.resident(p, first, 0, hardware) // self.units(p)
        most = max(1, min(room, self.reach(p) // (64 * first.warps)))
        default = replace(first, parts=max(n for n in parts if n <= most))
        return Space(GroupPartsConfig, knobs, default, lambda c: self.legal(p, c, hardware))

    def shared_bytes(self, p: Mapping[str, Any], config: Any) -> int:
        """Return the shared memory of a block: stages of all warps and queries; later what is merged."""
        stages = config.warps * config.stages * layout.group_bytes(p) + _queries_bytes(p)
        merged = 4 * config.warps * HEIGHT * (whole(p["dv"]) + 8 + STATE)
        return int(max(stages, merged))

    def template(self) -> Path:
        """Return the file of the text."""
        return Path(__file__).with_name("cuda_groups_decode.cu")

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the kernel's work at the op's nominal KV lengths."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        seen = sum((visits(p, length, 1) for length in op.lengths(p)), Visits())
        few = p["t"] * (p["h"] // p["kv"]) <= HEIGHT // 2  # the lower half of a tile
        found = group_counts(p, seen, config.parts, HEIGHT // 2 if few else HEIGHT)
        found = in_pages(found, p, op.lengths(p), position_bytes(p))
        return with_merge(found, p, self.units(p), config.parts)


class CudaGroupsPrefill(GroupsFlash, CudaPrefill):
    """Blocks of 16 rows for each warp, which share groups; each warp reads its own runs of the tail."""

    name = "cached_attention.cuda_groups_prefill"
    version: ClassVar[int] = 2
    config: ClassVar[type] = GroupStagesConfig

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Stages and warps."""
        p = get_op(self.op).full(workload)
        knobs = {"stages": (2, 3, 4), "warps": (1, 2, 4, 8)}
        tries = (GroupStagesConfig(2, n) for n in (self.warps_of(p, hardware), 1))
        default = next((c for c in tries if self.legal(p, c, hardware)), GroupStagesConfig(2, 1))
        return Space(GroupStagesConfig, knobs, default, lambda c: self.legal(p, c, hardware))

    def shared_bytes(self, p: Mapping[str, Any], config: Any) -> int:
        """Return the shared memory of a block: stages, and the queries of each warp."""
        return int(config.stages * layout.group_bytes(p) + config.warps * _queries_bytes(p))

    def template(self) -> Path:
        """Return the file of the text."""
        return Path(__file__).with_name("cuda_groups_prefill.cu")

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the kernel's work at the op's nominal KV lengths."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        seen = sum((visits(p, length, config.warps) for length in op.lengths(p)), Visits())
        return in_pages(group_counts(p, seen), p, op.lengths(p), position_bytes(p))
