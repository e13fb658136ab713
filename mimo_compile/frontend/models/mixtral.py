"""Mixtral: a Llama whose blocks are routed experts, all with the same sliding window, or none."""

from __future__ import annotations

from mimo_compile.frontend.models.decoder import DecoderConfig, LayerSpec
from mimo_compile.frontend.models.family import Fields, Names, dense_decoder, standard_names
from mimo_compile.frontend.models.mixture import (
    number_of_experts,
    plain_router,
    routed,
    with_experts,
)
from mimo_compile.frontend.models.windows import one_window
from mimo_compile.frontend.weights.checkpoint import Checkpoint

__all__ = ["configure", "layer_names"]


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate a Mixtral ``config.json``; ``intermediate_size`` is the width of an expert."""
    fields.require("attention_bias", (False,))
    plain_router(fields)
    dense = dense_decoder(fields, eps=1e-5, theta=1e6, windows=one_window)
    experts = number_of_experts(fields, "num_local_experts", "num_experts")
    feed = routed(fields, experts, fields.integer("intermediate_size"), norm=True)
    return with_experts(dense, [True] * len(dense.layers), feed)


def layer_names(spec: LayerSpec, prefix: str, checkpoint: Checkpoint) -> Names:
    """Return the published names of a layer, or those of transformers' own modules where they occur."""
    names = standard_names(spec, prefix, checkpoint)
    if checkpoint.shape(names["router"]) is not None:
        return names
    block = f"{prefix}block_sparse_moe."
    names["router"] = f"{block}gate.weight"
    for part, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        names[f"experts.{part}"] = f"{block}experts.{{e}}.{theirs}.weight"
    return names
