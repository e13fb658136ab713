"""How kernels find keys and values in pages of a pool (`ir.ops.pages`): by block tables.

A page is a run of whole blocks of 16 slots, so each part of a step lies in one page: its place is looked up,
and then keys and values are read as those of a cache of its own are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.schedules.attention.reach import Reach, Tiling, fixed
from mimo_compile.schedules.emit.build import T
from mimo_compile.schedules.emit.vector import LANES


def slot_of(pages: Any, sequence: Any, page: int, position: Any) -> Any:
    """Return the slot of a position of a sequence, given the tables."""
    number = fixed(pages[sequence, T.truncdiv(position, page)])
    return fixed(number * page + T.truncmod(position, page))


class PagedReach(Reach):
    """All positions of a sequence, whose blocks lie where its table says."""

    def __init__(self, s: Tiling, pos: Any, first: Any, pages: Any, sequence: Any) -> None:
        """``pages`` are the tables ``[B, width]``, ``sequence`` says whose it is."""
        super().__init__(s, pos, first)
        self.pages, self.sequence = pages, sequence
        self.final = fixed(T.max(self.total - 1, T.int32(0)))

    def block(self, step: Any, u: Any) -> Any:
        """See `Reach.block`; behind the last one that is seen it is that one: only its page is known."""
        run = int(self.sizes.p["page"]) // LANES
        at = fixed(T.min(step * self.sizes.blocks + u, self.final))
        number = self.pages[self.sequence, T.truncdiv(at, run)]
        return fixed(number * run + T.truncmod(at, run))

    def further(self, step: Any, u: Any) -> Any:
        """See `Reach.further`: the table says where that is."""
        return fixed(self.block(step + self.sizes.ahead, u) - self.block(step, u))


def visiting(pages: Any) -> Callable[..., PagedReach] | None:
    """Return what makes a tile's way over pages, as `phases.emit` takes it; None: there are no tables."""
    if pages is None:
        return None

    def visit(s: Tiling, turn: Any, first: Any, head: Any) -> PagedReach:
        whose = 0 if turn.sequence is None else turn.sequence
        return PagedReach(s, turn.pos, first, pages, whose)

    return visit
