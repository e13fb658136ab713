"""DeepSeekMoE (16B, the first version): a Llama with routed and shared experts behind dense layers.

Later versions have another attention (latent keys and values), which is not computed.
"""

from __future__ import annotations

from mimo_compile.frontend.models.decoder import DecoderConfig
from mimo_compile.frontend.models.family import Fields, dense_decoder, standard_names
from mimo_compile.frontend.models.mixture import (
    behind_dense,
    deepseek_experts,
    plain_router,
    with_experts,
)
from mimo_compile.frontend.models.windows import no_windows
from mimo_compile.frontend.weights.checkpoint import Checkpoint

__all__ = ["configure", "layer_names"]


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate a ``config.json`` of ``model_type`` ``deepseek``."""
    fields.require("attention_bias", (False,))
    fields.require("mlp_bias", (False,))
    plain_router(fields, "n_shared_experts")
    dense = dense_decoder(fields, windows=no_windows)
    if fields.get("n_routed_experts") is None:  # the family's dense models
        return dense
    # the weight of a single expert is never divided by itself
    norm = fields.flag("norm_topk_prob", False) and fields.integer("num_experts_per_tok") > 1
    return with_experts(
        dense, behind_dense(fields, len(dense.layers)), deepseek_experts(fields, norm=norm)
    )


layer_names = standard_names
