"""The shape of the built-in model, under the field names of a MiMo-V2-Flash `config.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """Shape of a MiMo-V2-Flash decoder. Defaults: the built-in model.

    `hybrid_layer_pattern` holds 1 for a sliding-window layer and 0 for a global one;
    `moe_layer_freq` holds 1 for a layer with experts and 0 for a dense one.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    hybrid_layer_pattern: tuple[int, ...] = (0, 1, 1, 1, 1, 0)
    moe_layer_freq: tuple[int, ...] = (0, 1, 1, 1, 1, 1)
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 64
    v_head_dim: int = 32
    swa_num_attention_heads: int = 4
    swa_num_key_value_heads: int = 2
    swa_head_dim: int = 64
    swa_v_head_dim: int = 32
    partial_rotary_factor: float = 0.5
    rope_theta: float = 100_000.0
    swa_rope_theta: float = 10_000.0
    sliding_window: int = 128
    attention_value_scale: float = 0.707
    intermediate_size: int = 512
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    mtp_layers: int = 3
    mtp_intermediate_size: int = 64
    layernorm_epsilon: float = 1e-5
    max_position_embeddings: int = 4096

    def __post_init__(self) -> None:
        layers = self.num_hidden_layers
        if len(self.hybrid_layer_pattern) != layers or len(self.moe_layer_freq) != layers:
            raise ValueError(
                f"hybrid_layer_pattern and moe_layer_freq need one entry per layer ({layers}), "
                f"found {len(self.hybrid_layer_pattern)} and {len(self.moe_layer_freq)}"
            )
        if self.rotary_dims(self.head_dim) % 2:
            raise ValueError("partial_rotary_factor must leave an even number of rotary dims")

    def rotary_dims(self, head_dim: int) -> int:
        """How many leading dims of a query or key head are rotated."""
        return int(head_dim * self.partial_rotary_factor)

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`, with the fields of the published model."""
        shape = asdict(self)
        del shape["mtp_layers"]  # as in the published model: counted from the tensor names
        for name in ("hybrid_layer_pattern", "moe_layer_freq"):
            shape[name] = list(shape[name])
        return {
            "architectures": ["MiMoV2FlashForCausalLM"],
            "model_type": "mimo_v2_flash",
            **shape,
            "attention_chunk_size": self.sliding_window,
            "add_full_attention_sink_bias": False,
            "add_swa_attention_sink_bias": True,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_scaling": None,
            "hidden_act": "silu",
            "n_shared_experts": None,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": None,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any], mtp_layers: int) -> TinyConfig:
        """Read the fields back; the number of MTP layers comes from the tensor names."""
        known: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in content:
                value = content[field.name]
                known[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**{**known, "mtp_layers": mtp_layers})


def read_config(folder: Path, mtp_layers: int = 3) -> TinyConfig:
    """Read `folder/config.json`."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return TinyConfig.from_json(content, mtp_layers)
