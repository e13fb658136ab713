"""OLMoE: norms over all query and all key heads together, limits of q, k and v, experts in all layers."""

from __future__ import annotations

from dataclasses import replace

from mimo_compile.frontend.models.decoder import DecoderConfig
from mimo_compile.frontend.models.family import Fields, dense_decoder, standard_names
from mimo_compile.frontend.models.mixture import (
    number_of_experts,
    plain_router,
    routed,
    with_experts,
)
from mimo_compile.frontend.models.windows import no_windows
from mimo_compile.frontend.weights.checkpoint import Checkpoint

__all__ = ["configure", "layer_names"]


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate an OLMoE ``config.json``; ``intermediate_size`` is the width of an expert."""
    fields.require("attention_bias", (False,))
    plain_router(fields)
    dense = dense_decoder(fields, qk_norm="all", eps=1e-5, windows=no_windows)
    if fields.get("clip_qkv") is not None:
        limit = fields.number("clip_qkv")
        dense = replace(dense, layers=tuple(replace(s, clip_qkv=limit) for s in dense.layers))
    experts = number_of_experts(fields, "num_experts", "num_local_experts")
    norm = fields.flag("norm_topk_prob", False)
    feed = routed(fields, experts, fields.integer("intermediate_size"), norm=norm)
    return with_experts(dense, [True] * len(dense.layers), feed)


layer_names = standard_names
