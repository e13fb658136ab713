"""The work of experts by matrix units on GPUs, launch by launch, for tokens that choose experts evenly."""

from __future__ import annotations

from dataclasses import dataclass

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.moe.cuda_base import CudaExperts

SMALL_THREADS = 256
"""Of the launches but those of the matmuls; as in `device/experts.cuh`."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How slots and rows of the weights are cut."""

    problem: CudaExperts
    bm: int
    """Slots of a tile."""
    bn13: int
    """Rows of gate and up of a tile."""
    bn2: int
    """Rows of the down matrix of a tile."""
    warps_m: int
    """Warps that share a tile's rows of the weights: each unpacks them."""
    split: int
    """Pieces of K of the down matmul."""

    @property
    def element(self) -> int:
        """Bytes of an element of the activations as operands."""
        return 1 if self.problem.acts.is_int8 else 2

    @property
    def integers(self) -> bool:
        """True if sums are integers, whose scales come last."""
        return self.problem.acts.is_int8 and not self.problem.w_group

    @property
    def x_blocks(self) -> int:
        """Blocks that make operands of x: one for a row of int8, else for 8 columns of each thread."""
        p = self.problem
        return p.t if p.acts.is_int8 else -(-p.t * (p.half.k_padded // 8) // SMALL_THREADS)

    @property
    def most(self) -> int:
        """Tiles of slots that there can be: of each expert one may have a single slot."""
        p = self.problem
        return (p.slots + min(p.e, p.slots) * (self.bm - 1)) // self.bm

    @property
    def expected(self) -> float:
        """Tiles of slots where all experts that are hit have as many."""
        p = self.problem
        return p.hit * -(-(p.slots / p.hit) // self.bm)

    @property
    def up_columns(self) -> int:
        """Tiles along the gate's rows; floats are stored with their padding."""
        p = self.problem
        return -(-(p.f if p.acts.is_int8 else p.w2.k_padded) // (self.bn13 // 2))

    @property
    def down_columns(self) -> int:
        """Tiles along the down matrix's rows."""
        return -(-self.problem.d // self.bn2)


def tiled_work(p: CudaExperts, tiles: Tiles, codes: bool, hardware: Hardware) -> Counts:
    """Return the work, with a part for each launch.

    What one launch leaves for the next stays in L2 as far as L2 holds it; at least the rest goes to memory
    and back.

    Args:
        p: The problem.
        tiles: Its tiles.
        codes: Whether weights are unpacked.
        hardware: A GPU.
    """
    int8, groups = p.acts.is_int8, p.w_group
    x, y, ids = 4.0 * p.t * p.d, 4.0 * p.t * p.d, 4.0 * p.slots
    operand, hidden = (
        float(rows * columns * tiles.element)
        for rows, columns in ((p.t, p.half.k_padded), (p.slots, p.w2.k_padded))
    )
    rows = tiles.expected * tiles.bm
    parts = 4.0 * tiles.split * p.slots * p.d
    between = 4.0 * p.slots * p.f if int8 else hidden
    far = {
        n: max(0.0, size - hardware.l3_bytes)
        for n, size in (("between", between), ("parts", parts))
    }
    kind = "tile_i8" if int8 else "tile_bf16"

    def main(
        name: str, columns: int, bn: int, k: int, k_padded: int, weights: float, units: float
    ) -> Counts:
        """Return the part of a matmul but for its results: `columns` tiles of bn rows, of k columns."""
        ops = {kind: rows * columns * bn * k_padded}
        if codes:
            unpacked = tiles.expected * tiles.warps_m * columns * bn * k_padded
            ops["unpack_u8"] = unpacked * (1 if int8 else 2)
            ops["fma_f32"] = rows * columns * bn * -(-k // groups) if groups else 0.0
        source = columns * rows * k_padded * tiles.element
        return Counts(
            ops,
            {"dram": p.hit * weights + ids, "l2": tiles.expected * weights + source + ids},
            {"share": -(-units // hardware.cores) / units},  # of the tiles that there are
            name=name,
        )

    def more(part: Counts, ops: dict[str, float], near: float, from_far: float) -> Counts:
        own = {
            level: n + (from_far if level == "dram" else near) for level, n in part.bytes.items()
        }
        return Counts({**part.ops, **ops}, own, part.traits, name=part.name)

    units = tiles.expected * tiles.up_columns, tiles.expected * tiles.down_columns * tiles.split
    up = main("up", tiles.up_columns, tiles.bn13, p.d, p.half.k_padded, 2 * p.half.bytes, units[0])
    down = main("down", tiles.down_columns, tiles.bn2, p.f, p.w2.k_padded, p.w2.bytes, units[1])
    launches = [
        Counts(
            {"int_op": (6.0 if int8 else 1.0) * p.t * p.half.k_padded + float(p.e * p.slots)},
            {"dram": x + ids, "l2": x * (2 if int8 else 1) + operand + p.e * ids},
            name="prepare",
        ),
        Counts({"int_op": 2.0 * p.e * p.slots}, {"l2": 2 * p.e * ids + ids}, name="place"),
        more(up, {"exp_f32": float(p.slots * p.f)}, between, far["between"]),
        more(down, {}, parts, far["parts"] + (0.0 if int8 else far["between"])),
        Counts(
            {"fma_f32": float(p.slots * p.d), "add_f32": float(tiles.split - 1) * p.slots * p.d},
            {"dram": y + ids + far["parts"], "l2": parts + y + 2 * ids},
            name="combine",
        ),
    ]
    if int8:
        quantize = Counts(
            {"int_op": 6.0 * p.slots * p.f},
            {"dram": far["between"], "l2": 2 * between + hidden},
            name="quantize_hidden",
        )
        launches.insert(3, quantize)
    return in_turn(*launches)
