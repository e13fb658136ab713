"""Integer codes times int8 activations on AMX tiles, for many tokens.

A task takes a panel of a few blocks of 16 weight rows. For each run of columns it unpacks the panel's codes
into tile order, where they stay in the first-level cache while all tokens pass by. Groups are summed in
tiles; scaling the sums costs a store of the tile for each group, so coarser groups run faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import KnobValue, Space
from mimo_compile.schedules.emit.amx import NEEDS, SIDE, TILES, AmxTiles, Tiles
from mimo_compile.schedules.emit.dot import MAX_ACTIVATION, exact
from mimo_compile.schedules.emit.tile import Weights
from mimo_compile.schedules.emit.unpack import unpack_cost
from mimo_compile.schedules.mpgemm.gemm import X86Gemm
from mimo_compile.schedules.mpgemm.loops import panels
from mimo_compile.schedules.mpgemm.panel import Panel, quantise_tiles
from mimo_compile.schedules.mpgemm.problem import Problem
from mimo_compile.schedules.work import Stream, Tile, busiest, work


@dataclass(frozen=True, slots=True)
class AmxConfig:
    """Knobs of a matmul on tiles."""

    rows: int = 2
    """Blocks of 16 weight rows in a panel."""
    tokens: int = 2
    """Tiles of 16 tokens that are summed together."""
    columns: int = 1024
    """Columns that a panel is unpacked for at once."""
    parallel: bool = False
    """Spread the panels over threads."""


class X86Amx(X86Gemm):
    """For CPUs with AMX int8 tiles."""

    name = "mpgemm.x86_amx"
    config = AmxConfig
    tiles_class: ClassVar[Callable[[], Tiles]] = AmxTiles

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Integer or ternary weights in groups that fill tiles, int8 activations, 8 tokens or more."""
        problem = self.problem(workload)
        if not hardware.features >= NEEDS or problem.act != "a8" or problem.m < 8:
            return False
        layout = problem.layout
        if not exact(layout) or not depth(problem):
            return False
        # one group's sums and their zero point are turned into float32 together
        size = layout.fmt.group_size(layout.k)
        return layout.groups == 1 or layout.max_value * MAX_ACTIVATION * size < 2**24

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles in flight, columns at once, threads."""
        problem = self.problem(workload)
        step = max(depth(problem), problem.layout.fmt.group_size(problem.k))
        columns = {max(1, c // step) * step for c in (512, 1024, 2048, 4096)}
        if problem.layout.groups == 1:
            columns = {512, 1024, 2048, 4096}
        knobs: dict[str, tuple[KnobValue, ...]] = {
            "rows": (1, 2, 3),
            "tokens": (1, 2, 3),
            "columns": tuple(sorted(columns)),
            "parallel": (False, True) if hardware.threads > 1 else (False,),
        }

        def legal(config: AmxConfig) -> bool:
            used = config.rows * config.tokens + config.rows + config.tokens
            few = (config.rows - 1) < problem.row_blocks and (config.tokens - 1) * SIDE < problem.m
            return used <= TILES and few

        rows, tokens = min(2, problem.row_blocks), 2 if problem.m > SIDE else 1
        at_once = min(columns, key=lambda c: abs(c - 1024))
        default = AmxConfig(rows, tokens, at_once, hardware.threads > 1 and problem.row_blocks > 2)
        return Space(AmxConfig, knobs, default, legal)

    def scratch_bytes(self, problem: Problem, config: Any) -> int:
        """Activations in tile order, panels and their sums."""
        m = -(-problem.m // SIDE) * SIDE
        wide = SIDE * config.rows
        each = wide * (min(config.columns, problem.layout.k_padded + 64) + 4 * m) + 4 * TILES * 256
        return int(m * (problem.layout.k_padded + 64 + 4 * problem.layout.groups + 4) + 2 * each)

    def body(self, problem: Problem, config: Any, hardware: Hardware) -> Callable[..., None]:
        """Return the emitter."""

        def emit(x: Any, *rest: Any) -> None:
            *packed, y = rest
            bias = packed.pop() if problem.bias else None
            weights = Weights(*packed)
            activations = quantise_tiles(problem, x, depth(problem), parallel=config.parallel)

            def panel(first: Any, rows: int) -> None:
                tiles = type(self).tiles_class()
                Panel(
                    problem, tiles, activations, weights, bias, y, first, rows,
                    config.tokens, config.columns, depth(problem),
                ).emit()  # fmt: skip

            panels(problem, config.rows, panel, parallel=config.parallel)

        return emit

    def arithmetic(self, problem: Problem, config: Any) -> dict[str, float]:
        """Return tile products over padded extents, unpacking once, scaling of each group."""
        layout = problem.layout
        m, n = -(-problem.m // SIDE) * SIDE, problem.row_blocks * SIDE
        return {
            "tile_i8": float(m) * n * layout.k_padded,
            "unpack_u8": 2.0 * SIDE * unpack_cost(layout) * layout.blocks * problem.row_blocks,
            "fma_f32": float(m) * n * layout.groups,
            "int_op": 3.0 * problem.m * problem.k + float(m) * n * layout.groups,
        }

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it."""
        problem = self.problem(workload)
        layout, m = problem.layout, problem.m
        panels = -(-problem.row_blocks // config.rows)
        chunks = -(-layout.k_padded // config.columns)
        columns = min(config.columns, layout.k_padded)
        x = float(m) * layout.k_padded
        panel = SIDE * config.rows * columns
        sums = 4.0 * m * SIDE * config.rows
        streams = [
            Stream(problem.packed_bytes()),
            Stream(x, ((panels, x + sums),), made=True),
            Stream(4.0 * m * problem.n, ((chunks, m * columns + sums),)),
            Stream(4.0 * m * problem.k, ((2, 4.0 * problem.k),)),
            Stream(
                float(layout.k_padded) * problem.row_blocks * SIDE,
                ((-(-m // (SIDE * config.tokens)), panel + SIDE * config.tokens * columns),),
                made=True,
            ),
        ]
        threads = hardware.threads if config.parallel else 1
        return work(
            self.arithmetic(problem, config),
            streams,
            hardware,
            tasks=panels if threads > 1 else 1,
            share=busiest(panels, threads),
            useful=problem.weight.useful * m / (-(-m // SIDE) * SIDE),
            tile=Tile(config.rows, config.tokens, panel + SIDE * config.tokens * columns),
        )


class X86AmxBits(X86Amx):
    """1 to 4 bits from the planes that lookups of few tokens read, so that both share weights."""

    name = "mpgemm.x86_amx_bits"
    packing = "bits4"

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """See `X86Amx`."""
        bits = self.problem(workload).fmt.bits
        return bits <= 4 and super().supports(workload, hardware)


def depth(problem: Problem) -> int:
    """Return the columns that a tile holds: 64, or 32 for finer groups; 0 if groups fill no tile."""
    layout = problem.layout
    if layout.groups == 1:
        return 64
    size = layout.fmt.group_size(layout.k)
    return next((d for d in (64, 32) if size % d == 0), 0)
