"""Experts by matrix units on GPUs from the A100 on: slots sorted by expert, in tiles of one expert each.

Both matmuls are those of `mpgemm.cuda_mma`, for operands as they lie, and of `mpgemm.cuda_mma_codes`, for
codes that are unpacked in registers; a tile's rows are gathered by their slots. The first stores
``silu(gate) * up`` as the operand of the second. How many tiles there are is known on the device alone; grids
are those of the most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware, gpu_of
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.limits import MOST_REGISTERS, fits
from mimo_compile.schedules.cuda.template import rendered
from mimo_compile.schedules.moe.cuda_base import CudaExperts, CudaMoe
from mimo_compile.schedules.moe.cuda_ends import LISTS, ExpertEnds
from mimo_compile.schedules.moe.cuda_work import Tiles, tiled_work
from mimo_compile.schedules.mpgemm.cuda_mma import NEEDS, whole_pieces

_OTHER_REGISTERS = 56
"""Of a thread, besides sums and operands; a guess, as that of `mpgemm.cuda_mma`."""


@dataclass(frozen=True, slots=True)
class MoeMmaConfig:
    """Knobs of `CudaMoeMma`."""

    bm: int = 64
    """Slots of a tile, in both matmuls."""
    bn13: int = 128
    """Rows of gate and up of a block's tile."""
    bn2: int = 128
    """Rows of the down matrix of a block's tile."""
    depth: int = 128
    """Bytes of activations along K of a stage."""
    warps_m: int = 2
    warps_n: int = 2
    """Warps that share a tile."""
    stages: int = 3
    """Tiles in shared memory or on their way."""
    split: int = 1
    """Pieces of K of the down matmul, summed by blocks of their own, and added in their order last."""
    group_m: int = 8
    """Tiles of slots that take turns at each tile of weights."""

    @property
    def threads(self) -> int:
        """Of a block of a matmul."""
        return 32 * self.warps_m * self.warps_n


