"""MiMo-V2-Flash: hybrid window and full attention, sinks, unequal head widths, routed experts, draft layers.

Two dialects of ``config.json`` are read: the published one (``hybrid_layer_pattern``, ``moe_layer_freq``,
``swa_*``) and the one that transformers writes (``layer_types``, ``mlp_layer_types``, ``rope_parameters``),
which derives the window layers' KV heads as twice the others and knows no draft layers. A window of W lets a
query see W keys, itself included, in both. (transformers reads ``sliding_window_size`` of the published
dialect as W + 1; the kernels of other engines and the model built in here take W.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mimo_compile.frontend.models.decoder import DecoderConfig, LayerSpec
from mimo_compile.frontend.models.family import (
    MOST,
    Fields,
    Names,
    read_rope,
    standard_names,
    stored_drafts,
)
from mimo_compile.frontend.models.mixture import routed
from mimo_compile.frontend.weights.checkpoint import Checkpoint

__all__ = ["configure", "layer_names"]

_DIALECTS = frozenset(
    """
    hybrid_layer_pattern moe_layer_freq mlp_layer_types layernorm_epsilon rms_norm_eps swa_head_dim
    swa_v_head_dim swa_num_attention_heads swa_num_key_value_heads swa_rope_theta sliding_window_size
    attention_chunk_size sliding_window layer_types add_swa_attention_sink_bias add_full_attention_sink_bias
    """.split()
)
"""What only one of them has; files that were saved again may hold both."""


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate either dialect; draft layers are counted from the tensor names."""
    fields.asked.update(_DIALECTS)
    fields.require("hidden_act", ("silu",))
    fields.require("n_shared_experts", (0,))
    fields.require("topk_method", ("noaux_tc",))
    fields.require("scoring_func", ("sigmoid", "softmax"))
    fields.require("attention_projection_layout", ("split", "separate"))
    count = fields.integer("num_hidden_layers", high=MOST)
    published = fields.get("hybrid_layer_pattern") is not None
    if published:
        sliding = fields.per_layer("hybrid_layer_pattern", count, (0, 1)) or []
        sparse = fields.per_layer("moe_layer_freq", count, (0, 1))
        attention = {bool(s): _published_attention(fields, bool(s)) for s in {1, *sliding}}
    else:
        kinds = fields.per_layer("layer_types", count, ("full_attention", "sliding_attention"))
        if kinds is None:
            raise fields.fail("neither hybrid_layer_pattern nor layer_types is there")
        sliding = [int(kind == "sliding_attention") for kind in kinds]
        blocks = fields.per_layer("mlp_layer_types", count, ("dense", "sparse"))
        sparse = None if blocks is None else [int(block == "sparse") for block in blocks]
        attention = {bool(s): _native_attention(fields, bool(s)) for s in {1, *sliding}}
    if sparse is None:
        raise fields.fail(f"{'moe_layer_freq' if published else 'mlp_layer_types'} is missing")
    feed: dict[bool, dict[str, Any]] = {
        False: {"mlp": "dense", "ffn": fields.integer("intermediate_size")}
    }
    if any(sparse):
        feed[True] = routed(
            fields,
            fields.integer("n_routed_experts", high=MOST),
            fields.integer("moe_intermediate_size"),
            norm=fields.flag("norm_topk_prob", True),
            scoring=fields.get("scoring_func", "sigmoid"),
            bias=True,
        )
    layers = tuple(
        LayerSpec(**attention[bool(s)], **feed[bool(m)])
        for s, m in zip(sliding, sparse, strict=True)
    )
    vocab = fields.integer("vocab_size")
    return DecoderConfig(
        name="mimo_v2_flash",
        hidden=fields.integer("hidden_size"),
        vocab=vocab,
        layers=layers,
        eps=fields.number("layernorm_epsilon", fields.number("rms_norm_eps", 1e-5)),
        tied=fields.flag("tie_word_embeddings", False),
        max_context=fields.integer("max_position_embeddings", 131072),
        bos=fields.bos(vocab),
        eos=fields.eos(vocab),
        mtp=_draft_layers(fields, checkpoint, attention[True]),
    )


