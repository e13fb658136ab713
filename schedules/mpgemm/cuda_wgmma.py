"""bfloat16 or int8 matmul on Hopper GPUs: ``wgmma`` on tiles that the tensor memory accelerator brings.

Persistent blocks with one group of warps that only asks for tiles, and one to three that multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.cuda.code import Launch, TensorMap
from mimo_compile.schedules.cuda.limits import fits
from mimo_compile.schedules.cuda.template import rendered
from mimo_compile.schedules.mpgemm.cuda_base import CudaGemm, CudaProblem
from mimo_compile.schedules.mpgemm.cuda_ends import Ends
from mimo_compile.schedules.mpgemm.cuda_mma import takes_operands, whole_pieces
from mimo_compile.schedules.mpgemm.cuda_work import tiled_work

NEEDS = frozenset({"cuda", "sm_90a", "wgmma", "tma"})
DEPTH = 128
"""Bytes along K of a stage: one row of the swizzle."""
ROWS = 64
"""Of y, that one group of warps has."""
REGISTERS = {1: (40, 232), 2: (40, 232), 3: (32, 160)}
"""Consumers -> registers of a producer's and of a consumer's thread: together at most 65536."""


@dataclass(frozen=True, slots=True)
class WgmmaConfig:
    """Knobs of `CudaWgmma`."""

    consumers: int = 2
    """Groups of four warps, each with 64 tokens of a block's tile."""
    bn: int = 128
    """Rows of the weights of a block's tile."""
    stages: int = 4
    """Tiles in shared memory or on their way."""
    split: int = 1
    """Pieces of K, which are summed apart, and added in their order by a last launch."""
    group_m: int = 8
    """Tiles of tokens that take turns at each tile of weights."""
    cluster: int = 1
    """Blocks with tiles of tokens below each other, to which a tile of weights comes once."""

    @property
    def bm(self) -> int:
        """Tokens of a block's tile."""
        return ROWS * self.consumers

    @property
    def threads(self) -> int:
        """Of a block: the producer's group and the consumers."""
        return 128 * (self.consumers + 1)

    @property
    def shared_bytes(self) -> int:
        """Of a block: stages, and two barriers for each."""
        return self.stages * ((self.bm + self.bn) * DEPTH + 16)


class CudaWgmma(CudaGemm):
    """Any number of tokens; tiles beyond the matrices are zeros."""

    name = "mpgemm.cuda_wgmma"
    config = WgmmaConfig
    needs = NEEDS
    version: ClassVar[int] = 5

    def takes(self, p: CudaProblem) -> bool:
        """``w=bf16,a=abf16``; codes of 5 to 8 bits by rows with ``a8``."""
        return takes_operands(p)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles, stages, pieces of K, order of the tiles, clusters of blocks."""
        p = CudaProblem.of(workload)
        knobs = {
            "consumers": (1, 2, 3), "bn": (64, 96, 128, 192, 256), "stages": (2, 3, 4, 5, 6, 8),
            "split": (1, 2, 4, 8), "group_m": (1, 4, 8), "cluster": (1, 2),
        }  # fmt: skip

        def legal(c: WgmmaConfig) -> bool:
            tiles_m, tiles_n = -(-p.m // (c.bm * c.cluster)), -(-p.n // c.bn)
            ends = Ends(p, c.split)
            return (
                fits(hardware, threads=c.threads, shared_bytes=c.shared_bytes, cluster=c.cluster)
                and c.bn // 2 <= REGISTERS[c.consumers][1] - 56  # sums and addresses
                and (c.consumers == 1 or c.bm < 2 * p.m)
                and (c.cluster == 1 or (c.bm < p.m and c.cluster <= hardware.cores))
                and (c.bn == 64 or c.bn < 2 * p.n)
                and (c.group_m == 1 or c.group_m < 2 * tiles_m)
                and whole_pieces(-(-ends.k_padded * ends.element // DEPTH), c.split)
                and (c.split == 1 or tiles_m * tiles_n * c.split * c.cluster <= 4 * hardware.cores)
            )

        default = next(c for c in _defaults(p, hardware) if legal(c))
        return Space(WgmmaConfig, knobs, default, legal)

    def lower(self, workload: Workload, config: WgmmaConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = CudaProblem.of(workload)
        ends = Ends(p, config.split)
        blocks = _blocks(p, config, hardware)
        producer, consumer = REGISTERS[config.consumers]
        constants = ends.constants() | {
            "CONSUMERS": config.consumers, "BN": config.bn, "STAGES": config.stages,
            "GROUP_M": config.group_m, "BLOCKS": blocks, "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer, "CLUSTER": config.cluster, "CLUSTERED": config.cluster > 1,
        }  # fmt: skip
        dtype = "int8" if ends.int8 else "bfloat16"
        columns, box = ends.k_padded, DEPTH // ends.element
        weight = "codes" if ends.int8 else "w"
        main = Launch(
            "mpgemm_wgmma",
            (blocks, 1, 1),
            config.threads,
            (
                TensorMap("x_operand", dtype, p.m, columns, config.bm, box),
                TensorMap(
                    weight, dtype, p.weight.n_padded, columns, config.bn // config.cluster, box
                ),
                ends.out,
                *ends.operands,
            ),
            config.shared_bytes,
            config.cluster,
        )
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        barrier = ("UCGABAR",) if config.cluster > 1 else ()
        expected = ("IGMMA" if ends.int8 else "HGMMA", "UTMALDG", "USETMAXREG", *barrier)
        return self.kernel(workload, config, hardware, ends.code(text, main, expected))

    def work(self, workload: Workload, config: WgmmaConfig, hardware: Hardware) -> Counts:
        """Whole tiles; each tile's block reads its rows of both operands."""
        p = CudaProblem.of(workload)
        blocks = _blocks(p, config, hardware)
        ends, c = Ends(p, config.split), config
        return tiled_work(p, ends, c.bm, c.bn, hardware, blocks=blocks, cluster=c.cluster)


def _blocks(p: CudaProblem, c: WgmmaConfig, hardware: Hardware) -> int:
    """Return the blocks of the main launch: for each tile and piece of K, at most as many as SMs."""
    clusters = -(-p.m // (c.bm * c.cluster)) * -(-p.n // c.bn) * c.split
    return min(clusters, hardware.cores // c.cluster) * c.cluster


def _defaults(p: CudaProblem, hardware: Hardware) -> Iterator[WgmmaConfig]:
    """Return configs that give most SMs a tile, the preferred first. Not measured."""
    consumers = 1 if p.m <= ROWS else 2
    for bn in (256, 128, 64):
        tiles = -(-p.m // (ROWS * consumers)) * -(-p.n // bn)
        if bn == 256 and tiles < 2 * hardware.cores:  # the last turn of some blocks would take long
            continue
        most = max(1, 2 * hardware.cores // tiles - 1)
        for split in (8, 4, 2, 1):
            if split <= most:
                for group_m in (8, 4, 1):
                    yield WgmmaConfig(consumers, bn, 4 if bn == 256 else 5, split, group_m)
    yield WgmmaConfig(1, 64, 4, 1, 1)
