"""What the x86 matmul schedules share: problem, config, the loops around a tile, result, counts."""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.formats import WeightFormat, parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, KnobValue, Schedule, Space
from mimo_compile.schedules.emit.build import T, choose, function, load, loop, when
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout, pack_quantised, pack_rows
from mimo_compile.schedules.emit.tile import Out, store_rows

PARALLEL_BYTES = 192 << 10
"""Weights below this are read before a second thread has woken up."""


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """Knobs of a tiled matmul."""

    rows: int = 4
    """Blocks of 16 weight rows in a register tile."""
    tokens: int = 1
    """Tokens in a register tile."""
    chunk: int = 1
    """Row tiles that one task does."""
    order: str = "rows"
    """Outer loop of a task: ``rows`` (weights stay in cache) or ``tokens`` (activations do)."""
    prefetch: int = 0
    """Distance of prefetches in cache lines, 0 for none."""
    unroll: int = 1
    """Steps along K in the inner loop's body."""
    parallel: bool = False
    """Spread the tasks over threads."""
    dot: str = ""
    """Name of the way to multiply (`emit.dot.DOTS`); empty where there is only one."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One matmul, its parameters resolved."""

    m: int
    n: int
    k: int
    fmt: WeightFormat
    act: str
    scale_dtype: str
    bias: bool

    @classmethod
    def of(cls, workload: Workload) -> Problem:
        """Read a workload of the op ``mpgemm``."""
        p = get_op("mpgemm").full(workload)
        fmt = parse_weight_format(p["w"])
        return cls(p["m"], p["n"], p["k"], fmt, p["a"], p["s"], bool(p["bias"]))

    @property
    def layout(self) -> CodeLayout:
        """Layout of integer codes."""
        return CodeLayout(self.fmt, self.n, self.k)

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 weight rows."""
        return -(-self.n // ROWS)

    def args(self) -> tuple[Arg, ...]:
        """Return the kernel's parameters: x, packed weights, bias, y."""
        out = [Arg("x", "input", (self.m, self.k), "float32")]
        if self.fmt.is_float:
            dtype = "uint16" if self.fmt.bits == 16 else "float32"
            out.append(Arg("w", "weight", (self.row_blocks, self.k, ROWS), dtype))
        else:
            out += self.layout.args("", (), self.scale_dtype)
        if self.bias:
            out.append(Arg("bias", "weight", (self.row_blocks, ROWS), "float32"))
        return (*out, Arg("y", "output", (self.m, self.n), "float32"))

    def packed_bytes(self) -> float:
        """Bytes of all packed weights."""
        return float(sum(arg_bytes(a) for a in self.args() if a.role == "weight"))