def _published_attention(fields: Fields, sliding: bool) -> dict[str, Any]:
    prefix = "swa_" if sliding else ""
    d = fields.integer(f"{prefix}head_dim")
    theta = fields.number(f"{prefix}rope_theta")
    rope = read_rope(replace(fields, raw={**fields.raw, "rope_theta": theta}), d)
    window = _published_window(fields) if sliding else 0
    sink = "add_swa_attention_sink_bias" if sliding else "add_full_attention_sink_bias"
    return {
        **_heads(
            fields,
            fields.integer(f"{prefix}num_attention_heads", fields.integer("num_attention_heads")),
            fields.integer(f"{prefix}num_key_value_heads"),
        ),
        **rope,
        "d": d,
        "dv": fields.integer(f"{prefix}v_head_dim", d),
        "window": window,
        "sink": fields.flag(sink, sliding),
    }


def _published_window(fields: Fields) -> int:
    """Return the window; files that transformers re-saved hold its own ``sliding_window`` beside it."""
    names = ["sliding_window_size", "attention_chunk_size"]
    if fields.get("layer_types") is None or fields.get(names[0]) is None:
        names.append("sliding_window")
    found = {name: fields.integer(name) for name in names if fields.get(name) is not None}
    if len(set(found.values())) != 1:
        raise fields.fail(f"the window is not given once: {found or 'sliding_window is missing'}")
    return next(iter(found.values()))


def _native_attention(fields: Fields, sliding: bool) -> dict[str, Any]:
    d = fields.integer("head_dim", 192)
    kind = "sliding_attention" if sliding else "full_attention"
    return {
        **_heads(
            fields,
            fields.integer("num_attention_heads"),
            fields.integer("num_key_value_heads") * (2 if sliding else 1),
        ),
        **read_rope(fields, d, kind),
        "d": d,
        "dv": fields.integer("v_head_dim", 128),
        "window": fields.integer("sliding_window") if sliding else 0,
        "sink": sliding,
    }


def _heads(fields: Fields, heads: int, kv_heads: int) -> dict[str, Any]:
    if heads % kv_heads:
        raise fields.fail(f"{heads} query heads are no multiple of {kv_heads} KV heads")
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "v_scale": fields.number("attention_value_scale", 1.0),
        "qkv_bias": fields.flag("attention_bias", False),
    }


def _draft_layers(
    fields: Fields, checkpoint: Checkpoint, attention: dict[str, Any]
) -> tuple[LayerSpec, ...]:
    """Draft layers attend through a window and are dense; their width is that of their tensors."""
    layers = []
    for i in range(stored_drafts(fields, checkpoint, "model.mtp.layers.")):
        shape = checkpoint.shape(f"model.mtp.layers.{i}.mlp.gate_proj.weight")
        ffn = shape[0] if shape and len(shape) == 2 else fields.integer("intermediate_size")
        layers.append(LayerSpec(**attention, mlp="dense", ffn=ffn))
    return tuple(layers)


def layer_names(spec: LayerSpec, prefix: str, checkpoint: Checkpoint) -> Names:
    """Return the names of a layer; names of transformers' own modules are taken where they occur."""
    names = standard_names(spec, prefix, checkpoint)
    if prefix.startswith("model.mtp."):
        names["mlp_norm"] = prefix + "pre_mlp_layernorm.weight"
        for key, name in (
            ("enorm", "enorm"),
            ("hnorm", "hnorm"),
            ("final_norm", "final_layernorm"),
        ):
            names[key] = f"{prefix}{name}.weight"
        names["eh_proj"] = prefix + "eh_proj.weight"
    if spec.sink and checkpoint.shape(f"{prefix}self_attn.sinks") is not None:
        names["sink"] = prefix + "self_attn.sinks"
    return names
