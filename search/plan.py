"""One choice for each workload of a model, taken for the whole model at once.

Each workload brings its non-dominated options (for each tensor layout separately, since tensors that
several workloads share must lie in memory in one way). Which option each takes is a multiple-choice
knapsack, solved exactly by HiGHS through `scipy.optimize.milp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import MimoError, MissingExtra, UsageError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import known_results, measured_here, use_measured
from mimo_compile.search.objective import Objective, pareto_front, parse_objective
from mimo_compile.search.space import Candidate, JointSpace

Source = Literal["measured", "modelled", "default"]
Tensor = tuple[Workload, str]
"""A tensor as one workload sees it: the workload and a name in its schedules' ``layouts``."""

MODELLED_PENALTY = 3.0
"""Factor on the roofline time of a config that was never measured: it stands behind honest measurements."""
_MANY = 4096


@dataclass(frozen=True, slots=True)
class Option:
    """One way to compute a workload, with its cost for one call."""

    candidate: Candidate
    latency_us: float
    energy_mj: float
    layouts: tuple[tuple[str, str], ...]
    source: Source
    energy_source: str
    """Meter that measured the energy, or ``modelled``."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What the plan takes for one workload."""

    workload: Workload
    calls: float
    option: Option
    schedule: Schedule
    config: Any


@dataclass(frozen=True, slots=True)
class Plan:
    """Choices for all workloads, with the sums over all calls."""

    choices: Mapping[Workload, Choice]
    objective: Objective
    latency_us: float
    energy_mj: float
    energy_source: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the manifest and ``--json``."""
        rows = [
            {
                "workload": str(c.workload), "calls": c.calls, "schedule": c.option.candidate.schedule,
                "schedule_version": c.schedule.version, "config": c.option.candidate.config,
                "latency_us": c.option.latency_us, "energy_mj": c.option.energy_mj,
                "source": c.option.source, "energy_source": c.option.energy_source,
            }
            for c in self.choices.values()
        ]  # fmt: skip
        return {
            "objective": str(self.objective), "latency_us": self.latency_us, "energy_mj": self.energy_mj,
            "energy_source": self.energy_source, "choices": rows,
        }  # fmt: skip


@dataclass(slots=True)
class _Use:
    space: JointSpace
    calls: float
    options: list[Option]


def make_plan(
    workloads: Mapping[Workload, float],
    hardware: Hardware,
    *,
    objective: str | Objective = "latency",
    db: Database | None = None,
    shared: Iterable[Sequence[Tensor]] = (),
    schedules: Sequence[Schedule] | None = None,
    device: DeviceModel | None = None,
) -> Plan:
    """Choose a schedule and config for each workload.

    Args:
        workloads: Each with the number of its calls in one run of the model.
        hardware: The target.
        objective: What the whole model should be best in.
        db: Records (packaged ones are used besides).
        shared: Groups of tensors that are one tensor and so must have one layout.
        schedules: Algorithms to choose from (None: all that are registered).
        device: Rates for what was not measured.

    Raises:
        UsageError: no schedule for a workload, ``pareto`` (which is for searches), or a budget of
            energy or latency that no choice keeps.
        MimoError: workloads that share a tensor have no layout in common.
    """
    goal = parse_objective(objective) if isinstance(objective, str) else objective
    if goal.kind == "pareto":
        raise UsageError("a plan needs one objective, not pareto", remedy="pareto is for `tune`")
    model = device or DeviceModel.guess(hardware)
    uses = {
        w: _use(JointSpace(w, hardware, schedules), calls, db, model)
        for w, calls in workloads.items()
    }
    groups = [[t for t in group if t[0] in uses] for group in shared]
    groups = [g for g in groups if len({w for w, _ in g}) > 1]
    _level_energy(uses, model)
    _offer_layouts(uses, groups, model)
    for use in uses.values():
        use.options = _prune(use.options)
    picks = _solve(list(uses.values()), _links(uses, groups), goal)
    choices = {}
    for (workload, use), index in zip(uses.items(), picks, strict=True):
        option = use.options[index]
        schedule = use.space.schedules[option.candidate.schedule]
        choices[workload] = Choice(
            workload, use.calls, option, schedule, use.space.config(option.candidate)
        )
    sources = {c.option.energy_source for c in choices.values()}
    return Plan(
        choices,
        goal,
        sum(c.calls * c.option.latency_us for c in choices.values()),
        sum(c.calls * c.option.energy_mj for c in choices.values()),
        sources.pop() if len(sources) == 1 else "modelled",
    )


# -- options -----------------------------------------------------------------------------------


def _option(
    space: JointSpace, c: Candidate, t: float, e: float, source: Source, meter: str
) -> Option:
    layouts = tuple(sorted(space.layouts(c).items()))
    return Option(c, t, e, layouts, source, meter)


def _modelled(space: JointSpace, c: Candidate, device: DeviceModel, source: Source) -> Option:
    """Cost by the roofline, of the kernel's declared work where that is cheap, else of the necessary."""
    schedule = space.schedules[c.schedule]
    cheap = type(schedule).work is not Schedule.work
    counts = (
        schedule.work(space.workload, space.config(c), space.hardware)
        if cheap
        else get_op(space.workload.op).counts(space.workload)
    )
    rank = 1.0 + 0.01 * list(space.schedules).index(c.schedule)  # preference order breaks ties
    latency = device.latency_us(counts, space.hardware) * MODELLED_PENALTY * rank
    return _option(space, c, latency, device.energy_mj(counts, latency), source, "modelled")


