"""How kernels find keys, values and what describes them in pages of a pool (`ir.ops.pages`): by block tables.

A page is a run of whole blocks of 16 slots, so each part of a step lies in one page: its place is looked up,
and then keys and values are read as those of a cache of its own are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mimo_compile.ir.ops.pages import TABLE, rows_in_page
from mimo_compile.schedules.attention.reach import Reach, Tiling, fixed
from mimo_compile.schedules.emit.build import T
from mimo_compile.schedules.emit.vector import LANES


class Table:
    """The block table of one sequence: where in the pool lies what it holds, as run-time expressions."""

    def __init__(self, pages: Any, sequence: Any | None, page: int) -> None:
        """``pages`` are the tables ``[B, width]``, ``sequence`` says whose it is (None: there is one)."""
        self.pages, self.page = pages, page
        self.sequence = 0 if sequence is None else sequence

    def row(self, row: Any, span: int) -> tuple[Any, Any]:
        """Return the page of a row that stands for so many positions, and its place among the page's rows."""
        each = rows_in_page(self.page, span)
        if each > 1:
            at, place = T.truncdiv(row, each), fixed(T.truncmod(row, each))
        else:
            runs = span // self.page
            at, place = (row + 1) * runs - 1, T.int32(0)
        return fixed(self.pages[self.sequence, at]), place

    def slot(self, position: Any) -> Any:
        """Return the slot of a position."""
        return self.flat(position, 1)

    def flat(self, row: Any, span: int) -> Any:
        """Return the number of a row among all of the pool."""
        number, place = self.row(row, span)
        return fixed(number * rows_in_page(self.page, span) + place)

    def block(self, block: Any) -> Any:
        """Return the pool's block of 16 slots that a block of the sequence's positions lies in."""
        return self.flat(block, LANES)


def table_of(
    p: Mapping[str, Any], buffers: Mapping[str, Any], sequence: Any | None
) -> Table | None:
    """Return the table of a sequence; None: a kernel with these parameters and buffers has no pages."""
    return Table(buffers[TABLE], sequence, int(p["page"])) if TABLE in buffers else None


class PagedReach(Reach):
    """All positions of a sequence, whose blocks lie where its table says."""

    def __init__(self, s: Tiling, pos: Any, first: Any, pages: Any, sequence: Any) -> None:
        """``pages`` are the tables ``[B, width]``, ``sequence`` says whose it is."""
        super().__init__(s, pos, first)
        self.table = Table(pages, sequence, int(s.p["page"]))
        self.final = fixed(T.max(self.total - 1, T.int32(0)))

    def block(self, step: Any, u: Any) -> Any:
        """See `Reach.block`; behind the last one that is seen it is that one: only its page is known."""
        return self.table.block(fixed(T.min(step * self.sizes.blocks + u, self.final)))

    def further(self, step: Any, u: Any) -> Any:
        """See `Reach.further`: the table says where that is."""
        return fixed(self.block(step + self.sizes.ahead, u) - self.block(step, u))


def visiting(pages: Any) -> Callable[..., PagedReach] | None:
    """Return what makes a tile's way over pages, as `phases.emit` takes it; None: there are no tables."""
    if pages is None:
        return None

    def visit(s: Tiling, turn: Any, first: Any, head: Any) -> PagedReach:
        return PagedReach(s, turn.pos, first, pages, turn.sequence)

    return visit
