"""What each workload of a plan can choose from: measured candidates, and stand-ins where there are none.

Options are gathered once for a model; any objective can then be planned from them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import EnvironmentMismatch, MimoError
from mimo_compile.ir import functions
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import KnobValue, Schedule, Space
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import Kept, known_results, measured_here, use_measured
from mimo_compile.search.objective import pareto_front
from mimo_compile.search.space import ORDER, Candidate, JointSpace

Layouts = tuple[tuple[str, str], ...]
"""Sorted (tensor, its layout); `ORDER` among them where it counts."""
Source = Literal["measured", "modelled", "default"]
Tensor = tuple[Workload, str]
"""A tensor as one workload sees it: the workload and a name in its schedules' ``layouts``; or `ORDER`."""

MODELLED_PENALTY = 3.0
"""Factor on the roofline time of a config that was never measured: it stands behind honest measurements."""
_MANY = 4096
"""Configs of one schedule that are looked at for a layout."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to compute a workload, with its cost for one call."""

    candidate: Candidate
    latency_us: float
    energy_mj: float
    layouts: Layouts
    source: Source
    energy_source: str
    """Meter that measured the energy, or ``modelled``."""
    modelled_mj: float
    """Energy by the model, whatever a meter said."""


@dataclass(slots=True)
class Use:
    """A workload with its calls and all that it can be computed by."""

    space: JointSpace
    calls: float
    options: list[Option]


def gather_options(
    workloads: Mapping[Workload, JointSpace],
    calls: Mapping[Workload, float],
    shared: Iterable[Sequence[Tensor]],
    db: Database | None,
    device: DeviceModel,
    packed: Mapping[Workload, Layouts] | None = None,
    kept: Kept | None = None,
) -> tuple[dict[Workload, Use], list[list[Tensor]]]:
    """Return each workload's options, and the groups of tensors among them that must agree.

    Args:
        workloads: Each with its candidates.
        calls: How often each is called.
        shared: Groups of tensors that are one tensor and so must have one layout.
        db: Records (packaged ones are used besides).
        device: Rates for what was not measured.
        packed: Layouts that a workload's tensors have already: it has options in no other ones.
        kept: Records of something that was compiled before.

    Raises:
        EnvironmentMismatch: no kernel reads tensors as they are packed.
        MimoError: where the order of sums counts, no kernel of a workload promises one.
    """
    uses = {w: _use(space, calls[w], db, device, kept) for w, space in workloads.items()}
    for workload, layouts in (packed or {}).items():
        _keep_layouts(uses[workload], layouts, device)
    groups = [[t for t in group if t[0] in uses] for group in shared]
    groups = [g for g in groups if len({w for w, _ in g}) > 1]
    _level_energy(uses)
    _offer_layouts(uses, groups, device)
    _drop_unordered(uses)
    _level_energy(uses)  # stand-ins have no joules but modelled ones
    for use in uses.values():
        use.options = _prune(use.options)
    return uses, groups


def tensors(layouts: Layouts) -> Layouts:
    """Return the layouts of tensors alone."""
    return tuple(pair for pair in layouts if pair[0] != ORDER)


def _option(
    space: JointSpace, c: Candidate, t: float, e: tuple[float, float], source: Source, meter: str
) -> Option:
    layouts = tuple(sorted(space.bonds(c).items()))
    return Option(c, t, e[0], layouts, source, meter, e[1])


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
    energy = device.energy_mj(counts, latency)
    return _option(space, c, latency, (energy, energy), source, "modelled")


def _use(
    space: JointSpace, calls: float, db: Database | None, device: DeviceModel, kept: Kept | None
) -> Use:
    found = known_results(space, db, kept)
    measured = use_measured([r for _, r in found])
    options = []
    for candidate, r in found:
        modelled = r.modelled_mj
        if modelled is None:
            counts = get_op(space.workload.op).counts(space.workload)
            modelled = device.energy_mj(counts, r.latency_us)
        here = measured_here(r, space.hardware)
        energy = r.measured_mj if measured else None
        source: Source = "measured" if here else "modelled"
        meter = r.energy_source if energy is not None and here else "modelled"
        both = (modelled if energy is None else energy, modelled)
        options.append(_option(space, candidate, r.latency_us, both, source, meter))
    if not options:
        defaults = space.defaults()
        if functions.is_function(space.workload):  # the model of them is too coarse to choose by
            defaults = defaults[:1]
        options = [_modelled(space, c, device, "default") for c in defaults]
    return Use(space, calls, options)


def _level_energy(uses: Mapping[Workload, Use]) -> None:
    """Use modelled energies throughout unless all options were measured by one meter."""
    meters = {o.energy_source for u in uses.values() for o in u.options}
    if len(meters) == 1 and meters != {"modelled"}:
        return
    for use in uses.values():
        use.options = [
            replace(o, energy_mj=o.modelled_mj, energy_source="modelled") for o in use.options
        ]


# -- layouts -----------------------------------------------------------------------------------


def _offer_layouts(
    uses: Mapping[Workload, Use], groups: Sequence[Sequence[Tensor]], device: DeviceModel
) -> None:
    """Give each workload of a group options in the layouts its partners know, so that they can agree."""
    for group in groups:
        wanted = {dict(o.layouts).get(name, "") for w, name in group for o in uses[w].options}
        if any(name == ORDER for _, name in group):
            wanted.discard("")
        for workload, name in group:
            use = uses[workload]
            have = {dict(o.layouts).get(name, "") for o in use.options}
            measured = [o for o in use.options if o.source == "measured"]
            for candidate in nearest_with(use.space, name, wanted - have):
                option = _modelled(use.space, candidate, device, "modelled")
                use.options.append(_behind(option, measured) if measured else option)


