"""What to minimise: the grammar of ``--objective``, scores of points, Pareto fronts.

A point is (latency in microseconds, energy in millijoules or None) of one kernel, or of a whole model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from mimo_compile.errors import UsageError

Kind = Literal["latency", "energy", "edp", "ed2p", "energy@latency", "latency@energy", "pareto"]
Point = tuple[float, float | None]
Item = TypeVar("Item")

_LIMIT = re.compile(r"(energy@latency|latency@energy):(\d+(?:\.\d+)?(?:e-?\d+)?)(mJ|J)?\Z")
_PLAIN = ("latency", "energy", "edp", "ed2p", "pareto")
_WINDOW = {"energy": 2.0, "edp": 1.5, "ed2p": 1.25, "pareto": 2.0, "latency@energy": 2.0}
_EXPONENT = {"edp": 2.0, "ed2p": 3.0, "pareto": 2.0, "latency@energy": 2.0}
BEHIND = 1e30
"""Scores from here on belong to candidates that miss a limit: behind all others."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A parsed objective. ``limit``: factor on the best latency, or millijoules for ``latency@energy``."""

    kind: Kind
    limit: float | None = None
    alone: bool = False
    """True for a search of one kernel, which then has the whole budget of ``latency@energy``."""

    @property
    def needs_energy(self) -> bool:
        """True when energies decide."""
        return self.kind != "latency"

    @property
    def window(self) -> float:
        """Times the best latency up to which a candidate's energy is worth a measurement.

        Slower ones cannot win, or hardly: energy rarely falls as fast as time grows.
        """
        if self.kind == "energy@latency":
            return self.limit or 1.0
        return _WINDOW.get(self.kind, 1.0)

    @property
    def exponent(self) -> float:
        """How the score grows with the latency, energy taken as proportional to it."""
        return 1.0 if self.alone else _EXPONENT.get(self.kind, 1.0)

    def for_one(self, calls: float) -> Objective:
        """Return the objective of a search over a single kernel that is called so often."""
        if self.kind != "latency@energy" or self.limit is None:
            return self
        return replace(self, limit=self.limit / calls, alone=True)

    def __str__(self) -> str:
        """Return the text that parses to it."""
        if self.limit is None:
            return self.kind
        return f"{self.kind}:{self.limit:g}" + ("mJ" if self.kind == "latency@energy" else "")

    def score(self, point: Point, best_latency_us: float | None = None) -> float:
        """Return a number to minimise for one kernel (infinite when energy is needed and absent).

        For ``energy@latency`` points beyond the latency limit rank behind all others, by latency; for
        ``latency@energy`` those beyond the energy limit, by energy. The latter is a whole-model budget:
        of several kernels each is ranked by the product. A Pareto search ranks by the product too; its
        front is what it keeps.
        """
        latency, energy = point
        if self.kind == "latency":
            return latency
        if energy is None:
            return math.inf
        if self.kind == "energy":
            return energy
        if self.kind == "ed2p":
            return energy * latency * latency
        if self.kind == "energy@latency":
            cap = (self.limit or 1.0) * (
                best_latency_us if best_latency_us is not None else latency
            )
            return energy if latency <= cap else BEHIND * (latency / cap)
        if self.alone and self.limit is not None:
            return latency if energy <= self.limit else BEHIND * (energy / self.limit)
        return energy * latency

    def behind(self, slowness: float) -> float:
        """Score a point without energy that is ``slowness`` times as slow as the best."""
        return BEHIND * max(slowness, 1.0)

    def choose(self, items: Sequence[Item], point: Callable[[Item], Point]) -> Item | None:
        """Return the best item of one workload (None when there is none with finite score).

        Without any energy at all, latency decides.
        """
        if not items:
            return None
        fastest = min(point(i)[0] for i in items)
        objective = self
        if all(point(i)[1] is None for i in items):
            objective = Objective("latency")
        best = min(items, key=lambda i: (objective.score(point(i), fastest), point(i)[0]))
        return best if math.isfinite(objective.score(point(best), fastest)) else None


def parse_objective(text: str) -> Objective:
    """Parse ``latency energy edp ed2p pareto energy@latency:1.05 latency@energy:12J``.

    Raises:
        UsageError: the text is not in the grammar.
    """
    if text == "latency":
        return Objective("latency")
    if text in _PLAIN:
        return Objective(text)  # type: ignore[arg-type]
    match = _LIMIT.match(text)
    if match:
        limit = float(match[2])
        if match[1] == "energy@latency" and match[3] is None and limit >= 1:
            return Objective("energy@latency", limit)
        if match[1] == "latency@energy" and match[3] is not None and limit > 0:
            return Objective("latency@energy", limit * (1000.0 if match[3] == "J" else 1.0))
    raise UsageError(
        f"unknown objective {text!r} (--objective)",
        remedy="use latency, energy, edp, ed2p, pareto, energy@latency:1.05 (a factor of at least 1) "
        "or latency@energy:12J",
    )


def pareto_front(items: Sequence[Item], point: Callable[[Item], Point]) -> list[Item]:
    """Return the items that no other dominates, fastest first; of equal points the first stays.

    An item without energy counts as infinitely expensive.
    """

    def full(item: Item) -> tuple[float, float]:
        latency, energy = point(item)
        return latency, math.inf if energy is None else energy

    front: list[Item] = []
    least = math.nan
    for item in sorted(items, key=full):
        energy = full(item)[1]
        if not front or energy < least:
            front.append(item)
            least = energy
    return front
