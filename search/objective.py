"""What to minimise: the grammar of ``--objective``, scores of points, Pareto fronts.

A point is (latency in microseconds, energy in millijoules or None) of one kernel, or of a whole model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from mimo_compile.errors import UsageError

Kind = Literal["latency", "energy", "edp", "ed2p", "energy@latency", "latency@energy", "pareto"]
Point = tuple[float, float | None]
Item = TypeVar("Item")

_LIMIT = re.compile(r"(energy@latency|latency@energy):(\d+(?:\.\d+)?(?:e-?\d+)?)(mJ|J)?\Z")
_PLAIN = ("latency", "energy", "edp", "ed2p", "pareto")


@dataclass(frozen=True, slots=True)
class Objective:
    """A parsed objective. ``limit``: factor on the best latency, or millijoules for ``latency@energy``."""

    kind: Kind
    limit: float | None = None

    @property
    def needs_energy(self) -> bool:
        """True when energies decide."""
        return self.kind != "latency"

    def __str__(self) -> str:
        """Return the text that parses to it."""
        if self.limit is None:
            return self.kind
        return f"{self.kind}:{self.limit:g}" + ("mJ" if self.kind == "latency@energy" else "")

    def score(self, point: Point, best_latency_us: float | None = None) -> float:
        """Return a number to minimise for one kernel (infinite when energy is needed and absent).

        For ``energy@latency`` points beyond the latency limit rank behind all others, by latency.
        ``latency@energy`` is a whole-model budget: for one kernel the product of both ranks. A Pareto
        search ranks by the product too; its front is what it keeps.
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
            return energy if latency <= cap else 1e30 * (latency / cap)
        return energy * latency

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
