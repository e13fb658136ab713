"""Layers that choose for others, and those that follow them beside a window of their own (HySparse).

A layer with two branches attends to what an earlier layer chose, in that layer's cache, and to its own window
(arXiv 2602.03560). Both branches share the queries, which are rotated once for each: the earlier
layer's keys lie in its cache as that layer rotated them. Each has its own softmax and sink; sigmoid gates of
the layer's input weigh them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_compile.frontend.models import kv
from mimo_compile.frontend.models.attend import Attending, Lists, Selecting, order_of
from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.frontend.models.feed import Feed
from mimo_compile.frontend.models.stages import Attention, Layer, LayerCore, pair_of
from mimo_compile.ir.ops.kv_append import rotate
from mimo_compile.ir.policies import AttentionPolicy

BORROWED = {"far_k": "k_cache", "far_v": "v_cache"}
"""Buffers of a layer with branches -> those of the layer whose caches they are."""


class Oracle(Selecting):
    """Attend to everything, and choose for the layers behind by what that gave the most weight."""

    in_pages = False

    @property
    def lay(self) -> str:  # type: ignore[override]
        """The order that followers read."""
        return order_of(self.policy)

    def at_once(self, sink: bool) -> bool:
        """Say whether one op attends and scores, in a layer that has a sink or none."""
        return not (self.lay or sink)

    def __call__(
        self, layer: LayerCore, q: Tensor, pos: Tensor, lists: Lists | None
    ) -> tuple[Tensor, Lists | None]:
        """Attend and score at once, where one op does both."""
        if not self.at_once(layer.attention.sink is not None):
            return super().__call__(layer, q, pos, lists)
        out, score = torch.ops.mimo.oracle_attention(
            q, layer.k_cache, layer.v_cache, pos, self.policy.block, layer.spec.d**-0.5
        )
        return out, self.lists(layer, score, pos)


@dataclass(frozen=True)
class Branches(Attending):
    """A window in the layer's own cache; `BranchLayer` adds what it follows."""

    policy: AttentionPolicy
    lender: LayerSpec
    """Of the layer whose lists and caches it reads."""
    source: int
    """Number of that layer."""
    cap: int
    """Slots of its caches."""
    in_pages = False

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The policy's text, and the shape of what is read."""
        s = self.lender
        return f"{self.policy} branches {s.kv_heads} {s.d} {s.dv} {s.rotary_dim} {self.cap}"

    @property
    def lay(self) -> str:  # type: ignore[override]
        """The order that the lender keeps."""
        return order_of(self.policy)

    @property
    def borrowed(self) -> dict[str, str]:
        """Buffer that holds another layer's cache -> global name of that state."""
        return {own: f"layers.{self.source}.{name}" for own, name in BORROWED.items()}


class BranchLayer(Layer):
    """``(x, delta, table, pos, far[, adapter], idx, cnt) -> (x', delta')``; ``far``: the lender's angles."""

    far_k: Tensor
    far_v: Tensor
    attend: Branches

    def __init__(
        self,
        spec: LayerSpec,
        attention: Attention,
        feed: Feed,
        norms: dict[str, Tensor],
        eps: float,
        max_context: int,
        caches: kv.Caches | None = None,
        attend: Attending | None = None,
    ) -> None:
        """Take what `LayerCore` takes; ``attend`` is a `Branches`."""
        assert isinstance(attend, Branches)
        super().__init__(spec, attention, feed, norms, eps, max_context, caches, attend)
        lent = kv.cache_arrays(attend.lender, self.caches, max_context)
        for own, name in BORROWED.items():
            self.register_buffer(own, lent[name], persistent=False)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        delta: Tensor,
        table: Tensor,
        pos: Tensor,
        far: Tensor,
        adapter: Tensor | None = None,
        idx: Tensor | None = None,
        cnt: Tensor | None = None,
        expert_ids: Tensor | None = None,
        expert_weights: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Add the pending delta, normalise, attend by both branches, run the rest of the layer."""
        assert idx is not None and cnt is not None
        normed, x = torch.ops.mimo.add_rms_norm(delta, x, self.attn_norm, self.eps)
        s = self.spec
        qkv = kv.project(self, normed, adapter)
        near, _ = self.attend(self, kv.append(self, qkv, table, pos), pos, None)
        q = qkv[:, : s.heads * s.d].reshape(x.shape[0], s.heads, s.d)
        listed = self.listed(rotate(q, far), pos, (idx, cnt))
        routes = pair_of(expert_ids, expert_weights)
        return self.after_attention(self.weighed(normed, listed, near), x, adapter, None, routes)

    def listed(self, q: Tensor, pos: Tensor, lists: Lists) -> Tensor:
        """Attend to listed blocks of the lender's cache: ``q [T, H, D]`` -> ``[T, H, DV]``."""
        out: Tensor = torch.ops.mimo.sparse_attention(
            q, self.far_k, self.far_v, pos, *lists, self.attention.listed_sink, self.attend.policy.block,
            1, self.spec.d**-0.5, 0,
        )[0]  # fmt: skip
        return out

    def weighed(self, normed: Tensor, listed: Tensor, near: Tensor) -> Tensor:
        """Return both branches ``[T, H, DV]`` times their gates, added."""
        gates = self.attention.gates
        assert gates is not None
        tokens, heads = listed.shape[:2]
        both = torch.sigmoid(gates(normed))
        half = both.shape[1] // 2
        first, second = (
            part.reshape(tokens, heads, half // heads) for part in (both[:, :half], both[:, half:])
        )
        return first * listed + second * near
