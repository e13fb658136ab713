"""Which slots of a KV cache a tile of queries sees through its list of blocks, and in which order.

Both classes answer as `reach.Reach` does, so that a `flash.Tile` passes over listed blocks as it passes over
all of them: in parts of 16 neighbouring slots. `Listed` reads the list as it goes; `Gathered` first turns
list and window into parts with a bit for each slot, for blocks of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.schedules.attention.pages import table_of
from mimo_compile.schedules.attention.phases import Turn
from mimo_compile.schedules.attention.reach import Tiling, fixed
from mimo_compile.schedules.attention.sequences import part_of
from mimo_compile.schedules.emit.build import Register, T, bind, loop, store, when, workspace
from mimo_compile.schedules.emit.vector import LANES, splat

NEVER = 1 << 30
"""A position behind that of every query."""


@dataclass(frozen=True, slots=True)
class ListTiling(Tiling):
    """Sizes of a kernel whose tiles follow lists; the tokens of a tile share one."""

    @property
    def groups(self) -> int:
        """Groups of query heads that share both their list and their keys."""
        return int(max(self.p["hs"], self.p["kv"]))

    @property
    def group(self) -> int:
        """Query heads of a group."""
        return int(self.p["h"] // self.groups)

    @property
    def chunk(self) -> int:
        """Positions that lie in one block and one part, as their slots do: pages hold whole parts."""
        return math.gcd(self.p["block"], LANES)

    @property
    def whole(self) -> bool:
        """Whether lists alone say what is visited, in whole parts."""
        return self.chunk == LANES and not self.p["window"]

    @property
    def parts(self) -> int:
        """Most parts of 16 slots that a tile visits."""
        p = self.p
        most = p["kmax"] * (-(-p["block"] // self.chunk))
        if p["window"]:
            most += (p["window"] + self.tokens - 2) // self.chunk + 2
        if p.get("first"):  # a block of slots at the ring's seam holds two parts
            return int(most)
        return int(min(most, -(-p["cap"] // self.chunk), self.cache_blocks))


class Row:
    """The list of one tile, and the positions of its queries."""

    def __init__(
        self, s: ListTiling, turn: Turn, first: Any, group: Any, lists: Mapping[str, Any]
    ) -> None:
        p, pos = s.p, turn.pos
        self.sizes = s
        self.table = table_of(p, lists, turn.sequence)
        self.start, self.valid = fixed(pos[0]), fixed(pos[1])
        self.low_query = fixed(self.start + first)
        last = fixed(self.start + self.valid - 1)
        self.high_query = fixed(T.min(self.low_query + (s.tokens - 1), last))
        self.any = bind(first < self.valid)
        self.ids, counts = (part_of(lists[n], turn.sequence, s.sequences) for n in ("idx", "cnt"))
        self.row, self.head = fixed(first // p["rows"]), fixed(group * p["hs"] // s.groups)
        self.count = fixed(T.min(counts[self.row, self.head], T.int32(p["kmax"])))

    def id(self, at: Any) -> Any:
        """Return the block that stands at a place of the list."""
        return self.ids[self.row, self.head, at]

    def before(self, block: Any) -> Any:
        """Return how many blocks of the list lie before a block: the list ascends."""
        low, rest = Register("int32", 1, T.int32(0)), int(self.sizes.p["kmax"])
        while rest > 0:
            half = (rest + 1) // 2
            probe = fixed(low.get() + (half - 1))
            with when(T.And(probe < self.count, self.id(probe) < block)):
                low.set(probe + 1)
            rest -= half
        return low.get()

    def slot(self, position: Any) -> Any:
        """Return the slot of a position."""
        first = int(self.sizes.p.get("first", 0))
        if self.table is not None:
            return self.table.slot(fixed(position))
        if not first:
            return position
        at = fixed(position)
        ring = first + T.truncmod(at - first, int(self.sizes.p["cap"]) - first)
        return fixed(T.if_then_else(at < first, at, ring))


class Parts(Row):
    """What both ways of visiting have in common: ``total`` parts in steps of some."""

    total: Any
    """Parts to visit."""
    touches = 4
    """See `Reach.touches`: without it, each part waits for the addresses of two pages."""
    apart = False
    """See `Reach.apart`."""
    alone = False
    """See `Reach.alone`."""

    def seal(self, total: Any) -> None:
        """Set how many parts there are."""
        self.total = fixed(total)
        self.steps = fixed(T.truncdiv(self.total + (self.sizes.blocks - 1), self.sizes.blocks))
        self.final = fixed(T.max(self.total - 1, T.int32(0)))

    def prepare(self, begin: Any, end: Any) -> None:
        """See `Reach.prepare`: all is done."""

    def place(self, step: Any, u: Any) -> Any:
        """Return the number of a part; behind the last one it is that one's."""
        return fixed(T.min(step * self.sizes.blocks + u, self.final))

    def there(self, step: Any, u: Any) -> Any:
        """Say whether a step has part ``u``."""
        return step * self.sizes.blocks + u < self.total

    def further(self, step: Any, u: Any) -> Any:
        """See `Reach.further`: the list says what comes next."""
        return fixed(self.block(step + self.sizes.ahead, u) - self.block(step, u))

    def block(self, step: Any, u: Any) -> Any:
        """See `Reach.block`."""
        raise NotImplementedError


