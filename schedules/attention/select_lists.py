"""One list of blocks: its candidates and forced blocks, the level that a rule sets, and what reaches it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.ops import batches, get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import row_end
from mimo_compile.schedules.attention.select_order import (
    LEAST,
    MOST,
    NONE,
    UNIT,
    by_mass,
    count_from,
    ends,
    fill_keys,
    is_nan,
    keys_of,
    kth,
    pad_keys,
    sum_from,
    values_of,
)
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    choose,
    load,
    loop,
    store,
    when,
    workspace,
)
from mimo_compile.schedules.emit.compress import append, counted, flags, packed
from mimo_compile.schedules.emit.vector import LANES, splat


@dataclass(frozen=True, slots=True)
class Choice:
    """Compile-time sizes of a kernel."""

    p: Mapping[str, Any]
    rows: int
    """List rows of a sequence."""
    blocks: int
    kmax: int
    run: int
    """Vectors that one greatest key stands for; 0: all keys are searched."""

    @classmethod
    def of(cls, workload: Workload, run: int) -> Choice:
        """Return the sizes of a workload and a config."""
        op: Any = get_op(workload.op)
        p = op.full(workload)
        args = {a.name: a.shape for a in op.args(batches.alone(workload))}
        return cls(p, args["score"][0], args["score"][2], args["idx"][2], run)

    @property
    def unit(self) -> int:
        """Vectors that rows of keys are padded to."""
        return math.lcm(UNIT, self.run or 1)

    @property
    def room(self) -> int:
        """Keys of a padded row, and one unit for what is written before it is known to stay."""
        step = LANES * self.unit
        return -(-self.blocks // step) * step + step


class Frame:
    """Candidates ``0 ... seen - 1`` of a list row and the forced ones at both ends of them."""

    def __init__(self, s: Choice, span: tuple[Any, Any], row: Any) -> None:
        p = s.p
        begin = span[0] + row * p["rows"]
        end = row_end(*span, row, p["rows"])
        block = T.int32(p["block"])
        self.seen = fixed(T.min(T.floordiv(end, block) + 1, T.int32(s.blocks)))
        self.first = fixed(T.min(T.int32(p["first"]), self.seen))
        last = self.seen
        if p["last"]:
            own = T.floordiv(begin, block) - (p["last"] - 1)
            last = T.min(T.max(own, self.first), self.seen)
        self.last = fixed(T.max(last, self.first))
        self.forced = fixed(self.first + self.seen - self.last)
        most = T.int32(s.kmax)
        if p["rule"] == "topk":
            wanted = T.int32(p["k"])
            if p["share"]:
                part = T.ceil(T.float64(p["share"]) * T.cast(self.seen, "float64"))
                wanted = T.max(wanted, T.cast(part, "int32"))
            most = T.min(wanted, most)
        self.room = fixed(T.max(most - self.forced, T.int32(0)))
        """Blocks that may be chosen besides the forced ones."""

    def each_forced(self, step: Callable[[Any], None]) -> None:
        """Emit ``step(id)`` for every forced block."""
        with T.serial(0, self.first) as i:
            step(i)
        with T.serial(0, fixed(self.seen - self.last)) as i:
            step(self.last + i)


class List:
    """One row of scores: its keys, and the level at which blocks are taken."""

    def __init__(self, s: Choice, frame: Frame, score: Any, row: Any, head: Any) -> None:
        self.s, self.frame = s, frame
        self.keys = workspace((s.room,), "int32")
        positive = bool(s.p["positive"])
        self.vectors = fill_keys(self.keys, score, (row, head), frame.seen, s.unit, positive)
        self.level = Register("int32", 1, T.int32(MOST))
        self.ties = Register("int32", 1, T.int32(0))
        """Blocks of exactly that level that are taken, the lower ones."""
        self.kept: tuple[Any, Any, Any] | None = None
        if s.run:
            runs = -(-s.room // (LANES * s.run)) + UNIT
            self.greatest = workspace((runs * LANES,), "int32")
            self.kept = (
                workspace((s.room,), "int32"), workspace((s.room,), "int32"),
                Register("int32", 1, T.int32(0)),
            )  # fmt: skip

    def without_forced(self) -> None:
        """Leave the forced blocks out of the order."""
        self.frame.each_forced(lambda i: store(self.keys, T.int32(NONE), i))

    # -- levels ------------------------------------------------------------------------------------

    def best(self, room: Any) -> None:
        """Take the ``room`` greatest keys."""
        if self.kept is not None:
            self._sieved(room)
            return
        low, high = ends(self.keys, self.vectors)
        self._best_of(self.keys, self.vectors, room, low, high)

    def _best_of(self, keys: Any, vectors: Any, room: Any, low: Any, high: Any) -> None:
        allowed = count_from(keys, vectors, low)
        wanted = fixed(T.min(room, allowed))

        def search() -> None:
            level = kth(keys, vectors, wanted, low, high)
            self.level.set(level)
            self.ties.set(wanted - count_from(keys, vectors, level + 1))

        def everything() -> None:
            self.level.set(low)
            self.ties.set(wanted)

        with when(wanted > 0):
            choose(wanted == allowed, everything, search)

    def _sieved(self, room: Any) -> None:
        """Search among the greatest keys of runs first: they bound the level from below."""
        s = self.s
        assert self.kept is not None
        keys, _, count = self.kept
        runs = fixed(T.floordiv(self.vectors, T.int32(s.run)))
        with T.serial(0, runs) as j:
            most = Register("int32", LANES, load(self.keys, j * s.run * LANES, lanes=LANES))
            with loop(s.run - 1) as i:
                at = (j * s.run + i + 1) * LANES
                most.set(T.max(most.get(), load(self.keys, at, lanes=LANES)))
            store(self.greatest, most.get(), j * LANES, lanes=LANES)
        vectors = pad_keys(self.greatest, fixed(runs * LANES), UNIT)
        low, high = ends(self.greatest, vectors)
        floor = Register("int32", 1, T.int32(LEAST))
        held = count_from(self.greatest, vectors, T.int32(LEAST))
        with when(T.And(held >= room, room > 0)):
            floor.set(kth(self.greatest, vectors, room, low, high))
        with when(room > 0):
            self._keep(floor.get())
            kept = pad_keys(keys, fixed(count.get()), UNIT)
            least, _ = ends(keys, kept)
            self._best_of(keys, kept, room, least, high)

    def _keep(self, floor: Any) -> None:
        """Copy the keys that reach ``floor``, with their ids."""
        assert self.kept is not None
        keys, ids, count = self.kept
        least = bind(splat(fixed(floor)))
        with T.serial(0, self.vectors) as j:
            key = bind(load(self.keys, j * LANES, lanes=LANES))
            append((keys, ids), (key, _ids(j)), flags(key >= least), count)

    def by_rule(self, value: Any) -> None:
        """Set the level of ``threshold`` or ``mass``, forced blocks in the order; then leave them out."""
        p = self.s.p
        if p["rule"] == "threshold":
            some = T.max(keys_of(value, 1), T.int32(LEAST))
            level = T.Select(is_nan(value), T.int32(MOST), some)
            self.level.set(level)
            self.ties.set(T.int32(MOST))
        else:
            self._mass(value)
        if p["k"]:
            self._at_least(p["k"])
        self._free()

    def _mass(self, value: Any) -> None:
        """Take the fewest greatest scores that sum to ``value`` of all."""
        low, high = ends(self.keys, self.vectors)
        whole = sum_from(self.keys, self.vectors, low)
        wanted = bind(value * whole)

        def some() -> None:
            level = by_mass(self.keys, self.vectors, wanted, low, high)
            above = sum_from(self.keys, self.vectors, level + 1)
            each = bind(values_of(level, 1))
            most = T.cast(count_from(self.keys, self.vectors, level), "float32")
            count = T.ceil((wanted - above) / each)
            self.level.set(level)
            self.ties.set(T.cast(T.max(T.min(count, most), T.float32(1)), "int32"))

        def everything() -> None:
            self.level.set(low)
            self.ties.set(T.int32(MOST))

        with when(T.And(wanted > T.float32(0), high > NONE)):
            choose(whole >= wanted, some, everything)

    def _at_least(self, k: int) -> None:
        """Take the ``k`` best if that is more."""
        low, high = ends(self.keys, self.vectors)
        wanted = fixed(T.min(count_from(self.keys, self.vectors, low), T.int32(k)))
        with when(wanted > 0):
            level = kth(self.keys, self.vectors, wanted, low, high)
            ties = fixed(wanted - count_from(self.keys, self.vectors, level + 1))
            with when(level == self.level.get()):
                self.ties.set(T.max(self.ties.get(), ties))
            with when(level < self.level.get()):
                self.level.set(level)
                self.ties.set(ties)

    def _free(self) -> None:
        """Go on without the forced blocks, and with no more others than there is room for."""
        with T.serial(0, self.frame.first) as i:
            tie = T.And(self.keys[i] == self.level.get(), self.ties.get() > 0)
            with when(tie):
                self.ties.set(self.ties.get() - 1)
        self.without_forced()
        level = fixed(T.min(self.level.get(), T.int32(MOST - 1)))
        above = count_from(self.keys, self.vectors, level + 1)
        equal = fixed(count_from(self.keys, self.vectors, level) - above)
        self.ties.set(T.min(self.ties.get(), equal))
        with when(above + self.ties.get() > self.frame.room):
            low, high = ends(self.keys, self.vectors)
            self.level.set(T.int32(MOST))
            self.ties.set(T.int32(0))
            self._best_of(self.keys, self.vectors, self.frame.room, low, high)

    # -- what is taken -----------------------------------------------------------------------------

    def taken(self) -> tuple[Any, Any, Any]:
        """Return keys and ids of what is taken, ascending, and how many; they overwrite the list."""
        level = bind(splat(fixed(self.level.get())))
        if self.kept is None:
            held = self.keys, workspace((self.s.room,), "int32")
            vectors = self.vectors
        else:
            keys, ids, some = self.kept
            held = keys, ids
            vectors = fixed(T.floordiv(some.get() + (LANES - 1), T.int32(LANES)))
        lanes, places = bind(_ids(0)), workspace((LANES,), "int32")
        count = Register("int32", 1, T.int32(0))
        with T.serial(0, vectors) as j:
            key = bind(load(held[0], j * LANES, lanes=LANES))
            index = _ids(j) if self.kept is None else bind(load(held[1], j * LANES, lanes=LANES))
            tie = flags(key == level)
            left, equal = fixed(self.ties.get()), counted(tie)

            def above(key: Any = key, index: Any = index) -> None:
                append(held, (key, index), flags(key > level), count)

            def some_ties(
                key: Any = key,
                index: Any = index,
                tie: Any = tie,
                left: Any = left,
                equal: Any = equal,
            ) -> None:
                store(places, packed(lanes, tie), 0, lanes=LANES)
                last = bind(splat(fixed(places[T.min(left, equal) - 1])))
                stays = T.Or(key > level, T.And(key == level, lanes <= last))
                append(held, (key, index), flags(stays), count)
                self.ties.set(T.max(left - equal, T.int32(0)))

            choose(T.Or(left == 0, equal == 0), above, some_ties)
        return (*held, fixed(count.get()))


def _ids(vector: Any) -> Any:
    """Return the ids of a vector of keys."""
    return bind(T.ramp(T.int32(0) + vector * LANES, 1, LANES))
