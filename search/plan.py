"""One choice for each workload of a model, taken for the whole model at once.

Each workload brings its non-dominated options (for each tensor layout separately, since tensors that
several workloads share must lie in memory in one way). Which option each takes is a multiple-choice
knapsack (`search.knapsack`). A `Planner` gathers the options once; each further objective takes
milliseconds and no measurement.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import MimoError, UsageError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.database import Database
from mimo_compile.search.knapsack import Infeasible, Knapsack
from mimo_compile.search.lookup import Kept
from mimo_compile.search.objective import Objective, parse_objective
from mimo_compile.search.plan_options import Layouts, Option, Tensor, gather_options, layout_links
from mimo_compile.search.space import JointSpace


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
    """The meter behind all of the energies, or ``modelled``: plans never mix the two."""
    seconds: float = 0.0
    """What choosing took, without gathering the options."""
    proved: bool = True
    """False if the solver ran out of time before it could prove that no plan is better."""

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


class Planner:
    """The options of a model's workloads, from which it plans for any objective."""

    def __init__(
        self,
        workloads: Mapping[Workload, float],
        hardware: Hardware,
        *,
        db: Database | None = None,
        shared: Iterable[Sequence[Tensor]] = (),
        schedules: Sequence[Schedule] | None = None,
        device: DeviceModel | None = None,
        packed: Mapping[Workload, Layouts] | None = None,
        kept: Kept | None = None,
        ordered: Collection[Workload] = (),
    ) -> None:
        """Gather the options; see `make_plan` for the arguments.

        ``packed``: layouts that a workload's tensors have already; options with others are left out.
        ``kept``: records of something that was compiled before.

        Raises:
            UsageError: no schedule for a workload.
            EnvironmentMismatch: no schedule reads the tensors as they are packed.
        """
        begin = time.perf_counter()
        spaces = {w: JointSpace(w, hardware, schedules, ordered=w in ordered) for w in workloads}
        self._uses, groups = gather_options(
            spaces, workloads, shared, db, device or DeviceModel.guess(hardware), packed, kept
        )
        self._links = layout_links(self._uses, groups)
        uses = list(self._uses.values())
        self._knapsack = Knapsack(
            [[u.calls * o.latency_us for o in u.options] for u in uses],
            [[u.calls * o.energy_mj for o in u.options] for u in uses],
            self._links,
        )
        self.seconds = time.perf_counter() - begin
        """What gathering took."""

    @property
    def options(self) -> dict[Workload, tuple[Option, ...]]:
        """What each workload can choose from: its Pareto front, for each layout of its tensors."""
        return {w: tuple(u.options) for w, u in self._uses.items()}

    def plan(self, objective: str | Objective = "latency") -> Plan:
        """Choose for the whole model.

        Raises:
            UsageError: ``pareto`` (which is for searches), or a budget that no choice keeps; the message
                names the least energy possible.
            MimoError: workloads that share a tensor have no layout in common.
        """
        begin = time.perf_counter()
        goal = parse_objective(objective) if isinstance(objective, str) else objective
        if goal.kind == "pareto":
            raise UsageError(
                "a plan needs one objective, not pareto", remedy="pareto is for `tune`"
            )
        try:
            picks = self._knapsack.choose(goal)
        except Infeasible as error:
            raise self._explained(error, goal) from error
        choices = {}
        for (workload, use), index in zip(self._uses.items(), picks, strict=True):
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
            time.perf_counter() - begin,
            self._knapsack.proved,
        )

    def _explained(self, error: Infeasible, goal: Objective) -> MimoError:
        if error.layouts:
            workloads = list(self._uses)
            names = [str(workloads[i]) for i in sorted({i for g in self._links for i, _ in g})]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            return MimoError(
                f"workloads that share a tensor have no layout in common, among {shown}"
            )
        remedy = "give a larger budget"
        if error.least_mj is not None:
            remedy += f", latency@energy:{_at_least(error.least_mj):g}mJ or more"
        return UsageError(f"no plan keeps {goal}: {error}", remedy=remedy)


def _at_least(value: float, digits: int = 4) -> float:
    """Round up to some digits, so that what is printed can be kept."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return math.ceil(value / unit * (1 - 1e-12)) * unit


def make_plan(
    workloads: Mapping[Workload, float],
    hardware: Hardware,
    *,
    objective: str | Objective = "latency",
    db: Database | None = None,
    shared: Iterable[Sequence[Tensor]] = (),
    schedules: Sequence[Schedule] | None = None,
    device: DeviceModel | None = None,
    ordered: Collection[Workload] = (),
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
        ordered: Workloads whose order of sums counts: groups of ``shared`` that hold them with `ORDER` add
            up alike.

    Raises:
        UsageError: no schedule for a workload, ``pareto`` (which is for searches), or a budget of
            energy or latency that no choice keeps.
        MimoError: workloads that share a tensor have no layout in common.
    """
    goal = parse_objective(objective) if isinstance(objective, str) else objective
    if goal.kind == "pareto":  # refused before anything is gathered
        raise UsageError("a plan needs one objective, not pareto", remedy="pareto is for `tune`")
    planner = Planner(
        workloads, hardware, db=db, shared=shared, schedules=schedules, device=device,
        ordered=ordered,
    )  # fmt: skip
    return planner.plan(goal)
