"""What a model family provides, and the helpers that families share.

A family is one module with ``configure(fields, checkpoint) -> DecoderConfig`` and
``layer_names(spec, prefix, checkpoint) -> names`` (most use `standard_names`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from mimo_compile.errors import InputError
from mimo_compile.frontend.models.decoder import DecoderConfig, LayerSpec
from mimo_compile.frontend.models.windows import Rule, from_a_layer
from mimo_compile.frontend.weights.checkpoint import Checkpoint

Names = dict[str, str]
"""Weight of a layer (``q``, ``gate``, ``experts.gate`` ...) -> tensor name; ``{e}`` stands for the expert."""

MOST = 10_000
"""Layers of a model, and experts of a layer: far beyond any, and soon listed."""


INERT = frozenset(
    """
    architectures auto_map torch_dtype dtype transformers_version _name_or_path tokenizer_class use_cache
    pad_token_id sep_token_id initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop
    pretraining_tp router_aux_loss_coef aux_loss_alpha seq_aux router_jitter_noise output_router_logits
    return_dict id2label label2id ep_size mtp_intermediate_size quantization_config compression_config
    quantization model_type eos_token_id bos_token_id rope_scaling rope_parameters rope_theta
    head_dim intermediate_size torchscript tf_legacy_loss use_bfloat16 pruned_heads output_attentions
    output_hidden_states is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder chunk_size_feed_forward finetuning_task problem_type task_specific_params prefix
    decoder_start_token_id forced_bos_token_id forced_eos_token_id max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty attn_implementation _attn_implementation
    _attn_implementation_autoset transformers.js_config unsloth_fixed unsloth_version
    index_topk index_n_heads index_head_dim
    seerattn_gate_block_size seerattn_use_rope seerattn_k_seq_pooling_type seerattn_q_head_pooling_type
    """.split()
)
"""Fields that change nothing of what a model computes when it runs, that others read, or that count only
together with those that were asked for."""


class Family(Protocol):
    """The two functions of a family's module."""

    def configure(self, fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
        """Translate ``config.json``; the checkpoint's names and shapes may decide details."""
        ...

    def layer_names(self, spec: LayerSpec, prefix: str, checkpoint: Checkpoint) -> Names:
        """Say where the weights of one layer stand (``prefix`` ends in a dot)."""
        ...


@dataclass(frozen=True)
class Fields:
    """A ``config.json`` with typed, checked access; every error names the field and the file."""

    raw: Mapping[str, Any]
    file: Path
    asked: set[str] = field(default_factory=set, compare=False)
    """Names that somebody asked for."""
    within: set[str] = field(default_factory=set, compare=False)
    """Fields of objects in it that nobody asked for, such as ``rope_scaling.mscale``."""

    def fail(self, what: str, remedy: str = "") -> InputError:
        """Build the error for a field that is wrong or not supported."""
        return InputError(what, file=self.file, remedy=remedy)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, ``default`` when it is absent or null."""
        self.asked.add(name)
        value = self.raw.get(name)
        return default if value is None else value

    def unknown(self) -> list[str]:
        """Return the fields that nobody asked for though they say something, but for those that are inert.

        False and 0 say something: ``use_rope: false``.
        """
        names = {n for n in set(self.raw) - self.asked - INERT if not _empty(self.raw[n])}
        return sorted(names | self.within)

    def integer(
        self, name: str, default: int | None = None, low: int = 1, high: int = 2**63 - 1
    ) -> int:
        """Return an integer from ``low`` to ``high``; required without a default."""
        value = self.get(name, default)
        if value is None:
            raise self.fail(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.fail(f"{name} must be an integer of at least {low}, found {value!r}")
        if value > high:
            raise self.fail(f"{name}={value} is beyond the {high} that are supported")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a finite positive number; required without a default."""
        value = self.get(name, default)
        if value is None:
            raise self.fail(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.fail(f"{name} must be a positive number, found {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(f"{name} must be true or false, found {value!r}")
        return value

    def per_layer(self, name: str, layers: int, allowed: tuple[Any, ...]) -> list[Any] | None:
        """Return a list with one of ``allowed`` for each layer, None when the field is absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers:
            length = len(value) if isinstance(value, list) else repr(value)
            raise self.fail(
                f"{name} must list one entry for each of {layers} layers, found {length}"
            )
        if wrong := [v for v in value if v not in allowed]:
            raise self.fail(
                f"{name} holds {wrong[0]!r}", f"Known entries: {', '.join(map(str, allowed))}"
            )
        return value

    def require(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a feature: the field must be absent, null or one of ``allowed``."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise self.fail(
                f"{name}={value!r} is not supported", f"Supported: {', '.join(map(repr, allowed))}"
            )

    def bos(self, vocab: int) -> int | None:
        """Return the token that begins a text (None: there is none), one of ``vocab``."""
        value: int | None = self.get("bos_token_id")
        if value is not None and not _token(value, vocab):
            raise self.fail(
                f"bos_token_id must be a token of 0 to {vocab - 1} or null, found {value!r}"
            )
        return value

    def eos(self, vocab: int) -> tuple[int, ...]:
        """Return the tokens that end a text, of ``vocab``."""
        value = self.get("eos_token_id", [])
        values = value if isinstance(value, list) else [value]
        if not all(_token(v, vocab) for v in values):
            raise self.fail(
                f"eos_token_id must be a token of 0 to {vocab - 1} or a list of them, found {value!r}"
            )
        return tuple(values)


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, list | dict | str) and not value)


def _token(value: Any, vocab: int) -> bool:
    return type(value) is int and 0 <= value < vocab


def read_rope(
    fields: Fields, d: int, layer_type: str | None = None, theta: float | None = None
) -> dict[str, Any]:
    """Read rotary settings from either spelling of ``config.json``.

    Old files have ``rope_theta`` and ``rope_scaling``, newer ones one ``rope_parameters`` object, which may
    hold an object per layer type.

    Args:
        fields: the configuration.
        d: width of a head.
        layer_type: key of the per-layer-type object.
        theta: base when the file gives none (None: required).

    Returns:
        ``rope_theta``, ``rotary_dim`` and ``rope_scaling`` of a `LayerSpec`.
    """
    # transformers too prefers the older field where both are given
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    given = fields.get(name, {})
    if isinstance(given, dict) and layer_type is not None:
        given = given.get(layer_type, given)
    if not isinstance(given, dict):
        raise fields.fail(f"rope_scaling or rope_parameters must be an object, found {given!r}")
    if nested := [key for key, value in given.items() if isinstance(value, dict)]:
        raise fields.fail(
            f"{name} has settings of its own for {', '.join(map(str, nested))}, "
            + ("which are not read here" if layer_type is None else f"none for {layer_type}")
        )
    top = {key: fields.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope = Fields({**{k: v for k, v in top.items() if v is not None}, **given}, fields.file)
    dim = int(d * rope.number("partial_rotary_factor", 1.0))
    if dim % 2 or not 0 < dim <= d:
        raise fields.fail(
            f"partial_rotary_factor rotates {dim} of {d} dimensions, not an even part"
        )
    settings = {
        "rope_theta": rope.number("rope_theta", theta),
        "rotary_dim": dim,
        "rope_scaling": _scaling(rope),
    }
    fields.within.update(f"{name}.{unknown}" for unknown in rope.unknown())
    return settings


def _scaling(rope: Fields) -> dict[str, Any] | None:
    kind, old = rope.get("rope_type"), rope.get("type")
    if kind is not None and old is not None and kind != old:
        raise rope.fail(f"rope_type={kind!r} and type={old!r} name two kinds of rotary scaling")
    kind = old if kind is None else kind
    if kind is None and rope.get("factor") is not None:
        raise rope.fail(
            "the rotary scaling has a factor and no rope_type", "Known: default, linear, llama3"
        )
    if kind in (None, "default"):
        return None
    if kind == "linear":
        return {"type": "linear", "factor": rope.number("factor")}
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.fail(f"low_freq_factor={low} must be less than high_freq_factor={high}")
        original = rope.integer("original_max_position_embeddings")
        factor = rope.number("factor")
        return {"type": "llama3", "factor": factor, "low": low, "high": high, "original": original}
    raise rope.fail(f"rope type {kind!r} is not supported", "Supported: default, linear, llama3")


def head_dims(fields: Fields) -> tuple[int, int, int]:
    """Return query heads, KV heads and head width of an ordinary decoder."""
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.fail(
            f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
        )
    hidden = fields.integer("hidden_size")
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.fail(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}")
    return heads, kv_heads, fields.integer("head_dim", hidden // heads)


def dense_decoder(
    fields: Fields, *, qkv_bias: bool = False, qk_norm: Literal["", "head", "all"] = "",
    eps: float = 1e-6, theta: float = 1e4, windows: Rule = from_a_layer,
) -> DecoderConfig:  # fmt: skip
    """Configure an ordinary dense decoder (Llama, Qwen2, Qwen3).

    Args:
        fields: The configuration.
        qkv_bias: q, k and v have biases.
        qk_norm: What q and k are normalised over.
        eps: Of norms where the file says nothing.
        theta: Base of rotary angles where the file says nothing.
        windows: Which layers have one.
    """
    fields.require("hidden_act", ("silu",))
    heads, kv_heads, d = head_dims(fields)
    count = fields.integer("num_hidden_layers", high=MOST)
    rope = read_rope(fields, d, theta=theta)
    ffn, vocab = fields.integer("intermediate_size"), fields.integer("vocab_size")
    layers = tuple(
        LayerSpec(
            heads,
            kv_heads,
            d,
            d,
            window=window,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            ffn=ffn,
            **rope,
        )
        for window in windows(fields, count)
    )
    return DecoderConfig(
        name=str(fields.get("model_type")),
        hidden=fields.integer("hidden_size"),
        vocab=vocab,
        layers=layers,
        eps=fields.number("rms_norm_eps", eps),
        tied=fields.flag("tie_word_embeddings", False),
        max_context=fields.integer("max_position_embeddings", 2048),
        bos=fields.bos(vocab),
        eos=fields.eos(vocab),
    )


def stored_drafts(fields: Fields, checkpoint: Checkpoint, prefix: str) -> int:
    """Return how many draft layers have tensors, whose names go on with a number behind ``prefix``.

    Where there are no tensors, as many as the configuration asks for.
    """
    if not checkpoint.has_tensors:
        return fields.integer("num_nextn_predict_layers", 0, low=0, high=MOST)
    number = re.compile(re.escape(prefix) + r"(\d+)\.")
    found = sorted({int(m[1]) for name in checkpoint.entries if (m := number.match(name))})
    if found != list(range(len(found))):
        raise fields.fail(f"draft layers {found} are not numbered from 0 without a gap")
    return len(found)


def standard_names(spec: LayerSpec, prefix: str, checkpoint: Checkpoint) -> Names:
    """Return the tensor names that most families share, those that ``spec`` needs.

    Experts have a tensor each, or one for all as in transformers' own modules, whatever is stored.
    """
    names = {
        "attn_norm": "input_layernorm.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "o": "self_attn.o_proj.weight",
    }
    for part in ("q", "k", "v"):
        names[part] = f"self_attn.{part}_proj.weight"
        if spec.qkv_bias:
            names[f"{part}_bias"] = f"self_attn.{part}_proj.bias"
    if spec.qk_norm:
        names |= {"q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"}
    if spec.sink:
        names["sink"] = "self_attn.attention_sink_bias"
    if spec.mlp == "dense":
        names |= {part: f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    else:
        names["router"] = "mlp.gate.weight"
        if checkpoint.shape(f"{prefix}mlp.experts.gate_up_proj") is not None:
            names["experts.gate_up"] = "mlp.experts.gate_up_proj"
            names["experts.all_down"] = "mlp.experts.down_proj"
        else:
            for part in ("gate", "up", "down"):
                names[f"experts.{part}"] = f"mlp.experts.{{e}}.{part}_proj.weight"
        if spec.router_bias:
            names["router_bias"] = "mlp.gate.e_score_correction_bias"
    if spec.shared_ffn:
        block = "shared_expert" if spec.shared_gate else "shared_experts"
        for part in ("gate", "up", "down"):
            names[f"shared.{part}"] = f"mlp.{block}.{part}_proj.weight"
    if spec.shared_gate:
        names["shared_gate"] = "mlp.shared_expert_gate.weight"
    return {key: prefix + name for key, name in names.items()}
