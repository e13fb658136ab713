"""The second half of a layer: a dense SwiGLU block, or routed experts with or without a shared block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.frontend.models.early import PreGate, Routes, choose
from mimo_compile.frontend.models.stages import Experts, QuantLinear


class Feed(nn.Module):
    """``normed [T, D] -> delta [T, D]``, and the next layer's experts where it has a `PreGate`."""

    router_bias: Tensor | None
    pre_gate: PreGate | None
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
        pre_gate: PreGate | None = None,
    ) -> None:
        """Take ``gate_up`` and ``down``, or ``experts`` and, unless another layer chooses them, ``router``.

        Beside experts there may be a block that all tokens pass, ``shared_gate_up`` and ``shared_down``, and
        ``shared_gate [1, D]``, whose sigmoid weighs it.
        """
        super().__init__()
        self.spec = spec
        self.register_buffer("router_bias", router_bias)
        for name, part in parts.items():
            self.add_module(name, part)
        self.add_module("pre_gate", pre_gate)

    @property
    def kind(self) -> str:
        """What the graph depends on beside the spec."""
        return ".".join(str(getattr(part, "kind", "")) for part in self.children())

    def forward(
        self, x: Tensor, adapter: Tensor | None = None, routes: Routes | None = None
    ) -> tuple[Tensor, ...]:
        """Run the block on normed rows ``[T, D]``, whose experts may have been chosen one layer earlier.

        Returns:
            Its output and, where it has a pre-gate, the experts and weights of the next layer.
        """
        if self.spec.mlp == "moe" and routes is None:
            routes = choose(self.spec, self.router(x), self.router_bias)
        made = () if self.pre_gate is None else self.pre_gate(x)  # known before experts run
        return self._block(x, adapter, routes), *made

    def _block(self, x: Tensor, adapter: Tensor | None, routes: Routes | None) -> Tensor:
        s = self.spec
        if routes is None:
            dense: Tensor = self.down(torch.ops.mimo.swiglu(self.gate_up(x, adapter)), adapter)
            return dense
        routed: Tensor = self.experts(x, *routes)
        if not s.shared_ffn:
            return routed
        shared: Tensor = self.shared_down(torch.ops.mimo.swiglu(self.shared_gate_up(x)))
        if s.shared_gate:
            shared = torch.sigmoid(self.shared_gate(x)) * shared
        return routed + shared
