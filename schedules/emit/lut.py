"""Table lookup: sums of neighbouring activations, looked up by indices made of weights, exactly.

A table has the 16 sums that `nibbles` tells of a run of columns. Sums of four int8 numbers have more than
8 bits, but activations that quantise well are small but for a few, so tables hold bytes, and what such a
byte is too small for goes into a second table. The few runs of columns that need it are looked up twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    load,
    loop,
    splat,
    store,
    vector_type,
    when,
    workspace,
)
from mimo_compile.schedules.emit.int_tile import int_tile
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout
from mimo_compile.schedules.emit.nibbles import NibbleLayout
from mimo_compile.schedules.emit.quantize import Activations, quantize_row
from mimo_compile.schedules.emit.tile import (
    Out,
    Piece,
    Sums,
    TileKnobs,
    Weights,
    ask_ahead,
    span_of,
)
from mimo_compile.schedules.emit.unpack import constant_words

_LOSS = 0.15
"""Padding of groups above which a layout is refused."""
_PAD = 16
"""Columns behind a row that a run's load may touch."""

Registers = dict[tuple[int, int, int], Register]
"""By row block, part of it, and token."""
Lines = Callable[..., Any]
"""``lines(b, r, i)``: line i of block b in row block r, 64 bytes; ``lines(b, r, i, at, lanes)``: some."""


def groups_fill_blocks(codes: CodeLayout) -> bool:
    """Say whether blocks of columns hold groups without much padding; a row that is one group may have it."""
    size = codes.fmt.group_size(codes.k)
    return codes.groups == 1 or codes.group_blocks * codes.block <= size * (1 + _LOSS)


@dataclass(frozen=True, slots=True)
class Tables:
    """Tables of rows in the kernel's workspace."""

    low: Any
    """``[M, 16 runs]`` bytes: sums as far as a byte goes."""
    rest: Any
    """Likewise: what is missing there, over `Lookup.rest_weight`; defined in the parts of `places`."""
    places: Any
    """``[M, G parts]`` int32: the parts of each group that `rest` counts in, from its own first place on."""
    counts: Any
    """``[M, G]`` int32: how many these are."""
    starts: Any
    """``[M, G]`` int32: what the sums of a group begin with."""


