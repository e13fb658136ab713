"""The second half of a layer: a dense SwiGLU block, or routed experts with or without a shared block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.frontend.models.stages import Experts, QuantLinear


class Feed(nn.Module):
    """``normed [T, D] -> delta [T, D]``."""

    router_bias: Tensor | None
    gate_up: QuantLinear
    down: QuantLinear
    router: QuantLinear
    experts: Experts
    shared_gate_up: QuantLinear
    shared_down: QuantLinear
    shared_gate: QuantLinear

    def __init__(
        self,
        spec: LayerSpec,
        parts: Mapping[str, QuantLinear | Experts],
        router_bias: Tensor | None = None,
    ) -> None:
        """Take ``gate_up`` and ``down``, or ``router`` and ``experts``.

        Beside experts there may be a block that all tokens pass, ``shared_gate_up`` and ``shared_down``, and
        ``shared_gate [1, D]``, whose sigmoid weighs it.
        """
        super().__init__()
        self.spec = spec
        self.register_buffer("router_bias", router_bias)
        for name, part in parts.items():
            self.add_module(name, part)

    @property
    def kind(self) -> str:
        """What the graph depends on beside the spec."""
        return ".".join(str(getattr(part, "kind", "")) for part in self.children())

    def forward(self, x: Tensor, adapter: Tensor | None = None) -> Tensor:
        """Return the block's output for normed rows ``[T, D]``."""
        s = self.spec
        if s.mlp == "dense":
            dense: Tensor = self.down(torch.ops.mimo.swiglu(self.gate_up(x, adapter)), adapter)
            return dense
        ids, weights = torch.ops.mimo.route(
            self.router(x), self.router_bias, s.top_k, s.scoring, s.norm_topk, s.factor,
            s.groups, s.top_groups,
        )  # fmt: skip
        routed: Tensor = self.experts(x, ids, weights)
        if not s.shared_ffn:
            return routed
        shared: Tensor = self.shared_down(torch.ops.mimo.swiglu(self.shared_gate_up(x)))
        if s.shared_gate:
            shared = torch.sigmoid(self.shared_gate(x)) * shared
        return routed + shared
