"""Flash attention over KV caches in groups, and the way of it that makes codes real in scratch memory.

`Real` turns one group of codes into float32 keys and values, a few KiB that stay near the core, and then
does what `flash.Tile` does: right for tiles of many queries, on any x86-64. `group_integers` multiplies codes
as they are.

The tail is float32 and read as caches of that format are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.ir.kv_groups import GroupedFormat
from mimo_compile.schedules.attention.flash import Tile
from mimo_compile.schedules.attention.group_layout import BLOCKS, elements, key_channels
from mimo_compile.schedules.attention.group_reach import GROUP, GroupReach
from mimo_compile.schedules.attention.layout import round_up
from mimo_compile.schedules.attention.reach import NEAR_BYTES, Tiling, fixed
from mimo_compile.schedules.emit.build import T, bind, load, loop, prefetch, store, when, workspace
from mimo_compile.schedules.emit.vector import LANES, splat


def line(buffer: Any, *index: Any) -> Any:
    """Return a line of codes as 16 lanes of 32 bits, bound."""
    return bind(T.reinterpret("int32x16", load(buffer, *index, 0, lanes=4 * LANES)))


def number(words: Any, bits: int, place: int, *, signed: bool = False) -> Any:
    """Return the code of element ``place`` of each lane as float32; bytes may have signs."""
    shift = 8 * (place % 4) + bits * (place // 4)
    if signed:
        up = T.shift_left(words, splat(T.int32(24 - shift))) if shift < 24 else words
        return T.cast(T.shift_right(up, splat(T.int32(24))), "float32x16")
    moved = T.shift_right(words, splat(T.int32(shift))) if shift else words
    return T.cast(T.bitwise_and(moved, splat(T.int32((1 << bits) - 1))), "float32x16")


class GroupTile(Tile):
    """What both ways share: steps over codes, then steps over the tail."""

    def __init__(
        self, s: Tiling, fmt: GroupedFormat, k: Any, v: Any, head: Any, lead: Any = None
    ) -> None:
        """``k`` and ``v`` are (codes, scales, tail)."""
        self.k_codes, self.k_scale, k_tail = k
        self.v_codes, self.v_scale, v_tail = v
        super().__init__(s, k_tail, v_tail, head, lead)
        self.fmt, self.per, d = fmt, elements(fmt), int(s.p["d"])
        self.words, self.wide = -(-d // self.per), key_channels(d, fmt)
        self.ask = self.streams
        self.streams = False
        self.further: Any = s.ahead
        """Groups from one to that which is prefetched with it, as they lie."""
        step = GROUP * (fmt.bytes_of(d, keys=True) + fmt.bytes_of(s.p["dv"], keys=False))
        self.near = 2 * step <= NEAR_BYTES
        """The group that arrives has room in the first-level cache beside the one that is read."""
        self.value_groups = fmt.value_groups(s.p["dv"])
        self.middle = float((fmt.levels + 1) // 2)
        self.k_params = workspace((2, self.wide), "float32")
        self.v_params = workspace((2, self.value_groups, GROUP), "float32")

    def begin(self, q: Any, first: Any, scale: float) -> None:
        """Load the queries as `Tile.begin` does; scales that lanes of codes have beyond a key are zero."""
        super().begin(q, first, scale)
        for at in range(round_up(int(self.s.p["d"])), self.wide, LANES):
            for half in (0, 1):
                store(self.k_params, splat(0.0), half, at, lanes=LANES)

    def run(self, reach: Any, first: Any, begin: Any, end: Any) -> None:
        """Pass over the steps ``begin .. end-1``."""
        middle = fixed(T.max(begin, T.min(end, reach.groups)))
        with when(begin < middle):
            self.prepare(reach, begin)
        with T.serial(begin, middle) as step:
            held = reach.held(step)
            if self.ask:
                self.further = reach.further(step)
            self.old(reach, step, held, first, fixed(T.min(step + 1, middle - 1)))
        self.finish()
        self.head = reach.head_of_tail(self.head)
        with T.serial(middle, end) as step:
            self.scores(reach.new, step)
            self.mask(reach.new, step, first)
            self.weigh()
            self.values(reach.new, step)

    def prepare(self, reach: GroupReach, step: Any) -> None:
        """Do what a step over codes needs of its group beforehand."""

    def widen_keys(self, step: Any) -> None:
        """Make scales of a group's keys float32, and what the middle code stands for."""
        with loop(round_up(int(self.s.p["d"])) // LANES) as j:
            self._widen(self.k_scale, self.k_params, (self.head, step), (), j * LANES, self.placed)

    def widen_values(self, step: Any) -> None:
        """Make scales of a group's values float32, and what the middle code stands for."""
        with loop(self.value_groups) as g, loop(BLOCKS) as u:
            self._widen(self.v_scale, self.v_params, (self.head, step), (g,), u * LANES)

    def _widen(
        self, source: Any, to: Any, outer: tuple[Any, ...], inner: tuple[Any, ...], at: Any,
        order: Callable[[Any], Any] = lambda scales: scales,
    ) -> None:  # fmt: skip
        scale, zero = (
            bind(order(T.cast(load(source, *outer, half, *inner, at, lanes=LANES), "float32x16")))
            for half in (0, 1)
        )
        if self.ask:
            head, step = outer
            for half in (0, 1):
                prefetch(source, head, step + self.further, half, *inner, at)
        store(to, scale, 0, *inner, at, lanes=LANES)
        store(to, scale * splat(self.middle) + zero, 1, *inner, at, lanes=LANES)

    def placed(self, scales: Any) -> Any:
        """Return scales of 16 channels in the order in which they are multiplied."""
        return scales

    def old(self, reach: GroupReach, step: Any, held: Any, first: Any, after: Any) -> None:
        """Do a step over the codes of the group that lies at ``held``, and prepare the step ``after``."""
        raise NotImplementedError

    def finish(self) -> None:
        """Complete the sums over codes."""

    def hide(self, reach: GroupReach, step: Any, first: Any) -> None:
        """Mask the scores of a step over codes where some query does not see them as such."""
        with when(T.Not(reach.old.clean(step))):
            self.mask(reach.old, step, first)

    def ask_keys(self, step: Any, u: Any, w: Any) -> None:
        """Prefetch the line of codes that comes some steps later."""
        if self.ask:
            prefetch(self.k_codes, self.head, step + self.further, u, w, 0, near=self.near)

    def ask_values(self, step: Any, column: Any, run: Any) -> None:
        """Prefetch the line of codes that comes some steps later."""
        if self.ask:
            prefetch(self.v_codes, self.head, step + self.further, column, run, 0, near=self.near)


class Real(GroupTile):
    """Codes of a group become float32 keys and values."""

    def __init__(
        self, s: Tiling, fmt: GroupedFormat, k: Any, v: Any, head: Any, lead: Any = None
    ) -> None:
        super().__init__(s, fmt, k, v, head, lead)
        self.real_k = workspace((1, BLOCKS, self.words * self.per, LANES), "float32")
        self.real_v = workspace((1, GROUP, s.columns * LANES), "float32")

    def old(self, reach: GroupReach, step: Any, held: Any, first: Any, after: Any) -> None:
        """See `GroupTile.old`."""
        self.widen_keys(held)
        self.widen_values(held)
        self.make_keys(held)
        self.make_values(held)
        kept = self.k, self.v, self.head
        self.k, self.v, self.head = self.real_k, self.real_v, 0
        self.scores(reach.old, step)
        self.hide(reach, step, first)
        self.weigh()
        self.values(reach.old, step)
        self.k, self.v, self.head = kept

    def make_keys(self, step: Any) -> None:
        """Write the keys of a group as float32 caches lie."""
        with loop(self.words) as w:
            lines = [line(self.k_codes, self.head, step, u, w) for u in range(BLOCKS)]
            for u in range(BLOCKS):
                self.ask_keys(step, u, w)
            for place in range(self.per):
                c = w * self.per + place
                scale, middle = (bind(splat(self.k_params[half, c])) for half in (0, 1))
                for u, words in enumerate(lines):
                    code = number(words, self.fmt.bits, place) - splat(self.middle)
                    store(self.real_k, code * scale + middle, 0, u, c, 0, lanes=LANES)

    def make_values(self, step: Any) -> None:
        """Write the values of a group as float32 caches lie."""
        per_scale = self.fmt.columns // LANES
        with loop(self.s.columns) as column, loop(GROUP // self.per) as run:
            words = line(self.v_codes, self.head, step, column, run)
            self.ask_values(step, column, run)
            g = bind(column // per_scale) if self.value_groups > 1 else 0
            for place in range(self.per):
                slot = run * self.per + place
                scale, middle = (splat(self.v_params[half, g, slot]) for half in (0, 1))
                code = number(words, self.fmt.bits, place, signed=self.fmt.bits == 8)
                if self.fmt.bits < 8:
                    code = code - splat(self.middle)
                store(self.real_v, code * scale + middle, 0, slot, column * LANES, lanes=LANES)
