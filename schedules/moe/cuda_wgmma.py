"""bfloat16 or int8 experts of many tokens on Hopper GPUs: ``wgmma`` on tiles that tensor maps bring.

As `moe.cuda_mma`, but rows are gathered by a launch of their own, since the tensor memory accelerator reads
rows that lie one behind the other; blocks are persistent, as those of `mpgemm.cuda_wgmma`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.cuda.code import DeviceCode, Launch, TensorMap
from mimo_compile.schedules.cuda.limits import fits
from mimo_compile.schedules.cuda.template import rendered
from mimo_compile.schedules.moe.cuda_base import CudaExperts, CudaMoe
from mimo_compile.schedules.moe.cuda_ends import LISTS, ExpertEnds
from mimo_compile.schedules.moe.cuda_mma import takes_tiles, unpacks
from mimo_compile.schedules.moe.cuda_work import SMALL_THREADS, Tiles, tiled_work
from mimo_compile.schedules.mpgemm.cuda_wgmma import DEPTH, NEEDS, REGISTERS, ROWS

_LEAST = 16
"""Slots of an expert in the mean, below which tiles of 64 are mostly padding."""


@dataclass(frozen=True, slots=True)
class MoeWgmmaConfig:
    """Knobs of `CudaMoeWgmma`."""

    consumers: int = 2
    """Groups of four warps, each with 64 slots of a block's tile."""
    bn13: int = 128
    """Rows of gate and up of a block's tile."""
    bn2: int = 128
    """Rows of the down matrix of a block's tile."""
    stages: int = 4
    """Tiles in shared memory or on their way."""
    group_m: int = 8
    """Tiles of slots that take turns at each tile of weights."""

    @property
    def bm(self) -> int:
        """Slots of a block's tile."""
        return ROWS * self.consumers

    @property
    def threads(self) -> int:
        """Of a block: the producer's group and the consumers."""
        return 128 * (self.consumers + 1)

    def shared_bytes(self, bn: int) -> int:
        """Of a block: stages, and two barriers for each."""
        return self.stages * ((self.bm + bn) * DEPTH + 16)


class CudaMoeWgmma(CudaMoe):
    """Tokens that give experts 16 slots and more in the mean; tiles beyond the matrices are zeros."""

    name = "moe.cuda_wgmma"
    config = MoeWgmmaConfig
    needs = NEEDS
    version: ClassVar[int] = 2

    def takes(self, p: CudaExperts) -> bool:
        """``w=bf16,a=abf16`` and ``w=w8,a=a8``."""
        return takes_tiles(p) and not unpacks(p) and p.slots >= _LEAST * p.hit

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles, stages, order of the tiles."""
        p = CudaExperts.of(workload)
        knobs = {
            "consumers": (1, 2, 3), "bn13": (64, 96, 128, 192, 256), "bn2": (64, 96, 128, 192, 256),
            "stages": (2, 3, 4, 5, 6, 8), "group_m": (1, 4, 8),
        }  # fmt: skip

        def legal(c: MoeWgmmaConfig) -> bool:
            bn = max(c.bn13, c.bn2)
            return (
                fits(hardware, threads=c.threads, shared_bytes=c.shared_bytes(bn))
                and bn // 2 <= REGISTERS[c.consumers][1] - 56  # sums and addresses
                and (c.consumers == 1 or c.bm < 2 * p.t)
                and (c.bn13 == 64 or c.bn13 < 4 * p.f)
                and (c.bn2 == 64 or c.bn2 < 2 * p.d)
                and (c.group_m == 1 or c.group_m < 2 * _tiles(p, c).most)
            )

        default = next(c for c in _defaults(p) if legal(c))
        return Space(MoeWgmmaConfig, knobs, default, legal)

    def lower(self, workload: Workload, config: MoeWgmmaConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p, c = CudaExperts.of(workload), config
        tiles = _tiles(p, c)
        ends = ExpertEnds(tiles, False)
        blocks = min(tiles.most * max(tiles.up_columns, tiles.down_columns), hardware.cores)
        producer, consumer = REGISTERS[c.consumers]
        constants = ends.constants() | {
            "CONSUMERS": c.consumers, "BN_UP": c.bn13, "BN_DOWN": c.bn2, "STAGES": c.stages,
            "GROUP_M": c.group_m, "BLOCKS": blocks, "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer,
        }  # fmt: skip
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        gathered = Arg("x_rows", "state", (p.slots, p.half.k_padded), ends.operand)
        code = DeviceCode(
            text,
            _launches(c, ends, blocks),
            {a.name: a for a in (*ends.scratch(), gathered)},
            expected=("IGMMA" if ends.int8 else "HGMMA", "UTMALDG", "USETMAXREG"),
        )
        return self.kernel(workload, config, hardware, code)

    def work(self, workload: Workload, config: MoeWgmmaConfig, hardware: Hardware) -> Counts:
        """Whole tiles, under uniform routing; see `cuda_work`."""
        p = CudaExperts.of(workload)
        tiles = _tiles(p, config)
        prepare, place, *rest = tiled_work(p, tiles, False, hardware).parts
        rows = float(p.slots * p.half.k_padded * tiles.element)
        gather = Counts({}, {"l2": 2 * rows + 4.0 * p.slots}, name="gather")
        return in_turn(prepare, place, gather, *rest)


def _tiles(p: CudaExperts, c: MoeWgmmaConfig) -> Tiles:
    return Tiles(p, c.bm, c.bn13, c.bn2, 1, 1)


def _launches(c: MoeWgmmaConfig, ends: ExpertEnds, blocks: int) -> tuple[Launch, ...]:
    p = ends.problem
    dtype = "int8" if ends.int8 else "bfloat16"
    (w13, scale), (w2, _) = p.weight_names("w13_"), p.weight_names("w2_")
    columns13, columns2, box = p.half.k_padded, p.w2.k_padded, DEPTH // ends.tiles.element
    pieces = p.slots * columns13 * ends.tiles.element // 16
    gather = Launch(
        "experts_gather", (-(-pieces // SMALL_THREADS), 1, 1), SMALL_THREADS,
        ("x_operand", "order", "totals", "x_rows"),
    )  # fmt: skip
    up = Launch(
        "experts_up", (blocks, 1, 1), c.threads,
        (
            TensorMap("x_rows", dtype, p.slots, columns13, c.bm, box),
            TensorMap(w13, dtype, 2 * p.e * p.half.n_padded, columns13, c.bn13 // 2, box),
            scale, ends.x_scale, *LISTS, ends.hidden,
        ),
        c.shared_bytes(c.bn13),
    )  # fmt: skip
    down = Launch(
        "experts_down", (blocks, 1, 1), c.threads,
        (
            TensorMap("hidden_operand", dtype, p.slots, columns2, c.bm, box),
            TensorMap(w2, dtype, p.e * p.w2.n_padded, columns2, c.bn2, box),
            *LISTS, "parts",
        ),
        c.shared_bytes(c.bn2),
    )  # fmt: skip
    return ends.around((gather, up), down)


def _defaults(p: CudaExperts) -> Iterator[MoeWgmmaConfig]:
    """Return configs whose tiles have about as many rows as experts have slots, the preferred first."""
    consumers = 1 if p.slots <= ROWS * p.hit else 2
    for bn in (128, 64):
        for group_m in (8, 4, 1):
            yield MoeWgmmaConfig(consumers, bn, bn, 5, group_m)
    yield MoeWgmmaConfig(1, 64, 64, 4, 1)
