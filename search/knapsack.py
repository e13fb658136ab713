"""One option for each row: the multiple-choice knapsack behind a whole-model plan, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mimo_compile.errors import MissingExtra
from mimo_compile.search.objective import Objective

EQUAL = 1e-9
"""Relative difference below which two sums count as the same; also the slack of a budget."""
_CUTS = 64
"""Times that a choice which HiGHS's tolerance let over a budget is forbidden and another asked for."""
_SECONDS = 60.0

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

    def _minimise(self, cost: Any, caps: Sequence[tuple[Any, float]] = ()) -> Picks:
        """Return the choice of least cost whose sums keep within the caps (up to `EQUAL`).

        HiGHS holds constraints to within 1e-6; a choice that this lets over a cap is forbidden by name.
        """
        if self.free and not caps:
            starts = self.offsets[:-1]
            return [int(cost[a : a + n].argmin()) for a, n in zip(starts, self.sizes, strict=True)]
        cuts: list[Any] = []
        for _ in range(_CUTS):
            picks = self._milp(cost, caps, cuts)
            at = self._at(picks)
            if all(values[at].sum() <= cap * (1 + EQUAL) for values, cap in caps):
                return picks
            cut = np.zeros(self.width)
            cut[at] = 1
            cuts.append(cut)
        raise Infeasible("too many choices lie on the budget", False)

    def _milp(self, cost: Any, caps: Sequence[tuple[Any, float]], cuts: Sequence[Any]) -> Picks:
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
        except ModuleNotFoundError as error:
            raise MissingExtra("planning", missing="scipy") from error
        pad = self.width - len(self.time)
        scale = float(np.abs(cost).max()) or 1.0
        constraints = [LinearConstraint(self.rows, self._equal_to, self._equal_to)]
        for values, cap in caps:
            row = np.pad(values / cap, (0, pad))[None]
            constraints.append(LinearConstraint(row, -np.inf, 1 + EQUAL))
        for cut in cuts:
            constraints.append(LinearConstraint(cut[None], -np.inf, len(self.sizes) - 1))
        found = milp(
            np.pad(cost / scale, (0, pad)),
            constraints=constraints,
            integrality=np.ones(self.width),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
        )
        if found.x is None:
            raise Infeasible(str(found.message), not caps)
        pick = found.x[: len(self.time)]
        return [
            int(pick[a : a + n].argmax())
            for a, n in zip(self.offsets[:-1], self.sizes, strict=True)
        ]

    def _at(self, picks: Sequence[int]) -> Any:
        return self.offsets[:-1] + np.array(picks, int)

    def sums(self, picks: Sequence[int]) -> tuple[float, float]:
        """Return total time and energy of a choice."""
        at = self._at(picks)
        return float(self.time[at].sum()), float(self.energy[at].sum())

    # -- objectives ----------------------------------------------------------------------------

    def least(self, of: str, caps: Sequence[tuple[Any, float]] = ()) -> Picks:
        """Return the choice of least ``time`` or ``energy``; of equal ones that with least of the other."""
        first, second = (self.time, self.energy) if of == "time" else (self.energy, self.time)
        picks = self._minimise(first, caps)
        best = float(first[self._at(picks)].sum())
        try:
            other = self._minimise(second, [*caps, (first, best)])
        except Infeasible:  # only by the solver's rounding: the first choice itself keeps the cap
            return picks
        better = second[self._at(other)].sum() < second[self._at(picks)].sum()
        return other if better else picks

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
            return self.least("time", [(self.energy, goal.limit)])
        if goal.kind == "energy@latency":
            best = self.sums(self._minimise(self.time))[0]
            return self.least("energy", [(self.time, best * (goal.limit or 1.0))])
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
