"""Register tiles of codebook and fp8 weights, by exact integer dots or in float32.

Two-sided formats (AFPQ) have a scale for values above zero and one for those below. Three ways to apply
them: two sums (``y = above * P + below * N``), a scale picked for each code by its sign, or a table
multiplied beforehand (`mpgemm.x86_codebook_columns`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mimo_compile.ir.formats import WeightFormat
from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    splat,
    vector_type,
)
from mimo_compile.schedules.emit.decode import (
    DECODERS,
    Choices,
    Decoder,
    above_is_high,
    columns,
    sides,
)
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout
from mimo_compile.schedules.emit.lookup import LOOKUPS, LookupDot, line_of, lookup_sums
from mimo_compile.schedules.emit.quantize import Activations
from mimo_compile.schedules.emit.tile import (
    CHAIN,
    Out,
    Piece,
    TileKnobs,
    Weights,
    ask_ahead,
    in_last,
    in_runs,
    span_of,
)
from mimo_compile.schedules.emit.unpack import tables

PICK = ".pick"
"""Ending of the names of float ways that pick a scale by sign."""
Grid = dict[tuple[int, int, int], Register]
"""Sums by row block, part of its rows, and token."""


@dataclass(frozen=True, slots=True)
class Way(ABC):
    """A way to compute tiles of a matrix of codes that stand for values."""

    name: str
    codes: CodeLayout
    quantised: bool
    """Rows of x are int8 codes with a scale each (a8)."""
    activation: ClassVar[str] = "float32"
    """What quantised rows are kept as."""

    @property
    @abstractmethod
    def lanes(self) -> int:
        """Rows in a vector."""

    @property
    @abstractmethod
    def cost(self) -> int:
        """Multiply-adds in a block of columns, for each row block and token."""

    @property
    @abstractmethod
    def work(self) -> dict[str, float]:
        """Operations of a block of columns of 16 rows for one token, by kind of `ir.counts`."""

    @property
    @abstractmethod
    def unpack_work(self) -> dict[str, float]:
        """Operations of a block of columns of 16 rows that all tokens of a tile share."""

    @property
    def scale_work(self) -> float:
        """Multiply-adds of a group of 16 rows for one token."""
        return float(ROWS * self.codes.fmt.scales_per_group)

    @abstractmethod
    def sums(
        self, weights: Weights, x: Any, blocks: Sequence[tuple[Any, ...]], tokens: Sequence[Any],
        total: Grid, knobs: TileKnobs, piece: Piece | None,
    ) -> None:  # fmt: skip
        """Emit code that adds ``weight * x`` to ``total``, in `units`."""

    def tile(
        self, weights: Weights, x: Any, blocks: Sequence[tuple[Any, ...]], tokens: Sequence[Any],
        out: Out, knobs: TileKnobs, piece: Piece | None = None,
    ) -> None:  # fmt: skip
        """Emit one tile; arguments as for `int_tile.int_tile` (x: float32 rows where not quantised).

        Pieces are of whole groups.
        """
        grid = [(r, h, m) for r in range(len(blocks)) for h in range(ROWS // self.lanes)
                for m in range(len(tokens))]  # fmt: skip
        zero = splat(T.float32(0), self.lanes)
        total = {key: Register("float32", self.lanes, zero) for key in grid}
        begin, count = span_of(piece, self.codes.k // self.codes.fmt.group_size(self.codes.k))
        knobs = knobs.reading(piece, begin, count, self.codes.group_blocks * self.codes.lines)
        self.sums(weights, x, blocks, tokens, total, knobs, piece)
        for (r, h, m), register in total.items():
            value = register.get()
            if piece is None:
                value = self.finished(x, tokens[m], value)
            out(r, m, h * self.lanes, value)

    def finished(self, x: Any, token: Any, value: Any) -> Any:
        """Return the results that sums over all columns stand for."""
        if not self.quantised:
            return value
        scale = x.scale[token]
        scale = scale if self.units == 1 else scale * T.float32(self.units)
        return value * splat(scale, self.lanes)

    @property
    def units(self) -> float:
        """What sums have to be multiplied by."""
        return 1.0

    @property
    def offset(self) -> int:
        """What operands lie above their values (see `quantize.quantize_row`)."""
        return 0

    def scales(self, weights: Weights, block: tuple[Any, ...], g: Any, half: int) -> list[Any]:
        """Load the scales of a group, one or two vectors, bound."""
        f32, count = vector_type("float32", self.lanes), self.codes.fmt.scales_per_group
        places = ((*block, g * count + side, half * self.lanes) for side in range(count))
        return [bind(T.cast(load(weights.scale, *at, lanes=self.lanes), f32)) for at in places]


def digits_of(fmt: WeightFormat) -> int:
    """Return the bytes of a codebook's values as whole numbers: halves are doubled, others rounded."""
    return 1 if all(2 * v % 1 == 0 for v in fmt.values) else 3


