"""Gates that decide: in one layer they choose the experts of the next ("Pre-gated MoE", arXiv 2308.12066)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.frontend.models.stages import QuantLinear

Routes = tuple[Tensor, Tensor]
"""Experts int32 ``[T, k]``, best first, and their weights float32 ``[T, k]``."""


def choose(spec: LayerSpec, logits: Tensor, bias: Tensor | None) -> Routes:
    """Choose experts of a layer by logits ``[T, E]`` and its bias for the choice ``[E]``, if it has one."""
    ids, weights = torch.ops.mimo.route(
        logits, bias, spec.top_k, spec.scoring, spec.norm_topk, spec.factor, spec.groups,
        spec.top_groups,
    )  # fmt: skip
    return ids, weights


class PreGate(nn.Module):
    """``normed [T, D]`` of one layer -> experts of the next one, by that one's rule."""

    choice_bias: Tensor | None

    def __init__(self, spec: LayerSpec, gate: QuantLinear, choice_bias: Tensor | None) -> None:
        """Take what makes the logits.

        Args:
            spec: Of the layer that is chosen for.
            gate: ``[E, D]``, with a bias or without.
            choice_bias: Of that layer's router, float32 ``[E]``, which decides who is chosen and not the
                weights; None: it has none.
        """
        super().__init__()
        self.spec, self.gate = spec, gate
        self.register_buffer("choice_bias", choice_bias)

    @property
    def kind(self) -> str:
        """What the graph depends on: the rule, and how the gate is stored."""
        s = self.spec
        rule = (
            s.experts, s.top_k, s.scoring, s.norm_topk, s.factor, s.groups, s.top_groups,
            self.choice_bias is not None,
        )  # fmt: skip
        return f"pre{rule}{self.gate.kind}"

    def forward(self, x: Tensor) -> Routes:
        """Return the next layer's experts and weights for rows ``[T, D]``."""
        return choose(self.spec, self.gate(x), self.choice_bias)
