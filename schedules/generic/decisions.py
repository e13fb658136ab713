"""The decisions about a generic function: which there are, what the rules would decide, which go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.errors import UsageError
from mimo_compile.ir import functions
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import KnobValue, Schedule
from mimo_compile.schedules.generic.blocks import BlockFacts
from mimo_compile.schedules.generic.outline import (
    LANES,
    Arranged,
    Outline,
    Values,
    block_knobs,
    lanes_for,
    outline_of,
    row_axis,
    rows_for,
    rules_for,
    thresholds,
    vectors_for,
)
from mimo_compile.schedules.generic.rules import ENOUGH_TASKS, Knobs, divisor, power
from mimo_compile.schedules.generic.x86_tir import PARALLEL_WORK

USED = {
    "tiled": ("vector", "unroll", "tile", "order", "steps"), "lanes": ("vector",),
    "spatial": ("vector",), "columns": (), "outer": (),
}  # fmt: skip
"""What each rule listens to; the other knobs of its block stay at their first value."""
SERIAL = 0


@dataclass(frozen=True, slots=True)
class Decisions:
    """A config: each decision by name, sorted."""

    made: tuple[tuple[str, KnobValue], ...]

    def of(self, name: str, otherwise: Any = None) -> Any:
        """Return one decision."""
        return dict(self.made).get(name, otherwise)

    def inlined(self) -> tuple[int, ...]:
        """Return the places of the blocks that are inlined."""
        return tuple(
            sorted(int(n[1:-3]) for n, v in self.made if n.endswith(".at") and v == "inline")
        )

    def block(self, index: int) -> dict[str, Any]:
        """Return the decisions about one block."""
        head = f"b{index}."
        return {n.removeprefix(head): v for n, v in self.made if n.startswith(head)}


class DecisionSchedule(Schedule):
    """A schedule of generic functions whose configs are decisions, in records by their names."""

    op = functions.OP
    config = Decisions

    def config_from_json(self, values: Mapping[str, Any]) -> Decisions:
        """Rebuild a config from its decisions."""
        return Decisions(tuple(sorted(values.items())))

    @staticmethod
    def config_to_json(config: Decisions) -> dict[str, Any]:
        """Return the decisions."""
        return dict(config.made)


def supported(workload: Workload, hardware: Hardware) -> bool:
    """Say whether generic schedules can compute a workload."""
    if workload.op != functions.OP or hardware.kind != "cpu":
        return False
    try:
        return bool(outline_of(workload).names)
    except (UsageError, ValueError):
        return False


def all_knobs(outline: Outline, hardware: Hardware) -> Values:
    """Return the knobs of a function with their values."""
    default = outline.arranged(outline.rule)
    whole = outline.arranged(())
    assert default is not None and whole is not None
    levels = thresholds(default, outline.chained) if hardware.threads > 1 else ()
    knobs: Values = {"parallel": (SERIAL, *levels)}
    if outline.chained:
        knobs["chain"] = (1, 0)
        knobs["chain_vector"] = (1, *chain_lanes(default))
    for index, facts in enumerate(whole.facts):
        if index in outline.candidates:
            knobs[f"b{index}.at"] = ("inline", "root")
        now = default.facts[index] or facts
        if now is None:
            continue
        for name, values in block_knobs(now).items():
            knobs[f"b{index}.{name}"] = values
    return knobs


def default_values(outline: Outline, knobs: Values) -> dict[str, KnobValue]:
    """Return what the rules would decide."""
    arranged = outline.arranged(outline.rule)
    assert arranged is not None
    level = PARALLEL_WORK.bit_length() - 1
    out: dict[str, KnobValue] = {n: v[0] for n, v in knobs.items()}
    above = [v for v in knobs["parallel"] if isinstance(v, int) and v >= level]
    out["parallel"] = above[0] if above and arranged.work >= PARALLEL_WORK else SERIAL
    if "chain_vector" in knobs:
        lanes = [v for v in knobs["chain_vector"] if isinstance(v, int) and v <= Knobs().vector]
        out["chain_vector"] = max(lanes)
        out["chain"] = int(max(lanes) > 1)
    for index in outline.candidates:
        out[f"b{index}.at"] = "inline" if index in outline.rule else "root"
    for index, facts in enumerate(arranged.facts):
        if facts is not None:
            told = rule_choice(facts)
            out |= {f"b{index}.{n}": v for n, v in told.items() if f"b{index}.{n}" in knobs}
    return out


def chain_lanes(arranged: Arranged) -> tuple[int, ...]:
    """Return the vector widths in which a function can run row by row."""
    last = [f for f in arranged.facts if f is not None][-1]
    return tuple(sorted({w for v in LANES if (w := power(last.extents[-1], v)) >= 4}))


def rule_choice(facts: BlockFacts) -> dict[str, KnobValue]:
    """Return what `x86_tir` decides about one block."""
    plain = Knobs()
    rules = rules_for(facts)
    if (
        rules[0] == "lanes"
        and power(facts.extents[-1], plain.vector) < 4
        and facts.extents[-1] < 2 * plain.vector
    ):
        rules = rules[1:]
    rule = rules[0]
    out: dict[str, KnobValue] = {"rule": rule}
    widths = [v for v in lanes_for(facts, rule) if v <= plain.vector]
    if widths:
        out["vector"] = max(widths)
    if rule == "tiled":
        chunks = facts.extents[facts.vector_axis or 0] // max(widths)
        vectors = divisor(chunks, plain.unroll)
        if 2 * vectors < plain.unroll:
            vectors = divisor(chunks, 2 * plain.unroll)
        rows = rows_for(facts)
        out["unroll"] = vectors
        out["tile"] = max(r for r in rows if r <= plain.tile)
        out["order"] = "columns" if chunks // vectors >= ENOUGH_TASKS else "rows"
        out["steps"] = 1
    return out


def settled(outline: Outline, knobs: Values, values: Mapping[str, KnobValue]) -> Decisions:
    """Return decisions in which what has no effect is at its first value."""
    out = {n: values.get(n, v[0]) for n, v in knobs.items()}

    def forget(names: list[str]) -> None:
        for name in names:
            out[name] = knobs[name][0]

    if out.get("chain"):
        out |= {f"b{i}.at": "inline" if i in outline.rule else "root" for i in outline.candidates}
        forget([n for n in knobs if n.startswith("b") and not n.endswith(".at")])
    elif "chain_vector" in out:
        forget(["chain_vector"])
    for index in range(len(outline.names)):
        head = f"b{index}."
        used: tuple[str, ...] = ()
        if out.get(f"{head}at") != "inline":
            used = ("rule", *USED.get(str(out.get(f"{head}rule")), ()))
        if not out.get("chain"):
            forget([n for n in knobs if n.startswith(head) and n[len(head) :] not in ("at", *used)])
    return Decisions(tuple(sorted(out.items())))


def fits(outline: Outline, config: Decisions) -> bool:
    """Say whether each block takes what is decided about it."""
    arranged = outline.arranged(config.inlined())
    if arranged is None:
        return False
    if config.of("chain"):
        return outline.chained
    return all(
        facts is None or _takes(facts, config.block(index))
        for index, facts in enumerate(arranged.facts)
    )


def _takes(facts: BlockFacts, told: Mapping[str, Any]) -> bool:
    rule = told.get("rule")
    if rule not in rules_for(facts):
        return False
    if "vector" in USED[rule] and told.get("vector", 1) not in lanes_for(facts, rule):
        return False
    if rule != "tiled":
        return True
    rows, vectors = told["tile"], told["unroll"]
    return (
        rows in rows_for(facts)
        and vectors in vectors_for(facts, told["vector"])
        and rows * vectors * max(1, told["vector"] // 16) <= MOST_SUMS
        and not (told.get("order") == "rows" and is_ragged(facts, rows))
    )


MOST_SUMS = 28
"""Registers of 16 lanes that a tile's sums may fill: AVX-512 has 32."""


def is_ragged(facts: BlockFacts, rows: int) -> bool:
    """Say whether tiles of so many rows do not divide their axis."""
    row = row_axis(facts)
    return row is not None and facts.extents[row] % rows != 0
