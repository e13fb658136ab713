"""A measurer that looks results up: strategies and tuners are tested on recorded spaces, without a clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from mimo_compile.ir.counts import Counts
from mimo_compile.search.measure.base import Measurement
from mimo_compile.search.records import Record, Verdict
from mimo_compile.search.space import Candidate, JointSpace


class ReplayMeasurer:
    """Answers from records by (workload, schedule, config); a candidate without one fails to build."""

    def __init__(self, records: Iterable[Record], *, cache: str = "cold") -> None:
        """Hold the records."""
        self.cache = cache
        self.asked: list[Candidate] = []
        """Candidates in the order in which they were measured."""
        self.metered: list[Candidate] = []
        """Candidates whose joules were asked for, in order; those of the last comparison included."""
        self._known: dict[tuple[str, str, tuple[tuple[str, object], ...]], Record] = {
            (r.workload, r.schedule, tuple(sorted(r.config.items()))): r for r in records
        }

    def _find(self, candidate: Candidate) -> Record | None:
        return self._known.get((str(candidate.workload), candidate.schedule, candidate.knobs))

    def _answer(self, candidate: Candidate, seed: int) -> Measurement:
        record = self._find(candidate)
        if record is None:
            return Measurement(candidate, Verdict.BUILD_FAILED, "not in the recording", seed)
        return Measurement(
            candidate, record.verdict, record.message, seed, record.latency_us, record.p10_us,
            record.p90_us, record.cv, record.calls, record.energy_mj, record.energy_spread_mj,
            record.energy_source, record.energy_window_s, record.modelled_mj, record.error_ratio,
            record.code_hash, record.requires, Counts(record.ops, record.bytes),
        )  # fmt: skip

    def measure(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int, *, energy: bool = True
    ) -> Iterator[Measurement]:
        """Yield the recorded results, without joules unless they are asked for."""
        for candidate in candidates:
            self.asked.append(candidate)
            answer = self._answer(candidate, seed)
            if energy:
                self.metered.append(candidate)
                yield answer
            else:
                yield replace(
                    answer, energy_mj=None, energy_spread_mj=None, energy_source="",
                    energy_window_s=None,
                )  # fmt: skip

    def confirm(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int
    ) -> Iterator[Measurement]:
        """Yield the recorded results once more."""
        for candidate in candidates:
            self.metered.append(candidate)
            yield self._answer(candidate, seed)

    def describe(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Counts | None]:
        """Return the recorded work."""
        found: Mapping[str, Record | None] = {c.key: self._find(c) for c in candidates}
        return [
            Counts(r.ops, r.bytes) if (r := found[c.key]) is not None else None for c in candidates
        ]

    def close(self) -> None:
        """Nothing to release."""
