"""Tiles of complex weights in {1, i, -1, -i}: four sums of real and imaginary parts for each matrix.

With the scales s, t of the real and the imaginary axis and sums over the weights of one axis, RR of their
signs times Re x, RI times Im x, IR and II likewise for the imaginary axis,

    W conj(x):  Re y = s RR + t II,  Im y = t IR - s RI
    U x:        Re y = s RR - t II,  Im y = t IR + s RI

With int8 activations the four sums are exact integers. Widely-linear formats add up matrices U, W, U, W.
x ``[M, K]`` and y ``[M, N]`` hold real halves, then imaginary ones: seen as ``[2 M, K/2]`` and
``[2 M, N/2]``, rows ``2 m`` are the real and rows ``2 m + 1`` the imaginary part of token m.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.schedules.emit.build import Register, T, bind, load, loop, splat, vector_type
from mimo_compile.schedules.emit.decode import DECODERS, Choices, Decoder, columns
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout, pack_quantised
from mimo_compile.schedules.emit.lookup import LOOKUPS, LookupDot, line_of, lookup_sums
from mimo_compile.schedules.emit.matrix import Matrix
from mimo_compile.schedules.emit.quantize import Activations
from mimo_compile.schedules.emit.tile import CHAIN, Out, TileKnobs, Weights, in_runs

REAL, IMAGINARY = (1, 0, -1, 0), (0, 1, 0, -1)
"""Parts of 1, i, -1, -i: what a code stands for on each axis."""
Sums = dict[tuple[int, int, int, int], Any]
"""By row block, part of its rows, row of x and axis: float32 or int32."""


class ComplexMatrix(Matrix):
    """Stacked complex matrices ``[terms, N/2, K/2]`` that act as a real one ``[N, K]``."""

    @property
    def codes(self) -> CodeLayout:
        """Layout of one of the complex matrices."""
        return CodeLayout(self.fmt, self.n // 2, self.k // 2)

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 complex rows of one matrix."""
        return self.codes.row_blocks

    @property
    def useful(self) -> float:
        """Part of the padded elements that are the matrices'."""
        codes = self.codes
        return codes.n * codes.k / (codes.row_blocks * ROWS * codes.k_padded)

    def args(self) -> list[Arg]:
        """Return codes ``[*lead, terms, N/32, lines, 64]`` and scale ``[*lead, terms, N/32, 2, 16]``."""
        return self.codes.args(self.prefix, (*self.lead, self.fmt.terms), self.scale_dtype)

    def stacked(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return canonical arrays with an axis for the matrices."""
        terms, names = self.fmt.terms, (f"{self.prefix}codes", f"{self.prefix}scale")
        given = {name: np.ascontiguousarray(arrays[name]) for name in names if name in arrays}
        return {name: a.reshape(*a.shape[:-2], terms, -1, a.shape[-1]) for name, a in given.items()}

    def pack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Pack those of codes and scale that are given."""
        return pack_quantised(self.codes, self.prefix, self.stacked(arrays), self.scale_dtype)

    def unpack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return the canonical arrays of those that `pack` gave: matrices below each other."""
        stacked = super().unpack(arrays)
        return {name: a.reshape(*self.lead, -1, a.shape[-1]) for name, a in stacked.items()}


def halves(buffer: Any) -> Any:
    """View ``[M, 2 C]`` as ``[2 M, C]``."""
    rows, count = (int(extent) for extent in buffer.shape)
    return T.decl_buffer((2 * rows, count // 2), "float32", data=buffer.data)


def combine(
    sums: Sums,
    scales: Mapping[tuple[int, int], Sequence[Any]],
    token_scales: Sequence[Any] | None,
    sign: Any,
    total: Mapping[tuple[int, int, int], Register],
    lanes: int,
) -> None:
    """Add the four sums of one matrix to ``total`` (rows ``2 m`` and ``2 m + 1`` for a token).

    Args:
        sums: Of the matrix; both rows of each token.
        scales: Of the axes, for each row block and part.
        token_scales: Of each row of x; None where x is not quantised.
        sign: 1 if the matrix acts on conj(x), -1 if on x; None: 1.
        total: Registers for the rows of y.
        lanes: Rows of the weights in a vector.
    """
    f32 = vector_type("float32", lanes)
    turned = scales
    if sign is not None:
        turned = {at: [bind(s * splat(sign, lanes)) for s in both] for at, both in scales.items()}

    def part(r: int, h: int, row: int, axis: int, scale: Any) -> Any:
        value = T.cast(sums[r, h, row, axis], f32) * scale[axis]
        return value if token_scales is None else value * splat(token_scales[row], lanes)

    for (r, h, row), register in total.items():
        at = r, h
        if row % 2 == 0:
            direct = part(r, h, row, 0, scales[at])
            register.set(register.get() + direct + part(r, h, row + 1, 1, turned[at]))
        else:
            direct = part(r, h, row - 1, 1, scales[at])
            register.set(register.get() + direct - part(r, h, row, 0, turned[at]))


@dataclass(frozen=True, slots=True)
class ComplexWay(ABC):
    """A way to compute the four sums."""

    name: str
    codes: CodeLayout
    quantised: bool

    @property
    @abstractmethod
    def lanes(self) -> int:
        """Rows in a vector."""

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return ROWS

    @property
    def offset(self) -> int:
        """What operands lie above their values (see `quantize.quantize_row`)."""
        return 1

    @property
    def scale_work(self) -> float:
        """Multiply-adds that scale the sums of 16 rows of one matrix for one token."""
        return 4.0 * ROWS

    @property
    @abstractmethod
    def activation(self) -> str:
        """What quantised rows are kept as."""

    @property
    @abstractmethod
    def cost(self) -> int:
        """Multiply-adds in a block of columns, for each row block and token."""

    @property
    @abstractmethod
    def work(self) -> dict[str, float]:
        """Operations of a block of columns of 16 rows of one matrix for one token."""

    @property
    @abstractmethod
    def unpack_work(self) -> dict[str, float]:
        """Operations of a block of columns of 16 rows that all tokens of a tile share."""

    @abstractmethod
    def sums(
        self, weights: Weights, x: Any, blocks: Sequence[tuple[Any, ...]], rows: Sequence[Any],
        knobs: TileKnobs,
    ) -> Sums:  # fmt: skip
        """Emit the sums of one matrix for rows of x."""

    def tile(
        self, weights: Weights, x: Any, blocks: Sequence[tuple[Any, ...]], tokens: Sequence[Any],
        out: Out, knobs: TileKnobs,
    ) -> None:  # fmt: skip
        """Emit a tile of all matrices: ``out(r, row, lane, value)``, row ``2 i`` real for token i.

        Args:
            weights: Packed codes and scales of all matrices.
            x: ``[2 M, K/2]`` float32, or quantised rows.
            blocks: Row blocks, the last number of an index; the matrix is put before it.
            tokens: Tokens.
            out: Takes each vector of results.
            knobs: See there.
        """
        lanes, f32 = self.lanes, vector_type("float32", self.lanes)
        rows = [2 * t + part for t in tokens for part in (0, 1)]
        places = [(r, h) for r in range(len(blocks)) for h in range(self.rows // lanes)]
        zero = splat(T.float32(0), lanes)
        total = {
            (r, h, i): Register("float32", lanes, zero) for r, h in places for i in range(len(rows))
        }
        token_scales = [bind(x.scale[row]) for row in rows] if self.quantised else None
        terms = self.codes.fmt.terms
        with loop(terms) as term:
            own = [(*block[:-1], term, block[-1]) for block in blocks]
            found = self.sums(weights, x, own, rows, knobs)
            scales = {
                (r, h): [
                    bind(T.cast(load(weights.scale, *own[r], axis, h * lanes, lanes=lanes), f32))
                    for axis in (0, 1)
                ]
                for r, h in places
            }
            sign = None
            if terms > 1:  # U and W in turn
                sign = bind(T.cast(T.bitwise_and(term, 1) * 2 - 1, "float32"))
            combine(found, scales, token_scales, sign, total, lanes)
        for (r, h, row), register in total.items():
            out(r, row, h * lanes, register.get())


class IntegerComplex(ComplexWay):
    """Codes become the bytes 0, 1, 2 (part plus one), which are multiplied exactly."""

    @property
    def dot(self) -> LookupDot:
        """The lookup, one table for each axis."""
        parts = (REAL, IMAGINARY)
        return LookupDot(self.name, self.codes, tuple(tuple(v + 1 for v in p) for p in parts))

    @property
    def lanes(self) -> int:
        """See `ComplexWay.lanes`."""
        return self.dot.lanes

    @property
    def activation(self) -> str:
        """See `ComplexWay.activation`."""
        return "int8"

    @property
    def cost(self) -> int:
        """See `ComplexWay.cost`."""
        return ROWS // self.lanes * self.codes.quads * 4

    @property
    def work(self) -> dict[str, float]:
        """See `ComplexWay.work`."""
        return {kind: 2 * n * (ROWS // self.lanes) for kind, n in self.dot.work.items()}

    @property
    def unpack_work(self) -> dict[str, float]:
        """See `ComplexWay.unpack_work`."""
        return {kind: n * (ROWS // self.lanes) for kind, n in self.dot.unpack_work.items()}

    def sums(
        self, weights: Weights, x: Activations, blocks: Sequence[tuple[Any, ...]],
        rows: Sequence[Any], knobs: TileKnobs,
    ) -> Sums:  # fmt: skip
        """See `ComplexWay.sums`."""
        return lookup_sums(self.dot, weights, x, blocks, rows, 0, knobs)


class FloatComplex(ComplexWay):
    """Parts become floats, which are multiplied and added."""

    @property
    def decoder(self) -> Decoder:
        """How codes become numbers."""
        return DECODERS[self.name](self.codes.fmt)

    @property
    def lanes(self) -> int:
        """See `ComplexWay.lanes`."""
        return self.decoder.lanes

    @property
    def activation(self) -> str:
        """See `ComplexWay.activation`."""
        return "float32"

    @property
    def cost(self) -> int:
        """See `ComplexWay.cost`."""
        return ROWS // self.lanes * self.codes.block * 4

    @property
    def work(self) -> dict[str, float]:
        """See `ComplexWay.work`."""
        return {"fma_f32": 4.0 * ROWS * self.codes.block}

    @property
    def unpack_work(self) -> dict[str, float]:
        """See `ComplexWay.unpack_work`."""
        return {kind: 2.0 * n * ROWS * self.codes.block for kind, n in self.decoder.work.items()}

    def sums(
        self, weights: Weights, x: Any, blocks: Sequence[tuple[Any, ...]], rows: Sequence[Any],
        knobs: TileKnobs,
    ) -> Sums:  # fmt: skip
        """See `ComplexWay.sums`."""
        layout, lanes, decoder = self.codes, self.lanes, self.decoder
        source = x.codes if self.quantised else x
        books = [decoder.prepare([float(v) for v in part]) for part in (REAL, IMAGINARY)]
        zero = splat(T.float32(0), lanes)
        grid = [
            (r, h, i, axis)
            for r in range(len(blocks)) for h in range(ROWS // lanes)
            for i in range(len(rows)) for axis in (0, 1)
        ]  # fmt: skip
        total = {key: Register("float32", lanes, zero) for key in grid}

        def block_of(b: Any, count: int, acc: dict[Any, Register]) -> None:
            values = [
                [bind(source[row, b * layout.block + c]) for c in range(count)] for row in rows
            ]
            for r, h in {(r, h): None for r, h, _, _ in acc}:
                lines = [line_of(weights.codes, blocks[r], b, h, lanes)]
                for c, word in enumerate(columns(layout, lines, lanes, [])[:count]):
                    for axis, book in enumerate(books):
                        w = decoder.value(book, word)
                        for i in range(len(rows)):
                            register = acc[r, h, i, axis]
                            register.set(register.get() + w * splat(values[i][c], lanes))

        def run(first: Any, count: int) -> None:
            acc = {key: Register("float32", lanes, zero) for key in grid}
            with loop(count) as s:
                block_of(first + s, layout.block, acc)
            for key, register in total.items():
                register.set(register.get() + acc[key].get())

        whole, rest = divmod(layout.k, layout.block)
        if whole:
            in_runs(0, whole, CHAIN // layout.block, run)
        if rest:
            block_of(whole, rest, total)
        return {key: register.get() for key, register in total.items()}


def complex_way(name: str, codes: CodeLayout, act: str) -> ComplexWay:
    """Return a way by name."""
    return (IntegerComplex if name in LOOKUPS else FloatComplex)(name, codes, act == "a8")


def complex_ways(codes: CodeLayout, act: str, hardware: Hardware) -> tuple[str, ...]:
    """Return the names of the ways that the hardware has, the fastest first."""
    out = [n for n in LOOKUPS if act == "a8" and IntegerComplex(n, codes, True).dot.fits(hardware)]
    out += [n for n, d in DECODERS.items() if d.fits(codes.fmt, hardware)]
    return tuple([n for n in out if n != Choices.name] or out)
