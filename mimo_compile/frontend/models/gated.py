"""Layers whose blocks are chosen by gates that were trained for the model (SeerAttention-R)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimo_compile.frontend.models import kv
from mimo_compile.frontend.models.attend import Selecting
from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.frontend.models.rotary import inverse_frequencies
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.describe_blocks import entries_of
from mimo_compile.ir.policies.seer import Seer
from mimo_compile.ir.workload import Workload

if TYPE_CHECKING:
    from mimo_compile.frontend.models.stages import LayerCore

EPS = 1e-6
"""Of the norms of gates, whatever that of the model is."""


@dataclass(frozen=True)
class GateWeights:
    """The gate of one layer; G is its width."""

    q: Tensor
    """``[KV, H/KV * D, G]``, float32 or bfloat16: what the queries of a group become."""
    k: Tensor
    """``[KV, 3 * D, G]``: likewise the pools of a block's keys."""
    q_norm: Tensor | None
    """``[G]`` float32; None: gates without norms."""
    k_norm: Tensor | None


def rotated(spec: LayerSpec, width: int) -> int:
    """Return how many channels of a gate are rotated: the layer's share of its own."""
    return width * spec.rotary_dim // spec.d


@dataclass(frozen=True)
class Gated(Selecting):
    """Score blocks by the products of gates' queries and compressed keys."""

    policy: Seer
    weights: GateWeights | None = field(default=None, compare=False)
    """None: only to ask for kernels."""

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Types of the weights, too."""
        w = self.weights
        assert w is not None
        return f"{super().kind} {w.q.dtype} {w.k.dtype} {w.q_norm is None}"

    def describing(
        self, spec: LayerSpec, cap: int, tokens: int, cache: str
    ) -> tuple[Workload, ...]:
        """Return the workloads that keep compressed keys up to date and make queries."""
        width = self.policy.gate
        rotation = {"rot": spec.rotary_dim, "grot": rotated(spec, width)}
        keys = get_op("gate_keys").workload(
            t=tokens, kv=spec.kv_heads, d=spec.d, cap=cap, size=self.policy.block, g=width, norm=1,
            c=cache, **rotation,
        )  # fmt: skip
        queries = get_op("gate_queries").workload(
            t=tokens, h=spec.heads, kv=spec.kv_heads, d=spec.d, g=width, norm=1, **rotation
        )
        return keys, queries

    def states(self, spec: LayerSpec, cap: int, cache: torch.dtype) -> dict[str, Tensor]:
        """Compressed keys of blocks, in float32."""
        entries = entries_of(cap, self.policy.block, self.policy.block)
        shape = (entries, spec.kv_heads, 1, self.policy.gate)
        return {"desc": torch.empty(shape, dtype=torch.float32, device="meta")}

    def constants(self, spec: LayerSpec) -> dict[str, Tensor]:
        """The gate's weights, angles of the layer and of the gate, the threshold."""
        w = self.weights
        assert w is not None
        gate = replace(spec, rotary_dim=rotated(spec, self.policy.gate))
        out = {
            "gate_q": w.q, "gate_k": w.k, "layer_freq": inverse_frequencies(spec),
            "gate_freq": inverse_frequencies(gate),
        }  # fmt: skip
        if w.q_norm is not None and w.k_norm is not None:
            out |= {"gate_q_norm": w.q_norm, "gate_k_norm": w.k_norm}
        if self.policy.threshold:
            out["level"] = torch.full((spec.kv_heads,), self.policy.threshold)
        return out

    def describe(self, layer: LayerCore, pos: Tensor) -> None:
        """Compress the blocks that are complete now."""
        p = self.policy
        torch.ops.mimo.gate_keys(
            layer.k_cache, pos, *self._angles(layer), layer.get_buffer("gate_k"),
            self._norm(layer, "gate_k_norm"), layer.get_buffer("desc"), p.block,
            p.block_pos == "last", EPS, *kv.tables(layer),
        )  # fmt: skip

    def score(self, layer: LayerCore, q: Tensor, pos: Tensor) -> Tensor:
        """Score blocks by the gate; with a threshold by the softmax of that."""
        p, blocks = self.policy, -(-kv.positions(layer) // self.policy.block)
        queries = torch.ops.mimo.gate_queries(
            q, pos, *self._angles(layer), layer.get_buffer("gate_q"),
            self._norm(layer, "gate_q_norm"), EPS,
        )  # fmt: skip
        out: Tensor = torch.ops.mimo.score_blocks(
            queries, layer.get_buffer("desc"), None, pos, "gate", "none", p.threshold > 0, p.block,
            1, blocks, p.block, p.block, p.gate**-0.5, *kv.tables(layer),
        )  # fmt: skip
        return out

    def _angles(self, layer: LayerCore) -> tuple[Tensor, Tensor]:
        return layer.get_buffer("layer_freq"), layer.get_buffer("gate_freq")

    def _norm(self, layer: LayerCore, name: str) -> Tensor | None:
        assert self.weights is not None
        return None if self.weights.q_norm is None else layer.get_buffer(name)
