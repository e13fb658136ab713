"""Qwen2 (and 1.5) with routed experts and one that all tokens pass, weighed by a sigmoid of its own."""

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
from mimo_compile.frontend.weights.checkpoint import Checkpoint

__all__ = ["configure", "layer_names"]


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate a Qwen2-MoE ``config.json``."""
    plain_router(fields, "shared_expert_intermediate_size")
    if fields.flag("use_sliding_window", False) and fields.get("layer_types") is None:
        raise fields.fail(  # versions of transformers disagree
            "use_sliding_window does not say which layers have the window",
            "List them in layer_types, or set it to false",
        )
    dense = dense_decoder(fields, qkv_bias=fields.flag("qkv_bias", True))
    sparse = every_few(fields, len(dense.layers))
    if not any(sparse):
        fields.asked.update(EXPERTS)
        return dense
    experts = number_of_experts(fields, "num_experts", "num_local_experts")
    norm = fields.flag("norm_topk_prob", False)
    feed = routed(fields, experts, fields.integer("moe_intermediate_size"), norm=norm)
    shared = fields.integer("shared_expert_intermediate_size")
    return with_experts(dense, sparse, {**feed, "shared_ffn": shared, "shared_gate": True})


layer_names = standard_names
