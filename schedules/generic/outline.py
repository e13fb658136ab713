"""A generic function as a search sees it: its blocks, which of them can be inlined, what each can be told.

All is told by a block's place in the function as it came, never by its name: functions that differ in names
alone are one workload.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mimo_compile._tvm import compiler
from mimo_compile.ir import functions
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import KnobValue
from mimo_compile.schedules.generic.blocks import BlockFacts, block_facts
from mimo_compile.schedules.generic.intrinsics import expand
from mimo_compile.schedules.generic.row_chain import row_chain
from mimo_compile.schedules.generic.rules import divisor, power
from mimo_compile.schedules.generic.x86_tir import PARALLEL_WORK, REFUSED, inlined_by_rule

tvm = compiler()

LANES = (1, 4, 8, 16, 32)
ROWS = 16
"""Most rows of a register tile."""
VECTORS = 8
"""Most vectors of one."""
RAGGED = (4, 6, 8, 12)
"""Rows of tiles that need not divide the extent."""
STEPS = (1, 2, 4, 8)
MOST_BITS = 48
"""Logarithm of the most configs of a space: candidates have numbers, and draws 53 bits."""


@dataclass(frozen=True, slots=True)
class Arranged:
    """The blocks once some were inlined; by their place in the function, None where a block is gone."""

    facts: tuple[BlockFacts | None, ...]
    operations: tuple[dict[str, float], ...]
    """Operations by kind of one innermost iteration of each block."""

    @property
    def work(self) -> int:
        """Innermost iterations of all blocks."""
        return sum(f.work for f in self.facts if f is not None)


@dataclass(slots=True)
class Outline:
    """One function before any decision."""

    func: Any
    """With its transcendental functions as arithmetic."""
    names: tuple[str, ...]
    candidates: tuple[int, ...]
    """Blocks that can be inlined."""
    rule: tuple[int, ...]
    """Blocks that are inlined without a record."""
    chained: bool
    """It can run row by row."""
    _arranged: dict[tuple[int, ...], Arranged | None] = field(default_factory=dict)

    def schedule(self, inlined: tuple[int, ...]) -> Any:
        """Return a schedule with some blocks inlined.

        Raises:
            ValueError: one of them cannot be.
        """
        schedule = tvm.s_tir.Schedule(tvm.IRModule({"main": self.func}))
        for index in inlined:
            try:
                schedule.compute_inline(schedule.get_sblock(self.names[index]))
            except REFUSED as error:
                raise ValueError(f"block {index} cannot be inlined beside {inlined}") from error
        return schedule

    def arranged(self, inlined: tuple[int, ...]) -> Arranged | None:
        """Return the blocks that are left; None where these cannot be inlined together."""
        if inlined not in self._arranged:
            try:
                schedule = self.schedule(inlined)
            except ValueError:
                self._arranged[inlined] = None
                return None
            facts = {f.name: f for f in block_facts(schedule)}
            self._arranged[inlined] = Arranged(
                tuple(facts.get(n) for n in self.names),
                tuple(_operations(schedule, facts.get(n)) for n in self.names),
            )
        return self._arranged[inlined]


def outline_of(workload: Workload) -> Outline:
    """Return the outline of a workload's function.

    Raises:
        UsageError: it is not known here.
        ValueError: a shape is not static.
    """
    functions.function_of(workload)
    return _outline(workload)


@lru_cache(maxsize=256)
def _outline(workload: Workload) -> Outline:
    func = expand(functions.function_of(workload)).with_attr("tirx.noalias", True)
    schedule = tvm.s_tir.Schedule(tvm.IRModule({"main": func}))
    facts = block_facts(schedule)
    names = tuple(f.name for f in facts)
    candidates = []
    for index, f in enumerate(facts):
        if f.reduced or f.output:
            continue
        try:
            copy = schedule.copy()
            copy.compute_inline(copy.get_sblock(f.name))
            candidates.append(index)
        except REFUSED:
            continue
    chosen = inlined_by_rule(schedule)
    rule = tuple(i for i in candidates if names[i] in chosen)
    return Outline(func, names, tuple(candidates), rule, _chains(schedule, chosen))


def _chains(schedule: Any, inlined: list[str]) -> bool:
    copy = schedule.copy()
    try:
        for name in inlined:
            copy.compute_inline(copy.get_sblock(name))
        return row_chain(copy, block_facts(copy), 1, False)
    except REFUSED:
        return False


def _operations(schedule: Any, facts: BlockFacts | None) -> dict[str, float]:
    """Count the operations of a block's body."""
    from tvm_ffi import structural_walk

    if facts is None:
        return {}
    body = schedule.get(schedule.get_sblock(facts.name)).body
    plain, costly, products = [0], [0], [0]

    def count(cell: list[int]) -> Any:
        def add(_: Any) -> None:
            cell[0] += 1

        return add

    tir = tvm.tirx
    structural_walk(
        body,
        [
            (tir.Add, count(plain)), (tir.Sub, count(plain)), (tir.Max, count(plain)),
            (tir.Min, count(plain)), (tir.Select, count(plain)), (tir.Mul, count(products)),
            (tir.Div, count(costly)), (tvm.ir.Call, count(costly)),
        ],
    )  # fmt: skip
    fused = min(products[0], plain[0]) if facts.reduced else 0
    return {
        "fma_f32": float(fused), "add_f32": float(max(1, plain[0] + products[0] - fused)),
        "exp_f32": float(costly[0]),
    }  # fmt: skip


