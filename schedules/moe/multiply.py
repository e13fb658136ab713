"""How an expert kernel multiplies: what rows become before its tiles, the tiles, and the work of both.

One object serves gate and up as well as down; `Experts.multiply` of a schedule chooses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from mimo_compile.schedules.emit.book import Way, way
from mimo_compile.schedules.emit.build import loop
from mimo_compile.schedules.emit.complex import ComplexWay, complex_way
from mimo_compile.schedules.emit.dot import DOTS, float_work
from mimo_compile.schedules.emit.float_tile import float_tile
from mimo_compile.schedules.emit.int_tile import int_tile
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout
from mimo_compile.schedules.emit.lookup import LOOKUPS
from mimo_compile.schedules.emit.matrix import Matrix
from mimo_compile.schedules.emit.quantize import alloc_activations, quantize_row, workspace_bytes
from mimo_compile.schedules.emit.rounding import rounded_rows
from mimo_compile.schedules.emit.tile import Out, TileKnobs, Weights
from mimo_compile.schedules.moe.problem import MoeConfig, Problem

_ALONE = 64 << 10
"""Numbers of rows that one thread turns into something else before others would have woken up."""
Blocks = list[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Multiply(ABC):
    """Base: rows stay floats, rounded where the activations' format says so."""

    problem: Problem
    config: MoeConfig

    @property
    def lanes(self) -> int:
        """Rows of weights in a vector."""
        return ROWS

    @property
    def unrolls(self) -> bool:
        """True if tiles look at `MoeConfig.unroll`."""
        return True

    @property
    def cost(self) -> int:
        """Multiply-adds in the inner loop's body for a row block and a token, to keep code small."""
        return 1

    def frame(self) -> AbstractContextManager[Any]:
        """Return what the whole kernel is emitted in."""
        return nullcontext()

    def prepared(self, matrix: Matrix, x: Any, rows: Any, size: int) -> Any:
        """Emit what rows become before the tiles, and return it.

        Args:
            matrix: Of the tiles.
            x: ``[M, K]`` float32.
            rows: How many of the M there are.
            size: Numbers in them.
        """
        p = self.problem
        if not p.rounds:
            return x
        return rounded_rows(
            p.acts, x, x.shape[0], matrix.codes.k, parallel=self.shared(size), rows=rows
        )

    def shared(self, size: int, alone: int = _ALONE) -> bool:
        """Say whether threads share the work on so many numbers."""
        return self.config.parallel and size > alone

    def scratch_bytes(self, matrix: Matrix, rows: int) -> int:
        """Return the workspace of `prepared` for so many rows."""
        return 4 * rows * matrix.codes.k if self.problem.rounds else 0

    def row_bytes(self, matrix: Matrix) -> float:
        """Return the bytes that a tile reads of one row."""
        return 4.0 * matrix.k

    @abstractmethod
    def tile(
        self, matrix: Matrix, weights: Weights, x: Any, blocks: Blocks, tokens: Sequence[Any],
        out: Out, knobs: TileKnobs,
    ) -> None:  # fmt: skip
        """Emit one register tile; ``x`` as `prepared` returned it."""

    def making(self, matrix: Matrix, rows: float) -> dict[str, float]:
        """Return the operations of `prepared` that count: none where it only rounds."""
        return {}

    @abstractmethod
    def work(self, matrix: Matrix, slots: float, visits: float) -> dict[str, float]:
        """Return the operations on all rows of one expert's matrix.

        Args:
            matrix: Gate, up or down.
            slots: Rows of x that meet it.
            visits: Register tiles that these take, each of which unpacks anew.
        """


class Floats(Multiply):
    """Multiply-adds in float32: float weights, or codes that become floats in registers."""

    @property
    def cost(self) -> int:
        """See `Multiply.cost`."""
        return 1 if self.problem.fmt.is_float else self.problem.layout13.block

    def tile(
        self, matrix: Matrix, weights: Weights, x: Any, blocks: Blocks, tokens: Sequence[Any],
        out: Out, knobs: TileKnobs,
    ) -> None:  # fmt: skip
        """See `Multiply.tile`."""
        codes = None if matrix.fmt.is_float else matrix.codes
        float_tile(codes, matrix.k, weights, x, blocks, tokens, out, knobs)

    def work(self, matrix: Matrix, slots: float, visits: float) -> dict[str, float]:
        """See `Multiply.work`."""
        numbers = float(matrix.row_blocks * ROWS * matrix.k)
        ops = {"fma_f32": numbers * slots}
        if not matrix.fmt.is_float:
            for kind, amount in float_work(matrix.codes, self.config.dot).items():
                ops[kind] = amount * numbers * visits
        return ops