@dataclass(frozen=True, slots=True)
class Lookup(ABC):
    """A way to look up and add; ``codes`` is the layout of the matrix."""

    codes: NibbleLayout
    name: ClassVar[str]
    lanes: ClassVar[int]
    """Rows in a vector of sums."""
    table_lanes: ClassVar[int]
    """Entries that are made at once."""
    needs: ClassVar[frozenset[str]]
    apart: ClassVar[bool]
    """Layouts that it reads."""

    @classmethod
    def fits(cls, codes: NibbleLayout, hardware: Hardware) -> bool:
        """Say whether the hardware has it, for this layout."""
        return cls.needs <= hardware.features and codes.apart == cls.apart

    @property
    def signed(self) -> bool:
        """True if tables hold int8 sums whose signs are stored apart, not unsigned bytes."""
        return self.codes.bias > 0

    @property
    def rest_weight(self) -> int:
        """What entries of the second table count."""
        return 2 if self.signed else 1

    @property
    @abstractmethod
    def part(self) -> int:
        """Runs of columns that look up in the second table together; they divide a group."""

    @property
    def parts(self) -> int:
        """Parts of a group."""
        return self.codes.group_blocks * self.codes.block // self.codes.run // self.part

    @property
    @abstractmethod
    def unit(self) -> int:
        """Parts that no piece of a group divides."""

    @property
    def units(self) -> int:
        """Units of a group."""
        return self.parts // self.unit

    @property
    def runs(self) -> int:
        """Runs of columns in a row."""
        return self.codes.k_padded // self.codes.run

    @property
    def adding(self) -> dict[str, float]:
        """Operations that add up one looked-up byte, by kind of `ir.counts`."""
        return {"dot_i8": 1.0}

    def work(self, m: float, passes: float) -> dict[str, float]:
        """Return the operations that look all sums of a matrix up: spans that need one table.

        Args:
            m: Rows of x.
            passes: Times that the packed indices are read.
        """
        codes = self.codes
        blocks = float(codes.row_blocks * codes.blocks)
        lookups = blocks * 128 * codes.index_lines
        scaled = float(codes.row_blocks * ROWS * codes.groups) * m
        ops = {
            "shuffle_u8": lookups * m,
            "unpack_u8": 32.0 * blocks * codes.unpack_ops * passes,
            "fma_f32": scaled * (2 if codes.fmt.has_zero else 1),
        }
        return ops | {kind: count * lookups * m for kind, count in self.adding.items()}

    def making(self, m: float) -> dict[str, float]:
        """Return the operations that make the tables of so many rows."""
        entries = 16.0 * self.runs * m
        return {"dot_i8": 8 * entries, "int_op": 3.0 * m * self.codes.k + 4 * entries}

    @abstractmethod
    def products(self, acc: Any, codes: Any, x: Any) -> Any:
        """Return 32-bit sums of four products of unsigned and signed bytes, for `table_lanes`."""

    @abstractmethod
    def sums(
        self,
        lines: Lines,
        table: Any,
        tokens: Sequence[Any],
        rows: int,
        g: Any,
        acc: Sums,
        ask: Callable[[Any], None],
        piece: Piece | None,
    ) -> None:
        """Emit the lookups of a group, or of a piece of it, and add them to ``acc``.

        Args:
            lines: Loads packed lines.
            table: ``[M, 16 runs]`` to look up in.
            tokens: Rows of ``table``.
            rows: Row blocks.
            g: The group.
            acc: By row block, part of it, and token: registers to share the sum.
            ask: Prefetches what lies ahead of a block.
            piece: Of the group's `units`.
        """

    @abstractmethod
    def part_sums(
        self, lines: Lines, table: Any, token: Any, rows: int, part: Any, acc: Registers
    ) -> None:
        """Emit the lookups of one part in the second table; see `sums`. Token 0 of ``acc`` is ``token``."""

    def alloc(self, m: int) -> Tables:
        """Allocate the tables of ``m`` rows."""
        shape, dtype = (m, 16 * self.runs), "int8" if self.signed else "uint8"
        return Tables(
            workspace(shape, dtype),
            workspace(shape, dtype),
            workspace((m, self.codes.groups * self.parts), "int32"),
            workspace((m, self.codes.groups), "int32"),
            workspace((m, self.codes.groups), "int32"),
        )

    def bytes(self, m: int) -> int:
        """Return the bytes of `alloc`."""
        return m * (32 * self.runs + 4 * self.codes.groups * (self.parts + 2))

    def build(self, x: Activations, out: Tables, m: Any) -> None:
        """Fill the tables of row ``m`` from its quantised activations."""
        codes, lanes = self.codes, self.table_lanes
        digits = [constant_words(codes.digits[i : i + lanes]) for i in range(0, 16, lanes)]
        zero = splat(T.int32(0), lanes)
        with loop(codes.groups) as g:
            bases, count = Register("int32", lanes, zero), Register("int32", 1, T.int32(0))
            with loop(self.parts) as p:
                part = bind(g * self.parts + p)
                top = Register("int32", lanes, zero)
                with loop(self.part) as i:
                    run = bind(part * self.part + i)
                    base, sums = self._sums(x, m, run, digits)
                    bases.set(bases.get() + base)
                    for at, value in enumerate(sums):
                        above, below = self._excess(value)
                        top.set(T.max(top.get(), T.max(above, below) if self.signed else above))
                        low = T.min(value, splat(T.int32(127 if self.signed else 255), lanes))
                        if self.signed:
                            low = T.max(low, splat(T.int32(-127), lanes))
                        self._store(out.low, low, m, run, at)
                most = T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", top.get())
                with when(bind(most) > 0):
                    store(out.places, part, m, g * self.parts + count.get())
                    count.set(count.get() + 1)
                    with loop(self.part) as i:
                        run = bind(part * self.part + i)
                        _, sums = self._sums(x, m, run, digits)
                        for at, value in enumerate(sums):
                            self._store_both(out, value, m, run, at)
            store(out.counts, count.get(), m, g)
            start = T.int32(0) if codes.late_zero or self.signed else load(x.sums, m, g)
            if not self.signed:
                start = start - bases.lane(0) * T.int32((1 << codes.planes) - 1)
            store(out.starts, start, m, g)

    def _sums(self, x: Activations, m: Any, run: Any, digits: list[Any]) -> tuple[Any, list[Any]]:
        """Return what unsigned sums are too large by, and the sums, each bound."""
        codes, lanes, count = self.codes, self.table_lanes, 4 * self.table_lanes
        i32, i8 = vector_type("int32", lanes), vector_type("int8", count)
        four = load(x.codes, m, run * codes.run, lanes=4)
        words = bind(splat(T.reinterpret("int32", four), lanes))
        negative = splat(T.int8(0), count) - T.reinterpret(i8, words)
        by = codes.bias
        if not self.signed:  # of a run's own columns, those below zero make its least sum
            negative = T.max(negative, splat(T.int8(0), count))
            by = int(codes.digits.max())
        negative = T.reinterpret(i32, negative)
        if codes.run == 2:
            negative = T.bitwise_and(negative, splat(T.int32(0xFFFF), lanes))
        zero, ones = splat(T.int32(0), lanes), splat(T.int32(by * 0x01010101), lanes)
        base = bind(self.products(zero, ones, negative))
        return base, [bind(self.products(base, d, words)) for d in digits]

    def _excess(self, value: Any) -> tuple[Any, Any]:
        """Return how far sums lie above and below what a byte holds, at least 0."""
        lanes = self.table_lanes
        zero = splat(T.int32(0), lanes)
        if not self.signed:
            return bind(T.max(value - splat(T.int32(255), lanes), zero)), zero
        limit = splat(T.int32(127), lanes)
        return bind(T.max(value - limit, zero)), bind(T.max(zero - limit - value, zero))

    def _store_both(self, out: Tables, value: Any, m: Any, run: Any, part: int) -> None:
        above, below = self._excess(value)
        if not self.signed:
            self._store(out.rest, above, m, run, part)
            return
        one = splat(T.int32(1), self.table_lanes)
        rest = bind(T.shift_right(above + one, one) - T.shift_right(below + one, one))
        self._store(out.rest, rest, m, run, part)
        self._store(out.low, value - rest - rest, m, run, part)

    def _store(self, buffer: Any, value: Any, m: Any, run: Any, part: int) -> None:
        lanes = self.table_lanes
        narrow = T.cast(value, vector_type(buffer.dtype, lanes))
        store(buffer, narrow, m, run * 16 + part * lanes, lanes=lanes)


