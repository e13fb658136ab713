"""dots.llm1: attention of Qwen3, sigmoid scores with a bias, shared experts behind dense layers."""

from __future__ import annotations

from mimo_compile.frontend.models.decoder import DecoderConfig
from mimo_compile.frontend.models.family import Fields, dense_decoder, standard_names
from mimo_compile.frontend.models.mixture import behind_dense, deepseek_experts, with_experts
from mimo_compile.frontend.models.windows import from_a_layer_where_given
from mimo_compile.frontend.weights.checkpoint import Checkpoint

__all__ = ["configure", "layer_names"]


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate a dots.llm1 ``config.json``; windows, if any, begin at layer ``max_window_layers``."""
    fields.require("attention_bias", (False,))
    fields.require("topk_method", ("noaux_tc",))
    fields.require("scoring_func", ("sigmoid", "noaux_tc"))  # published files say the latter
    dense = dense_decoder(fields, qk_norm="head", windows=from_a_layer_where_given)
    count = len(dense.layers)
    norm = fields.flag("norm_topk_prob", False)
    feed = deepseek_experts(fields, norm=norm, scoring="sigmoid", bias=True)
    return with_experts(dense, behind_dense(fields, count), feed)


layer_names = standard_names