class Listed(Parts):
    """Blocks of whole parts, and no window: the list is what is visited."""

    apart = True

    def __init__(
        self, s: ListTiling, turn: Turn, first: Any, group: Any, lists: Mapping[str, Any]
    ) -> None:
        super().__init__(s, turn, first, group, lists)
        self.many = int(s.p["block"]) // LANES
        self.alone = self.many == 1
        newest = fixed(T.truncdiv(T.max(self.high_query, T.int32(0)), s.p["block"]))
        seen = fixed(self.before(newest + 1))
        total = seen * self.many
        if self.many > 1:  # of the block of the newest query, what lies behind it is not visited
            own = fixed(self.id(T.max(seen - 1, T.int32(0))))
            ends = T.And(seen > 0, own == newest)
            part = T.truncdiv(self.high_query - newest * s.p["block"], LANES)
            total = total - T.if_then_else(ends, self.many - 1 - part, T.int32(0))
        self.seal(T.if_then_else(self.any, total, T.int32(0)))

    def base(self, step: Any, u: Any) -> Any:
        """Return the first position of a part."""
        at = self.place(step, u)
        if self.many == 1:
            return fixed(self.id(at) * LANES)
        block = self.id(T.truncdiv(at, self.many))
        return fixed((block * self.many + T.truncmod(at, self.many)) * LANES)

    def block(self, step: Any, u: Any) -> Any:
        """See `Reach.block`."""
        return fixed(T.shift_right(self.slot(self.base(step, u)), T.int32(4)))

    def clean(self, step: Any) -> Any:
        """See `Reach.clean`; parts ascend."""
        end = self.base(step, self.sizes.blocks - 1) + (LANES - 1)
        return T.And((step + 1) * self.sizes.blocks <= self.total, end <= self.low_query)

    def positions(self, step: Any, u: Any) -> Any:
        """See `Reach.positions`; here a slot that is not to be seen lies behind every query."""
        base = fixed(T.if_then_else(self.there(step, u), self.base(step, u), T.int32(NEVER)))
        return bind(T.ramp(base, 1, LANES))

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
        left = T.min(self.high_query + 1 - self.base(step, u), T.int32(LANES))
        left = T.max(left, T.int32(0))
        return fixed(T.if_then_else(self.there(step, u), left, T.int32(0)))