def _use(space: JointSpace, calls: float, db: Database | None, device: DeviceModel) -> _Use:
    found = known_results(space, db)
    measured = use_measured([r for _, r in found])
    options = []
    for candidate, r in found:
        latency, energy = r.point(measured)
        if energy is None:
            counts = get_op(space.workload.op).counts(space.workload)
            energy = device.energy_mj(counts, latency)
        here = measured_here(r, space.hardware)
        source: Source = "measured" if here else "modelled"
        meter = r.energy_source if measured and here else "modelled"
        options.append(_option(space, candidate, latency, energy, source, meter))
    if not options:
        options = [_modelled(space, c, device, "default") for c in space.defaults()]
    return _Use(space, calls, options)


def _level_energy(uses: Mapping[Workload, _Use], device: DeviceModel) -> None:
    """Use modelled energies throughout unless all options were measured by one meter."""
    meters = {o.energy_source for u in uses.values() for o in u.options}
    if meters == {"modelled"} or (len(meters) == 1 and meters):
        return
    for use in uses.values():
        counts = get_op(use.space.workload.op).counts(use.space.workload)
        use.options = [
            Option(
                o.candidate,
                o.latency_us,
                device.energy_mj(counts, o.latency_us),
                o.layouts,
                o.source,
                "modelled",
            )
            for o in use.options
        ]


def _offer_layouts(
    uses: Mapping[Workload, _Use], groups: Sequence[Sequence[Tensor]], device: DeviceModel
) -> None:
    """Give each workload of a group options in the layouts its partners know, so that they can agree."""
    for group in groups:
        wanted = {dict(o.layouts).get(name, "") for w, name in group for o in uses[w].options}
        for workload, name in group:
            use = uses[workload]
            have = {dict(o.layouts).get(name, "") for o in use.options}
            measured = [o for o in use.options if o.source == "measured"]
            for candidate in _first_with(use.space, name, wanted - have):
                option = _modelled(use.space, candidate, device, "modelled")
                use.options.append(_behind(option, measured) if measured else option)


def _behind(option: Option, measured: Sequence[Option]) -> Option:
    """Cost an unmeasured option at least twice the best measured one: hopes must not beat measurements."""
    return replace(
        option,
        latency_us=max(option.latency_us, 2 * min(o.latency_us for o in measured)),
        energy_mj=max(option.energy_mj, 2 * min(o.energy_mj for o in measured)),
    )


def _first_with(space: JointSpace, name: str, layouts: set[str]) -> list[Candidate]:
    """Return one candidate for each layout of a tensor: a default, else the first in the space."""
    found: dict[str, Candidate] = {}

    def look(candidates: Iterable[Candidate]) -> None:
        for count, c in enumerate(candidates):
            if len(found) == len(layouts) or count >= _MANY:
                return
            layout = space.layouts(c).get(name, "")
            if layout in layouts:
                found.setdefault(layout, c)

    look(space.defaults())
    for schedule in space.schedules.values():
        look(JointSpace(space.workload, space.hardware, [schedule]))
    return [found[k] for k in sorted(found)]


def _prune(options: list[Option]) -> list[Option]:
    """Keep the Pareto front of each combination of layouts."""
    by_layout: dict[tuple[tuple[str, str], ...], list[Option]] = {}
    for option in options:
        by_layout.setdefault(option.layouts, []).append(option)
    fronts = (pareto_front(v, lambda o: (o.latency_us, o.energy_mj)) for v in by_layout.values())
    return [o for front in fronts for o in front]


def _links(
    uses: Mapping[Workload, _Use], groups: Sequence[Sequence[Tensor]]
) -> list[list[tuple[int, list[str]]]]:
    """Return, per group, (index of the workload, layout of the tensor in each of its options)."""
    index = {w: i for i, w in enumerate(uses)}
    return [
        [(index[w], [dict(o.layouts).get(name, "") for o in uses[w].options]) for w, name in group]
        for group in groups
    ]


# -- the knapsack ------------------------------------------------------------------------------


def _solve(
    uses: Sequence[_Use], links: Sequence[Sequence[tuple[int, list[str]]]], goal: Objective
) -> list[int]:
    problem = Knapsack(
        [[u.calls * o.latency_us for o in u.options] for u in uses],
        [[u.calls * o.energy_mj for o in u.options] for u in uses],
        links,
    )
    try:
        return problem.choose(goal)
    except Infeasible as error:
        if error.layouts:
            linked = sorted({i for group in links for i, _ in group})
            names = [str(uses[i].space.workload) for i in linked]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise MimoError(
                f"workloads that share a tensor have no layout in common, among {shown}"
            ) from error
        raise UsageError(f"no plan keeps {goal}: {error}", remedy="give a larger budget") from error


