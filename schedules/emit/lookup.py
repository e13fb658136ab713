"""Codes that stand for small whole numbers by a table: bytes by shuffles, then exact integer dots.

A weight of several sums (the two sides of AFPQ, the two axes of complex weights) has a table for each.
Tables hold unsigned bytes; where values have signs they are raised by an offset, which the sum of the
activations takes away again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
)
from mimo_compile.schedules.emit.dot import DOTS, MAX_ACTIVATION, Dot
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout
from mimo_compile.schedules.emit.quantize import Activations
from mimo_compile.schedules.emit.tile import TileKnobs, Weights, ask_ahead
from mimo_compile.schedules.emit.unpack import tables, unpack


@dataclass(frozen=True, slots=True)
class Shuffle:
    """An instruction that replaces each byte by one of a table."""

    intrinsic: str
    needs: frozenset[str]
    index_bits: int
    """Low bits of a byte that choose (0: its other bits must be clear, and 4 choose)."""


_V4 = frozenset({"avx512f", "avx512bw", "avx512vl"})
_SHUFFLES = {
    "vpermb": Shuffle("llvm.x86.avx512.permvar.qi.512", _V4 | {"avx512vbmi"}, 6),
    "vpshufb512": Shuffle("llvm.x86.avx512.pshuf.b.512", _V4, 0),
    "vpshufb256": Shuffle("llvm.x86.avx2.pshuf.b", frozenset({"avx2"}), 0),
    "pshufb128": Shuffle("llvm.x86.ssse3.pshuf.b.128", frozenset({"ssse3"}), 0),
}
LOOKUPS: dict[str, tuple[str, str]] = {
    "vpermb.vnni512": ("vpermb", "vnni512"),
    "vpshufb.vnni512": ("vpshufb512", "vnni512"),
    "vpshufb.madd512": ("vpshufb512", "madd512"),
    "vpshufb.vnni256": ("vpshufb256", "vnni256"),
    "vpshufb.madd256": ("vpshufb256", "madd256"),
    "pshufb.madd128": ("pshufb128", "madd128"),
}
"""Ways to look up and multiply by name, the fastest first."""

Sums = dict[tuple[int, int, int, int], Any]
"""By row block, part of its rows, token and table."""


@dataclass(frozen=True, slots=True)
class LookupDot:
    """One way of `LOOKUPS` for a layout and its tables."""

    way: str
    codes: CodeLayout
    tables: tuple[tuple[int, ...], ...]
    """For each sum, the byte that each code stands for."""
    digits: int = 1
    """Bytes of a number, each with a table, the highest first; activations' sums count in that one."""

    @property
    def shuffle(self) -> Shuffle:
        """How bytes are looked up."""
        return _SHUFFLES[LOOKUPS[self.way][0]]

    @property
    def dot(self) -> Dot:
        """How they are multiplied."""
        return DOTS[LOOKUPS[self.way][1]](self.codes)

    @property
    def lanes(self) -> int:
        """Rows in a vector."""
        return self.dot.lanes

    def fits(self, hardware: Hardware) -> bool:
        """Say whether the hardware has it, and sums of products stay exact."""
        largest = max(map(max, self.tables))
        if not hardware.features >= self.shuffle.needs | self.dot.needs:
            return False
        pairs = 2 * largest * MAX_ACTIVATION * self.codes.quads  # what 16 bits may have to hold
        narrow = LOOKUPS[self.way][1].startswith("madd")
        whole = largest * MAX_ACTIVATION * self.codes.k_padded
        return whole < 2**31 and (not narrow or pairs < 2**15)

    def prepare(self) -> list[Any]:
        """Return the tables as vectors, each bound here; unpacking's own constants follow."""
        return [_bytes(t, self.lanes) for t in self.tables] + tables(self.codes)

    def operands(self, lines: list[Any], constants: list[Any]) -> list[list[Any]]:
        """Return, for each table, a block's operands, each bound."""
        index, shuffle = self._indices(lines, constants[len(self.tables) :]), self.shuffle
        kind = vector_type("int8", 4 * self.lanes)

        def looked_up(table: Any, at: Any) -> Any:
            # vpermb takes the table first as well
            at = T.reinterpret(kind, at)
            found = T.call_llvm_pure_intrin(kind, shuffle.intrinsic, table, at)
            return bind(T.reinterpret(vector_type("int32", self.lanes), found))

        return [[looked_up(c, at) for at in index] for c in constants[: len(self.tables)]]

    def _indices(self, lines: list[Any], constants: list[Any]) -> list[Any]:
        bits = self.codes.lane_bits
        if self.codes.dense or not self.clear:
            return unpack(self.codes, lines, self.lanes, constants)
        # what a shift brings in from the next code only chooses among repetitions of the table
        shifts = [splat(T.int32(p * bits), self.lanes) for p in range(self.codes.quads)]
        return [lines[0] if p == 0 else T.shift_right(lines[0], s) for p, s in enumerate(shifts)]

    @property
    def clear(self) -> bool:
        """True if bits above a code may be anything."""
        return bool(self.shuffle.index_bits)

    @property
    def work(self) -> dict[str, float]:
        """Operations of one block of ``lanes`` rows for one token and all tables."""
        return {kind: len(self.tables) * n for kind, n in self.dot.work.items()}

    @property
    def unpack_work(self) -> dict[str, float]:
        """Operations that turn one block of ``lanes`` rows into operands, shared by all tokens."""
        looked_up = 4.0 * self.lanes * self.codes.quads * len(self.tables)
        out = {"shuffle_u8": looked_up}
        if self.codes.dense or not self.clear:
            out |= self.dot.unpack_work
        else:
            out["int_op"] = float(self.lanes * (self.codes.quads - 1))
        return out


