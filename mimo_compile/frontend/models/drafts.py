"""Draft layers of multi-token prediction as torch modules over `mimo` ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimo_compile.frontend.models.stages import LayerCore, QuantLinear, float_name, frozen


class MtpLayer(LayerCore):
    """A draft layer: ``(hidden [T, D] before the final norm, ids [T], table, pos) -> normed [T, D]``."""

    def bind(self, table: nn.Parameter, eh_proj: QuantLinear, norms: dict[str, Tensor]) -> MtpLayer:
        """Attach the shared embedding, the joining projection and ``enorm hnorm final_norm``."""
        self.table, self.eh_proj = table, eh_proj
        self.enorm, self.hnorm = frozen(norms["enorm"]), frozen(norms["hnorm"])
        self.final_norm = frozen(norms["final_norm"])
        return self

    @property
    def kind(self) -> str:
        """What the graph depends on, the joining projection and the table included."""
        return f"{super().kind} {self.eh_proj.kind} {float_name(self.table)}"

    def forward(self, hidden: Tensor, ids: Tensor, table: Tensor, pos: Tensor) -> Tensor:
        """Join token and hidden state (token first), run the layer, normalise."""
        norm, width = torch.nn.functional.rms_norm, (hidden.shape[-1],)
        token = norm(torch.ops.mimo.embed(ids, self.table), width, self.enorm, self.eps)
        state = norm(hidden, width, self.hnorm, self.eps)
        x = self.eh_proj(torch.cat([token, state], dim=-1))
        normed = norm(x, width, self.attn_norm, self.eps)
        x, delta = self.after_norm(normed, x, table, pos)[:2]
        out: Tensor = torch.ops.mimo.add_rms_norm(delta, x, self.final_norm, self.eps)[0]
        return out
