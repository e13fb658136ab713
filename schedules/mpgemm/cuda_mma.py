"""bfloat16 or int8 matmul on GPUs from the A100 on: ``mma.sync`` on tiles that ``cp.async`` brings ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware, gpu_of
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.cuda.code import Launch
from mimo_compile.schedules.cuda.limits import MOST_REGISTERS, fits
from mimo_compile.schedules.cuda.template import rendered
from mimo_compile.schedules.mpgemm.cuda_base import CudaGemm, CudaProblem
from mimo_compile.schedules.mpgemm.cuda_ends import Ends
from mimo_compile.schedules.mpgemm.cuda_work import tiled_work

NEEDS = frozenset({"cuda", "mma", "cp_async"})
_OTHER_REGISTERS = 56
"""Of a thread, besides sums and operands: addresses, loop counters. A guess; ptxas has the last word."""


@dataclass(frozen=True, slots=True)
class MmaConfig:
    """Knobs of `CudaMma`."""

    bm: int = 128
    """Tokens of a block's tile."""
    bn: int = 128
    """Rows of the weights of a block's tile."""
    depth: int = 128
    """Bytes along K of a stage."""
    warps_m: int = 2
    warps_n: int = 2
    """Warps that share a tile."""
    stages: int = 3
    """Tiles in shared memory or on their way."""
    split: int = 1
    """Pieces of K, which blocks of their own sum and a last launch adds in their order."""
    group_m: int = 8
    """Tiles of tokens that take turns at each tile of weights."""

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return self.stages * (self.bm + self.bn) * self.depth

    @property
    def registers(self) -> int:
        """Of a thread: sums, and operands of a step."""
        sums = self.bm * self.bn // self.threads
        return sums + self.bm // self.warps_m // 4 + 8 + _OTHER_REGISTERS


def takes_operands(p: CudaProblem) -> bool:
    """Say whether, of weights in `Rows`, both operands are bfloat16, or int8 with one scale for each row."""
    if p.fmt.name == "bf16":
        return p.acts.kind == "bf16"
    plain = p.fmt.is_integer and p.weight.bits == 8 and not (p.w_group or p.fmt.has_zero)
    return plain and p.acts.is_int8 and not p.x_group and p.exact


class CudaMma(CudaGemm):
    """Any number of tokens; tiles beyond the matrices are zeros."""

    name = "mpgemm.cuda_mma"
    config = MmaConfig
    needs = NEEDS

    def takes(self, p: CudaProblem) -> bool:
        """``w=bf16,a=abf16``; codes of 5 to 8 bits by rows with ``a8``."""
        return takes_operands(p)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles of blocks and warps, stages, pieces of K, order of the tiles."""
        p = CudaProblem.of(workload)
        knobs = {
            "bm": (16, 32, 64, 128, 256), "bn": (32, 64, 128, 256), "depth": (64, 128),
            "warps_m": (1, 2, 4), "warps_n": (1, 2, 4), "stages": (2, 3, 4, 5), "split": (1, 2, 4, 8),
            "group_m": (1, 4, 8),
        }  # fmt: skip

        def legal(c: MmaConfig) -> bool:
            return may_run(c, hardware) and worth(c, Ends(p, c.split), hardware)

        return Space(MmaConfig, knobs, _default(p, hardware, legal), legal)

    def lower(self, workload: Workload, config: MmaConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = CudaProblem.of(workload)
        ends = Ends(p, config.split)
        constants = ends.constants() | {
            "BM": config.bm, "BN": config.bn, "DEPTH": config.depth, "WARPS_M": config.warps_m,
            "WARPS_N": config.warps_n, "STAGES": config.stages, "GROUP_M": config.group_m,
        }  # fmt: skip
        tiles = -(-p.m // config.bm) * -(-p.n // config.bn)
        weight = "codes" if ends.int8 else "w"
        main = Launch(
            "mpgemm_mma",
            (tiles, 1, config.split),
            config.threads,
            ("x_operand", weight, ends.out, *ends.operands),
            config.shared_bytes,
        )
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        expected = ("IMMA" if ends.int8 else "HMMA", "LDSM", "LDGSTS")
        return self.kernel(workload, config, hardware, ends.code(text, main, expected))

    def work(self, workload: Workload, config: MmaConfig, hardware: Hardware) -> Counts:
        """Whole tiles; each block reads its rows of both operands."""
        p = CudaProblem.of(workload)
        return tiled_work(p, Ends(p, config.split), config.bm, config.bn, hardware)


def may_run(c: MmaConfig, hardware: Hardware) -> bool:
    """Say whether warps' tiles are whole fragments, and a GPU can launch such a block."""
    whole = c.bm % (16 * c.warps_m) == 0 and c.bn % (16 * c.warps_n) == 0
    room = min(MOST_REGISTERS, gpu_of(hardware).registers_per_sm // c.threads)
    return (
        whole
        and c.registers <= room
        and fits(hardware, threads=c.threads, shared_bytes=c.shared_bytes)
    )


def worth(c: MmaConfig, ends: Ends, hardware: Hardware) -> bool:
    """Say whether tiles are not mostly padding, and no knob says what another value says as well."""
    p = ends.problem
    tiles_m, tiles_n = -(-p.m // c.bm), -(-p.n // c.bn)
    tiles_k = -(-ends.k_padded * ends.element // c.depth)
    return (
        (c.bm == 16 or c.bm < 2 * p.m)
        and (c.bn == 32 or c.bn < 2 * p.n)
        and (c.group_m == 1 or c.group_m < 2 * tiles_m)
        and whole_pieces(tiles_k, c.split)
        and (c.split == 1 or tiles_m * tiles_n * c.split <= 4 * hardware.cores)
    )


def whole_pieces(tiles_k: int, split: int) -> bool:
    """Say whether no piece of K is empty."""
    return (split - 1) * -(-tiles_k // split) < tiles_k


def _default(p: CudaProblem, hardware: Hardware, legal: Callable[[MmaConfig], bool]) -> MmaConfig:
    """Return a config that gives most SMs a block, by cutting K where tiles are few. Not measured."""
    for c in _defaults(p):
        if legal(c):
            tiles = -(-p.m // c.bm) * -(-p.n // c.bn)
            cut = (replace(c, split=s) for s in (2, 4, 8))
            few = (d for d in cut if tiles * d.split < 2 * hardware.cores and legal(d))
            return max((c, *few), key=lambda d: d.split) if tiles < hardware.cores else c
    return MmaConfig(16, 32, 64, 1, 1, 2, 1, 1)


def _defaults(p: CudaProblem) -> Iterator[MmaConfig]:
    bm = next((b for b in (16, 32, 64) if p.m <= b), 128)
    warps_m, warps_n = (2, 2) if bm >= 64 else (1, 4)
    for bn in (128, 64):
        for stages in (4, 3, 2):
            for group_m in (8, 4, 1):
                yield MmaConfig(bm, bn, 128, warps_m, warps_n, stages, 1, group_m)