def lookup_sums(
    dot: LookupDot,
    weights: Weights,
    x: Activations,
    blocks: Sequence[tuple[Any, ...]],
    tokens: Sequence[Any],
    g: Any,
    knobs: TileKnobs,
) -> Sums:
    """Emit the exact sums of group ``g``, those of highest digits begun at ``x.sums``; return them, int32.

    Args:
        dot: Layout and tables.
        weights: Packed codes.
        x: Quantised rows.
        blocks: For each row block its index into the weights' leading axes.
        tokens: For each token its row in ``x``.
        g: The group.
        knobs: See there.
    """
    layout, lanes, terms = dot.codes, dot.lanes, range(len(dot.tables))
    halves = range(ROWS // lanes)
    constants = dot.prepare()
    acc: dict[tuple[int, int, int, int], Register] = {}
    for m, token in enumerate(tokens):
        start, zero = splat(load(x.sums, token, g), lanes), splat(T.int32(0), lanes)
        for r, h, t in ((r, h, t) for r in range(len(blocks)) for h in halves for t in terms):
            acc[r, h, m, t] = Register("int32", lanes, zero if t % dot.digits else start)
    unroll = knobs.unroll if layout.group_blocks % knobs.unroll == 0 else 1

    def block_of(b: Any) -> None:
        ask_ahead(weights.codes, blocks, b * layout.lines, layout.lines, knobs)
        # behind the branch of a prefetch, or loads and broadcasts become two instructions
        values = [dot.dot.columns(x.codes, token, b * layout.block) for token in tokens]
        for r, block in enumerate(blocks):
            for h in halves:
                lines = [line_of(weights.codes, block, b * layout.lines + i, h, lanes)
                         for i in range(layout.lines)]  # fmt: skip
                for t, operands in zip(terms, dot.operands(lines, constants), strict=True):
                    for m in range(len(tokens)):
                        register = acc[r, h, m, t]
                        register.set(dot.dot.block(register.get(), operands, values[m]))

    first = g * layout.group_blocks
    with loop(layout.group_blocks // unroll) as s:
        for u in range(unroll):
            b = first + s * unroll + u
            block_of(b if isinstance(b, int) else bind(b))
    return {key: register.get() for key, register in acc.items()}


def line_of(codes: Any, block: tuple[Any, ...], line: Any, half: int, lanes: int) -> Any:
    """Load a line of packed codes, or the part of it that ``lanes`` rows have, as bound words."""
    raw = load(codes, *block, line, half * 4 * lanes, lanes=4 * lanes)
    return bind(T.reinterpret(vector_type("int32", lanes), raw))


def _bytes(values: Sequence[int], lanes: int) -> Any:
    """Return a table, repeated over a vector of ``4 * lanes`` bytes, bound."""
    whole = [values[i % len(values)] for i in range(16)]
    words = [
        int.from_bytes(bytes(whole[i : i + 4]), "little", signed=True) for i in range(0, 16, 4)
    ]
    register = Register("int32", lanes)
    for lane in range(lanes):
        store(register.buffer, T.int32(words[lane % 4]), lane)
    return bind(T.reinterpret(vector_type("int8", 4 * lanes), register.get()))
