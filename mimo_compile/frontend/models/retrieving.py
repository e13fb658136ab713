"""TailorKV in a decoder: generated tokens attend to the tokens that a few channels of the keys point at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimo_compile.frontend.models.attend import Selecting, order_of
from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.policies.tailorkv import TailorKV
from mimo_compile.ir.workload import Workload

if TYPE_CHECKING:
    from mimo_compile.frontend.models.stages import LayerCore


@dataclass(frozen=True)
class Retrieving(Selecting):
    """Score single tokens by the channels of the group's mean query that matter most, and list the best.

    The query is the layer's own. TailorKV predicts it from the layer before, so that channels arrive from
    another memory in time; here they lie where they are read. Keys are kept twice: each by itself, for those
    that are listed, and by channels, of which a token reads a few.
    """

    policy: TailorKV
    in_pages = False

    @property
    def lay(self) -> str:  # type: ignore[override]
        """The order that lists are read in."""
        return order_of(self.policy)

    def describing(
        self, spec: LayerSpec, cap: int, tokens: int, cache: str
    ) -> tuple[Workload, ...]:
        """Return the workload that takes keys into the index."""
        index = get_op("index_keys").workload(
            t=tokens, kv=spec.kv_heads, d=spec.d, cap=cap, span=self.policy.span, c=cache
        )
        return (index,)

    def states(self, spec: LayerSpec, cap: int, cache: torch.dtype) -> dict[str, Tensor]:
        """The index: a copy of the keys, and the greatest magnitudes of each span's channels."""
        spans = blocks_of(cap, self.policy.span)
        return {
            name: torch.empty((extent, spec.kv_heads, spec.d), dtype=cache, device="meta")
            for name, extent in (("k_copy", cap), ("peak", spans))
        }

    def describe(self, layer: LayerCore, pos: Tensor) -> None:
        """Take in the new keys."""
        index = (layer.get_buffer(name) for name in ("k_copy", "peak"))
        torch.ops.mimo.index_keys(layer.k_cache, pos, *index, self.policy.span)

    def score(self, layer: LayerCore, q: Tensor, pos: Tensor) -> Tensor:
        """Score single tokens: ``q [T, H, D]`` -> ``[T, KV, cap]``."""
        p = self.policy
        out: Tensor = torch.ops.mimo.score_keys(
            q, layer.get_buffer("k_copy"), pos, layer.get_buffer("peak"), None, p.score.source,
            p.score.agg, p.block, p.channels, layer.spec.d**-0.5, p.span,
        )  # fmt: skip
        return out
