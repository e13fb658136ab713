"""Integer codes times int8 activations for several tokens: codes are unpacked once for all of them.

A task takes a panel of a few blocks of 16 weight rows. For each run of columns it unpacks the panel's codes
to bytes, which stay in the first-level cache while all tokens pass by, a register tile of them at a time.
Sums are those of the register tiles of `mpgemm.x86_planes`, in the same order: bit for bit the same results.
Codes of 1, 2, 4 and 8 bits a byte gain nothing: unpacking them hides behind the dots of four tokens.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import KnobValue, Space
from mimo_compile.schedules.emit.build import loop
from mimo_compile.schedules.emit.dot import DOTS, exact
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.matrix import PARALLEL_BYTES
from mimo_compile.schedules.emit.quantize import alloc_activations, quantize_row, workspace_bytes
from mimo_compile.schedules.emit.tile import Weights
from mimo_compile.schedules.mpgemm.gemm import X86Gemm
from mimo_compile.schedules.mpgemm.integer import QUANTIZE_ALONE
from mimo_compile.schedules.mpgemm.loops import panels
from mimo_compile.schedules.mpgemm.problem import Problem
from mimo_compile.schedules.mpgemm.unpacked import UnpackedPanel
from mimo_compile.schedules.work import Stream, Tile, busiest, work

_LEAST = 8
"""Tokens from which on unpacking once is worth a pass through the cache."""
_MANY = 48
"""Tokens from which on that beats sums looked up, at 2 bits."""


@dataclass(frozen=True, slots=True)
class PanelConfig:
    """Knobs of a matmul on unpacked panels."""

    rows: int = 4
    """Blocks of 16 weight rows in a panel, and in a register tile."""
    tokens: int = 4
    """Tokens in a register tile."""
    columns: int = 256
    """Columns that a panel is unpacked for at once."""
    unroll: int = 2
    """Dots of four columns in the inner loop's body, for each sum."""
    prefetch: bool = True
    """Ask for the next run's codes while tokens pass by."""
    parallel: bool = False
    """Spread the panels over threads."""
    dot: str = "vnni512"
    """Name of the way to multiply (`emit.dot.DOTS`)."""


