"""Why a candidate was chosen: rank, bounds, predictions beside measurements, and what the others lack.

Nothing is measured here: records and the two cost models answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.cost_models.features import Extractor
from mimo_compile.cost_models.learned import Sample
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.database import Database
from mimo_compile.search.held_out import held_out_us, rank_correlation, what_matters
from mimo_compile.search.lookup import Result, known_results, measured_here, use_measured
from mimo_compile.search.objective import Objective
from mimo_compile.search.space import Candidate, JointSpace

CLOSE = 0.02
"""Relative difference of two measured times below which neither is called the faster one."""
MOST = 2000
"""Samples that a model is fitted to for an explanation."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What limits a kernel by the analytic model. Unit: microseconds of one call."""

    compute_us: float
    memory_us: float
    launch_us: float
    operation: str
    """The kind of operation that takes most of ``compute_us``."""
    level: str
    """The memory level that takes ``memory_us``."""

    @property
    def kind(self) -> str:
        """``compute``, ``memory`` or ``launch``: the largest of the three."""
        parts = {"compute": self.compute_us, "memory": self.memory_us, "launch": self.launch_us}
        return max(parts, key=lambda k: parts[k])

    @property
    def total_us(self) -> float:
        """What the model predicts in all."""
        return self.launch_us + max(self.compute_us, self.memory_us)

    def __str__(self) -> str:
        """Return ``bound by memory (dram 31.2 us; compute 12.0, launch 2.0)``."""
        compute = f"compute {self.compute_us:.3g} us of {self.operation}" if self.operation else ""
        memory = f"memory {self.memory_us:.3g} us of {self.level}" if self.level else ""
        launch = f"launch {self.launch_us:.3g} us"
        texts = {"compute": compute, "memory": memory, "launch": launch}
        rest = [t for k, t in texts.items() if k != self.kind and t]
        return f"bound by {texts[self.kind]} ({', '.join(rest)})"


def bound_of(counts: Counts, hardware: Hardware, device: DeviceModel) -> Bound:
    """Return how the analytic model's time comes about."""

    def time_us(part: Counts) -> float:
        return device.latency_us(part, hardware)

    traits = counts.traits
    launch = time_us(Counts({}, {}, traits))
    compute = {k: time_us(Counts({k: n}, {}, traits)) - launch for k, n in counts.ops.items()}
    memory = {lv: time_us(Counts({}, {lv: b}, traits)) - launch for lv, b in counts.bytes.items()}
    return Bound(
        time_us(Counts(counts.ops, {}, traits)) - launch,
        time_us(Counts({}, counts.bytes, traits)) - launch,
        launch,
        max(compute, key=lambda k: compute[k], default=""),
        max(memory, key=lambda k: memory[k], default=""),
    )


def work_of(space: JointSpace, candidate: Candidate, result: Result | None) -> Counts:
    """Return a candidate's work as its schedule declares it; of a measured one that costs no lowering."""
    schedule = space.schedules[candidate.schedule]
    if result is not None and type(schedule).work is Schedule.work:
        return Counts(result.record.ops, result.record.bytes)
    return schedule.told(space.workload, space.config(candidate), space.hardware)


@dataclass(frozen=True, slots=True)
class Known:
    """A measured candidate with what the models say of it."""

    candidate: Candidate
    result: Result
    counts: Counts
    bound: Bound
    analytic_us: float
    learned_us: float | None
    """Predicted by a model that was trained without this candidate; None with too few records."""


