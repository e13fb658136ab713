"""SALE: prefill whose blocks are chosen by low-bit products of the queries themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from mimo_compile.ir.policies.base import AttentionPolicy, Score, Select, arg


@dataclass(frozen=True, slots=True, kw_only=True)
class Sale(AttentionPolicy):
    """A block stays if one estimated weight of its tile is at least ``tau`` of the sink and local mass.

    The first ``sink`` keys, the tile's own and ``local`` before it are attended to exactly, and first.
    ``tau`` is calibrated for each layer and head (0: that head is dense); the argument is where calibration
    starts and what holds without it. Up to ``least`` keys attention is dense. With ``every`` above 1 only
    some queries of a tile are estimated, which thresholds that were calibrated so allow for.
    """

    name: ClassVar[str] = "sale"
    phases: ClassVar[tuple[str, ...]] = ("prefill",)

    tau: float = arg(0.008, "relative weight that keeps a block")
    bits: int = arg(4, "bits of the estimate's operands", low=2)
    bq: int = arg(64, "queries of a tile", low=1)
    bk: int = arg(32, "keys of a block", low=1)
    sink: int = arg(32, "first keys that are always attended to", low=1)
    local: int = arg(128, "keys before a tile that are always attended to")
    least: int = arg(1024, "length up to which attention is dense")
    every: int = arg(1, "of a tile's queries, one in so many is estimated", low=1)
    thresholds: str = arg("", "file of calibrated thresholds of each layer and head")
    table: tuple[tuple[float, ...], ...] = ()
    """What the file says: thresholds of each layer's query heads; none of layers that choose nothing."""

    def problem(self) -> str:
        """Sinks and local keys are whole blocks, codes fit a byte, a tile has a query to estimate."""
        if self.thresholds and self.tau != self.estimate.tau:
            return f"tau={self.tau} does nothing beside thresholds={self.thresholds}: leave out one"
        if self.every > self.bq:
            return f"every={self.every} is above bq={self.bq}"
        if self.sink % self.bk or self.local % self.bk:
            return f"sink={self.sink} and local={self.local} must be multiples of bk={self.bk}"
        return f"bits={self.bits} is above 8" if self.bits > 8 else ""

    @property
    def block(self) -> int:
        """Keys of a block."""
        return self.bk

    @property
    def rows(self) -> int:
        """Queries of a tile share a list."""
        return self.bq

    @property
    def score(self) -> Score:
        """The largest estimated relative weight of each block and tile."""
        return Score(
            "score_lowbit", "lowbit", "head",
            options=(
                ("bits", self.bits), ("first", self.sink // self.bk),
                ("last", 1 + self.local // self.bk), ("least", self.least), ("every", self.every),
            ),
        )  # fmt: skip

    @property
    def select(self) -> Select:
        """By threshold; the exact region is forced."""
        return Select(
            rule="threshold", value=self.tau, first=self.sink // self.bk,
            last=1 + self.local // self.bk,
        )  # fmt: skip

    @property
    def sees_all(self) -> int:
        """The dense length, or sinks, the local keys and a block; what is seen further on, texts decide."""
        return max(self.least, self.sink + self.local + self.bk)

    @property
    def estimate(self) -> Sale:
        """The policy without thresholds: what they are calibrated for."""
        return replace(self, tau=0.008, thresholds="", table=())