class PanelGemm(X86Gemm):
    """Base: a layout whose codes take long to unpack, and 512-bit integer dots."""

    config = PanelConfig

    @abstractmethod
    def fits(self, problem: Problem) -> bool:
        """Say whether the workload has this layout, and is better off unpacked once."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Integer weights, int8 activations with a scale each, 8 tokens or more."""
        problem = self.problem(workload)
        if not problem.acts.is_int8 or problem.acts.group > 0 or problem.m < _LEAST:
            return False
        if hardware.kind != "cpu" or not self.fits(problem):
            return False
        if any(math.prod(a.shape) >= 2**31 for a in problem.args()):  # indices have 32 bits
            return False
        return exact(problem.layout) and bool(self.dots(problem, hardware))

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the 512-bit integer dots that the CPU has, the fastest first."""
        usable = (n for n, d in DOTS.items() if d.fits(problem.layout, hardware))
        return tuple(n for n in usable if DOTS[n].lanes == ROWS and DOTS[n].activation == "int8")

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tile, columns at once, unrolling, prefetch, threads."""
        problem = self.problem(workload)
        threads = (False, True) if hardware.threads > 1 and problem.row_blocks > 1 else (False,)
        knobs: dict[str, tuple[KnobValue, ...]] = {
            "rows": (1, 2, 3, 4, 6, 8),
            "tokens": (2, 4, 6, 8, 12),
            "columns": (128, 256, 512, 1024),
            "unroll": (1, 2, 4),
            "prefetch": (False, True),
            "parallel": threads,
            "dot": self.dots(problem, hardware),
        }

        def legal(config: PanelConfig) -> bool:
            return (
                config.rows * config.tokens <= 28
                and config.rows * config.tokens * config.unroll <= 96
                and (config.rows - 1) < problem.row_blocks
                and config.tokens <= problem.m
                and (config.columns == 128 or config.columns < 2 * problem.layout.k_padded)
                and config.parallel in threads
            )

        enough = problem.packed_bytes() * problem.m / 4 >= PARALLEL_BYTES
        dot = self.dots(problem, hardware)[0]
        # sums of groups and their running total share the registers
        best = ((4, 256), (3, 256)) if problem.layout.groups == 1 else ((3, 512), (3, 256))
        sizes = (*best, (2, 256), (1, 256), (2, 128), (1, 128))
        tried = [PanelConfig(r, 4, c, 2, True, False, dot) for r, c in sizes]
        tried = [c for c in tried if legal(c)] or [PanelConfig(1, 4, 128, 1, True, False, dot)]
        default = tried[0]
        if enough and len(threads) > 1:

            def longest(config: PanelConfig) -> float:
                return busiest(-(-problem.row_blocks // config.rows), hardware.threads)

            # narrower panels only where that spreads them much more evenly
            default = next(c for c in tried if longest(c) <= 1.25 * min(map(longest, tried)))
            default = replace(default, parallel=problem.row_blocks > default.rows)
        return Space(PanelConfig, knobs, default, legal)

    def scratch_bytes(self, problem: Problem, config: Any) -> int:
        """Quantised rows; panels and their sums."""
        rows = workspace_bytes(problem.layout, problem.m, "int8")
        layout = problem.layout
        group = layout.group_blocks * layout.block if layout.groups > 1 else 0
        columns = min(max(config.columns, group) + 2 * layout.block, layout.k_padded)
        return int(rows + 2 * config.rows * (ROWS * columns + 64 * problem.m))

    def body(self, problem: Problem, config: Any, hardware: Hardware) -> Callable[..., None]:
        """Return the emitter."""
        dot = DOTS[config.dot](problem.layout)

        def emit(x: Any, *rest: Any) -> None:
            *packed, y = rest
            bias = packed.pop() if problem.bias else None
            weights = Weights(*packed)
            rows = alloc_activations(problem.layout, problem.m, dot.activation)
            shared = config.parallel and problem.m * problem.k > QUANTIZE_ALONE
            with loop(problem.m, parallel=shared) as m:
                quantize_row(problem.layout, x, (m,), rows, m)

            def panel(first: Any, count: int) -> None:
                UnpackedPanel(
                    problem, dot, rows, weights, bias, y, first, count,
                    config.tokens, config.columns, config.unroll,
                    config.rows if config.prefetch else 0,
                ).emit()  # fmt: skip

            panels(problem, config.rows, panel, parallel=config.parallel)

        return emit

    def arithmetic(self, problem: Problem, config: Any) -> dict[str, float]:
        """Return dots over padded extents, unpacking once, scaling of each group."""
        dot, layout, m = DOTS[config.dot](problem.layout), problem.layout, problem.m
        blocks = float(layout.row_blocks * layout.blocks)
        ops = {kind: count * blocks * m for kind, count in dot.work.items()}
        for kind, count in dot.unpack_work.items():
            ops[kind] = ops.get(kind, 0.0) + count * blocks
        scaled = float(layout.row_blocks * ROWS * layout.groups * m)
        ops["fma_f32"] = ops.get("fma_f32", 0.0) + scaled * (1 + layout.fmt.has_zero)
        ops["int_op"] = ops.get("int_op", 0.0) + 3.0 * m * problem.k
        return ops

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it."""
        problem = self.problem(workload)
        layout, m = problem.layout, problem.m
        panels = -(-problem.row_blocks // config.rows)
        columns = min(config.columns, layout.k_padded)
        runs = -(-layout.k_padded // columns)
        x = float(m) * layout.k_padded
        panel = float(ROWS * config.rows * columns)
        sums = 4.0 * m * ROWS * config.rows
        turn = panel + config.tokens * columns
        streams = [
            Stream(problem.packed_bytes()),
            Stream(x, ((panels, x + sums + panel),), made=True),
            Stream(4.0 * m * problem.n, ((runs, m * columns + sums + panel),)),
            Stream(4.0 * m * problem.k, ((2, 4.0 * problem.k),)),
            Stream(
                float(layout.k_padded) * problem.row_blocks * ROWS,
                ((-(-m // config.tokens), turn),),
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
            useful=problem.weight.useful,
            tile=Tile(config.rows, min(config.tokens, m), turn),
        )


class X86PanelPlanes(PanelGemm):
    """3, 5, 6 and 7 bits as fields of 4, 2 and 1 bits; for CPUs with AVX-512."""

    name = "mpgemm.x86_panel_planes"
    packing = "planes"

    def fits(self, problem: Problem) -> bool:
        """Widths that divide no byte."""
        return problem.fmt.family == "int" and problem.fmt.bits in (3, 5, 6, 7)


class X86PanelBits(PanelGemm):
    """2 and 3 bits from the planes that lookups of few tokens read, so that both share weights."""

    name = "mpgemm.x86_panel_bits"
    packing = "bits4"

    def fits(self, problem: Problem) -> bool:
        """Enough tokens that dots overtake lookups, which one bit and ternary codes do better anyway."""
        return problem.fmt.family == "int" and problem.fmt.bits in (2, 3) and problem.m >= _MANY
