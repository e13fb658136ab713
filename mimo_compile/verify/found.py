"""What verification finds, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

STRAYED_BOUND = 0.05
"""Largest share of choices that stray, as of rows that are outside of their bound."""
PERPLEXITY_BOUND = 1e-3
"""Largest relative difference between compiled and eager perplexity."""


@dataclass(frozen=True, slots=True)
class KernelCheck:
    """One kernel of the plan on fresh inputs."""

    workload: str
    schedule: str
    kernel: str
    error_ratio: float | None
    """Largest error as a multiple of its bound; None when not checked."""
    message: str = ""
    """What is wrong, or why it was not checked."""
    skipped: bool = False

    @property
    def ok(self) -> bool:
        """True unless something is wrong."""
        return self.skipped or not self.message


@dataclass(frozen=True, slots=True)
class LogitsBound:
    """What the rows of logits may differ by, relative to the row's largest magnitude."""

    nearly_all: float
    """For 95 of 100 rows."""
    each: float
    """For every row; infinite when a flipped rounding may change a routed expert."""


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """Compiled outputs against eager torch, relative to the largest magnitude of each row."""

    rows: int
    median_error: float
    p95_error: float
    max_error: float
    bound_p95: float
    bound_max: float
    same_choice: float
    """Share of rows whose largest logit is that of the same token."""
    decoded: int = 0
    """How many of the rows are tokens that were decoded one by one, the last ones."""
    decoded_median: float = 0.0
    """Their median error: few among many rows, they may all be wrong within the other bounds."""
    choices: int = 0
    """Choices of experts that were compared, of all tokens that were run in all layers that choose."""
    followed: int = 0
    """Those that fell otherwise where experts nearly tie, by router logits within the bound: the eager model
    followed them."""
    strayed: int = 0
    """Others that fell otherwise: the eager model kept its own."""
    unseen: int = 0
    """Choices of the eager model alone: the compiled one's logits were not seen."""

    @property
    def ok(self) -> bool:
        """True within all bounds."""
        most = max(self.p95_error, self.decoded_median)
        within = most <= self.bound_p95 and self.max_error <= self.bound_max
        return within and self.strayed <= STRAYED_BOUND * self.choices


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Per token of the same text, compiled and eager with the same quantisation."""

    tokens: int
    compiled: float
    eager: float
    noise: float = 0.0
    """Standard error of the difference's logarithm: 8-bit activations next to a tie round either way, which
    moves each token a little, this way or that."""

    @property
    def bound(self) -> float:
        """Largest relative difference; `noise` says how much of it few tokens make by chance."""
        return PERPLEXITY_BOUND

    @property
    def difference(self) -> float:
        """Relative difference."""
        return self.compiled / self.eager - 1

    @property
    def ok(self) -> bool:
        """True within the bound."""
        return abs(self.difference) <= self.bound


@dataclass(slots=True)
class Verification:
    """Everything `verify_artifact` found."""

    path: str
    kernels: list[KernelCheck] = field(default_factory=list)
    end_to_end: EndToEnd | None = None
    batch: EndToEnd | None = None
    """Of tokens of several sequences that were decoded together, where the artifact does that."""
    perplexity: Perplexity | None = None
    notes: list[str] = field(default_factory=list)
    """What was not checked and why."""

    @property
    def ok(self) -> bool:
        """True when nothing that was checked is wrong."""
        parts = [p.ok for p in (self.end_to_end, self.batch, self.perplexity) if p is not None]
        return all(k.ok for k in self.kernels) and all(parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        checked = [k.error_ratio for k in self.kernels if k.error_ratio is not None]
        out: dict[str, Any] = {
            "ok": self.ok, "path": self.path, "notes": self.notes,
            "worst_error_ratio": max(checked, default=None),
            "kernels": [{**asdict(k), "ok": k.ok} for k in self.kernels],
        }  # fmt: skip
        if self.end_to_end is not None:
            out["end_to_end"] = {**asdict(self.end_to_end), "ok": self.end_to_end.ok}
        if self.batch is not None:
            out["batch"] = {**asdict(self.batch), "ok": self.batch.ok}
        if self.perplexity is not None:
            p = self.perplexity
            out["perplexity"] = {
                **asdict(p),
                "bound": p.bound,
                "difference": p.difference,
                "ok": p.ok,
            }
        return out