class X86Gemm(Schedule):
    """Base: subclasses emit the kernel's body and say which tiles fit."""

    op = "mpgemm"
    config = GemmConfig

    @abstractmethod
    def body(self, problem: Problem, config: GemmConfig, hardware: Hardware) -> Callable[..., None]:
        """Return the function that emits the statements, given the parameters' buffers."""

    @abstractmethod
    def counts(self, problem: Problem, config: GemmConfig) -> Counts:
        """Return the work of one run."""

    def tile_cost(self, problem: Problem, config: GemmConfig) -> int:
        """Return the vector operations in the inner loop's body, to keep code small."""
        return config.rows * config.tokens * config.unroll

    def scratch_bytes(self, problem: Problem, config: GemmConfig) -> int:
        """Return the bytes of workspace."""
        return 0

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the ways to multiply that may be chosen from."""
        return ("",)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tile, loop order, chunk, prefetch and threads."""
        problem = Problem.of(workload)
        tokens = tuple(t for t in (1, 2, 4, 6, 8) if t <= problem.m)
        threads = (False, True) if hardware.threads > 1 and problem.row_blocks > 1 else (False,)
        knobs: dict[str, tuple[KnobValue, ...]] = {
            "rows": (1, 2, 3, 4, 6, 8),
            "tokens": tokens,
            "chunk": (1, 2, 4, 8),
            "order": ("rows",) if problem.m == 1 else ("rows", "tokens"),
            "prefetch": (0, 8, 16, 32),
            "unroll": (1, 2, 4),
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
                and (config.parallel in threads)
            )

        return Space(GemmConfig, knobs, self.default(problem, hardware, legal), legal)

    def default(
        self, problem: Problem, hardware: Hardware, legal: Callable[[GemmConfig], bool]
    ) -> GemmConfig:
        """Return a good config without a measurement (figures: `benchmarks/mpgemm_roof.py`)."""
        dot = self.dots(problem, hardware)[0]
        work = problem.packed_bytes() * max(1.0, problem.m / 4)
        parallel = hardware.threads > 1 and problem.row_blocks > 1 and work >= PARALLEL_BYTES
        ahead = 16 if problem.m == 1 and problem.packed_bytes() > hardware.l2_bytes else 0
        for rows, tokens, unroll in self.tiles(problem):
            config = GemmConfig(
                rows, min(tokens, problem.m), 1, "rows", ahead, unroll, parallel, dot
            )
            if legal(config):
                return config
        return GemmConfig(rows=1, tokens=1, parallel=parallel, dot=dot)

    def tiles(self, problem: Problem) -> tuple[tuple[int, int, int], ...]:
        """Return (rows, tokens, unroll) of register tiles, the best first.

        Sums of groups and their running total share the registers, so formats with groups take
        smaller tiles.
        """
        grouped = not problem.fmt.is_float and problem.layout.groups > 1
        if problem.m == 1:
            unroll = 1 if problem.fmt.is_float or problem.layout.per_byte == 1 else 2
            return ((4, 1, unroll), (2, 1, unroll), (1, 1, unroll), (4, 1, 1), (2, 1, 1))
        best = (3, 4, 1) if grouped else (4, 4, 2)
        return (best, (3, 4, 1), (2, 4, 1), (1, 4, 1), (2, 2, 1), (1, 2, 1))

    def lower(self, workload: Workload, config: GemmConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        problem = Problem.of(workload)
        name = kernel_name(self, workload, config, hardware)
        args = problem.args()
        return Kernel(
            name,
            function(name, args, self.body(problem, config, hardware)),
            args,
            self.counts(problem, config),
            self.scratch_bytes(problem, config),
            hardware.features,  # LLVM may have used any of them
        )

    def layouts(self, workload: Workload, config: GemmConfig) -> dict[str, str]:
        """All x86 kernels of a format read the same packed weights."""
        return {"weight": "rows16.k1" if Problem.of(workload).fmt.is_float else "rows16.k4"}

    def pack(
        self, workload: Workload, config: GemmConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Pack codes, scale, zero or w, and bias (those given)."""
        problem = Problem.of(workload)
        if problem.fmt.is_float:
            out = {"w": pack_rows(arrays["w"])} if "w" in arrays else {}
        else:
            out = pack_quantised(problem.layout, "", arrays, problem.scale_dtype)
        if "bias" in arrays:
            out["bias"] = pack_rows(arrays["bias"].reshape(-1, 1)).reshape(-1, ROWS)
        return out


def tiles(
    problem: Problem,
    config: GemmConfig,
    tile: Callable[[list[tuple[Any, ...]], list[Any]], None],
) -> None:
    """Emit the loops around register tiles, with smaller tiles where rows or tokens run out.

    Args:
        problem: The matmul.
        config: Its tile, chunk, order and threads.
        tile: Emits one tile for row blocks and tokens.
    """
    wide = any(math.prod(a.shape) >= 2**31 for a in problem.args())
    full, part = divmod(problem.row_blocks, config.rows)
    row_tiles = full + (part > 0)
    chunk = min(config.chunk, row_tiles)

    def at_rows(index: Any, first: Any, count: int) -> None:
        def emit(rows: int) -> None:
            at = T.cast(index, "int64") if wide and not isinstance(index, int) else index
            blocks: list[tuple[Any, ...]] = [(at * config.rows + r,) for r in range(rows)]
            tile(blocks, [first + t for t in range(count)])

        if not part:
            emit(config.rows)
        elif not full:
            emit(part)
        else:
            choose(index < full, lambda: emit(config.rows), lambda: emit(part))

    def over_tokens(emit: Callable[[Any, int], None]) -> None:
        count, rest = divmod(problem.m, config.tokens)
        if count:
            with loop(count) as i:
                emit(i * config.tokens, config.tokens)
        if rest:
            emit(count * config.tokens, rest)

    def over_chunk(task: Any, emit: Callable[[Any], None]) -> None:
        with loop(chunk) as c:
            if row_tiles % chunk:
                with when(task * chunk + c < row_tiles):
                    emit(task * chunk + c)
            else:
                emit(task * chunk + c)

    with loop(-(-row_tiles // chunk), parallel=config.parallel) as task:
        if config.order == "rows":
            over_chunk(task, lambda i: over_tokens(lambda first, n: at_rows(i, first, n)))
        else:
            over_tokens(lambda first, n: over_chunk(task, lambda i: at_rows(i, first, n)))


def writer(
    problem: Problem,
    y: Any,
    bias: Any,
    blocks: list[tuple[Any, ...]],
    tokens: list[Any],
    lanes: int,
) -> Out:
    """Return the ``out`` of a tile: add the bias and store, cutting off rows behind N."""

    def out(r: int, m: int, lane: int, value: Any) -> None:
        (block,) = blocks[r]
        if bias is not None:
            value = value + load(bias, block, lane, lanes=lanes)
        last = r + 1 == len(blocks)  # the last block of all is the last of its tile
        store_rows(y, tokens[m], block, lane, lanes, value, problem.n, last=last)

    return out


def kernel_name(schedule: Schedule, workload: Workload, config: Any, hardware: Hardware) -> str:
    """Return a C identifier: the workload in words, then a hash of all that shapes the code."""
    words = re.sub(r"[^a-zA-Z0-9]+", "_", re.sub(r"[a-z]+=(?=[a-z])|=", "", str(workload)))
    facts = [
        schedule.name, schedule.version, str(workload), schedule.config_to_json(config),
        sorted(hardware.features),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return f"{words}__{digest}"


def arg_bytes(arg: Arg) -> int:
    """Return the size of an argument."""
    size = {"int8": 1, "uint8": 1, "float16": 2, "uint16": 2, "bfloat16": 2}.get(arg.dtype, 4)
    for extent in arg.shape:
        size *= extent
    return size
