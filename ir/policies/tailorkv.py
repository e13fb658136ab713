"""TailorKV: low-bit caches for layers that see everything, retrieval for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import UsageError
from mimo_compile.ir.policies.base import (
    AttentionPolicy,
    LayerRole,
    Score,
    Select,
    arg,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TailorKV(AttentionPolicy):
    """The first ``quantised`` layers keep ``bits``-bit caches; the others retrieve ``budget`` tokens.

    Tokens are scored by the ``channels`` channels of the group's mean query that matter most,
    ``|q_c| max_t |k_tc|``. The first ``sink`` and the last ``recent`` count towards the budget, the last
    ``generated`` do not: they stand for tokens made since the prompt.
    """

    name: ClassVar[str] = "tailorkv"
    phases: ClassVar[tuple[str, ...]] = ("decode",)

    channels: int = arg(8, "channels of the estimate", low=1)
    budget: int = arg(192, "tokens that are attended to", low=1)
    sink: int = arg(8, "first tokens that are always attended to")
    recent: int = arg(56, "last tokens that are always attended to", low=1)
    generated: int = arg(0, "further last tokens, outside of the budget")
    quantised: int = arg(1, "first layers whose cache is quantised")
    bits: int = arg(1, "bits of a quantised layer's cache", low=1)
    group: int = arg(64, "elements that share a scale in a quantised cache", low=1)
    residual: int = arg(128, "last tokens that a quantised cache keeps whole")
    tau: float = arg(0.2, "mass outside of the best 5 % above which a layer is quantised")

    def problem(self) -> str:
        """What is always attended to fits the budget."""
        kept = self.sink + self.recent
        return f"budget={self.budget} is below sink + recent = {kept}" if self.budget < kept else ""

    @property
    def score(self) -> Score:
        """The estimate from a few channels."""
        return Score("score_keys", "channels", "group", "mean", (("channels", self.channels),))

    @property
    def select(self) -> Select:
        """Sinks, recent tokens, and the best between."""
        last = self.recent + self.generated
        return Select(k=self.budget + self.generated, first=self.sink, last=last)

    def role_alone(self, layer: int) -> LayerRole:
        """Quantised, then sparse."""
        if layer < self.quantised:
            return LayerRole("quantised", True, None, layer)
        return LayerRole("select", False, layer, layer)

    def quantises(self, weights: npt.NDArray[np.float64]) -> bool:
        """Return whether a layer with these attention weights suits quantisation; see `mass_outside`."""
        return mass_outside(weights) > self.tau


def mass_outside(weights: npt.NDArray[np.float64], share: float = 0.05) -> float:
    """Return the mean attention mass outside of each row's best keys: the number P that classifies layers.

    Args:
        weights: ``[heads, queries, keys]``, non-negative, normalised by their sum (the last 32 queries of a
            prompt, causal).
        share: Of the keys that are the best ones, at least one.

    Raises:
        UsageError: there is no weight at all.
    """
    total = float(weights.sum())
    if not total > 0:
        raise UsageError("attention weights without any mass cannot classify a layer")
    best = max(1, int(share * weights.shape[-1]))
    kept = np.sort(weights, axis=-1)[..., weights.shape[-1] - best :]
    return float((total - kept.sum()) / total)
