"""bfloat16 experts of many tokens on Hopper GPUs: ``wgmma`` on tiles that tensor maps bring.

As `moe.cuda_mma`, but rows are gathered by a launch of their own, since the tensor memory accelerator reads
rows that lie one behind the other; blocks are persistent, as those of `mpgemm.cuda_wgmma`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Space
from mimo_compile.schedules.cuda.code import DeviceCode, Launch, TensorMap
from mimo_compile.schedules.cuda.limits import fits
from mimo_compile.schedules.cuda.template import rendered
from mimo_compile.schedules.moe.cuda_base import CudaExperts, CudaMoe
from mimo_compile.schedules.moe.cuda_work import SMALL_THREADS, Tiles, tiled_work
from mimo_compile.schedules.mpgemm.cuda_wgmma import DEPTH, NEEDS, REGISTERS, ROWS

_BOX = DEPTH // 2
"""Columns of a stage."""
_SMALL_SHARED = 4 * 2 * SMALL_THREADS // 32
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

    def takes(self, p: CudaExperts) -> bool:
        """``w=bf16,a=abf16``."""
        return p.fmt.name == "bf16" and p.acts.kind == "bf16" and p.slots >= _LEAST * p.hit

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
        blocks = min(tiles.most * max(tiles.up_columns, tiles.down_columns), hardware.cores)
        producer, consumer = REGISTERS[c.consumers]
        constants = p.constants() | {
            "CONSUMERS": c.consumers, "BN_UP": c.bn13, "BN_DOWN": c.bn2, "STAGES": c.stages,
            "GROUP_M": c.group_m, "BLOCKS": blocks, "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer,
        }  # fmt: skip
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        scratch = [
            Arg("x_rows", "state", (p.slots, p.half.k_padded), "uint16"),
            Arg("hidden", "state", (p.slots, p.w2.k_padded), "uint16"),
            Arg("parts", "state", (p.slots, p.d), "float32"),
            Arg("counts", "state", (p.e,), "int32"),
            Arg("order", "state", (p.slots,), "int32"),
            Arg("tiles", "state", (tiles.most, 4), "int32"),
            Arg("totals", "state", (2,), "int32"),
        ]
        code = DeviceCode(
            text,
            _launches(p, c, blocks),
            {a.name: a for a in scratch},
            expected=("HGMMA", "UTMALDG", "USETMAXREG"),
        )
        return self.kernel(workload, config, hardware, code)

    def work(self, workload: Workload, config: MoeWgmmaConfig, hardware: Hardware) -> Counts:
        """Whole tiles, under uniform routing; see `cuda_work`."""
        p = CudaExperts.of(workload)
        _, place, up, down, combine = tiled_work(p, _tiles(p, config), False, hardware).parts
        ids, x = 4.0 * p.slots, 4.0 * p.t * p.d
        rows = 2.0 * p.slots * p.half.k_padded
        count = Counts(
            {"int_op": float(p.e * p.slots)}, {"dram": ids, "l2": p.e * ids}, name="count"
        )
        gather = Counts(
            {"int_op": float(p.slots * p.half.k_padded)},
            {"dram": x, "l2": 4.0 * p.slots * p.d + rows + ids},
            name="gather",
        )
        return in_turn(count, place, gather, up, down, combine)


def _tiles(p: CudaExperts, c: MoeWgmmaConfig) -> Tiles:
    return Tiles(p, c.bm, c.bn13, c.bn2, 1, 1)


def _launches(p: CudaExperts, c: MoeWgmmaConfig, blocks: int) -> tuple[Launch, ...]:
    columns13, columns2 = p.half.k_padded, p.w2.k_padded
    gathered = -(-p.slots * (columns13 // 8) // SMALL_THREADS)
    return (
        Launch("experts_count", (p.e, 1, 1), SMALL_THREADS, ("ids", "counts"), _SMALL_SHARED),
        Launch(
            "experts_place", (p.e, 1, 1), SMALL_THREADS, ("ids", "counts", "order", "tiles", "totals"),
            _SMALL_SHARED,
        ),
        Launch("experts_gather", (gathered, 1, 1), SMALL_THREADS, ("x", "order", "totals", "x_rows")),
        Launch(
            "experts_up", (blocks, 1, 1), c.threads,
            (
                TensorMap("x_rows", "bfloat16", p.slots, columns13, c.bm, _BOX),
                TensorMap("w13_w", "bfloat16", 2 * p.e * p.half.n_padded, columns13, c.bn13 // 2, _BOX),
                "tiles", "totals", "hidden",
            ),
            c.shared_bytes(c.bn13),
        ),
        Launch(
            "experts_down", (blocks, 1, 1), c.threads,
            (
                TensorMap("hidden", "bfloat16", p.slots, columns2, c.bm, _BOX),
                TensorMap("w2_w", "bfloat16", p.e * p.w2.n_padded, columns2, c.bn2, _BOX),
                "order", "tiles", "totals", "parts",
            ),
            c.shared_bytes(c.bn2),
        ),
        Launch(
            "experts_combine", (-(-p.t * p.d // SMALL_THREADS), 1, 1), SMALL_THREADS,
            ("parts", "ids", "weights", "y"),
        ),
    )  # fmt: skip


def _defaults(p: CudaExperts) -> Iterator[MoeWgmmaConfig]:
    """Return configs whose tiles have about as many rows as experts have slots, the preferred first."""
    consumers = 1 if p.slots <= ROWS * p.hit else 2
    for bn in (128, 64):
        for group_m in (8, 4, 1):
            yield MoeWgmmaConfig(consumers, bn, bn, 5, group_m)
    yield MoeWgmmaConfig(1, 64, 64, 4, 1)
