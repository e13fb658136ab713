"""The work of matmuls by matrix units on GPUs, launch by launch: x as operand, tiles of y, sums of pieces."""

from __future__ import annotations

from collections.abc import Mapping

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.mpgemm.cuda_base import CudaProblem
from mimo_compile.schedules.mpgemm.cuda_ends import Ends


def tiled_work(
    p: CudaProblem,
    ends: Ends,
    bm: int,
    bn: int,
    hardware: Hardware,
    more: Mapping[str, float] | None = None,
    blocks: int = 0,
    cluster: int = 1,
    products: float = 1.0,
) -> Counts:
    """Return the work in tiles of bm x bn of y, with a part for each launch of `Ends.around`.

    What one launch leaves for the next stays in L2 as far as L2 holds it; at least the rest goes to memory
    and back.

    Args:
        p: The problem.
        ends: Its launches.
        bm: Tokens of a tile.
        bn: Rows of the weights of a tile.
        hardware: A GPU.
        more: Operations of the main launch besides the products.
        blocks: Of the main launch where they are persistent, 0: one for each tile and piece of K.
        cluster: Blocks with tiles below each other, to which a tile of weights comes once.
        products: Multiply-adds for each weight and token of a tile.
    """
    clusters_m, tiles_n = -(-p.m // (bm * cluster)), -(-p.n // bn)
    tiles_m = clusters_m * cluster
    operand, sums = float(p.m * ends.k_padded * ends.element), 4.0 * p.m * p.n * ends.split
    cut = ends.split > 1
    x_far, sums_far = (max(0.0, n - hardware.l3_bytes) for n in (operand, sums * cut))
    x, y, bias = 4.0 * p.m * p.k, 4.0 * p.m * p.n, 4.0 * p.n * p.bias
    first = Counts(
        {"int_op": (6.0 if ends.int8 else 1.0) * p.m * ends.k_padded},
        # int8: once for the largest of a row, once for its codes
        {"dram": x + x_far, "l2": x * (2 if ends.int8 else 1) + operand},
        name="prepare",
    )
    kind = "tile_i8" if ends.int8 else "tile_bf16"
    done = products * (tiles_m * bm) * (tiles_n * bn) * ends.k_padded
    units = tiles_m * tiles_n * ends.split
    main = Counts(
        {**(more or {}), kind: done},
        {
            "dram": p.weight.bytes + x_far + (sums_far if cut else y + bias),
            "l2": tiles_n * operand
            + clusters_m * p.weight.bytes
            + tiles_m * bias * (not cut)
            + (sums if cut else y),
        },
        # of persistent blocks the busiest one has whole tiles, too
        {"share": -(-units // blocks) / units} if blocks else {},
        name="tiles",
    )
    if not cut:
        return in_turn(first, main)
    last = Counts(
        {"add_f32": float(ends.split - 1) * p.m * p.n},
        {"dram": y + bias + sums_far, "l2": sums + y + p.m * bias},
        name="join",
    )
    return in_turn(first, main, last)
