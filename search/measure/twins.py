"""Candidates that become the same code: the second one needs no clock.

Two configs of a schedule may compile to the same object code, byte for byte (a knob without effect on this
shape, or two ways to say the same). Weights and states are packed by their layout alone, so with the same
layouts they are the same kernel on the same arguments: verified and timed before.
"""

from __future__ import annotations

from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.search.lookup import LASTING
from mimo_compile.search.measure.base import Measurement
from mimo_compile.search.records import Record, Verdict
from mimo_compile.search.space import Candidate, JointSpace

Code = tuple[str, str, tuple[tuple[str, str], ...], str]
"""Workload, schedule, layouts, hash of the object code."""


class Twins:
    """Records of measured code, by what makes it the same."""

    def __init__(self) -> None:
        """Start with nothing known."""
        self._known: dict[Code, tuple[Candidate, Record]] = {}

    @staticmethod
    def _code(space: JointSpace, candidate: Candidate, code_hash: str) -> Code:
        layouts = tuple(sorted(space.layouts(candidate).items()))
        return str(space.workload), candidate.schedule, layouts, code_hash

    def learn(self, space: JointSpace, candidate: Candidate, record: Record) -> None:
        """Take in a record; code that was found wrong later is measured anew.

        The first reading in a search counts, and one with joules more: those of the comparison at the end
        are not like the single readings that others are ranked by.
        """
        if record.twin or not record.code_hash:
            return
        code = self._code(space, candidate, record.code_hash)
        if record.verdict in LASTING:
            self._known.pop(code, None)
        elif record.ok and record.latency_us is not None:
            _, known = self._known.get(code, (None, None))
            richer = known is not None and known.energy_mj is None and record.energy_mj is not None
            if known is None or (richer and record.phase != "confirm"):
                self._known[code] = candidate, record

    def find(
        self, space: JointSpace, candidate: Candidate, facts: dict[str, Any], seed: int, *,
        meter: str,
    ) -> Measurement | None:  # fmt: skip
        """Return the figures of what is the same code as a candidate, None when there is none.

        Args:
            space: The candidate's.
            candidate: What was built and has no measurement of its own.
            facts: What its builder says of it.
            seed: Of the inputs it would have run on.
            meter: Only what has joules by this meter will do ("": any).
        """
        code = self._code(space, candidate, facts["code_hash"])
        other, known = self._known.get(code, (candidate, None))
        if known is None or other == candidate:
            return None
        if meter and (known.energy_source != meter or known.energy_mj is None):
            return None
        return Measurement(
            candidate, Verdict.OK, f"the same code as {other}", seed,
            latency_us=known.latency_us, energy_mj=known.energy_mj,
            energy_spread_mj=known.energy_spread_mj, energy_source=known.energy_source,
            energy_window_s=known.energy_window_s, modelled_mj=known.modelled_mj,
            error_ratio=known.error_ratio, code_hash=known.code_hash, requires=known.requires,
            counts=Counts(facts["ops"], facts["bytes"]), twin=known.key,
        )  # fmt: skip
