"""Which kernels must add up in one order, so that a token's results do not depend on what comes with it.

Drafts are verified several at a time, while plain decoding takes one token after the other. Where the kernels
of both add up in one order (`Schedule.order`), a token's logits are the same bits in both, and so are greedy
texts, and texts drawn with one seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import schedules_for
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.plan_options import Tensor
from mimo_compile.search.space import ORDER

if TYPE_CHECKING:
    from mimo_compile.pipeline.graphs import ModelGraphs
    from mimo_compile.search.plan import Plan

Scope = Literal["drafts", "all", "none"]
"""Which entry points share an order: those that decode and verify, all that read tokens, none has to."""
_KINDS = ("step", "head")

Calls = Mapping[str, Sequence[Workload | None]]
"""The kernel calls of each entry point, in their order; None: of a generic function."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What a plan must have alike."""

    tokens: tuple[int, ...] = ()
    """Token counts T whose ``step_T`` and ``head_T`` add up in one order, ascending; empty: none has to."""
    groups: list[list[Tensor]] = field(default_factory=list)
    """Workloads with equal orders, as a plan takes them beside tensors that are shared."""
    unknown: tuple[str, ...] = ()
    """Workloads, or what else there is, whose order nothing promises: then there are no groups."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """See `order_costs`; empty before there is a plan."""

    @property
    def workloads(self) -> frozenset[Workload]:
        """All workloads whose order counts."""
        return frozenset(w for group in self.groups for w, _ in group)


def check_scope(scope: str) -> Scope:
    """Return what ``--reproducible`` says.

    Raises:
        UsageError: it is none of the words.
    """
    for known in get_args(Scope):
        if scope == known:
            return known  # type: ignore[no-any-return]
    raise UsageError(
        f"{scope!r} entry points cannot share an order (--reproducible)",
        remedy=f"use {', '.join(get_args(Scope))}",
    )


def verified_by(steps: Sequence[int], drafts: int) -> int:
    """Return the token count of the step that verifies so many drafts; 0 without any that can."""
    return next((t for t in sorted(steps) if t > drafts), 0) if drafts else 0


def orders_of_model(model: ModelGraphs, hardware: Hardware, scope: Scope) -> Orders:
    """Return what the plan of a model must have alike.

    Raises:
        UsageError: ``all`` is asked for, and some kernels promise no order; names the first.
    """
    decoder = model.decoder
    steps = _counts(model.entries, "step")
    if decoder is None or not steps or scope == "none":
        if scope == "all":
            raise UsageError(
                f"{model.name} is no decoder: it has no entry points that could share an order "
                "(--reproducible)"
            )
        return Orders()
    tokens = tuple(steps)
    if scope == "drafts":
        verify = 0 if decoder.config.decodes_apart else verified_by(steps, len(decoder.config.mtp))
        tokens = tuple(t for t in steps if t <= verify)  # fewer drafts take smaller steps
    calls = {
        name: [None if node.func is not None else node.workload for node in graph.nodes]
        for name, graph in model.entries.items()
    }
    found = same_order(calls, tokens, hardware)
    if scope == "all" and found.unknown:
        raise UsageError(
            f"--reproducible: nothing promises the order in which {found.unknown[0]} adds up",
            remedy="leave --reproducible out",
        )
    return found


def same_order(calls: Calls, tokens: Sequence[int], hardware: Hardware) -> Orders:
    """Return what must be alike for ``step_T`` and ``head_T`` of some token counts to add up alike.

    Args:
        calls: Of each entry point.
        tokens: Token counts of steps. The logits of so many tokens come from the smallest ``head_T`` for
            as many.
        hardware: The target.
    """
    if len(tokens) < 2:
        return Orders()
    groups: dict[frozenset[Workload], list[Tensor]] = {}
    unknown: dict[str, None] = {}
    for kind in _KINDS:
        mine = _used(_counts(calls, kind), tokens)
        for column in zip(*(calls[f"{kind}_{t}"] for t in mine), strict=True):
            alike = [w for w in column if w is not None]
            if len(alike) < len(column) or len({w.op for w in alike}) > 1:
                unknown[f"a generic function of {kind}_{mine[0]}"] = None
                continue
            unknown.update((str(w), None) for w in alike if not _promised(w, hardware))
            distinct = dict.fromkeys(alike)
            groups.setdefault(frozenset(distinct), [(w, ORDER) for w in distinct])
    if unknown:
        return Orders(unknown=tuple(unknown))
    return Orders(tuple(tokens), [g for g in groups.values() if len(g) > 1])


def order_costs(
    orders: Orders, calls: Mapping[Workload, Mapping[str, int]], plan: Plan, free: Plan
) -> dict[str, float]:
    """Return what one order of sums costs each entry point that has it, as a part of its time in kernels.

    That is known where kernels that differ were measured, all of them: what is predicted has a penalty.

    Args:
        orders: What ``plan`` has alike.
        calls: Of each planned workload by entry point; generic functions without a plan cost the same.
        plan: The kernels that are taken.
        free: Those that would be taken if none had to add up like another.

    Returns:
        Entry point to time over that of ``free``, less one: of the times behind both plans.
    """
    guessed = {
        w
        for w, c in plan.choices.items()
        if (both := (c.option, free.choices[w].option))[0].candidate != both[1].candidate
        and any(option.source != "measured" for option in both)
    }

    def time_of(found: Plan, entry: str) -> float:
        mine = {w: calls[w].get(entry, 0) for w in found.choices}
        if any(mine[w] for w in guessed):
            return 0.0
        return sum(mine[w] * c.option.latency_us for w, c in found.choices.items())

    entries = {entry: 0 for by_entry in calls.values() for entry in by_entry}
    names = [f"{kind}_{t}" for kind in _KINDS for t in _used(_counts(entries, kind), orders.tokens)]
    pairs = ((name, time_of(plan, name), time_of(free, name)) for name in names)
    return {name: ours / theirs - 1 for name, ours, theirs in pairs if theirs}


def rounded(costs: Mapping[str, float]) -> dict[str, float]:
    """Return costs as a manifest holds them."""
    return {entry: round(cost, 4) for entry, cost in costs.items()}


def _used(counts: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Return the token counts of the entry points of a kind that so many tokens go through."""
    if not counts:
        return []
    return sorted({next((c for c in counts if c >= t), counts[-1]) for t in tokens})


def _promised(workload: Workload, hardware: Hardware) -> bool:
    """Say whether some schedule says how a workload's kernels add up."""
    return any(type(s).order is not Schedule.order for s in schedules_for(workload, hardware))


def _counts(entries: Mapping[str, object], kind: str) -> list[int]:
    """Return the token counts that a kind of entry points has, ascending."""
    return sorted(_numbers(entries, f"{kind}_"))


def _numbers(entries: Mapping[str, object], prefix: str) -> Iterator[int]:
    return (int(name.removeprefix(prefix)) for name in entries if name.startswith(prefix))
