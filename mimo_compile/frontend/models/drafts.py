"""Draft layers of multi-token prediction as torch modules over `mimo` ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimo_compile.frontend.models.draft_rule import DraftRule
from mimo_compile.frontend.models.stages import LayerCore, QuantLinear, float_name, frozen


class MtpLayer(LayerCore):
    """A draft layer: ``(hidden [T, D] before the final norm, ids [T], table, pos) -> normed [T, D]``."""

    model_norm: nn.Parameter | None

    def bind(
        self,
        table: nn.Parameter,
        eh_proj: QuantLinear,
        norms: dict[str, Tensor],
        rule: DraftRule,
        model_norm: Tensor,
    ) -> MtpLayer:
        """Attach what stands before and behind the layer.

        Args:
            table: The model's embedding ``[V, D]``.
            eh_proj: The joining projection ``[D, 2 D]``.
            norms: ``enorm`` of tokens, ``hnorm`` of hidden states and ``final_norm``, ``[D]`` float32.
            rule: The order of the halves, and what they are.
            model_norm: The model's final norm ``[D]`` float32, for rules by which the state has passed it.
        """
        self.table, self.eh_proj, self.rule = table, eh_proj, rule
        self.enorm, self.hnorm = frozen(norms["enorm"]), frozen(norms["hnorm"])
        self.final_norm = frozen(norms["final_norm"])
        self.register_parameter("model_norm", frozen(model_norm) if rule.normed else None)
        return self

    @property
    def kind(self) -> str:
        """What the graph depends on, the joining projection and the table included."""
        return f"{super().kind} {self.eh_proj.kind} {float_name(self.table)} {self.rule}"

    def forward(self, hidden: Tensor, ids: Tensor, table: Tensor, pos: Tensor) -> Tensor:
        """Join token and hidden state as the rule says, run the layer, normalise."""
        norm, width = torch.nn.functional.rms_norm, (hidden.shape[-1],)
        embedded = torch.ops.mimo.embed(ids, self.table)
        if self.rule.blank_first:
            positions = torch.arange(ids.shape[0], dtype=torch.int32) + pos[0]
            embedded = embedded * (positions > 0).to(embedded.dtype)[:, None]
        token = norm(embedded, width, self.enorm, self.eps)
        if self.model_norm is not None:
            hidden = norm(hidden, width, self.model_norm, self.eps)
        state = norm(hidden, width, self.hnorm, self.eps)
        both = [state, token] if self.rule.hidden_first else [token, state]
        x = self.eh_proj(torch.cat(both, dim=-1))
        normed = norm(x, width, self.attn_norm, self.eps)
        x, delta = self.after_norm(normed, x, table, pos)[:2]
        out: Tensor = torch.ops.mimo.add_rms_norm(delta, x, self.final_norm, self.eps)[0]
        return out
