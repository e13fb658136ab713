"""What measuring is told and what it answers: limits, timing, a measurement, and who can measure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from mimo_compile.ir.counts import Counts
from mimo_compile.search.records import Record, Verdict
from mimo_compile.search.space import Candidate, JointSpace


@dataclass(frozen=True, slots=True)
class Limits:
    """What a candidate may use up. Seconds of wall clock; bytes of address space."""

    build_s: float = 60.0
    run_s: float = 20.0
    time_s: float = 30.0
    memory_bytes: int = 0
    """0 stands for `worker.default_memory`."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How time and energy are taken."""

    warm_up_s: float = 0.02
    batches: int = 9
    batch_s: float = 0.006
    budget_s: float = 0.5
    max_spread: float = 0.1
    """Largest difference of the batches' quartiles, over their median; above it they are timed again."""
    repeats: int = 2
    """How often at most; all batches then count."""
    cache: str = "cold"
    """``cold``: weights and states rotate over more bytes than the last-level cache holds; ``hot``."""
    rotate_bytes: int = 0
    """Bytes to rotate over; 0 stands for twice the last-level cache."""
    memory_bytes: int = 0
    """Most bytes of rotating copies; 0 stands for 1 GiB, on GPUs for 64 GiB (and half of what is free)."""
    energy_window_s: float = 2.0
    confirm_rounds: int = 3


@dataclass(frozen=True, slots=True)
class Measurement:
    """What came of a candidate; see `records.Record` for the meaning of the fields."""

    candidate: Candidate
    verdict: Verdict
    message: str = ""
    seed: int = 0
    latency_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    cv: float | None = None
    calls: int = 0
    energy_mj: float | None = None
    energy_spread_mj: float | None = None
    energy_source: str = ""
    energy_window_s: float | None = None
    modelled_mj: float | None = None
    error_ratio: float | None = None
    code_hash: str = ""
    requires: tuple[str, ...] = ()
    counts: Counts = field(default_factory=Counts)
    twin: str = ""
    worker: str = ""
    device: str = ""
    time: float = 0.0
    """Seconds since 1970 when it was measured; 0 stands for now."""


class Measures(Protocol):
    """What a tuner needs of a measurer; `measure.replay` has one that looks numbers up."""

    cache: str

    def measure(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int, *, energy: bool = True
    ) -> Iterator[Measurement]:
        """Yield one measurement for each candidate of one workload, in any order.

        Without ``energy`` no joules are read, which take seconds where a time takes milliseconds: the
        search asks for them later, for the candidates that deserve it.
        """
        ...

    def confirm(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int
    ) -> Iterator[Measurement]:
        """Measure correct candidates against each other, interleaved."""
        ...

    def describe(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Counts | None]:
        """Return the work each candidate's kernel declares (None where lowering fails)."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


@runtime_checkable
class Recalls(Protocol):
    """What a measurer has besides when it compiles: what is the same code as before is not timed again."""

    def recall(self, space: JointSpace, candidate: Candidate, record: Record) -> None:
        """Note what is recorded of a candidate, from this search or an earlier one."""
        ...


@runtime_checkable
class Ahead(Protocol):
    """What a measurer has besides when it can build one batch while it measures another."""

    @property
    def overlaps(self) -> bool:
        """True where that disturbs no clock."""
        ...

    def prepare(self, space: JointSpace, candidates: Sequence[Candidate]) -> None:
        """Begin to build candidates of one workload, which are to be measured after others."""
        ...


@runtime_checkable
class Predicts(Protocol):
    """What a measurer has besides when it knows times without measuring: the search ranks by them."""

    def predict_us(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[float]:
        """Return microseconds of each candidate of one workload."""
        ...
