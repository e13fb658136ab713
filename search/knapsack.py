"""One option for each row: the multiple-choice knapsack behind a whole-model plan, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mimo_compile.errors import MimoError, MissingExtra
from mimo_compile.search.objective import Objective

EQUAL = 1e-9
"""Relative difference below which two sums count as the same; also the slack of a budget."""
_CUTS = 8
"""Times that a choice which HiGHS's tolerance let over a budget is forbidden and another asked for."""
_TIGHTER = 2e-6
"""Part of a budget that is left unused once forbidding did not help; twice what HiGHS may overlook."""
_ROW = 1e3
"""Size of sums for the solver: it is exact to 1e-6, so to 1e-9 of what a budget leaves or costs differ by."""
_SECONDS = 60.0
_STOPPED, _INFEASIBLE = 1, 2
"""Outcomes of scipy's `milp`: out of time (maybe with a choice not proved best), and no choice at all."""

Picks = list[int]
"""The index of the option taken in each row."""
Line = tuple[float, float]
"""Weights of time and energy: what a point was proved to be the least sum of."""


class Infeasible(Exception):
    """No choice satisfies the constraints; ``layouts`` when even without a budget."""

    def __init__(self, text: str, layouts: bool, least_mj: float | None = None) -> None:
        """Describe what cannot be kept; ``least_mj``: the least energy that any choice has."""
        super().__init__(text)
        self.layouts = layouts
        self.least_mj = least_mj


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
        self.free = not links
        self.proved = True
        """False once the solver ran out of time: what it had found was taken, proved to be best or not."""
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

    # -- one program ---------------------------------------------------------------------------

    def _minimise(
        self, cost: Any, caps: Sequence[tuple[Any, float]] = (), known: Picks | None = None
    ) -> Picks:
        """Return the choice of least cost whose sums keep within the caps (up to `EQUAL`).

        HiGHS holds constraints to within 1e-6; a choice that this lets over a cap is forbidden by name. If
        there are more and more of these, the cap is tightened by what HiGHS may overlook.

        Args:
            cost: Of each option.
            caps: Values of each option and the most that their sum may be.
            known: A choice that keeps the caps, for when the solver finds none.
        """
        if self.free and not caps:
            starts = self.offsets[:-1]
            return [int(cost[a : a + n].argmin()) for a, n in zip(starts, self.sizes, strict=True)]
        cuts: list[Any] = []
        tighter = [(values, cap * (1 - _TIGHTER)) for values, cap in caps]
        for attempt in range(_CUTS + 1):
            last = attempt == _CUTS
            try:
                picks = self._milp(cost, tighter if last else caps, [] if last else cuts)
            except Infeasible:
                if known is None:
                    raise
                return known
            at = self._at(picks)
            if all(values[at].sum() <= cap * (1 + EQUAL) for values, cap in caps):
                worse = known is not None and cost[self._at(known)].sum() < cost[at].sum()
                return known if known is not None and worse else picks
            cut = np.zeros(self.width)
            cut[at] = 1
            cuts.append(cut)
        if known is None:
            raise Infeasible("too many choices lie on the budget", False)
        return known

    def _milp(self, cost: Any, caps: Sequence[tuple[Any, float]], cuts: Sequence[Any]) -> Picks:
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
        except ModuleNotFoundError as error:
            raise MissingExtra("planning", missing="scipy") from error
        pad = self.width - len(self.time)
        # HiGHS is content within 1e-6 of the least cost too
        spread = self._above_least(cost)[0]
        goal = spread * (_ROW / (float(spread.max()) or 1.0))
        constraints = [LinearConstraint(self.rows, self._equal_to, self._equal_to)]
        highest = np.ones(self.width)
        for values, cap in caps:
            above, least = self._above_least(values)
            left = cap * (1 + EQUAL) - least
            if left < 0:
                raise Infeasible("the least of every row is over the budget", False)
            over = above > left
            highest[: len(values)][over] = 0
            row = np.where(over, 0.0, above) * (_ROW / (left or 1.0))
            constraints.append(LinearConstraint(np.pad(row, (0, pad))[None], -np.inf, _ROW))
        for cut in cuts:
            constraints.append(LinearConstraint(cut[None], -np.inf, len(self.sizes) - 1))
        found = milp(
            np.pad(goal, (0, pad)),
            constraints=constraints,
            integrality=np.ones(self.width),
            bounds=Bounds(0, highest),
            options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
        )
        if found.status == _STOPPED:
            self.proved = False
        if found.x is None:
            if found.status not in (_STOPPED, _INFEASIBLE):
                raise MimoError(f"the solver of plans failed: {found.message}")
            if found.status == _STOPPED and not caps:
                raise MimoError(f"the solver found no plan within {_SECONDS:g} s")
            raise Infeasible(str(found.message), found.status == _INFEASIBLE and not caps)
        pick = found.x[: len(self.time)]
        return [
            int(pick[a : a + n].argmax())
            for a, n in zip(self.offsets[:-1], self.sizes, strict=True)
        ]

    def _above_least(self, values: Any) -> tuple[Any, float]:
        """Return what options take above the least of their row, and the sum of these leasts."""
        least = np.minimum.reduceat(values, self.offsets[:-1])
        return values - np.repeat(least, self.sizes), float(least.sum())

    def _at(self, picks: Sequence[int]) -> Any:
        return self.offsets[:-1] + np.array(picks, int)

    def sums(self, picks: Sequence[int]) -> tuple[float, float]:
        """Return total time and energy of a choice."""
        at = self._at(picks)
        return float(self.time[at].sum()), float(self.energy[at].sum())

    # -- objectives ----------------------------------------------------------------------------

    def least(
        self, of: str, caps: Sequence[tuple[Any, float]] = (), known: Picks | None = None
    ) -> Picks:
        """Return the choice of least ``time`` or ``energy``; of equal ones that with least of the other.

        ``known``: a choice that keeps the caps, for when the solver finds none.
        """
        first, second = (self.time, self.energy) if of == "time" else (self.energy, self.time)
        picks = self._minimise(first, caps, known)
        best = float(first[self._at(picks)].sum())
        return self._minimise(second, [*caps, (first, best)], picks)

    def choose(self, goal: Objective) -> Picks:
        """Return the index of the option taken in each row.

        Raises:
            Infeasible: nothing satisfies the constraints.
        """
        if goal.kind == "latency":
            return self.least("time")
        if goal.kind == "energy":
            return self.least("energy")
        if goal.kind == "latency@energy":
            assert goal.limit is not None
            cheapest = self.least("energy")  # tells a layout conflict from a budget too small
            time, energy = self.sums(cheapest)
            if energy > goal.limit * (1 + EQUAL):
                text = f"no choice needs less than {energy:.4g} mJ (which takes {time:.4g} us)"
                raise Infeasible(text, False, energy)
            return self.least("time", [(self.energy, goal.limit)], cheapest)
        if goal.kind == "energy@latency":
            fastest = self._minimise(self.time)
            cap = self.sums(fastest)[0] * (goal.limit or 1.0)
            return self.least("energy", [(self.time, cap)], fastest)
        power = 2 if goal.kind == "ed2p" else 1
        return self._product(lambda t, e: e * t**power)

    def _product(self, value: Callable[[float, float], float]) -> Picks:
        """Return the choice of least energy times a power of time, exactly.

        The logarithm of such a product is concave, so its least value over the convex hull of all
        choices lies at a corner of it, and a corner has the least weighted sum for some weights. Corners
        are found between two known ones by the weights for which those two are equal; a region is left
        out where even the crossing of the lines that bound it is no better than the best known.
        """
        fast, cheap = self.least("time"), self.least("energy")
        best = min((fast, cheap), key=lambda p: value(*self.sums(p)))
        least = value(*self.sums(best))
        regions: list[tuple[Picks, Line, Picks, Line]] = [(fast, (1.0, 0.0), cheap, (0.0, 1.0))]
        while regions:
            left, left_line, right, right_line = regions.pop()
            (t0, e0), (t1, e1) = self.sums(left), self.sums(right)
            if t1 - t0 <= EQUAL * t1 or e0 - e1 <= EQUAL * e0:
                continue
            corner = _crossing((t0, e0), left_line, (t1, e1), right_line)
            if value(*corner) >= least * (1 - EQUAL):
                continue
            line = (e0 - e1, t1 - t0)
            picks = self._minimise(line[0] * self.time + line[1] * self.energy)
            t, e = self.sums(picks)
            height = line[0] * t0 + line[1] * e0
            if line[0] * t + line[1] * e >= height * (1 - EQUAL):
                continue  # nothing lies below the straight line between the two
            if value(t, e) < least:
                best, least = picks, value(t, e)
            regions += [(left, left_line, picks, line), (picks, line, right, right_line)]
        return best


def _crossing(
    a: tuple[float, float], la: Line, b: tuple[float, float], lb: Line
) -> tuple[float, float]:
    """Return where the line of weights ``la`` through ``a`` meets that of ``lb`` through ``b``."""
    det = la[0] * lb[1] - la[1] * lb[0]
    ca, cb = la[0] * a[0] + la[1] * a[1], lb[0] * b[0] + lb[1] * b[1]
    if math.isclose(det, 0.0, abs_tol=1e-300):
        return min(a[0], b[0]), min(a[1], b[1])
    t, e = (ca * lb[1] - cb * la[1]) / det, (la[0] * cb - lb[0] * ca) / det
    return max(t, min(a[0], b[0])), max(e, min(a[1], b[1]))