class Quantised(Multiply):
    """Base: rows become int8 codes."""

    @property
    @abstractmethod
    def activation(self) -> str:
        """Dtype that codes are kept in."""

    def offset(self, codes: CodeLayout) -> int | None:
        """Return what weights lie above their values (see `quantize_row`)."""
        return None

    def prepared(self, matrix: Matrix, x: Any, rows: Any, size: int) -> Any:
        """See `Multiply.prepared`."""
        codes, group = matrix.codes, max(self.problem.acts.group, 0)
        out = alloc_activations(codes, x.shape[0], self.activation, group)
        with loop(rows, parallel=self.shared(size)) as row:
            quantize_row(codes, x, (row,), out, row, offset=self.offset(codes))
        return out

    def scratch_bytes(self, matrix: Matrix, rows: int) -> int:
        """See `Multiply.scratch_bytes`."""
        group = max(self.problem.acts.group, 0)
        return workspace_bytes(matrix.codes, rows, self.activation, group)

    def row_bytes(self, matrix: Matrix) -> float:
        """See `Multiply.row_bytes`."""
        width = 1.0 if self.activation == "int8" else 4.0
        return self.problem.parts * matrix.codes.k_padded * width


class Dots(Quantised):
    """Integer codes times int8 by one of `emit.dot.DOTS`."""

    @property
    def lanes(self) -> int:
        """See `Multiply.lanes`."""
        return DOTS[self.config.dot].lanes

    @property
    def activation(self) -> str:
        """See `Quantised.activation`."""
        return DOTS[self.config.dot].activation

    @property
    def cost(self) -> int:
        """See `Multiply.cost`."""
        layout = self.problem.layout13
        steps = layout.block if self.activation == "float32" else layout.quads
        return steps * (ROWS // self.lanes)

    def tile(
        self, matrix: Matrix, weights: Weights, x: Any, blocks: Blocks, tokens: Sequence[Any],
        out: Out, knobs: TileKnobs,
    ) -> None:  # fmt: skip
        """See `Multiply.tile`."""
        int_tile(DOTS[self.config.dot](matrix.codes), weights, x, blocks, tokens, out, knobs)

    def work(self, matrix: Matrix, slots: float, visits: float) -> dict[str, float]:
        """See `Multiply.work`."""
        layout, rows = matrix.codes, float(matrix.row_blocks * ROWS)
        dot = DOTS[self.config.dot](layout)
        steps = rows / dot.lanes * layout.blocks
        ops = {kind: amount * steps * slots for kind, amount in dot.work.items()}
        for kind, amount in dot.unpack_work.items():
            ops[kind] = ops.get(kind, 0.0) + amount * steps * visits
        scaled = rows * slots * layout.groups
        ops["fma_f32"] = ops.get("fma_f32", 0.0) + scaled * (2 if layout.fmt.has_zero else 1)
        return ops


class Values(Multiply):
    """Codes that stand for values (codebooks, fp8, complex): a way of `emit.book` or `emit.complex`."""

    def way(self, codes: CodeLayout) -> Way | ComplexWay:
        """Return how a tile multiplies."""
        make = complex_way if codes.fmt.family == "complex" else way
        return make(self.config.dot, codes, self.problem.act)

    @property
    def lanes(self) -> int:
        """See `Multiply.lanes`."""
        return self.way(self.problem.layout13).lanes

    @property
    def unrolls(self) -> bool:
        """Ways in floats unroll nothing."""
        return self.config.dot in LOOKUPS

    @property
    def cost(self) -> int:
        """See `Multiply.cost`."""
        return self.way(self.problem.layout13).cost

    def tile(
        self, matrix: Matrix, weights: Weights, x: Any, blocks: Blocks, tokens: Sequence[Any],
        out: Out, knobs: TileKnobs,
    ) -> None:  # fmt: skip
        """See `Multiply.tile`."""
        self.way(matrix.codes).tile(weights, x, blocks, tokens, out, knobs)

    def work(self, matrix: Matrix, slots: float, visits: float) -> dict[str, float]:
        """See `Multiply.work`."""
        layout, chosen = matrix.codes, self.way(matrix.codes)
        panels = float(matrix.fmt.terms * matrix.row_blocks)
        blocks = panels * layout.blocks
        ops = {kind: amount * blocks * slots for kind, amount in chosen.work.items()}
        for kind, amount in chosen.unpack_work.items():
            ops[kind] = ops.get(kind, 0.0) + amount * blocks * visits
        scaled = chosen.scale_work * panels * layout.groups * slots
        ops["fma_f32"] = ops.get("fma_f32", 0.0) + scaled
        return ops


class QuantisedValues(Values, Quantised):
    """`Values` times int8 activations with one scale a row."""

    @property
    def activation(self) -> str:
        """See `Quantised.activation`."""
        return self.way(self.problem.layout13).activation

    def offset(self, codes: CodeLayout) -> int | None:
        """See `Quantised.offset`."""
        return self.way(codes).offset
