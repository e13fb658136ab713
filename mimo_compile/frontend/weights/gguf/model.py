"""What the metadata of a GGUF file says about its model, in the terms of Hugging Face's ``config.json``."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.frontend.weights.gguf.reader import GgufFile

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FREQUENCIES = "rope_freqs.weight"
"""Factors that divide the rotary frequencies (Llama 3's scaling, worked out)."""
_NAME = re.compile(r"(?:blk\.(\d{1,6})\.)?([a-z_]+)\.(weight|bias)")
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all published models of Llama 3.1 to 3.3 use; factors that do not follow from it are refused."""


def tensor_name(name: str) -> str:
    """Return the name that model families use; names that are not known stay."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    layer, part, kind = match.groups()
    if layer is None:
        return f"{_TOP[part]}.{kind}" if part in _TOP else name
    return f"model.layers.{layer}.{_LAYER[part]}.{kind}" if part in _LAYER else name


def rotated_rows(architecture: str, name: str, config: dict[str, Any]) -> int:
    """Return the heads of a matrix whose rows the writer reordered (0: it did not).

    Files of Llama hold the rows of each query and key head in pairs ``(i, i + d/2)``.
    """
    if architecture != "llama":
        return 0
    if name.endswith("self_attn.q_proj.weight"):
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if name.endswith("self_attn.k_proj.weight") else 0


def row_order(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """Return which stored row each row is: the pairs of `rotated_rows` undone."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def read_config(file: GgufFile, factors: npt.NDArray[np.float32] | None) -> dict[str, Any]:
    """Translate the metadata.

    Args:
        file: the file.
        factors: content of `FREQUENCIES`, if it is there.

    Raises:
        InputError: an architecture or feature that is not known, or fields that are missing or impossible.
    """
    get = file.metadata.get
    architecture = get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise file.fail(
            f"the architecture {architecture!r} is not read from GGUF",
            f"Known: {', '.join(_ARCHITECTURES)}",
        )
    if get("split.count", 0) not in (0, 1):
        raise file.fail("it is one part of several", "Merge the parts first (gguf-split --merge)")
    fields = _Fields(file, architecture)
    for name in ("expert_count", "attention.sliding_window"):
        if fields.value(name, 0):
            raise file.fail(f"{architecture}.{name} is not supported")
    heads = fields.integer("attention.head_count")
    hidden = fields.integer("embedding_length")
    width = fields.integer("attention.key_length", hidden // heads if hidden % heads == 0 else 0)
    if width != fields.integer("attention.value_length", width):
        raise file.fail("keys and values of different width are not supported")
    if fields.integer("rope.dimension_count", width) != width:
        raise file.fail("rotating a part of each head is not supported")
    layers = fields.integer("block_count")
    if layers > len(file.tensors):
        raise file.fail(f"{layers} layers in {len(file.tensors)} tensors")
    table = file.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "model_type": architecture,
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": width,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "max_position_embeddings": fields.integer("context_length"),
        "vocab_size": fields.integer("vocab_size", table.shape[0] if table else 0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
    }
    if scaling := _scaling(file, fields, config, factors):
        config["rope_scaling"] = scaling
    return config | _special(file)


def _special(file: GgufFile) -> dict[str, Any]:
    """Return the tokens that begin and end texts."""

    def token(name: str) -> int | None:
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < 1 << 31 else None

    ends = [t for t in dict.fromkeys(token(n) for n in ("eos", "eot", "eom")) if t is not None]
    return {"bos_token_id": token("bos"), "eos_token_id": ends}


def _scaling(
    file: GgufFile,
    fields: _Fields,
    config: dict[str, Any],
    factors: npt.NDArray[np.float32] | None,
) -> dict[str, Any] | None:
    kind = fields.value("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise file.fail(f"rope scaling {kind!r} is not supported", "Known: none, linear")
    old = fields.number("rope.scale_linear", 1.0)
    factor = fields.number("rope.scaling.factor", old) if kind == "linear" or old != 1 else 1.0
    if factors is None:
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    largest = float(factors.max()) if factors.size else 0.0
    if factor != 1 or not 1 <= largest < 1e6:
        raise file.fail(f"{FREQUENCIES} with a factor of {largest:g} is not supported")
    scaling = {"rope_type": "llama3", "factor": round(largest, 3), **_LLAMA3}
    if not _follows(factors, scaling, config):
        raise file.fail(f"{FREQUENCIES} is no scaling of Llama 3 with the factor {largest:g}")
    return scaling


def _follows(
    factors: npt.NDArray[np.float32], scaling: dict[str, Any], config: dict[str, Any]
) -> bool:
    """Say whether factors are those that a scaling of Llama 3 gives."""
    width = config["head_dim"]
    if factors.shape != (width // 2,):
        return False
    inverse = config["rope_theta"] ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    keep = np.clip((waves - low) / (high - low), 0, 1)
    wanted = 1 / ((1 - keep) / scaling["factor"] + keep)
    return bool(np.allclose(factors, wanted, rtol=1e-4))


class _Fields:
    """Metadata of the architecture, checked."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.prefix = file, architecture

    def value(self, name: str, default: Any = None) -> Any:
        found = self.file.metadata.get(f"{self.prefix}.{name}", default)
        if found is None:
            raise self.file.fail(f"{self.prefix}.{name} is missing")
        return found

    def integer(self, name: str, default: int | None = None) -> int:
        found = self.value(name, default)
        if type(found) is not int or not 0 < found < 1 << 31:
            what = "differs between layers" if isinstance(found, np.ndarray) else f"is {found!r}"
            raise self.file.fail(f"{self.prefix}.{name} {what}; a positive number is needed")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        found = self.value(name, default)
        if type(found) not in (int, float) or not 0 < found < 1e30:
            raise self.file.fail(f"{self.prefix}.{name} is {found!r}; a positive number is needed")
        return float(found)
