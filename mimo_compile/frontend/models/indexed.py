"""Layers whose tokens are chosen by an indexer that was trained for the model (DSA of DeepSeek-V3.2).

An indexer reads the layer's normed input, as attention does: a few small queries and their weights for each
token, and one small key, which is kept. What it lists is one list for all heads of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimo_compile.frontend.models import kv
from mimo_compile.frontend.models.attend import Lists, Selecting, dense, listed, order_of
from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.kv_append import rotate
from mimo_compile.ir.policies.dsa import Dsa
from mimo_compile.ir.workload import Workload

if TYPE_CHECKING:
    from mimo_compile.frontend.models.stages import LayerCore

EPS = 1e-6
"""Of the norm of an indexer's keys, whatever that of the model is."""


@dataclass(frozen=True)
class IndexWeights:
    """The indexer of one layer; J heads of width W."""

    matrix: Tensor
    """``[J * W + W + J, hidden]``, float32 or bfloat16: queries, the key, the heads' weights."""
    norm: Tensor
    """``[W]`` float32, factors of the key's norm."""
    bias: Tensor
    """``[W]`` float32."""


@dataclass(frozen=True)
class Indexed(Selecting):
    """Score every token by ``sum_h w_h relu(q_h . key)`` and attend to the best, one list for all heads."""

    policy: Dsa
    weights: IndexWeights | None = field(default=None, compare=False)
    """None: only to ask for kernels."""
    in_pages = False

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The type of the weights, too."""
        assert self.weights is not None
        return f"{super().kind} {self.weights.matrix.dtype}"

    @property
    def lay(self) -> str:  # type: ignore[override]
        """The order that lists are read in."""
        return order_of(self.policy)

    def describing(
        self, spec: LayerSpec, cap: int, tokens: int, cache: str
    ) -> tuple[Workload, ...]:
        """Return the workload that keeps the new keys."""
        return (
            get_op("append_entries").workload(
                t=tokens, kv=1, d=self.policy.width, cap=cap, e=cache
            ),
        )

    def states(self, spec: LayerSpec, cap: int, cache: torch.dtype) -> dict[str, Tensor]:
        """The indexer's keys, in the type of the layer's own."""
        return {"index_k": torch.empty((cap, 1, 1, self.policy.width), dtype=cache, device="meta")}

    def constants(self, spec: LayerSpec) -> dict[str, Tensor]:
        """The indexer's weights."""
        w = self.weights
        assert w is not None
        return {"index_w": w.matrix, "index_norm": w.norm, "index_bias": w.bias}

    def look(self, layer: LayerCore, normed: Tensor, table: Tensor, pos: Tensor) -> Lists | None:
        """Keep the new tokens' keys, and list what they attend to, where layers choose."""
        p = self.policy
        rows = torch.ops.mimo.linear(normed, layer.get_buffer("index_w"), None, "a16")
        first, both = p.heads * p.width, (p.heads + 1) * p.width
        norm, bias = layer.get_buffer("index_norm"), layer.get_buffer("index_bias")
        key = torch.nn.functional.layer_norm(rows[:, first:both], (p.width,), norm, bias, EPS)
        held = layer.get_buffer("index_k")
        torch.ops.mimo.append_entries(rotate(key[:, None], table), pos, held)
        if not layer.chooses:
            return None
        q = rotate(rows[:, :first].reshape(-1, p.heads, p.width), table)
        weight = rows[:, both:] * (p.heads * p.width) ** -0.5
        score = torch.ops.mimo.score_blocks(
            q, held, weight, pos, "indexer", "sum", False, 1, 1, kv.positions(layer), 1, 1, 1.0
        )
        return self.lists(layer, score, pos)

    def __call__(
        self, layer: LayerCore, q: Tensor, pos: Tensor, lists: Lists | None
    ) -> tuple[Tensor, Lists | None]:
        """Attend to what the indexer lists, or to everything."""
        if lists is None:
            return dense(layer, q, pos), None
        return listed(layer, q, pos, lists, self.policy.block, self.policy.kept_window)[0], None
