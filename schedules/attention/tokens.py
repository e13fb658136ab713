"""The single keys that a query sees through its list, for caches that keep each key's numbers together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mimo_compile.schedules.attention.lists import NEVER, ListTiling, Row
from mimo_compile.schedules.attention.phases import Turn
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.emit.build import T, bind, load, store, workspace
from mimo_compile.schedules.emit.vector import LANES, splat


class Tokens(Row):
    """Listed keys in ascending order, then those of the window; 16 of them, wherever they lie, are a part.

    Answers as `reach.Reach` does. With a window a tile has one token, so that no two queries see different
    keys of it.
    """

    touches = 1

    def __init__(
        self, s: ListTiling, turn: Turn, first: Any, group: Any, lists: Mapping[str, Any]
    ) -> None:
        super().__init__(s, turn, first, group, lists)
        p, window = s.p, int(s.p["window"])
        assert not window or s.tokens == 1
        end = fixed(T.max(self.high_query, T.int32(-1)) + 1)
        if window:
            end = fixed(T.max(end - window, T.int32(0)))
        self.end, block = end, int(p["block"])
        own = fixed(T.truncdiv(end, block))
        whole = fixed(self.before(own))
        listed = whole * block
        if block > 1:
            place = fixed(T.min(whole, T.int32(p["kmax"] - 1)))
            partly = T.And(whole < self.count, self.id(place) == own)
            listed = listed + T.if_then_else(partly, end - own * block, T.int32(0))
        self.listed = fixed(T.if_then_else(self.any, listed, T.int32(0)))
        """Keys of the list before the window, or up to the newest query."""
        recent = T.if_then_else(self.any, self.high_query + 1 - end, T.int32(0))
        self.total = fixed(self.listed + recent)
        self.width = s.blocks * LANES
        self.steps = fixed(T.truncdiv(self.total + (self.width - 1), self.width))
        room = min(p["kmax"] * block + window, p["cap"])
        self.extra = s.ahead + self.touches
        room = (-(-room // self.width) + self.extra) * self.width
        self.seats, self.held = (workspace((room,), "int32") for _ in range(2))

    def prepare(self, begin: Any, end: Any) -> None:
        """Find the keys of the steps ``begin .. end-1``, and of those that are prefetched meanwhile."""
        self.begin, s = begin, self.sizes
        block, last = int(s.p["block"]), fixed(T.max(self.total - 1, T.int32(0)))
        count = T.if_then_else(begin < end, (end - begin + self.extra) * self.width, T.int32(0))
        with T.serial(0, fixed(count)) as i:
            n = fixed(begin * self.width + i)
            at = fixed(T.min(n, last))
            named = fixed(T.min(at, T.int32(s.p["kmax"] * block - 1)))
            listed = self.id(T.truncdiv(named, block)) * block + T.truncmod(named, block)
            position = fixed(T.if_then_else(at < self.listed, listed, self.end + at - self.listed))
            store(self.seats, self.slot(position), i)
            store(self.held, T.if_then_else(n < self.total, position, T.int32(NEVER)), i)

    def seat(self, step: Any, u: Any, i: Any) -> Any:
        """Return the slot of key ``i`` of part ``u`` of a step."""
        return fixed(self.seats[(step - self.begin) * self.width + u * LANES + i])

    def clean(self, step: Any) -> Any:
        """See `Reach.clean`; keys ascend."""
        return self.held[(step + 1 - self.begin) * self.width - 1] <= self.low_query

    def positions(self, step: Any, u: Any) -> Any:
        """See `Reach.positions`; what is no key lies behind every query."""
        return bind(load(self.held, (step - self.begin) * self.width + u * LANES, lanes=LANES))

    def limits(self, query: Any) -> Any:
        """See `Reach.limits`."""
        return bind(splat(query))

    @staticmethod
    def sees(positions: Any, limits: Any) -> Any:
        """See `Reach.sees`."""
        return positions <= limits

    def kept(self, step: Any, u: Any) -> Any | None:
        """See `Reach.kept`."""
        return None

    def live(self, step: Any, u: Any) -> Any:
        """See `Reach.live`."""
        left = self.total - (step * self.width + u * LANES)
        return fixed(T.max(T.min(left, T.int32(LANES)), T.int32(0)))


def following(s: ListTiling, lists: Mapping[str, Any]) -> Callable[..., Any]:
    """Return what makes a tile's way through single keys; see `lists.visiting`."""
    return lambda _, turn, first, group: Tokens(s, turn, first, group, lists)
