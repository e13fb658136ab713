"""One expert layer and how a kernel runs it: extents, config, packed arguments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from mimo_compile.ir.formats import (
    ActFormat,
    WeightFormat,
    parse_act_format,
    parse_weight_format,
)
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.dot import exact
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout
from mimo_compile.schedules.emit.matrix import Matrix
from mimo_compile.schedules.emit.rounding import copies_rows
from mimo_compile.schedules.emit.steps import Steps


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Knobs of the expert kernel."""

    rows13: int = 2
    """Blocks of 16 rows of gate, and as many of up, in a register tile."""
    rows2: int = 4
    """Blocks of 16 rows in a register tile of the down projection."""
    tokens: int = 1
    """Slots in a register tile (a power of two unless `once`); what is left takes smaller ones."""
    prefetch: int = 0
    """Distance of prefetches in cache lines, 0 for none."""
    unroll: int = 1
    """Steps along K in the inner loop's body."""
    parallel: bool = False
    """Spread the rows of the weights over threads."""
    tasks: int = 0
    """Tasks that share a matmul, each with its rows of an expert before the next; 0: one for each tile."""
    apart: bool = False
    """Gate and up of some rows in two tiles, one after the other: one stream of weights instead of two."""
    dot: str = ""
    """Name of the way to multiply (`emit.dot.DOTS`); empty for float32 FMA."""
    share: bool = False
    """While an expert's slots meet one tile of weights, ask for the next: each of them for its share."""
    once: bool = False
    """What is left of an expert's slots takes one tile, with room for one more at most up to 8, instead of a
    tile for each power of two in their number."""


@dataclass(frozen=True, slots=True)
class Split:
    """How tasks share the row blocks of a matrix."""

    rows: int
    """Row blocks of a tile."""
    tiles: int
    """Tiles of all."""
    chunk: int
    """Tiles of a task; the last one may have fewer."""

    @staticmethod
    def of(matrix: Matrix, rows: int, tasks: int) -> Split:
        """Share a matrix among ``tasks`` tasks, 0: as many as there are tiles."""
        tiles = matrix.row_blocks // rows
        return Split(rows, tiles, -(-tiles // (tasks or tiles)))

    @property
    def tasks(self) -> int:
        """Tasks that have tiles."""
        return -(-self.tiles // self.chunk)

    @property
    def next_tile(self) -> int:
        """Row blocks to the tile that a task reads next (see `emit.tile.TileKnobs`)."""
        return self.rows if self.chunk > 1 else 0

    def first(self, task: Any, tile: Any) -> Any:
        """Return the first row block of a task's tile."""
        return (task * self.chunk + tile) * self.rows


@dataclass(frozen=True, slots=True)
class Problem:
    """One expert layer, its parameters resolved."""

    t: int
    e: int
    k: int
    w13: Matrix
    """Gate and up of all experts."""
    w2: Matrix
    """Down of all experts, ``[E, D, F]``."""
    act: str

    halves: ClassVar[int] = 2
    """Matrices that gate and up are: ``[E, 2, F, D]``."""
    parts: ClassVar[int] = 1
    """Rows of vectors that a token is, with a scale of its own each."""

    @staticmethod
    @lru_cache(maxsize=256)
    def of(workload: Workload, packing: str = "", kind: type[Matrix] = Matrix) -> Problem:
        """Read a workload of the op ``moe``.

        Args:
            workload: The workload.
            packing: Layout of integer codes (`emit.dense.PACKINGS`).
            kind: How float weights are laid out.
        """
        p = get_op("moe").full(workload)
        fmt, e, d, f = parse_weight_format(p["w"]), p["e"], p["d"], p["f"]
        w13 = kind(fmt, f, d, p["s"], "w13_", (e, 2), packing)
        w2 = kind(fmt, d, f, p["s"], "w2_", (e,), packing)
        return Problem(p["t"], e, p["k"], w13, w2, p["a"])

    @property
    def d(self) -> int:
        """Width of a token."""
        return self.w13.k

    @property
    def f(self) -> int:
        """Width between the matmuls."""
        return self.w2.k

    @property
    def hidden_width(self) -> int:
        """Columns of a row between the matmuls as it is stored."""
        return self.w13.row_blocks * ROWS

    @property
    def fmt(self) -> WeightFormat:
        """Format of the weights."""
        return self.w13.fmt

    @property
    def slots(self) -> int:
        """Pairs of token and choice."""
        return self.t * self.k

    @property
    def layout13(self) -> CodeLayout:
        """Layout of the gate, and of the up matrix, of one expert."""
        return self.w13.codes

    @property
    def layout2(self) -> CodeLayout:
        """Layout of the down matrix of one expert."""
        return self.w2.codes

    @property
    def hit(self) -> float:
        """Experts that are chosen, expected under uniform routing."""
        return self.e * (1 - (1 - self.k / self.e) ** self.t)

    @property
    def acts(self) -> ActFormat:
        """Format of the activations."""
        return parse_act_format(self.act)

    @property
    def rounds(self) -> bool:
        """True if float kernels read rounded copies of rows."""
        return copies_rows(self.acts, self.fmt)

    @property
    def exact(self) -> bool:
        """True for integer codes whose sums fit 32 bits in both matmuls, in steps that are whole blocks."""
        group = max(self.acts.group, 0)
        layouts = self.layout13, self.layout2
        return all(exact(layout) and Steps(layout, group).fits for layout in layouts)

    @property
    def expert_bytes(self) -> float:
        """Packed bytes of one expert."""
        return (self.w13.bytes + self.w2.bytes) / self.e

    def args(self) -> tuple[Arg, ...]:
        """Return the kernel's parameters: x, ids, weights, packed w13 and w2, y."""
        return (
            Arg("x", "input", (self.t, self.d), "float32"),
            Arg("ids", "input", (self.t, self.k), "int32"),
            Arg("weights", "input", (self.t, self.k), "float32"),
            *self.w13.args(),
            *self.w2.args(),
            Arg("y", "output", (self.t, self.d), "float32"),
        )
