"""What can be tried for one workload: every schedule that supports it, with every config of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mimo_compile.errors import UsageError
from mimo_compile.ir import functions
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import schedules_for
from mimo_compile.schedules.base import KnobValue, Schedule, Space

ORDER = "order"
"""Stands among the names of tensors for the order in which a kernel adds up."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One schedule with one config, as plain values."""

    workload: Workload
    schedule: str
    knobs: tuple[tuple[str, KnobValue], ...]
    """The config's JSON form, sorted by name."""
    _named: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    """The key, once it was asked for."""

    @property
    def config(self) -> dict[str, KnobValue]:
        """The config's JSON form."""
        return dict(self.knobs)

    @property
    def key(self) -> str:
        """Structural identity within one search (16 hex digits)."""
        if not self._named:
            text = msgspec.json.encode((str(self.workload), self.schedule, self.knobs))
            self._named.append(hashlib.sha256(text).hexdigest()[:16])
        return self._named[0]

    def __str__(self) -> str:
        """Return ``schedule(knob=value, ...)``."""
        return f"{self.schedule}({', '.join(f'{k}={v}' for k, v in self.knobs)})"


class JointSpace:
    """The choice of algorithm and of its knobs as one search space."""

    def __init__(
        self,
        workload: Workload,
        hardware: Hardware,
        schedules: Sequence[Schedule] | None = None,
        *,
        ordered: bool = False,
    ) -> None:
        """Collect the spaces of all schedules that support the workload (or of those given).

        ``ordered``: candidates are also told apart by the order in which they add up (`bonds`).

        Raises:
            UsageError: no schedule supports the workload on the hardware, or it is a function that is not
                known here.
        """
        given = schedules_for(workload, hardware) if schedules is None else schedules
        self.workload = workload
        self.hardware = hardware
        self.ordered = ordered
        self.schedules: dict[str, Schedule] = {
            s.name: s for s in given if s.op == workload.op and s.supports(workload, hardware)
        }
        if not self.schedules:
            if functions.is_function(workload):
                functions.function_of(workload)
            raise UsageError(
                f"no schedule supports {workload} on {hardware.name}",
                remedy="`mimo-compile targets --formats` lists what has kernels where",
            )
        self.spaces: dict[str, Space] = {
            name: s.space(workload, hardware) for name, s in self.schedules.items()
        }

    @property
    def size(self) -> int:
        """Number of candidates before the schedules' constraints."""
        return sum(s.size for s in self.spaces.values())

    @property
    def costly(self) -> bool:
        """True when some candidate's work is known only after generating its code."""
        return any(type(s).work is Schedule.work for s in self.schedules.values())

    def candidate(self, schedule: str, config: Any) -> Candidate:
        """Name a config of a schedule."""
        values = self.schedules[schedule].config_to_json(config)
        return Candidate(self.workload, schedule, tuple(sorted(values.items())))

    def config(self, candidate: Candidate) -> Any:
        """Rebuild the config object of a candidate."""
        return self.schedules[candidate.schedule].config_from_json(candidate.config)

    def layouts(self, candidate: Candidate) -> dict[str, str]:
        """Return the layout names that a candidate asks of its tensors."""
        schedule = self.schedules[candidate.schedule]
        return schedule.layouts(self.workload, self.config(candidate))

    def bonds(self, candidate: Candidate) -> dict[str, str]:
        """Return what several workloads of a plan may have to have in common with a candidate.

        The layouts of its tensors, and under `ORDER`, where it counts, how it adds up: empty if its schedule
        promises nothing (`Schedule.order`).
        """
        bonds = self.layouts(candidate)
        if self.ordered:
            schedule = self.schedules[candidate.schedule]
            bonds[ORDER] = (
                schedule.order(self.workload, self.config(candidate), self.hardware) or ""
            )
        return bonds

    def defaults(self) -> list[Candidate]:
        """Return each schedule's default, the preferred schedule first."""
        return [self.candidate(name, space.default) for name, space in self.spaces.items()]

    def adopt(
        self, schedule: str, config: Mapping[str, Any], threads: int | None = None
    ) -> Candidate | None:
        """Return a recorded config as a candidate of this space, or None if it does not belong.

        ``threads``: what it was measured with. With another number than the target's, whether it runs in
        parallel is what the schedule's default says here.
        """
        space = self.spaces.get(schedule)
        if space is None:
            return None
        if threads not in (None, self.hardware.threads) and "parallel" in space.knobs:
            default = self.schedules[schedule].config_to_json(space.default)
            config = {**config, "parallel": default["parallel"]}
        try:
            made = self.schedules[schedule].config_from_json(config)
            if not space.legal(made):
                return None
            candidate = self.candidate(schedule, made)
        except (TypeError, ValueError, KeyError):
            return None
        inside = all(candidate.config.get(k) in values for k, values in space.knobs.items())
        return candidate if inside or made == space.default else None

    def __iter__(self) -> Iterator[Candidate]:
        """Enumerate all legal candidates."""
        for name, space in self.spaces.items():
            for config in space:
                yield self.candidate(name, config)
