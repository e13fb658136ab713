"""One matmul and how a kernel runs it: extents, config, packed arguments."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mimo_compile.ir.formats import (
    ActFormat,
    WeightFormat,
    parse_act_format,
    parse_weight_format,
)
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout
from mimo_compile.schedules.emit.matrix import Matrix, arg_bytes
from mimo_compile.schedules.emit.steps import Steps


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
    """Distance of prefetches in cache lines, 0 for none. Where several tiles of tokens read the same
    weights, any other number: they share the prefetching of the next weights."""
    unroll: int = 1
    """Steps along K in the inner loop's body."""
    parallel: bool = False
    """Spread the tasks over threads."""
    dot: str = ""
    """Name of the way to multiply (`emit.dot.DOTS`); empty where there is only one."""
    split: int = 1
    """Pieces of the columns that are summed by tasks of their own, and added in their order."""

    def turns(self, m: int) -> int:
        """Return how many tiles of tokens read a row tile's weights one after the other, of ``m`` tokens."""
        return -(-m // self.tokens) if self.order == "rows" else 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One matmul, its parameters resolved."""

    m: int
    weight: Matrix
    act: str
    bias: bool

    @staticmethod
    @lru_cache(maxsize=256)
    def of(workload: Workload, packing: str = "") -> Problem:
        """Read a workload of the op ``mpgemm``; ``packing``: layout of integer codes."""
        p = get_op("mpgemm").full(workload)
        weight = Matrix(parse_weight_format(p["w"]), p["n"], p["k"], p["s"], packing=packing)
        return Problem(p["m"], weight, p["a"], bool(p["bias"]))

    @property
    def n(self) -> int:
        """Rows of the weights."""
        return self.weight.n

    @property
    def k(self) -> int:
        """Columns of the weights."""
        return self.weight.k

    @property
    def fmt(self) -> WeightFormat:
        """Format of the weights."""
        return self.weight.fmt

    @property
    def acts(self) -> ActFormat:
        """Format of the activations."""
        return parse_act_format(self.act)

    @property
    def steps(self) -> Steps:
        """What kernels with int8 activations sum as integers."""
        return Steps(self.layout, max(self.acts.group, 0))

    @property
    def layout(self) -> CodeLayout:
        """Layout of integer codes."""
        return self.weight.codes

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 weight rows."""
        return self.weight.row_blocks

    def args(self) -> tuple[Arg, ...]:
        """Return the kernel's parameters: x, packed weights, bias, y."""
        out = [Arg("x", "input", (self.m, self.k), "float32"), *self.weight.args()]
        if self.bias:
            out.append(Arg("bias", "weight", (self.row_blocks, ROWS), "float32"))
        return (*out, Arg("y", "output", (self.m, self.n), "float32"))

    def launch(self, tasks: int) -> AbstractContextManager[Any]:
        """Return what the loop over tasks is emitted in: nothing, for a plain matmul."""
        return nullcontext()

    def start_task(self) -> None:
        """Emit what a task does before its tiles: nothing, for a plain matmul."""

    def finish(self, value: Any, token: Any, block: Any, lane: int, lanes: int) -> Any:
        """Return what is stored for sums (bias added) of rows ``16 * block + lane`` and following."""
        return value

    def packed_bytes(self) -> float:
        """Bytes of all packed weights."""
        return float(sum(arg_bytes(a) for a in self.args() if a.role == "weight"))
