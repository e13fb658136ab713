"""Attention over KV caches of 8-bit floats on GPUs: queries and weights are sums of three bfloat16 numbers.

The op has the bound of exact arithmetic for these caches, and so is this: codes are operands as they are, and
nothing is rounded more coarsely than float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_float8_layout as layout
from mimo_compile.schedules.attention.cuda_decode import CudaDecode
from mimo_compile.schedules.attention.cuda_flash import CudaFlash
from mimo_compile.schedules.attention.cuda_layout import whole
from mimo_compile.schedules.attention.cuda_prefill import CudaPrefill
from mimo_compile.schedules.attention.cuda_work import HEIGHT, STATE
from mimo_compile.schedules.cuda.limits import MOST_REGISTERS, fits

_TERMS = 3
"""Numbers of bfloat16 that a float32 one is the sum of."""
_SPARE = 78
"""Registers beside sums and operands in flight."""
_MOST_SUMS = 160
"""Columns of values: of more, nvcc spills some."""


class Float8Flash(CudaFlash):
    """What attention over 8-bit floats has in common."""

    caches: ClassVar[Any] = layout

    def given(self, p: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the caches."""
        return ("k_cache", "v_cache")

    def registers(self, p: Mapping[str, Any], config: Any, own: int) -> int:
        """Return about how many registers a thread needs, as nvcc gives them to heads of 64 to 192."""
        return int(min((whole(p["d"]) + whole(p["dv"])) // 2 + _SPARE, MOST_REGISTERS))

    def can(self, p: Mapping[str, Any], config: Any, own: int, hardware: Hardware) -> bool:
        """Say whether a block of a config can be launched, and needs no registers that a thread lacks."""
        shared, registers = self.shared_bytes(p, config), self.registers(p, config, own)
        return whole(p["dv"]) <= _MOST_SUMS and fits(
            hardware, threads=32 * config.warps, shared_bytes=shared, registers=registers
        )

    def stages_bytes(self, p: Mapping[str, Any], config: Any) -> int:
        """Return the shared memory of all stages: rows with 16 bytes behind each, and the rows' bytes."""
        row = whole(p["d"]) + whole(p["dv"]) + 34
        return int(config.stages * config.keys * row)

    @staticmethod
    def terms_bytes(p: Mapping[str, Any]) -> int:
        """Return the shared memory of 16 rows of queries."""
        return _TERMS * 2 * HEIGHT * whole(p["d"])

    def counted(
        self,
        p: Mapping[str, Any],
        copied: float,
        held: float,
        scored: float,
        own: int,
        parts: int = 1,
    ) -> Counts:
        """Return the counts of passing over keys: more products than of bfloat16, fewer bytes."""
        found = super().counted(p, copied, held, scored, HEIGHT, parts)
        numbers, heads = float(whole(p["d"]) + whole(p["dv"])), p["kv"]
        ops = dict(found.ops)
        tiles = ops["tile_bf16"]
        ops["tile_bf16"] = _TERMS * tiles
        # two codes of a tile's 16 rows: moved, masked, joined, multiplied; weights in three terms
        ops["int_op"] += 5.0 / 2 * tiles / HEIGHT + 1.5 * ops["exp_f32"]
        ops["add_f32"] += 2.0 * ops["exp_f32"]
        less = 2.0 * numbers - (numbers + 2)
        moved = {
            "dram": found.bytes["dram"] - held * less,
            "l2": found.bytes["l2"] - heads * copied * less,
            "l1": found.bytes["l1"] - heads * (copied + scored) * less,
        }
        return Counts(ops, moved)


class CudaFloat8Decode(Float8Flash, CudaDecode):
    """Tiles of 16 rows; each warp has blocks of 16 keys of its own."""

    name = "cached_attention.cuda_float8_decode"

    def shared_bytes(self, p: Mapping[str, Any], config: Any) -> int:
        """Return the shared memory of a block: stages and queries; later what is merged."""
        merged = 4 * config.warps * HEIGHT * (whole(p["dv"]) + 8 + STATE)
        return max(self.stages_bytes(p, config) + self.terms_bytes(p), int(merged))

    def template(self) -> Path:
        """Return the file of the text."""
        return Path(__file__).with_name("cuda_float8_decode.cu")

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the kernel's work: softmax steps are blocks of 16 keys."""
        return super().work(workload, replace(config, keys=HEIGHT * config.warps), hardware)


class CudaFloat8Prefill(Float8Flash, CudaPrefill):
    """Blocks of 16 rows for each warp, which share blocks of 16 keys."""

    name = "cached_attention.cuda_float8_prefill"

    def shared_bytes(self, p: Mapping[str, Any], config: Any) -> int:
        """Return the shared memory of a block: stages, and the queries of each warp."""
        return self.stages_bytes(p, config) + int(config.warps) * self.terms_bytes(p)

    def template(self) -> Path:
        """Return the file of the text."""
        return Path(__file__).with_name("cuda_float8_prefill.cu")

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the kernel's work: blocks that no row of a warp sees are left out one by one."""
        return super().work(workload, replace(config, keys=HEIGHT), hardware)
