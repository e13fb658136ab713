"""Layers that see the first positions and the last ones (StreamingLLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimo_compile.frontend.models.attend import Attending, Lists, listed
from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.frontend.models.rotary import inverse_frequencies
from mimo_compile.ir.ops.kv_append import turn_back
from mimo_compile.ir.policies.stream import Stream

if TYPE_CHECKING:
    from mimo_compile.frontend.models.stages import LayerCore


@dataclass(frozen=True)
class Streaming(Attending):
    """The first ``sink`` positions and the last ``recent``, in one softmax.

    Keys are cached rotated by their positions in the text. Rolling positions differ only in how far away the
    sinks are: for a query at position p they stay ``sink + recent - 1`` away from where it stands in the
    cache. So queries far from the start meet the sinks under another rotation, and both parts are merged by
    their softmax denominators; near the start sinks and window are one part.
    """

    policy: Stream
    in_pages = False

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The policy's text."""
        return str(self.policy)

    def constants(self, spec: LayerSpec) -> dict[str, Tensor]:
        """What it takes to turn queries: frequencies, and how many positions the cache holds."""
        if not (self.policy.rolling and spec.rotary_dim):
            return {}
        held = self.policy.sink + self.policy.recent - 1
        return {
            "stream_freq": inverse_frequencies(spec),
            "stream_held": torch.tensor([held, 0], dtype=torch.int32),
        }

    def __call__(
        self, layer: LayerCore, q: Tensor, pos: Tensor, lists: Lists | None
    ) -> tuple[Tensor, Lists | None]:
        """Attend to sinks and window at once, or merge both."""
        p, tokens = self.policy, q.shape[0]
        if not (p.rolling and layer.spec.rotary_dim):
            idx = torch.zeros((tokens, 1, 1), dtype=torch.int32)
            one = torch.ones((tokens, 1), dtype=torch.int32)
            return listed(layer, q, pos, (idx, one), p.sink, p.recent)[0], None
        batch = pos.shape[0] if pos.dim() == 2 else 1
        each = torch.arange(tokens // batch, dtype=torch.int32)
        at = pos[0] + each if batch == 1 else (pos[:, :1] + each).reshape(-1)
        near = (at < p.sink + p.recent).to(torch.int32)[:, None]
        both = listed(layer, q, pos, (near[:, None] - 1, near), p.sink, p.recent)
        away = torch.ops.mimo.rope_table(
            pos - layer.get_buffer("stream_held"), layer.get_buffer("stream_freq"), tokens // batch
        )
        turned = turn_back(q, away)
        sinks = listed(layer, turned, pos, (-near[:, None], 1 - near), p.sink, 0, sink=False)
        return merge(both, sinks), None


def merge(one: Lists, other: Lists) -> Tensor:
    """Join two attentions over different keys, each ``[T, H, DV]`` with its lse ``[T, H]``."""
    # rows that saw nothing have -inf, which must not meet another one
    top = torch.maximum(one[1], other[1]).clamp(min=-1e30)[..., None]
    first, second = torch.exp(one[1][..., None] - top), torch.exp(other[1][..., None] - top)
    return (first * one[0] + second * other[0]) / (first + second).clamp(min=1e-30)