class Gathered(Parts):
    """Blocks of any size, and a window, whose keys count once where they are listed, too.

    A part is 16 slots and the position that the first of them would have. Of its slots, bits say which ones
    some query of the tile may see, and which ones are listed: the others are seen by window alone.
    """

    def __init__(
        self, s: ListTiling, turn: Turn, first: Any, group: Any, lists: Mapping[str, Any]
    ) -> None:
        super().__init__(s, turn, first, group, lists)
        self.window = int(s.p["window"])
        kinds = ("block", "origin", "kept", *(["listed"] if self.window else []))
        self.held = {name: workspace((max(s.parts, 1),), "int32") for name in kinds}
        self.made = Register("int32", 1, T.int32(0))
        self.newest = [Register("int32", 1, T.int32(-NEVER)) for _ in range(2)]
        with when(self.any):
            if self.window:
                self._list_and_window()
            else:
                self._list(T.truncdiv(self.high_query, s.p["block"]) + 1, self.high_query + 1)
        self.seal(self.made.get())

    def _list(self, behind: Any, end: Any) -> None:
        """Add what blocks of the list before ``behind`` have before position ``end``."""
        p, chunk = self.sizes.p, self.sizes.chunk
        with T.serial(0, fixed(self.before(behind))) as i:
            block = fixed(self.id(i))
            with loop(p["block"] // chunk) as c:
                position = fixed(block * p["block"] + c * chunk)
                with when(position < end):
                    bits = self._bits(position)
                    self._add(position, bits, bits)

    def _list_and_window(self) -> None:
        """Add what is listed before the window, then all of the window."""
        p, chunk = self.sizes.p, self.sizes.chunk
        oldest = fixed(T.max(self.low_query - (self.window - 1), T.int32(0)))
        base = fixed(T.truncdiv(oldest, chunk) * chunk)
        own = fixed(T.truncdiv(base, p["block"]))
        self._list(own + 1, base)
        at = Register("int32", 1, fixed(self.before(own)))
        with T.serial(0, fixed(T.truncdiv(self.high_query - base, chunk) + 1)) as c:
            position = fixed(base + c * chunk)
            block = fixed(T.truncdiv(position, p["block"]))
            with when(self._next(at) < block):  # ids ascend, and blocks here by one at most
                at.set(at.get() + 1)
            listed = fixed(T.cast(self._next(at) == block, "int32"))
            bits = self._bits(position)
            older = fixed(T.max(oldest - position, T.int32(0)))
            inside = T.shift_left(T.int32(-1), older)
            kept = T.bitwise_and(bits, T.bitwise_or(inside, 0 - listed))
            self._add(position, fixed(kept), fixed(bits * listed))

    def _next(self, at: Register) -> Any:
        """Return the block of the list at a place that may lie behind its end."""
        place = fixed(T.min(at.get(), T.int32(self.sizes.p["kmax"] - 1)))
        return fixed(T.if_then_else(at.get() < self.count, self.id(place), T.int32(NEVER)))

    def _bits(self, position: Any) -> Any:
        """Return a bit for each slot of a chunk that does not lie behind the newest query."""
        most = T.min(self.high_query + 1 - position, T.int32(self.sizes.chunk))
        return fixed(T.shift_left(T.int32(1), most) - 1)

    def _add(self, position: Any, kept: Any, listed: Any) -> None:
        """Add a chunk to the newest part, or a part for it."""
        slot = fixed(self.slot(position))
        lane = fixed(T.bitwise_and(slot, T.int32(LANES - 1)))
        block, origin = fixed(T.shift_right(slot, T.int32(4))), fixed(position - lane)
        marks = [fixed(T.shift_left(bits, lane)) for bits in (kept, listed)]
        held = [self.held[n] for n in ("kept", "listed") if n in self.held]
        same = T.And(self.newest[0].get() == block, self.newest[1].get() == origin)

        def first() -> None:
            at = fixed(self.made.get())
            self.made.set(at + 1)
            for name, value in (("block", block), ("origin", origin)):
                store(self.held[name], value, at)
            for register, value in zip(self.newest, (block, origin), strict=True):
                register.set(value)
            for buffer, bits in zip(held, marks, strict=False):
                store(buffer, bits, at)

        def more() -> None:
            at = fixed(self.made.get() - 1)
            for buffer, bits in zip(held, marks, strict=False):
                store(buffer, T.bitwise_or(buffer[at], bits), at)

        with T.If(same):
            with T.Then():
                more()
            with T.Else():
                first()

    def block(self, step: Any, u: Any) -> Any:
        """See `Reach.block`."""
        return fixed(self.held["block"][self.place(step, u)])

    def clean(self, step: Any) -> Any | None:
        """See `Reach.clean`: too many questions, so every step is masked."""
        return None

    def kept(self, step: Any, u: Any) -> Any | None:
        """See `Reach.kept`."""
        bits = self.held["kept"][self.place(step, u)]
        return fixed(T.if_then_else(self.there(step, u), bits, T.int32(0)))

    def positions(self, step: Any, u: Any) -> Any:
        """See `Reach.positions`: those that are kept; with a window also those that no window hides."""
        at = self.place(step, u)
        held = bind(T.ramp(fixed(self.held["origin"][at]), 1, LANES))
        lanes, never = T.ramp(T.int32(0), 1, LANES), splat(T.int32(NEVER))

        def marked(bits: Any) -> Any:
            return T.bitwise_and(T.shift_right(splat(bits), lanes), splat(T.int32(1))) != splat(
                T.int32(0)
            )

        kept = bind(T.Select(marked(self.kept(step, u)), held, never))
        if not self.window:
            return kept, None
        return kept, bind(T.Select(marked(fixed(self.held["listed"][at])), never, held))

    def limits(self, query: Any) -> Any:
        """See `Reach.limits`."""
        return bind(splat(query)), bind(splat(query - self.window))

    @staticmethod
    def sees(positions: Any, limits: Any) -> Any:
        """See `Reach.sees`."""
        (kept, recent), (newest, oldest) = positions, limits
        return kept <= newest if recent is None else T.And(kept <= newest, recent > oldest)

    def live(self, step: Any, u: Any) -> Any:
        """See `Reach.live`: as many as `kept` has bits for."""
        return fixed(T.if_then_else(self.there(step, u), T.int32(LANES), T.int32(0)))


def visiting(s: ListTiling, lists: Mapping[str, Any]) -> Callable[..., Any]:
    """Return what makes a tile's way through its list from sizes, its turn, first token and group of heads.

    Args:
        s: Sizes.
        lists: ``idx``, ``cnt``, and ``pages`` where caches lie in them: parameters of the kernel.
    """
    way: type[Parts] = Listed if s.whole else Gathered
    return lambda _, turn, first, group: way(s, turn, first, group, lists)