@dataclass(frozen=True, slots=True)
class TableRows:
    """Quantised rows of x and their tables."""

    lookup: Lookup
    rows: Activations
    tables: Tables

    @staticmethod
    def bytes(lookup: Lookup, m: int) -> int:
        """Return the scratch bytes of `made`."""
        codes = lookup.codes
        return m * (codes.k_padded + _PAD + 4 * codes.groups + 4) + lookup.bytes(m)

    @staticmethod
    def made(lookup: Lookup, x: Any, m: int, *, parallel: bool, rows: Any = None) -> TableRows:
        """Emit the codes and tables of x ``[m, K]`` float32; each row has one scale.

        ``rows``: how many rows there are of the m that have room; None: all.
        """
        codes = lookup.codes
        columns = codes.k_padded + _PAD
        out = Activations(
            workspace((m, columns), "int8"),
            workspace((m, codes.groups), "int32"),
            workspace((m,), "float32"),
            columns=columns,
        )
        tables = lookup.alloc(m)
        with loop(m if rows is None else rows, parallel=parallel) as row:
            quantize_row(codes, x, (row,), out, row)
            lookup.build(out, tables, row)
        return TableRows(lookup, out, tables)

    def tile(
        self,
        weights: Weights,
        blocks: Sequence[tuple[Any, ...]],
        tokens: Sequence[Any],
        out: Out,
        knobs: TileKnobs,
        piece: Piece | None = None,
    ) -> None:
        """Emit one tile; arguments as for `int_tile`."""

        def sums(g: Any, knobs: TileKnobs, piece: Piece | None) -> dict[tuple[int, int, int], Any]:
            return lut_sums(self.lookup, self.tables, weights, blocks, tokens, g, knobs, piece)

        int_tile(self.lookup, weights, self.rows, blocks, tokens, out, knobs, sums, piece)


def lut_sums(
    lookup: Lookup,
    tables: Tables,
    weights: Weights,
    blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any],
    g: Any,
    knobs: TileKnobs,
    piece: Piece | None = None,
) -> dict[tuple[int, int, int], Any]:
    """Emit the sums of one group (less a fixed zero point) and return them, int32; see `int_tile`."""
    codes, lanes = lookup.codes, lookup.lanes
    begin, length = span_of(piece, lookup.units)
    each = lookup.codes.group_blocks // lookup.units * codes.lines
    knobs = knobs.reading(piece, begin, length, each)

    def start(m: int) -> Any:
        value = load(tables.starts, tokens[m], g)
        return splat(value if piece is None else piece.once(value, "int32"), lanes)

    grid = [
        (r, h, m)
        for r in range(len(blocks)) for h in range(ROWS // lanes) for m in range(len(tokens))
    ]  # fmt: skip
    zero = splat(T.int32(0), lanes)
    # additions to one register wait for each other: long groups of few rows get several
    chains = max(1, 4 // len(grid)) if codes.group_blocks > 4 and not lookup.apart else 1
    acc = {
        v: [Register("int32", lanes, zero if c else start(v[2])) for c in range(chains)]
        for v in grid
    }

    def lines(b: Any, r: int, i: int, at: int = 0, lanes: int = 64) -> Any:
        return load(weights.codes, *blocks[r], b * codes.lines + i, at, lanes=lanes)

    def ask(b: Any) -> None:
        ask_ahead(weights.codes, blocks, b * codes.lines, codes.lines, knobs)

    lookup.sums(lines, tables.low, tokens, len(blocks), g, acc, ask, piece)
    for m, token in enumerate(tokens):
        count = bind(load(tables.counts, token, g))

        def again(i: Any, turn: int, m: int = m, token: Any = token) -> None:
            mine = {(r, h, 0): a[turn] for (r, h, t), a in acc.items() if t == m}
            part = bind(load(tables.places, token, g * lookup.parts + i))

            def look() -> None:
                lookup.part_sums(lines, tables.rest, token, len(blocks), part, mine)

            if piece is None:
                look()
                return
            unit = bind(T.floordiv(part - g * lookup.parts, lookup.unit) - begin)
            with when(T.And(unit >= 0, unit < length)):
                look()

        with loop(T.floordiv(count, chains)) as i:
            for turn in range(chains):
                again(i * chains + turn, turn)
        if chains > 1:
            with loop(T.floormod(count, chains)) as i:
                again(count - 1 - i, 0)
    out = {}
    for v, (total, *others) in acc.items():
        for register in others:
            total.set(total.get() + register.get())
        out[v] = total.get()
    return out