def sums_of(fmt: WeightFormat) -> int:
    """Return the exact sums that a codebook takes for each row and token with int8 activations."""
    return digits_of(fmt) * fmt.scales_per_group


class IntegerWay(Way):
    """Values as whole numbers: looked up as bytes, multiplied exactly.

    Those of FP3 and FP4 (doubled) are; those of NF3 and NF4 are rounded to 24 bits, three bytes.
    """

    activation: ClassVar[str] = "int8"

    @property
    def digits(self) -> int:
        """Bytes of a number."""
        return digits_of(self.codes.fmt)

    @property
    def units(self) -> float:
        """What the highest byte counts: halves are doubled to be whole, fractions fill the bytes."""
        fmt = self.codes.fmt
        if self.digits > 1:
            return max(map(abs, fmt.values)) / (255 if fmt.two_sided else 127)
        return 0.5 if any(v % 1 for v in fmt.values) else 1.0

    @property
    def offset(self) -> int:
        """What bytes lie above values, which have signs."""
        fmt = self.codes.fmt
        if fmt.two_sided:
            return 0
        return 128 if self.digits > 1 else int(-min(fmt.values) / self.units)

    @property
    def dot(self) -> LookupDot:
        """The lookup: tables of magnitudes above and below zero, or of values with an offset."""
        one = 256 ** (self.digits - 1)  # of the highest byte
        numbers = [
            [round(abs(v) / self.units * one) for v in side] for side in sides(self.codes.fmt)
        ]
        if not self.codes.fmt.two_sided:
            numbers = [[round((v / self.units + self.offset) * one) for v in self.codes.fmt.values]]
        tables = (
            tuple(number // (one >> 8 * digit) % 256 for number in side)
            for side in numbers for digit in range(self.digits)
        )  # fmt: skip
        return LookupDot(self.name, self.codes, tuple(tables), self.digits)

    @property
    def lanes(self) -> int:
        """See `Way.lanes`."""
        return self.dot.lanes

    @property
    def cost(self) -> int:
        """See `Way.cost`."""
        return ROWS // self.lanes * self.codes.quads * len(self.dot.tables)

    @property
    def work(self) -> dict[str, float]:
        """See `Way.work`."""
        return {kind: n * (ROWS // self.lanes) for kind, n in self.dot.work.items()}

    @property
    def unpack_work(self) -> dict[str, float]:
        """See `Way.unpack_work`."""
        return {kind: n * (ROWS // self.lanes) for kind, n in self.dot.unpack_work.items()}

    def sums(
        self, weights: Weights, x: Activations, blocks: Sequence[tuple[Any, ...]],
        tokens: Sequence[Any], total: Grid, knobs: TileKnobs, piece: Piece | None,
    ) -> None:  # fmt: skip
        """See `Way.sums`."""
        f32, dot = vector_type("float32", self.lanes), self.dot
        part = splat(T.float32(1 / 256), self.lanes)

        def number(r: int, h: int, m: int, side: int) -> Any:
            own = [T.cast(found[r, h, m, side * self.digits + d], f32) for d in range(self.digits)]
            total = own.pop()
            while own:
                total = own.pop() + total * part
            return total

        begin, count = span_of(piece, self.codes.groups)
        with loop(count) as s:
            g = s if piece is None else bind(begin + s)
            found = lookup_sums(dot, weights, x, blocks, tokens, g, knobs)
            scales = {(r, h): self.scales(weights, blocks[r], g, h) for r, h, _ in total}
            for (r, h, m), register in total.items():
                value = register.get() + number(r, h, m, 0) * scales[r, h][0]
                if self.codes.fmt.two_sided:
                    value = value - number(r, h, m, 1) * scales[r, h][1]
                register.set(value)


class FloatWay(Way):
    """Values in float32, then multiply-adds."""

    @property
    def decoder(self) -> Decoder:
        """How codes become numbers."""
        return DECODERS[self.name.removesuffix(PICK)](self.codes.fmt)

    @property
    def pick(self) -> bool:
        """True if weights get their scale before they are multiplied."""
        return self.name.endswith(PICK)

    @property
    def lanes(self) -> int:
        """See `Way.lanes`."""
        return self.decoder.lanes

    @property
    def terms(self) -> int:
        """Sums of a group."""
        return 2 if self.codes.fmt.two_sided and not self.pick else 1

    @property
    def cost(self) -> int:
        """See `Way.cost`."""
        return ROWS // self.lanes * self.codes.block * self.terms

    @property
    def work(self) -> dict[str, float]:
        """See `Way.work`."""
        return {"fma_f32": float(ROWS * self.codes.block * self.terms)}

    @property
    def unpack_work(self) -> dict[str, float]:
        """See `Way.unpack_work`."""
        count = ROWS * self.codes.block
        out = {kind: n * count * self.terms for kind, n in self.decoder.work.items()}
        if self.codes.dense:
            out["unpack_u8"] = 2.0 * ROWS * self.codes.unpack_ops
        if self.pick:
            out["int_op"] = out.get("int_op", 0.0) + 2.0 * count
            out["add_f32"] = out.get("add_f32", 0.0) + count
        return out

    @property
    def scale_work(self) -> float:
        """See `Way.scale_work`."""
        return 0.0 if self.pick else float(ROWS * self.terms)

    def sums(
        self, weights: Weights, x: Any, blocks: Sequence[tuple[Any, ...]], tokens: Sequence[Any],
        total: Grid, knobs: TileKnobs, piece: Piece | None,
    ) -> None:  # fmt: skip
        """See `Way.sums`."""
        layout, decoder = self.codes, self.decoder
        rows = x.codes if self.quantised else x
        values = sides(layout.fmt) if self.terms == 2 else (layout.fmt.values,)
        books = [decoder.prepare(table) for table in values]
        constants = tables(layout)

        def block_of(b: Any, acc: list[Grid], scales: dict[Any, list[Any]], count: int) -> None:
            ask_ahead(weights.codes, blocks, b * layout.lines, layout.lines, knobs)
            values = [[bind(rows[t, b * layout.block + c]) for c in range(count)] for t in tokens]
            for (r, h), own in scales.items():
                lines = [line_of(weights.codes, blocks[r], b * layout.lines + i, h, self.lanes)
                         for i in range(layout.lines)]  # fmt: skip
                words = columns(layout, lines, self.lanes, constants)
                for c, word in enumerate(words[:count]):
                    for term, book in enumerate(books):
                        w = decoder.value(book, word)
                        if self.pick:
                            w = bind(w * self._picked(word, own))
                        for m in range(len(tokens)):
                            register = acc[term][r, h, m]
                            product = w * splat(values[m][c], self.lanes)
                            register.set(register.get() + product)

        def run(g: Any, first: Any, turns: Any, rest: int = 0) -> None:
            """Add some blocks of group g, and ``rest`` columns of the next, to the totals."""
            scales = {(r, h): self.scales(weights, blocks[r], g, h) for r, h, _ in total}
            zero = splat(T.float32(0), self.lanes)
            acc = [{key: Register("float32", self.lanes, zero) for key in total} for _ in books]
            if not (isinstance(turns, int) and turns == 0):
                with loop(turns) as s:
                    b = first + s
                    block_of(b if isinstance(b, int) else bind(b), acc, scales, layout.block)
            if rest:
                block_of(first + turns, acc, scales, rest)
            for (r, h, m), register in total.items():
                for part, scale in zip(acc, scales[r, h], strict=False):
                    value = part[r, h, m].get()
                    register.set(register.get() + (value if self.pick else value * scale))

        size, most = layout.fmt.group_size(layout.k), CHAIN // layout.block
        whole, rest = divmod(layout.k, size)

        def group(g: Any, count: int) -> None:
            turns, behind = divmod(count, layout.block)
            if turns <= most:
                run(g, g * layout.group_blocks, turns, behind)
                return
            in_runs(g * layout.group_blocks, turns, most, lambda first, n: run(g, first, n))
            if behind:
                run(g, g * layout.group_blocks + turns, 0, behind)

        if whole:
            begin, count = span_of(piece, whole)
            with loop(count) as s:
                group(s if piece is None else bind(begin + s), size)
        if rest:
            with in_last(piece):
                group(whole, rest)

    def _picked(self, word: Any, scales: list[Any]) -> Any:
        above, below = scales if above_is_high(self.codes.fmt) else scales[::-1]
        return T.Select(self.decoder.top_bit(word), above, below)


def way(name: str, codes: CodeLayout, act: str) -> Way:
    """Return a way by name."""
    return (IntegerWay if name in LOOKUPS else FloatWay)(name, codes, act == "a8")


def ways(codes: CodeLayout, act: str, hardware: Hardware) -> tuple[str, ...]:
    """Return the names of the ways that the hardware has for a layout, the fastest first."""
    fmt = codes.fmt
    out = []
    if act == "a8" and fmt.family == "codebook":
        out += [n for n in LOOKUPS if IntegerWay(n, codes, True).dot.fits(hardware)]
    for name, decoder in DECODERS.items():
        if decoder.fits(fmt, hardware):
            out += [name, name + PICK] if fmt.two_sided else [name]
    fast = [n for n in out if not n.startswith(Choices.name)]
    return tuple(fast or out)
