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
from mimo_compile.schedules.emit.rounding import copies_rows, rounded_rows
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem
from mimo_compile.schedules.mpgemm.work import gemm_work, share_of

ROW_BLOCKS = (1, 2, 3, 4, 6, 8)
"""Row blocks that a register tile may have."""
AHEAD = 32
"""Usual distance of prefetches in cache lines."""
SPLITS = (1, 2, 4, 8)
"""Numbers of pieces that the columns may be cut into."""
SHAPE = frozenset({"rows", "tokens", "chunk", "order", "prefetch", "parallel"})
"""Knobs that say which sums are made together and when, not how one of them is made."""
_EVEN = 1.1
"""Times its share that the busiest thread may do before columns are cut for the threads' sake."""
_UNITS = 4
"""Units in a piece at least, so that pieces which differ by one are about as long."""
_SUMS_BYTES = 4 << 20
"""Most bytes of the sums of all pieces."""
_FEW_TURNS = 16
"""Tiles of tokens up to which it shows that the next weights come from memory."""


class X86Gemm(Schedule):
    """Base: subclasses emit the kernel's body and say which tiles fit."""

    op = "mpgemm"
    version: ClassVar[int] = 4
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
        return copies_rows(problem.acts, problem.fmt)

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

    def units(self, problem: Problem) -> int:
        """Return the runs of columns that pieces (`GemmConfig.split`) are made of; 0: there are none."""
        return 0

    def scratch_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Return the bytes of the body's workspace."""
        return 0

    def workspace_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Return the bytes of all workspace."""
        rounded = 4 * problem.m * problem.k if self.rounds(problem) else 0
        pieces = piece_bytes(problem, config.split) if isinstance(config, GemmConfig) else 0
        return rounded + pieces + self.scratch_bytes(problem, config)

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the ways to multiply that may be chosen from."""
        return ("",)

    def unrolls(self, problem: Problem) -> tuple[int, ...]:
        """Return the steps along K that an inner loop may hold."""
        return (1, 2, 4)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tile, loop order, chunk, prefetch, threads and pieces of the columns."""
        problem = self.problem(workload)
        tokens = tuple(t for t in (1, 2, 4, 6, 8) if t <= problem.m)
        splits = self.splits(problem, tokens, hardware)
        many = problem.row_blocks > 1 or len(splits) > 1
        threads = (False, True) if hardware.threads > 1 and many else (False,)
        knobs: dict[str, tuple[KnobValue, ...]] = {
            "rows": ROW_BLOCKS,
            "tokens": tokens,
            "chunk": (1, 2, 4, 8),
            "order": ("rows",) if problem.m == 1 else ("rows", "tokens"),
            "prefetch": (0, 16, AHEAD, 64, 128) if problem.m == 1 else (0, 8, 16, AHEAD),
            "unroll": self.unrolls(problem),
            "parallel": threads,
            "dot": self.dots(problem, hardware),
            "split": splits,
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
                and (config.split == 1 or self.may_split(problem, config, hardware))
                and not (config.parallel and config.split * problem.row_blocks == 1)
            )

        default = self.default(problem, tokens, hardware, legal)
        default = self.with_pieces(problem, default, hardware, legal)
        return Space(GemmConfig, knobs, default, legal)

    def splits(
        self, problem: Problem, tokens: tuple[int, ...], hardware: Hardware
    ) -> tuple[int, ...]:
        """Return the numbers of pieces that some tile may have."""
        tiles = [
            GemmConfig(r, t, parallel=hardware.threads > 1)
            for r in ROW_BLOCKS for t in tokens if r <= problem.row_blocks
        ]  # fmt: skip
        may = (
            any(self.may_split(problem, replace(c, split=s), hardware) for c in tiles)
            for s in SPLITS
        )
        return tuple(s for s, ok in zip(SPLITS, may, strict=True) if s == 1 or ok)

    def may_split(self, problem: Problem, config: GemmConfig, hardware: Hardware) -> bool:
        """Say whether pieces may help: tiles are few for the threads, or x outgrows the nearest cache."""
        if config.chunk > 1 or config.order != "rows":
            return False
        if self.units(problem) < _UNITS * config.split:
            return False
        if piece_bytes(problem, config.split) > _SUMS_BYTES:
            return False
        tasks = config.split * -(-problem.row_blocks // config.rows)
        x = config.tokens * problem.k * (1 if problem.acts.is_int8 else 4)
        large = 2 * x > config.split * hardware.l1d_bytes  # also half as many pieces would be
        return (config.parallel and tasks <= 2 * hardware.threads) or large

    def with_pieces(
        self,
        problem: Problem,
        config: GemmConfig,
        hardware: Hardware,
        legal: Callable[[GemmConfig], bool],
    ) -> GemmConfig:
        """Return the config with as few pieces as give all threads as much to do, where it is enough."""
        if hardware.threads == 1 or self.effort(problem) < PARALLEL_BYTES:
            return config
        if share_of(problem, config, hardware.threads) * hardware.threads <= _EVEN:
            return config
        cut = (replace(config, split=s, parallel=True) for s in SPLITS[1:])
        return min(
            (config, *filter(legal, cut)),
            key=lambda c: share_of(problem, c, hardware.threads if c.parallel else 1),
        )

    def effort(self, problem: Problem) -> float:
        """Return bytes of weights that take about as long to read as the matmul takes."""
        return problem.packed_bytes() * max(1.0, problem.m / 4)

    def default(
        self,
        problem: Problem,
        sizes: tuple[int, ...],
        hardware: Hardware,
        legal: Callable[[GemmConfig], bool],
    ) -> GemmConfig:
        """Return a good config without a measurement (figures: `benchmarks/mpgemm_roof.py`)."""
        dot = self.dots(problem, hardware)[0]
        wide = hardware.threads > 1 and problem.row_blocks > 1
        parallel = wide and self.effort(problem) >= PARALLEL_BYTES
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
        small = grouped or problem.fmt.is_float or not problem.acts.is_int8
        tiles = ((3, 4, 1), (2, 4, 1), (1, 4, 1), (2, 2, 1), (1, 2, 1))
        return tiles if small else ((4, 4, 1), *tiles)

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

    def order(self, workload: Workload, config: GemmConfig, hardware: Hardware) -> str | None:
        """Which rows and tokens share a register tile changes no sum; all other knobs may."""
        knobs = self.config_to_json(config)
        kept = (f"{name}={knobs[name]}" for name in sorted(knobs.keys() - SHAPE))
        return " ".join((self.name, *kept))

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


def piece_bytes(problem: Problem, split: int) -> int:
    """Return the workspace for the sums of pieces."""
    return 4 * split * problem.m * problem.row_blocks * ROWS if split > 1 else 0
