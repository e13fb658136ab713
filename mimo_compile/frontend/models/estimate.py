"""SALE in a decoder: prompts attend to the blocks that low-bit products of their own queries estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimo_compile.frontend.models.attend import Lists, Selecting, dense, list_length, listed
from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.ir.policies.sale import Sale
from mimo_compile.ir.workload import bucket_of

if TYPE_CHECKING:
    from mimo_compile.frontend.models.stages import LayerCore


def scores(policy: Sale, q: Tensor, k_cache: Tensor, pos: Tensor, scale: float) -> Tensor:
    """Estimate the relative weights of blocks for the tiles of one call.

    Args:
        policy: Its sizes.
        q: ``[T, H, D]``, rotated; T is at least a tile.
        k_cache: ``[cap, KV, D]``, which holds their keys.
        pos: int32 [2], start and valid.
        scale: Factor on q.k.

    Returns:
        ``[ceil(T / bq), H, ceil(cap / bk)]``; means are those of the call's queries and of all keys.
    """
    real = (torch.arange(q.shape[0], dtype=torch.int32) < pos[1]).to(q.dtype)[:, None, None]
    q_mean = (q * real).sum(0) / pos[1].to(q.dtype)
    k_mean = torch.ops.mimo.key_mean(k_cache, pos)
    forced = policy.select
    out: Tensor = torch.ops.mimo.score_lowbit(
        q, k_cache, pos, q_mean, k_mean, policy.bits, policy.bk, policy.bq, forced.first, forced.last,
        scale, policy.least, policy.every,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Estimating(Selecting):
    """Estimate and select for whole tiles of a prompt; calls of fewer tokens than a tile are dense."""

    policy: Sale
    in_pages = False

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Calibrated thresholds of the layer's query heads; none: all have the policy's."""
        return self.policy.table[self.role.cache_of] if self.policy.table else ()

    def constants(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Thresholds of the layer's query heads ``[H]`` float32."""
        found = self.thresholds or (self.policy.tau,) * spec.heads
        return {"tau": torch.tensor(found, dtype=torch.float32)}

    def __call__(
        self, layer: LayerCore, q: Tensor, pos: Tensor, lists: Lists | None
    ) -> tuple[Tensor, Lists | None]:
        """Choose where layers choose."""
        p = self.policy
        if not layer.chooses or bucket_of(q.shape[0]) < p.rows:
            return dense(layer, q, pos), None
        return listed(layer, q, pos, self.choose(layer, q, pos), p.bk, 0, rows=p.rows)[0], None

    def choose(self, layer: LayerCore, q: Tensor, pos: Tensor) -> Lists:
        """Estimate blocks and list those at or above the head's threshold."""
        p, s, rule = self.policy, layer.spec, self.policy.select
        score = scores(p, q, layer.k_cache, pos, s.d**-0.5)
        out: Lists = torch.ops.mimo.select_blocks(
            score, pos, layer.get_buffer("tau"), rule.rule, rule.k, rule.share, p.bk, p.rows,
            rule.first, rule.last, rule.merge, list_length(p, s, layer.k_cache.shape[0]),
        )  # fmt: skip
        return out
