"""Which groups of codes, and which rows of the tail, a tile of queries sees of a cache in groups.

Steps are groups of 64 slots: first those of codes that some query of the tile sees, then those of the tail
from the first query's group on. A query sees its own group in the tail, and all groups before as codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mimo_compile.ir.kv_groups import GroupedFormat, tail_of
from mimo_compile.schedules.attention.group_layout import BLOCKS
from mimo_compile.schedules.attention.pages import Table
from mimo_compile.schedules.attention.reach import Tiling, fixed
from mimo_compile.schedules.emit.build import T, bind
from mimo_compile.schedules.emit.vector import LANES, splat

GROUP = BLOCKS * LANES


class GroupReach:
    """The steps of a tile of queries from token ``first`` on, as run-time expressions."""

    def __init__(
        self, s: Tiling, fmt: GroupedFormat, pos: Any, first: Any, table: Table | None = None
    ) -> None:
        """``table``: of pages that codes and scales lie in; None: they are the sequence's own."""
        self.sizes, self.table = s, table
        self.start, self.valid = fixed(pos[0]), fixed(pos[1])
        self.last = fixed(self.start + self.valid - 1)
        self.low_query = fixed(self.start + first)
        high = fixed(T.min(self.low_query + (s.tokens - 1), self.last))
        some = first < self.valid
        self.groups = fixed(T.if_then_else(some, high // GROUP, T.int32(0)))
        """Steps over codes, which come first."""
        self.own = fixed(self.low_query // GROUP)
        """The first query's group."""
        recent = T.if_then_else(some, high // GROUP - self.own + 1, T.int32(0))
        self.steps = fixed(self.groups + recent)
        self.old: Any = Old(self)
        self.new: Any = Recent(self, tail_of(s.p, fmt) // GROUP)

    def held(self, step: Any) -> Any:
        """Return the group of codes of a step as it lies; behind the last one that is seen it is that one."""
        if self.table is None:
            return step
        return self.table.flat(fixed(T.min(step, T.max(self.groups - 1, T.int32(0)))), GROUP)

    def further(self, step: Any) -> Any:
        """Return how many groups behind that of a step the one of ``ahead`` steps later lies."""
        if self.table is None:
            return self.sizes.ahead
        return fixed(self.held(step + self.sizes.ahead) - self.held(step))

    def head_of_tail(self, head: Any) -> Any:
        """Return the head of a sequence's own tail for that of the codes."""
        if self.table is None:
            return head
        return fixed(self.table.sequence * int(self.sizes.p["kv"]) + head)


class Old:
    """Steps over codes, made real in scratch memory that holds one group: step i is group i."""

    def __init__(self, reach: GroupReach) -> None:
        self.all, self.start = reach, reach.start

    def block(self, step: Any, u: Any) -> Any:
        """Return the block of scratch memory."""
        return u

    def live(self, step: Any, u: Any) -> Any:
        """Groups of codes are whole."""
        return LANES

    def kept(self, step: Any, u: Any) -> None:
        """All slots count."""
        return

    def clean(self, step: Any) -> Any:
        """Say whether the step lies before the own group of every query."""
        return step < self.all.own

    def positions(self, step: Any, u: Any) -> Any:
        """Return the positions of part ``u``, 16 lanes."""
        return bind(T.ramp(step * GROUP + u * LANES, 1, LANES))

    def limits(self, query: Any) -> Any:
        """Return the first position that a query does not see as codes."""
        return bind(splat(query - query % GROUP))

    @staticmethod
    def sees(positions: Any, limits: Any) -> Any:
        """Say in 16 lanes whether a query sees `positions`."""
        return positions < limits


class Recent:
    """Steps over the tail, a ring of whole groups: the first is the own group of the first query."""

    def __init__(self, reach: GroupReach, ring: int) -> None:
        self.all, self.start, self.ring = reach, reach.start, ring

    def _group(self, step: Any) -> Any:
        return self.all.own + (step - self.all.groups)

    def block(self, step: Any, u: Any) -> Any:
        """Return the tail's block of part ``u``."""
        return fixed(self._group(step) % self.ring * BLOCKS + u)

    def live(self, step: Any, u: Any) -> Any:
        """Return how many slots of part ``u`` were written."""
        left = self.all.last + 1 - (self._group(step) * GROUP + u * LANES)
        return fixed(T.min(T.max(left, T.int32(0)), T.int32(LANES)))

    def kept(self, step: Any, u: Any) -> None:
        """All written slots count."""
        return

    def clean(self, step: Any) -> None:
        """Every step is masked: it is the own group of some query."""
        return

    def positions(self, step: Any, u: Any) -> Any:
        """Return the positions of part ``u``, 16 lanes."""
        return bind(T.ramp(self._group(step) * GROUP + u * LANES, 1, LANES))

    def limits(self, query: Any) -> tuple[Any, Any]:
        """Return the first and the last position that a query sees in the tail."""
        return bind(splat(query - query % GROUP)), bind(splat(query))

    @staticmethod
    def sees(positions: Any, limits: tuple[Any, Any]) -> Any:
        """Say in 16 lanes whether a query sees `positions`."""
        low, high = limits
        return T.And(positions >= low, positions <= high)


def group_steps(s: Tiling, start: int, first: Any) -> tuple[Any, Any, Any]:
    """Return steps over codes, steps over the tail, and rows of the tail that are read.

    Args:
        s: Sizes; all of its t queries count.
        start: Position of the first query.
        first: First tokens of tiles, an array; so are the results.
    """
    last = start + int(s.p["t"]) - 1
    high = np.minimum(start + first + s.tokens - 1, last)
    own = (start + first) // GROUP
    recent = high // GROUP - own + 1
    return high // GROUP, recent, np.minimum((own + recent) * GROUP, last + 1) - own * GROUP