# -- one workload ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loser:
    """The best candidate of an algorithm that was not chosen, and why in one line."""

    candidate: Candidate
    measured_us: float | None
    predicted_us: float
    bound: Bound
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a workload has the kernel that it has."""

    space: JointSpace
    chosen: Known | None
    """None when the chosen candidate was never measured."""
    candidate: Candidate
    counts: Counts
    bound: Bound
    known: tuple[Known, ...]
    """All measured candidates, the best by the objective first."""
    rank: int | None
    """Place of the chosen one among them, 1 is the best."""
    roofline_us: float
    """What no kernel is expected to beat: the roofline of the necessary work."""
    analytic_rho: float | None
    learned_rho: float | None
    """Rank correlation of predictions with measurements over all measured candidates."""
    matters: list[tuple[str, float]]
    losers: list[Loser]
    origin: str
    """Where the chosen one's time comes from."""

    @property
    def elsewhere(self) -> bool:
        """True when all that is known was measured on other machines or numbers of threads."""
        hardware = self.space.hardware
        return bool(self.known) and not any(measured_here(k.result, hardware) for k in self.known)

    @property
    def analytic_rank(self) -> int | None:
        """The chosen one's place by the analytic model."""
        return self._place(lambda k: k.analytic_us)

    @property
    def learned_rank(self) -> int | None:
        """The chosen one's place by the learned model, which did not see it."""
        if self.chosen is None or self.chosen.learned_us is None:
            return None
        return self._place(lambda k: k.learned_us or 0.0)

    def _place(self, value: Callable[[Known], float]) -> int | None:
        if self.chosen is None:
            return None
        mine = value(self.chosen)
        return 1 + sum(value(k) < mine for k in self.known)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        chosen = self.chosen
        measured = None if chosen is None else chosen.result.latency_us
        return {
            "schedule": self.candidate.schedule, "config": self.candidate.config,
            "rank": self.rank, "known": len(self.known),
            "analytic_rank": self.analytic_rank, "learned_rank": self.learned_rank,
            "measured_us": measured, "analytic_us": self.bound.total_us,
            "learned_us": None if chosen is None else chosen.learned_us,
            "analytic_rho": self.analytic_rho, "learned_rho": self.learned_rho,
            "roofline_us": self.roofline_us,
            "roof_share": None if measured is None else self.roofline_us / measured,
            "bound": {
                "kind": self.bound.kind, "compute_us": self.bound.compute_us,
                "memory_us": self.bound.memory_us, "launch_us": self.bound.launch_us,
            },
            "work": {
                "ops": dict(self.counts.ops), "bytes": dict(self.counts.bytes),
                "traits": dict(self.counts.traits),
            },
            "matters": [{"feature": n, "change": c} for n, c in self.matters],
            "losers": [
                {
                    "schedule": x.candidate.schedule, "config": x.candidate.config,
                    "measured_us": x.measured_us, "analytic_us": x.predicted_us,
                    "bound": {"kind": x.bound.kind}, "reason": x.reason,
                }
                for x in self.losers
            ],
            "origin": self.origin,
        }  # fmt: skip


def explain(
    space: JointSpace,
    db: Database | None,
    device: DeviceModel,
    objective: Objective,
    chosen: Candidate | None = None,
    extra: Mapping[Candidate, Result] | None = None,
) -> Explanation:
    """Explain the choice of a workload's kernel.

    Args:
        space: Its candidates on the target.
        db: Records (packaged ones count besides).
        device: Rates for the analytic model.
        objective: What is best.
        chosen: The candidate to explain; None: the best that is known, else the default.
        extra: Further results, such as those kept in an artifact; used where nothing else is known.

    Raises:
        MissingExtra: xgboost is not installed.
    """
    found = dict(known_results(space, db))
    kept = not found and bool(extra)
    found = found or dict(extra or {})
    known = _known(space, found, device)
    measured = use_measured([k.result for k in known])
    fastest = min((k.result.latency_us for k in known), default=0.0)
    known.sort(key=lambda k: objective.score(k.result.point(measured), fastest))
    if chosen is None:
        chosen = known[0].candidate if known else space.defaults()[0]
    mine = next((k for k in known if k.candidate == chosen), None)
    counts = mine.counts if mine else work_of(space, chosen, None)
    bound = bound_of(counts, space.hardware, device)
    times = [k.result.latency_us for k in known]
    learned = [k.learned_us for k in known if k.learned_us is not None]
    need = get_op(space.workload.op).counts(space.workload)
    return Explanation(
        space, mine, chosen, counts, bound, tuple(known),
        1 + known.index(mine) if mine else None,
        device.latency_us(need, space.hardware),
        rank_correlation([k.analytic_us for k in known], times),
        rank_correlation(learned, times) if len(learned) == len(times) else None,
        what_matters(_samples(space, known, device)),
        _losers(space, known, mine, chosen, bound, device, objective),
        _origin(space, mine, db, kept),
    )  # fmt: skip


def _known(
    space: JointSpace, found: Mapping[Candidate, Result], device: DeviceModel
) -> list[Known]:
    out = []
    for candidate, result in list(found.items())[:MOST]:
        counts = work_of(space, candidate, result)
        bound = bound_of(counts, space.hardware, device)
        analytic = device.latency_us(counts, space.hardware)
        out.append(Known(candidate, result, counts, bound, analytic, None))
    learned = held_out_us(_samples(space, out, device))
    if learned is None:
        return out
    return [
        Known(k.candidate, k.result, k.counts, k.bound, k.analytic_us, us)
        for k, us in zip(out, learned, strict=True)
    ]


