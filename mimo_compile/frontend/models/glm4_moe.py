"""GLM-4.5: half of each head is rotated, sigmoid scores with a bias, shared experts behind dense layers.

The draft layers that published files hold behind the others are left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from mimo_compile.frontend.models.decoder import DecoderConfig
from mimo_compile.frontend.models.family import MOST, Fields, dense_decoder, standard_names
from mimo_compile.frontend.models.mixture import behind_dense, deepseek_experts, with_experts
from mimo_compile.frontend.models.windows import no_windows
from mimo_compile.frontend.weights.checkpoint import Checkpoint

__all__ = ["configure", "layer_names"]

_DEFAULTS: dict[str, Any] = {
    "partial_rotary_factor": 0.5,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
}


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate a GLM-4.5 ``config.json``."""
    given = {name: value for name, value in fields.raw.items() if value is not None}
    fields = replace(fields, raw={**_DEFAULTS, **given})
    fields.require("topk_method", ("noaux_tc",))
    fields.require("scoring_func", ("sigmoid",))
    bias, normed = fields.flag("attention_bias", False), fields.flag("use_qk_norm", False)
    norms: Literal["", "head"] = "head" if normed else ""
    dense = dense_decoder(fields, qkv_bias=bias, qk_norm=norms, eps=1e-5, windows=no_windows)
    count = len(dense.layers)
    drafts = fields.integer("num_nextn_predict_layers", 0, low=0, high=MOST)
    left_out = tuple(f"model.layers.{count + i}." for i in range(drafts))
    norm = fields.flag("norm_topk_prob", _DEFAULTS["norm_topk_prob"])
    feed = deepseek_experts(fields, norm=norm, scoring="sigmoid", bias=True)
    model = with_experts(dense, behind_dense(fields, count), feed)
    return replace(model, left_out=left_out)


layer_names = standard_names