def takes_tiles(p: CudaExperts) -> bool:
    """Say whether matrix units take the operands: as they lie, or codes in groups of 16 bytes and more."""
    if p.fmt.is_float:
        return p.fmt.name == "bf16" and p.acts.kind == "bf16"
    if p.w_group % (128 // p.half.bits) or not (p.acts.rounded or p.acts.is_int8):
        return False
    if p.acts.is_int8 and p.half.bits == 8 and p.w_group:
        return False
    return p.acts.rounded or (p.exact and not p.x_group)


class CudaMoeMma(CudaMoe):
    """Any number of tokens; tiles beyond an expert's slots and the matrices are zeros."""

    name = "moe.cuda_mma"
    config = MoeMmaConfig
    needs = NEEDS
    version: ClassVar[int] = 2

    def takes(self, p: CudaExperts) -> bool:
        """``w=bf16,a=abf16``; codes without zero points with 16-bit floats or ``a8`` (8 bits: by rows)."""
        return takes_tiles(p)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles of blocks and warps, stages, pieces of K, order of the tiles."""
        p = CudaExperts.of(workload)
        knobs = {
            "bm": (16, 32, 64, 128), "bn13": (32, 64, 128, 256), "bn2": (32, 64, 128, 256),
            "depth": (128, 256) if unpacks(p) else (64, 128), "warps_m": (1, 2, 4), "warps_n": (1, 2, 4),
            "stages": (2, 3, 4, 5), "split": (1, 2, 4, 8), "group_m": (1, 4, 8),
        }  # fmt: skip

        def legal(c: MoeMmaConfig) -> bool:
            return _may_run(c, p, hardware) and _worth(c, p, hardware)

        return Space(MoeMmaConfig, knobs, _default(p, hardware, legal), legal)

    def lower(self, workload: Workload, config: MoeMmaConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p, tiles = CudaExperts.of(workload), _tiles(CudaExperts.of(workload), config)
        codes = unpacks(p)
        ends = ExpertEnds(tiles, codes)
        constants = ends.constants() | {
            "BN_UP": config.bn13, "BN_DOWN": config.bn2, "DEPTH": config.depth,
            "WARPS_M": config.warps_m, "WARPS_N": config.warps_n, "STAGES": config.stages,
            "GROUP_M": config.group_m, "W_UP_BYTES": p.half.row_bytes, "W_DOWN_BYTES": p.w2.row_bytes,
        }  # fmt: skip
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        expected = ("IMMA" if ends.int8 else "HMMA", "LDGSTS", *(() if codes else ("LDSM",)))
        scratch = {a.name: a for a in ends.scratch()}
        code = DeviceCode(text, _launches(p, config, ends), scratch, expected=expected)
        return self.kernel(workload, config, hardware, code)

    def work(self, workload: Workload, config: MoeMmaConfig, hardware: Hardware) -> Counts:
        """Whole tiles, under uniform routing; see `cuda_work`."""
        p = CudaExperts.of(workload)
        return tiled_work(p, _tiles(p, config), unpacks(p), hardware)


def unpacks(p: CudaExperts) -> bool:
    """Say whether weights are unpacked in registers, else they are operands as they lie."""
    return p.half.bits < 8 or not (p.fmt.is_float or p.acts.is_int8)


def _tiles(p: CudaExperts, c: MoeMmaConfig) -> Tiles:
    return Tiles(p, c.bm, c.bn13, c.bn2, c.warps_m, c.split)


def _launches(p: CudaExperts, c: MoeMmaConfig, ends: ExpertEnds) -> tuple[Launch, ...]:
    """Return the launches; arrays that a kernel does not look at stand for those that there are not."""
    tiles, w13, w2 = ends.tiles, p.weight_names("w13_"), p.weight_names("w2_")
    up = Launch(
        "experts_up", (tiles.most * tiles.up_columns, 1, 1), c.threads,
        ("x_operand", *w13, ends.x_scale, *LISTS, ends.hidden), _shared(c, c.bn13, p),
    )  # fmt: skip
    down = Launch(
        "experts_down", (tiles.most * tiles.down_columns, 1, c.split), c.threads,
        ("hidden_operand", *w2, *LISTS, "parts"), _shared(c, c.bn2, p),
    )  # fmt: skip
    return ends.around((up,), down)


def _shared(c: MoeMmaConfig, bn: int, p: CudaExperts) -> int:
    """Return the bytes of shared memory of a block: stages of both operands, and the slots of its rows."""
    w_depth = c.depth
    if unpacks(p):
        w_depth = c.depth // (1 if p.acts.is_int8 else 2) * p.half.bits // 8
    return c.stages * (c.bm * c.depth + bn * w_depth) + 4 * c.bm


def _may_run(c: MoeMmaConfig, p: CudaExperts, hardware: Hardware) -> bool:
    """Say whether warps' tiles are whole pairs of fragments, and a GPU can launch such blocks."""
    bn = max(c.bn13, c.bn2)
    sums = c.bm * bn // c.threads
    operands = c.bm // c.warps_m // 4 + 8
    if unpacks(p):
        steps = 8 // p.half.bits // (2 if p.acts.is_int8 else 1)
        # x and scales of a group, and where the next ones are
        operands = 2 * (c.bm // c.warps_m // 4 * steps + bn // c.warps_n // 4)
    registers = (2 if p.w_group else 1) * sums + operands + _OTHER_REGISTERS
    return (
        c.bm % (16 * c.warps_m) == 0
        and c.bn13 % (16 * c.warps_n) == 0
        and c.bn2 % (16 * c.warps_n) == 0
        and registers <= min(MOST_REGISTERS, gpu_of(hardware).registers_per_sm // c.threads)
        and fits(hardware, threads=c.threads, shared_bytes=_shared(c, bn, p))
    )


def _worth(c: MoeMmaConfig, p: CudaExperts, hardware: Hardware) -> bool:
    """Say whether tiles are not mostly padding, and no knob says what another value says as well."""
    tiles = _tiles(p, c)
    tiles_k = -(-p.w2.k_padded * tiles.element // c.depth)
    return (
        (c.bm == 16 or c.bm < 2 * p.t)  # no expert has more slots, but where ids repeat
        and (c.bn13 == 32 or c.bn13 < 4 * p.f)
        and (c.bn2 == 32 or c.bn2 < 2 * p.d)
        and (c.group_m == 1 or c.group_m < 2 * tiles.most)
        and whole_pieces(tiles_k, c.split)
        and (c.split == 1 or tiles.expected * tiles.down_columns * c.split <= 4 * hardware.cores)
    )


def _default(
    p: CudaExperts, hardware: Hardware, legal: Callable[[MoeMmaConfig], bool]
) -> MoeMmaConfig:
    """Return a config whose tiles have about as many rows as experts have slots. Not measured."""
    mean = p.slots / p.hit
    bm = next((b for b in (16, 32, 64) if mean <= b), 64 if unpacks(p) else 128)
    warps_m, warps_n = (2, 2) if bm >= 64 else (1, 4)
    for bn in (128, 64):
        for group_m in (8, 4, 1):
            c = MoeMmaConfig(bm, bn, bn, 128, warps_m, warps_n, 4, 1, group_m)
            if legal(c):
                units = _tiles(p, c).expected * _tiles(p, c).down_columns
                cut = (replace(c, split=s) for s in (2, 4, 8))
                few = (d for d in cut if units * d.split < 2 * hardware.cores and legal(d))
                return max((c, *few), key=lambda d: d.split) if units < hardware.cores else c
    return MoeMmaConfig(16, 32, 32, 128, 1, 1, 2, 1, 1)