def _samples(space: JointSpace, known: Sequence[Known], device: DeviceModel) -> list[Sample]:
    """Return measured candidates as the learned model takes them."""
    features = Extractor(space.workload, space.hardware, device)
    group = str(space.workload)
    return [
        Sample(
            (features(k.counts, k.candidate.schedule, k.candidate.config),),
            k.result.latency_us,
            group,
        )
        for k in known
    ]


def _losers(
    space: JointSpace, known: Sequence[Known], mine: Known | None, chosen: Candidate, bound: Bound,
    device: DeviceModel, objective: Objective,
) -> list[Loser]:  # fmt: skip
    """Return the best of each other algorithm by the objective, the nearest first; unmeasured ones come last.

    ``known`` is in the order of the objective.
    """
    measured = use_measured([k.result for k in known])
    place = {k.candidate: i for i, k in enumerate(known)}
    best: dict[str, Known] = {}
    for k in known:
        best.setdefault(k.candidate.schedule, k)
    out = []
    for name in space.schedules:
        if name == chosen.schedule:
            continue
        if (known_best := best.get(name)) is not None:
            out.append(
                Loser(
                    known_best.candidate, known_best.result.latency_us, known_best.analytic_us,
                    known_best.bound,
                    _why(known_best, mine, bound, objective, measured),
                )
            )  # fmt: skip
            continue
        candidate = next(c for c in space.defaults() if c.schedule == name)
        counts = work_of(space, candidate, None)
        theirs = bound_of(counts, space.hardware, device)
        predicted = device.latency_us(counts, space.hardware)
        reason = (
            f"not measured; the model expects {predicted:.3g} us of its default, "
            f"{predicted / bound.total_us:.2f} x what it expects of the chosen one: {theirs}"
        )
        out.append(Loser(candidate, None, predicted, theirs, reason))
    return sorted(out, key=lambda x: (place.get(x.candidate, len(known)), x.predicted_us))


def _why(
    loser: Known, winner: Known | None, winner_bound: Bound, objective: Objective, measured: bool
) -> str:
    """Say in one line why a measured candidate lost."""
    text = str(loser.bound)
    if winner is None:
        return text
    ratio = loser.result.latency_us / winner.result.latency_us
    same = abs(ratio - 1) < CLOSE
    parts = ["as fast to within 2 %" if same else f"{ratio:.2f} x the time"]
    theirs, ours = loser.result.point(measured)[1], winner.result.point(measured)[1]
    if objective.kind != "latency" and theirs is not None and ours:
        kind = "measured" if measured else "modelled"
        parts.append(f"{theirs / ours:.2f} x the energy, {kind}")
    parts.append(text)
    excess = _excess(loser, winner)
    if excess:
        parts.append(excess)
    expected = loser.analytic_us / winner_bound.total_us
    if ratio > 1.05 and expected < 0.95:
        parts.append(f"the model is wrong here: it expects {expected:.2f} x")
    return "; ".join(parts)


def _excess(loser: Known, winner: Known) -> str:
    """Name what of its limiting resource the loser needs more of."""
    kind = loser.bound.kind
    if kind == "launch":
        return ""
    name = loser.bound.level if kind == "memory" else loser.bound.operation
    mine = (loser.counts.bytes if kind == "memory" else loser.counts.ops).get(name, 0.0)
    theirs = (winner.counts.bytes if kind == "memory" else winner.counts.ops).get(name, 0.0)
    what = f"bytes from {name}" if kind == "memory" else name
    if theirs <= 0:
        return f"the chosen one needs no {what}"
    return f"{mine / theirs:.2f} x the {what}" if mine > 1.02 * theirs else ""


def _origin(space: JointSpace, mine: Known | None, db: Database | None, kept: bool) -> str:
    if mine is None:
        return "never measured: the analytic model's prediction"
    record = mine.result.record
    own = db is not None and any(r.key == record.key for r in db.records(space.workload))
    place = (
        "your records" if own else "the artifact's records" if kept else "records of the package"
    )
    if record.simulated:
        return f"simulated by a cycle model ({place})"
    day = datetime.fromtimestamp(record.time, UTC).strftime(", %Y-%m-%d") if record.time else ""
    how = (
        "compared with the other leaders" if record.phase == "confirm" else "read once in a search"
    )
    if record.twin:
        how = "by the same code under another config"
    where = f"{record.hardware}, {record.threads} threads"
    here = (
        ""
        if measured_here(mine.result, space.hardware)
        else ", another target than this: taken as modelled"
    )
    return f"measured on {where}{day}, {record.cache} caches, {how} ({place}{here})"