# -- what a block can be told ------------------------------------------------------------------


def rules_for(facts: BlockFacts) -> tuple[str, ...]:
    """Return the rules that fit a block, the preferred one first."""
    if not facts.reduced:
        return ("spatial", "outer") if facts.kinds else ("spatial",)
    if len(facts.written) > 1:
        return ("outer",)
    out = []
    if lanes_for(facts, "tiled"):
        out.append("tiled")
    if lanes_for(facts, "lanes"):
        out.append("lanes")
    if facts.vector_axis is not None and facts.extents[facts.vector_axis] >= 8:
        out.append("columns")
    return (*out, "outer")


def lanes_for(facts: BlockFacts, rule: str) -> tuple[int, ...]:
    """Return the vector widths that a rule can use on a block."""
    if rule == "tiled" and facts.vector_axis is not None:
        return tuple(v for v in LANES[1:] if facts.extents[facts.vector_axis] % v == 0)
    if rule == "lanes" and facts.kinds[-1] == "R" and facts.vectorisable:
        count = sum(k == "S" for k in facts.kinds)
        if any(k == "S" for k in facts.kinds[count:]):
            return ()
        last = facts.extents[-1]
        return tuple(
            v for v in LANES[1:] if last % v == 0 or (power(last, v) < 4 and last >= 2 * v)
        )
    if rule == "spatial" and facts.kinds and facts.vectorisable:
        last = facts.work if facts.linear else facts.extents[-1]
        return (1, *(v for v in LANES[1:] if last % v == 0))
    return (1,) if rule == "spatial" else ()


def row_axis(facts: BlockFacts) -> int | None:
    """Return the loop whose iterations share a register tile's vectors."""
    if facts.reuse_axis is not None or facts.vector_axis is None:
        return facts.reuse_axis
    spatial = [i for i, k in enumerate(facts.kinds) if k == "S"]
    before = (i for i in reversed(spatial) if i < (facts.vector_axis or 0))
    return next((i for i in before if facts.extents[i] > 1), None)


def rows_for(facts: BlockFacts) -> tuple[int, ...]:
    """Return how many rows a register tile can have."""
    row = row_axis(facts)
    if row is None:
        return (1,)
    n = facts.extents[row]
    exact = {d for d in range(1, min(n, ROWS) + 1) if n % d == 0}
    ragged = {t for t in RAGGED if n > 2 * t and 2 * divisor(n, t) <= t}
    return tuple(sorted(exact | ragged))


def vectors_for(facts: BlockFacts, lanes: int) -> tuple[int, ...]:
    """Return how many vectors a row of a register tile can have."""
    if facts.vector_axis is None:
        return (1,)
    chunks = facts.extents[facts.vector_axis] // lanes
    return tuple(d for d in range(1, min(chunks, VECTORS) + 1) if chunks % d == 0)


def steps_for(facts: BlockFacts) -> tuple[int, ...]:
    """Return how many steps of the innermost reduced loop can be written out."""
    reduced = [n for n, k in zip(facts.extents, facts.kinds, strict=True) if k == "R"]
    return tuple(s for s in STEPS if s == 1 or (reduced and reduced[-1] % s == 0))


def thresholds(arranged: Arranged, chained: bool) -> tuple[int, ...]:
    """Return logarithms of the least work that is worth threads, each of which spreads other blocks."""
    default = PARALLEL_WORK.bit_length() - 1
    out, seen = [], set()
    works = [f.work for f in arranged.facts if f is not None]
    if chained:
        works.append(arranged.work)
    for level in (default, 10, 12, 14, 18, 20):
        wide = tuple(w >> level > 0 for w in works)
        if any(wide) and wide not in seen:
            seen.add(wide)
            out.append(level)
    return tuple(sorted(out))


Values = dict[str, tuple[KnobValue, ...]]


def bounded(knobs: Values, default: Mapping[str, KnobValue]) -> Values:
    """Leave out every other value of the knob that has most, but not the default's, until there is room."""
    out = dict(knobs)
    while math.prod(len(v) for v in out.values()) >= 1 << MOST_BITS:
        # of those that have as many, the last: inner levels and late blocks
        name = max(reversed(out), key=lambda n: len(out[n]))
        values = out[name]
        kept = [v for i, v in enumerate(values) if i % 2 == 0 or v == default.get(name)]
        if len(kept) == len(values):
            kept = [v for v in values if v in (values[0], default.get(name))]
            if len(kept) == len(values):
                kept = [default.get(name, values[0])]
        out[name] = tuple(kept)
    return out


def block_knobs(facts: BlockFacts) -> Values:
    """Return the knobs of one block with their values, the default's among them."""
    rules = rules_for(facts)
    out: Values = {"rule": rules}
    vectors: set[int] = set()
    for rule in rules:
        vectors.update(lanes_for(facts, rule))
    if vectors:
        out["vector"] = tuple(sorted(vectors))
    if "tiled" in rules:
        units = {u for v in lanes_for(facts, "tiled") for u in vectors_for(facts, v)}
        out["unroll"] = tuple(sorted(units))
        out["tile"] = rows_for(facts)
        out["steps"] = steps_for(facts)
        if row_axis(facts) is not None:
            out["order"] = ("columns", "rows")
    return out