def _drop_unordered(uses: Mapping[Workload, Use]) -> None:
    """Leave out options that promise no order of their sums where it counts.

    Raises:
        MimoError: a workload has no others.
    """
    for workload, use in uses.items():
        use.options = [o for o in use.options if dict(o.layouts).get(ORDER) != ""]
        if not use.options:
            raise MimoError(f"no kernel of {workload} promises an order of its sums")


def _keep_layouts(use: Use, layouts: Layouts, device: DeviceModel) -> None:
    """Leave only options with these layouts; without one, the config nearest to the default stands in."""
    measured = [o for o in use.options if o.source == "measured"]
    use.options = [o for o in use.options if tensors(o.layouts) == layouts]
    if use.options:
        return
    candidate = _nearest(use.space, layouts)
    if candidate is None:
        raise EnvironmentMismatch(
            f"no kernel of {use.space.workload} reads its tensors as they are packed",
            remedy="compile it from its source",
        )
    option = _modelled(use.space, candidate, device, "modelled")
    use.options = [_behind(option, measured) if measured else option]


def _behind(option: Option, measured: Sequence[Option]) -> Option:
    """Cost an unmeasured option at least twice the best measured one: hopes must not beat measurements."""
    return replace(
        option,
        latency_us=max(option.latency_us, 2 * min(o.latency_us for o in measured)),
        energy_mj=max(option.energy_mj, 2 * min(o.energy_mj for o in measured)),
        modelled_mj=max(option.modelled_mj, 2 * min(o.modelled_mj for o in measured)),
    )


def nearest_with(space: JointSpace, name: str, layouts: set[str]) -> list[Candidate]:
    """Return one candidate for each layout of a tensor (those that there are).

    It is a default if one has the layout; else, of the first schedule in order of preference that has it,
    the config nearest to the default: fewest knobs changed, and those by the fewest steps.
    """
    found: dict[str, Candidate] = {}
    for candidate in _nearest_first(space):
        layout = space.bonds(candidate).get(name, "")
        if layout in layouts:
            found.setdefault(layout, candidate)
        if len(found) == len(layouts):
            break
    return [found[k] for k in sorted(found)]


def _nearest(space: JointSpace, layouts: Layouts) -> Candidate | None:
    """Return the first candidate, in the order of `nearest_with`, whose tensors all have these layouts."""
    every = _nearest_first(space)
    return next((c for c in every if tuple(sorted(space.layouts(c).items())) == layouts), None)


def _nearest_first(space: JointSpace) -> Iterator[Candidate]:
    """Yield the defaults, then for each schedule the configs nearest to its own."""
    yield from space.defaults()
    for schedule, configs in space.spaces.items():
        default_knobs = space.schedules[schedule].config_to_json(configs.default)
        for config in itertools.islice(_outwards(configs, default_knobs), _MANY):
            yield space.candidate(schedule, config)


def _outwards(space: Space, default: Mapping[str, KnobValue]) -> Iterator[Any]:
    """Yield the legal configs of a space, those nearest to the default first."""
    base = {name: default.get(name, values[0]) for name, values in space.knobs.items()}
    steps: dict[str, list[tuple[int, KnobValue]]] = {}
    for name, values in space.knobs.items():
        at = values.index(base[name]) if base[name] in values else 0
        away = [(abs(i - at), v) for i, v in enumerate(values) if v != base[name]]
        steps[name] = sorted(away, key=lambda s: s[0])
    for count in range(len(steps) + 1):
        every = (
            (sum(s for s, _ in chosen), dict(zip(names, (v for _, v in chosen), strict=True)))
            for names in itertools.combinations(steps, count)
            for chosen in itertools.product(*(steps[n] for n in names))
        )
        for _, changed in sorted(itertools.islice(every, _MANY), key=lambda c: c[0]):
            try:
                config = space.make(**{**base, **changed})
            except ValueError:
                continue
            if space.legal(config):
                yield config


# -- fronts ------------------------------------------------------------------------------------


def _prune(options: list[Option]) -> list[Option]:
    """Keep the Pareto front of each combination of layouts."""
    by_layout: dict[tuple[tuple[str, str], ...], list[Option]] = {}
    for option in options:
        by_layout.setdefault(option.layouts, []).append(option)
    fronts = (pareto_front(v, lambda o: (o.latency_us, o.energy_mj)) for v in by_layout.values())
    return [o for front in fronts for o in front]


def layout_links(
    uses: Mapping[Workload, Use], groups: Sequence[Sequence[Tensor]]
) -> list[list[tuple[int, list[str]]]]:
    """Return, per group, (index of the workload, layout of the tensor in each of its options).

    A group whose options all have one and the same layout binds nobody and is left out.
    """
    index = {w: i for i, w in enumerate(uses)}
    links = [
        [(index[w], [dict(o.layouts).get(name, "") for o in uses[w].options]) for w, name in group]
        for group in groups
    ]
    return [g for g in links if len({s for _, names in g for s in names}) > 1]