class Infeasible(Exception):
    """No choice satisfies the constraints; ``layouts`` when even without a budget."""

    def __init__(self, text: str, layouts: bool) -> None:
        """Describe what cannot be kept."""
        super().__init__(text)
        self.layouts = layouts


class Knapsack:
    """Choose one option per row; linked rows must choose options with equal labels.

    Args of the constructor: times and energies ``[rows][options]`` (sums matter), and links: for each group
    (row, label of each option).
    """

    def __init__(
        self,
        times: Sequence[Sequence[float]],
        energies: Sequence[Sequence[float]],
        links: Sequence[Sequence[tuple[int, Sequence[str]]]] = (),
    ) -> None:
        """Lay out variables: one for each option, then one for each label of each group."""
        self.sizes = [len(t) for t in times]
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(int)
        self.time = np.array([x for row in times for x in row], float)
        self.energy = np.array([x for row in energies for x in row], float)
        rows, self._equal_to = [], []
        total = int(self.offsets[-1])
        labels = [sorted({s for _, names in g for s in names}) for g in links]
        width = total + sum(len(v) for v in labels)
        for i, size in enumerate(self.sizes):
            row = np.zeros(width)
            row[self.offsets[i] : self.offsets[i] + size] = 1
            rows.append(row)
            self._equal_to.append(1.0)
        at = total
        for group, known in zip(links, labels, strict=True):
            for label in known:
                for i, names in group:
                    row = np.zeros(width)
                    row[[self.offsets[i] + j for j, s in enumerate(names) if s == label]] = 1
                    row[at] = -1
                    rows.append(row)
                    self._equal_to.append(0.0)
                at += 1
        self.width = width
        self.rows = np.array(rows)

    def _minimise(self, cost: Any, caps: Sequence[tuple[Any, float]] = ()) -> list[int]:
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
        except ModuleNotFoundError as error:
            raise MissingExtra("planning", missing="scipy") from error
        pad = self.width - len(self.time)
        scale = float(np.abs(cost).max()) or 1.0
        constraints = [LinearConstraint(self.rows, self._equal_to, self._equal_to)]
        for values, cap in caps:
            constraints.append(
                LinearConstraint(np.pad(values / cap, (0, pad))[None], -np.inf, 1.0 + 1e-9)
            )
        found = milp(
            np.pad(cost / scale, (0, pad)),
            constraints=constraints,
            integrality=np.ones(self.width),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": 60.0},
        )
        if found.x is None:
            raise Infeasible(str(found.message), not caps)
        pick = found.x[: len(self.time)]
        return [
            int(pick[a : a + n].argmax())
            for a, n in zip(self.offsets[:-1], self.sizes, strict=True)
        ]

    def sums(self, picks: Sequence[int]) -> tuple[float, float]:
        """Return total time and energy of a choice."""
        at = self.offsets[:-1] + np.array(picks, int)
        return float(self.time[at].sum()), float(self.energy[at].sum())

    def choose(self, goal: Objective) -> list[int]:
        """Return the index of the option taken in each row.

        Raises:
            Infeasible: nothing satisfies the constraints.
        """
        if goal.kind == "latency":
            return self._minimise(self.time)
        if goal.kind == "energy":
            return self._minimise(self.energy)
        if goal.kind == "latency@energy":
            assert goal.limit is not None
            self._minimise(self.energy)  # tells a layout conflict from a budget too small
            return self._minimise(self.time, [(self.energy, goal.limit)])
        if goal.kind == "energy@latency":
            best = self.sums(self._minimise(self.time))[0]
            return self._minimise(self.energy, [(self.time, best * (goal.limit or 1.0))])
        power = 2 if goal.kind == "ed2p" else 1
        return self._product(lambda t, e: e * t**power)

    def _product(self, value: Callable[[float, float], float], most: int = 400) -> list[int]:
        """Walk the whole-model Pareto front from least energy to least time; keep the best product.

        Each step asks for the least energy at a strictly smaller time; points nearer in time than the
        whole range over ``most`` are taken as one.
        """
        fastest = self.sums(self._minimise(self.time))[0]
        picks = self._minimise(self.energy)
        best, best_value = picks, math.inf
        step = max((self.sums(picks)[0] - fastest) / most, fastest * 1e-7)
        while True:
            time, energy = self.sums(picks)
            if (v := value(time, energy)) < best_value:
                best, best_value = picks, v
            cap = time - step
            # Even with the energy of this point no faster choice can win any more.
            if cap < fastest or value(fastest, energy) >= best_value:
                break
            try:
                picks = self._minimise(self.energy, [(self.time, cap)])
            except Infeasible:
                break
        final = self._minimise(self.time)
        return final if value(*self.sums(final)) < best_value else best
