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

BITS = (1, 2, 4, 8)
"""Bits of caches that layers may be quantised to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TailorKV(AttentionPolicy):
    """Some layers keep ``bits``-bit caches and see everything; the others retrieve ``budget`` tokens.

    The first ``quantised`` layers are those with few bits, or those whose attention a calibration found to be
    spread (``classes``): more than ``tau`` of it lies outside of the best 5 % of the keys.

    Tokens are scored by the ``channels`` channels of the group's mean query that matter most,
    ``|q_c| max_t |k_tc|``. The maximum is over all keys but those of the running ``span`` positions. The
    first ``sink`` and the last ``recent`` tokens count towards the budget, the last ``generated`` do not:
    they stand for tokens made since the prompt.
    """

    name: ClassVar[str] = "tailorkv"
    phases: ClassVar[tuple[str, ...]] = ("decode",)

    channels: int = arg(8, "channels of the estimate", low=1)
    budget: int = arg(192, "tokens that are attended to", low=1)
    sink: int = arg(8, "first tokens that are always attended to")
    recent: int = arg(56, "last tokens that are always attended to", low=1)
    generated: int = arg(0, "further last tokens, outside of the budget")
    quantised: int = arg(1, "first layers whose cache is quantised")
    bits: int = arg(2, "bits of a quantised layer's cache")
    span: int = arg(256, "positions whose greatest magnitudes are kept together", low=1)
    tau: float = arg(0.2, "mass outside of the best 5 % above which a layer is quantised")
    classes: str = arg("", "file of that mass of each layer, in place of quantised")
    outside: tuple[float, ...] = ()
    """What the file says: the mass of each layer; 0 of layers with a window of the model's own."""

    def problem(self) -> str:
        """What is always attended to fits the budget, there are such caches, classes are said once."""
        kept = self.sink + self.recent
        if self.bits not in BITS:
            return f"bits={self.bits} is none of {', '.join(map(str, BITS))}"
        if self.classes and self.quantised != 1:
            return f"quantised={self.quantised} does nothing beside classes={self.classes}: leave out one"
        return f"budget={self.budget} is below sink + recent = {kept}" if self.budget < kept else ""

    @property
    def score(self) -> Score:
        """The estimate from a few channels."""
        options = (("channels", self.channels), ("span", self.span))
        return Score("score_keys", "channels", "group", "mean", options)

    @property
    def select(self) -> Select:
        """Sinks, recent tokens, and the best between."""
        last = self.recent + self.generated
        return Select(k=self.budget + self.generated, first=self.sink, last=last)

    @property
    def quantised_cache(self) -> str:
        """A format in groups."""
        return f"i{self.bits}"

    def spread(self, layer: int) -> float:
        """What the file of classes says."""
        return self.outside[layer] if self.outside else 0.0

    def role_alone(self, layer: int) -> LayerRole:
        """Quantised where attention is spread, sparse elsewhere."""
        spread = self.spread(layer) > self.tau
        if spread if self.outside else layer < self.quantised:
            return LayerRole("quantised", True, None, layer)
        return LayerRole("select", False, layer, layer)


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
