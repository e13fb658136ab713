"""Base of the x86 matmul schedules: space, default, packing; subclasses emit the body."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, KnobValue, Schedule, Space, kernel_name
from mimo_compile.schedules.emit.build import function
from mimo_compile.schedules.emit.layout import ROWS, pack_rows
from mimo_compile.schedules.emit.matrix import PARALLEL_BYTES
from mimo_compile.schedules.emit.rounding import rounded_rows
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem
from mimo_compile.schedules.mpgemm.work import gemm_work

AHEAD = 32
"""Usual distance of prefetches in cache lines."""
_FEW_TURNS = 16
"""Tiles of tokens up to which it shows that the next weights come from memory."""


class X86Gemm(Schedule):
    """Base: subclasses emit the kernel's body and say which tiles fit."""

    op = "mpgemm"
    version: ClassVar[int] = 3
    config: ClassVar[type] = GemmConfig
    packing: ClassVar[str] = ""
    """Layout of integer codes (`emit.dense.PACKINGS`)."""

    def problem(self, workload: Workload) -> Problem:
        """Return the workload as this schedule runs it."""
        return Problem.of(workload, self.packing)

    @abstractmethod
    def body(self, problem: Problem, config: GemmConfig, hardware: Hardware) -> Callable[..., None]:
        """Return the function that emits the statements, given the parameters' buffers."""

    @abstractmethod
    def arithmetic(self, problem: Problem, config: GemmConfig) -> dict[str, float]:
        """Return the operations of one run by kind of `ir.counts`, over padded extents."""

    def row_bytes(self, problem: Problem, config: GemmConfig) -> float:
        """Return the bytes that a tile reads for one token: x itself unless `prepares` says otherwise."""
        return 4.0 * problem.k

    def rounds(self, problem: Problem) -> bool:
        """Say whether the kernel makes a rounded copy of x first, which the body then takes for x."""
        acts = problem.acts
        return acts.rounded or (acts.group > 0 and not problem.fmt.is_integer)

    def emitter(
        self, problem: Problem, config: GemmConfig, hardware: Hardware
    ) -> Callable[..., None]:
        """Return what emits all statements: the body, after rounding x where formats ask for it."""
        body = self.body(problem, config, hardware)
        if not self.rounds(problem):
            return body

        def emit(x: Any, *rest: Any) -> None:
            size = problem.m, problem.k
            body(rounded_rows(problem.acts, x, *size, parallel=config.parallel), *rest)

        return emit

    def prepares(self, problem: Problem, config: GemmConfig) -> bool:
        """Say whether the kernel turns x into something else (codes, tables) before the tiles."""
        return False

    def lanes(self, config: GemmConfig) -> int:
        """Return the rows in a vector."""
        return ROWS

    def work(self, workload: Workload, config: GemmConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it."""
        problem = self.problem(workload)
        ops, rounds = self.arithmetic(problem, config), self.rounds(problem)
        if rounds:
            ops["int_op"] = ops.get("int_op", 0.0) + 6.0 * problem.m * problem.k
        return gemm_work(
            problem,
            config,
            hardware,
            ops,
            row_bytes=self.row_bytes(problem, config),
            prepared=rounds or self.prepares(problem, config),
            lanes=self.lanes(config),
        )

    def tile_cost(self, problem: Problem, config: GemmConfig) -> int:
        """Return the vector operations in the inner loop's body, to keep code small."""
        return config.rows * config.tokens * config.unroll

    def scratch_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Return the bytes of the body's workspace."""
        return 0

    def workspace_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Return the bytes of all workspace."""
        rounded = 4 * problem.m * problem.k if self.rounds(problem) else 0
        return rounded + self.scratch_bytes(problem, config)

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the ways to multiply that may be chosen from."""
        return ("",)

    def unrolls(self, problem: Problem) -> tuple[int, ...]:
        """Return the steps along K that an inner loop may hold."""
        return (1, 2, 4)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tile, loop order, chunk, prefetch and threads."""
        problem = self.problem(workload)
        tokens = tuple(t for t in (1, 2, 4, 6, 8) if t <= problem.m)
        threads = (False, True) if hardware.threads > 1 and problem.row_blocks > 1 else (False,)
        knobs: dict[str, tuple[KnobValue, ...]] = {
            "rows": (1, 2, 3, 4, 6, 8),
            "tokens": tokens,
            "chunk": (1, 2, 4, 8),
            "order": ("rows",) if problem.m == 1 else ("rows", "tokens"),
            "prefetch": (0, 16, AHEAD, 64, 128) if problem.m == 1 else (0, 8, 16, AHEAD),
            "unroll": self.unrolls(problem),
            "parallel": threads,
            "dot": self.dots(problem, hardware),
        }

        def legal(config: GemmConfig) -> bool:
            return (
                config.rows * config.tokens <= 28
                and self.tile_cost(problem, config) <= 256
                and (config.rows - 1) < problem.row_blocks
                and (config.chunk == 1 or config.chunk * config.rows < 2 * problem.row_blocks)
                and config.tokens <= problem.m
                and (config.prefetch in (0, AHEAD) or config.turns(problem.m) == 1)
                and (config.parallel in threads)
            )

        return Space(GemmConfig, knobs, self.default(problem, tokens, hardware, legal), legal)

    def default(
        self,
        problem: Problem,
        sizes: tuple[int, ...],
        hardware: Hardware,
        legal: Callable[[GemmConfig], bool],
    ) -> GemmConfig:
        """Return a good config without a measurement (figures: `benchmarks/mpgemm_roof.py`)."""
        dot = self.dots(problem, hardware)[0]
        work = problem.packed_bytes() * max(1.0, problem.m / 4)
        parallel = hardware.threads > 1 and problem.row_blocks > 1 and work >= PARALLEL_BYTES
        far = problem.packed_bytes() > hardware.l2_bytes
        one = far and problem.m == 1
        tiles = (*(self.streams(problem) if one else ()), *self.tiles(problem))
        for rows, most, unroll in tiles:
            tokens = max(t for t in sizes if t <= most)
            # one row block at a time is one stream, which memory serves best when asked 8 KiB ahead
            ahead = (128 if rows == 1 else 64 if problem.fmt.is_float else AHEAD) if one else AHEAD
            config = GemmConfig(rows, tokens, 1, "rows", 0, unroll, parallel, dot)
            if far and config.turns(problem.m) <= _FEW_TURNS:
                config = replace(config, prefetch=ahead)
            if legal(config):
                return config
        return GemmConfig(rows=1, tokens=1, parallel=parallel, dot=dot)

    def sharing(
        self,
        config: GemmConfig,
        legal: Callable[[GemmConfig], bool],
        rows: tuple[int, ...],
        ahead: int,
    ) -> GemmConfig:
        """Return a config whose row blocks share x: the first legal number of them, else as it is."""
        ahead = min(config.prefetch, ahead)
        wide = (replace(config, rows=r, unroll=1, prefetch=ahead) for r in rows)
        return next((c for c in wide if legal(c)), config)

    def streams(self, problem: Problem) -> tuple[tuple[int, int, int], ...]:
        """Return tiles as `tiles` does that are better for one token and weights in memory."""
        if not problem.acts.is_int8:
            return ()
        steps = sorted(self.unrolls(problem), reverse=True)
        return tuple((1, 1, u) for u in steps if problem.steps.blocks % u == 0)

    def tiles(self, problem: Problem) -> tuple[tuple[int, int, int], ...]:
        """Return (rows, tokens, unroll) of register tiles, the best first.

        Sums of groups and their running total share the registers, so formats with groups take
        smaller tiles.
        """
        grouped = not problem.fmt.is_float and max(problem.layout.groups, problem.steps.count) > 1
        if problem.m == 1:
            unroll = 1 if problem.fmt.is_float or problem.layout.quads == 1 else 2
            return ((4, 1, unroll), (2, 1, unroll), (1, 1, unroll), (4, 1, 1), (2, 1, 1))
        best = (3, 4, 1) if grouped else (4, 4, 2)
        if problem.fmt.is_float or not problem.acts.is_int8:
            best = (3, 4, 1)
        return (best, (3, 4, 1), (2, 4, 1), (1, 4, 1), (2, 2, 1), (1, 2, 1))

    def lower(self, workload: Workload, config: GemmConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        problem = self.problem(workload)
        name = kernel_name(self, workload, config, hardware)
        args = problem.args()
        return Kernel(
            name,
            function(name, args, self.emitter(problem, config, hardware)),
            args,
            self.work(workload, config, hardware),
            self.workspace_bytes(problem, config),
            hardware.features,  # LLVM may have used any of them
        )

    def layouts(self, workload: Workload, config: GemmConfig) -> dict[str, str]:
        """All x86 kernels of a format read the same packed weights."""
        return {"weight": self.problem(workload).weight.layout}

    def pack(
        self, workload: Workload, config: GemmConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Pack codes, scale, zero or w, and bias (those given)."""
        problem = self.problem(workload)
        out = problem.weight.pack(arrays)
        if "bias" in arrays:
            out["bias"] = pack_rows(arrays["bias"].reshape(-1, 1)).reshape(-1, ROWS)
        return out

    def unpack_weights(
        self, workload: Workload, config: GemmConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Undo `pack`."""
        problem = self.problem(workload)
        out = problem.weight.unpack(arrays)
        if "bias" in arrays:
            out["bias"] = np.ascontiguousarray(arrays["bias"].reshape(-1)[: problem.n])
        return out
