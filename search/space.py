"""What can be tried for one workload: every schedule that supports it, with every config of each."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import schedules_for
from mimo_compile.schedules.base import KnobValue, Schedule, Space


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
            parts = [str(self.workload), self.schedule, self.knobs]
            text = json.dumps(parts, separators=(",", ":"))
            self._named.append(hashlib.sha256(text.encode()).hexdigest()[:16])
        return self._named[0]

    def __str__(self) -> str:
        """Return ``schedule(knob=value, ...)``."""
        return f"{self.schedule}({', '.join(f'{k}={v}' for k, v in self.knobs)})"


@lru_cache(maxsize=4096, typed=True)
def _neighbours(
    values: tuple[KnobValue, ...], old: KnobValue | None
) -> tuple[tuple[KnobValue, ...], npt.NDArray[np.float64]]:
    """Return a knob's other values with the running sum of their shares; neighbours count twice."""
    at = values.index(old) if old in values else -2
    others = [i for i, v in enumerate(values) if v != old]
    weight = np.array([2.0 if abs(i - at) == 1 else 1.0 for i in others])
    shares = (weight / weight.sum()).cumsum()
    return tuple(values[i] for i in others), shares / shares[-1]


class JointSpace:
    """The choice of algorithm and of its knobs as one search space."""

    def __init__(
        self, workload: Workload, hardware: Hardware, schedules: Sequence[Schedule] | None = None
    ) -> None:
        """Collect the spaces of all schedules that support the workload (or of those given).

        Raises:
            UsageError: no schedule supports the workload on the hardware.
        """
        given = schedules_for(workload, hardware) if schedules is None else schedules
        self.workload = workload
        self.hardware = hardware
        self.schedules: dict[str, Schedule] = {
            s.name: s for s in given if s.op == workload.op and s.supports(workload, hardware)
        }
        if not self.schedules:
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

    def _made(self, schedule: str, knobs: Mapping[str, KnobValue]) -> Candidate | None:
        space = self.spaces[schedule]
        try:
            config = space.make(**knobs)
        except ValueError:
            return None
        return self.candidate(schedule, config) if space.legal(config) else None

    def sample(self, rng: np.random.Generator, tries: int = 64) -> Candidate | None:
        """Draw a legal candidate: a schedule by the logarithm of its size, then each knob uniformly."""
        names = list(self.spaces)
        weight = np.cumsum([1.0 + math.log2(max(1, self.spaces[n].size)) for n in names])
        for _ in range(tries):
            at = weight.searchsorted(rng.random() * weight[-1], side="right")
            name = names[int(at)]
            knobs = self.spaces[name].knobs
            draws = rng.random(len(knobs)).tolist()
            drawn = {k: v[int(x * len(v))] for (k, v), x in zip(knobs.items(), draws, strict=True)}
            if (made := self._made(name, drawn)) is not None:
                return made
        return None

    def mutate(self, parent: Candidate, rng: np.random.Generator) -> Candidate | None:
        """Change one knob; values near the old one in the knob's order are twice as likely."""
        space = self.spaces[parent.schedule]
        open_knobs = [k for k, v in space.knobs.items() if len(v) > 1]
        if not open_knobs:
            return None
        config = parent.config
        name = open_knobs[int(rng.integers(len(open_knobs)))]
        others, shares = _neighbours(space.knobs[name], config.get(name))
        # What rng.choice(len(others), p=...) does, without its checks: a search mutates very often.
        pick = others[int(shares.searchsorted(rng.random(), side="right"))]
        knobs = {k: config.get(k, v[0]) for k, v in space.knobs.items()}
        return self._made(parent.schedule, {**knobs, name: pick})

    def neighbours(self, parent: Candidate) -> Iterator[Candidate]:
        """Enumerate the legal candidates that differ from ``parent`` in one knob."""
        space, config = self.spaces[parent.schedule], parent.config
        knobs = {k: config.get(k, v[0]) for k, v in space.knobs.items()}
        for name, values in space.knobs.items():
            for value in values:
                if value == knobs[name]:
                    continue
                if (made := self._made(parent.schedule, {**knobs, name: value})) is not None:
                    yield made

    def crossover(self, a: Candidate, b: Candidate, rng: np.random.Generator) -> Candidate | None:
        """Take each knob from one of two configs of the same schedule."""
        if a.schedule != b.schedule:
            return None
        left, right = a.config, b.config
        knobs = {
            k: (left if rng.random() < 0.5 else right).get(k, v[0])
            for k, v in self.spaces[a.schedule].knobs.items()
        }
        return self._made(a.schedule, knobs)

    def __iter__(self) -> Iterator[Candidate]:
        """Enumerate all legal candidates."""
        for name, space in self.spaces.items():
            for config in space:
                yield self.candidate(name, config)

    def enumerate(self, limit: int = 512) -> list[Candidate] | None:
        """Return all legal candidates, or None when there may be more than ``limit``."""
        return list(self) if self.size <= limit else None
