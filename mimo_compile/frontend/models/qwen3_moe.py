"""Qwen3 with routed experts: those of Qwen3 (dense) in some layers, softmax scores."""

from __future__ import annotations

from mimo_compile.frontend.models.decoder import DecoderConfig
from mimo_compile.frontend.models.family import Fields, dense_decoder, standard_names
from mimo_compile.frontend.models.mixture import (
    EXPERTS,
    every_few,
    number_of_experts,
    plain_router,
    routed,
    with_experts,
)
from mimo_compile.frontend.models.windows import in_all_layers
from mimo_compile.frontend.weights.checkpoint import Checkpoint

__all__ = ["configure", "layer_names"]


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate a Qwen3-MoE ``config.json``; with ``use_sliding_window`` all layers have the window."""
    fields.require("attention_bias", (False,))
    plain_router(fields)
    dense = dense_decoder(fields, qk_norm="head", windows=in_all_layers)
    sparse = every_few(fields, len(dense.layers))
    if not any(sparse):
        fields.asked.update(EXPERTS)
        return dense
    experts = number_of_experts(fields, "num_experts", "num_local_experts")
    norm = fields.flag("norm_topk_prob", False)
    feed = routed(fields, experts, fields.integer("moe_intermediate_size"), norm=norm)
    return with_experts(dense, sparse, feed)


layer_names = standard_names
