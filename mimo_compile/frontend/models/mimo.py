"""MiMo-7B: a Qwen2 trunk with biases on q, k and v, and draft layers of its own kind (arXiv 2505.07608).

A draft layer joins the model's hidden state after the final norm (first) with the embedding of the next token
(behind it, zero at position 0). Only drafts depend on these layers: a file that holds none is read without,
even if ``num_nextn_predict_layers`` asks for some; one that holds some, but fewer than that, is refused.
"""

from __future__ import annotations

from dataclasses import replace

from mimo_compile.frontend.models.decoder import DecoderConfig, LayerSpec
from mimo_compile.frontend.models.draft_rule import DraftRule
from mimo_compile.frontend.models.family import (
    MOST,
    Fields,
    Names,
    dense_decoder,
    standard_names,
    stored_drafts,
)
from mimo_compile.frontend.models.windows import no_windows
from mimo_compile.frontend.weights.checkpoint import Checkpoint

__all__ = ["configure", "layer_names"]

_RULE = DraftRule("model.mtp_layers.", hidden_first=True, normed=True, blank_first=True)
_NORMS = {"enorm": "token_layernorm", "hnorm": "hidden_layernorm", "final_norm": "final_layernorm"}


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate a MiMo ``config.json``; draft layers are those that are stored and asked for."""
    fields.require("use_mrope", (False,))
    bias = fields.flag("attention_bias", True)
    trunk = dense_decoder(fields, qkv_bias=bias, eps=1e-5, theta=640000.0, windows=no_windows)
    stored = stored_drafts(fields, checkpoint, _RULE.prefix)
    asked = fields.get("num_nextn_predict_layers")
    count = stored if asked is None else _asked(fields, checkpoint, stored)
    left_out = tuple(f"{_RULE.prefix}{i}." for i in range(count, stored))
    if left_out:
        checkpoint.note(
            f"num_nextn_predict_layers={asked}: {len(left_out)} of {stored} stored draft layers "
            "are left out",
        )
    return replace(trunk, mtp=trunk.layers[:1] * count, drafts=_RULE, left_out=left_out)


def _asked(fields: Fields, checkpoint: Checkpoint, stored: int) -> int:
    """Return how many of the stored draft layers are asked for; a file without any is one without."""
    asked = fields.integer("num_nextn_predict_layers", low=0, high=MOST)
    if asked > stored > 0:
        raise fields.fail(
            f"num_nextn_predict_layers={asked}, but {stored} draft layers are stored",
            f"Set it to {stored}, or get the shards that hold the others",
        )
    if asked > stored:
        checkpoint.note(
            f"num_nextn_predict_layers={asked}, but no draft layer ({_RULE.prefix}*) is stored: the "
            "model is read without, and makes no drafts",
        )
    return min(asked, stored)


def layer_names(spec: LayerSpec, prefix: str, checkpoint: Checkpoint) -> Names:
    """Return the names of a layer, those of the trunk for draft layers too, and what these join."""
    names = standard_names(spec, prefix, checkpoint)
    if prefix.startswith(_RULE.prefix):
        names |= {key: f"{prefix}{name}.weight" for key, name in _NORMS.items()}
        names["eh_proj"] = f"{prefix}input_proj.weight"
    return names
