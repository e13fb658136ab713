"""Untrained models of a few thousand parameters in the shape of the built-in one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mimo_compile.tiny import corpus
from mimo_compile.tiny.training_config import TinyConfig
from mimo_compile.tiny.training_model import TinyModel

FOLDER = Path(corpus.__file__).parent
MICRO = TinyConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    hybrid_layer_pattern=(0, 1, 0),
    moe_layer_freq=(0, 1, 1),
    head_dim=16,
    v_head_dim=8,
    swa_head_dim=16,
    swa_v_head_dim=8,
    sliding_window=8,
    intermediate_size=32,
    n_routed_experts=4,
    moe_intermediate_size=16,
    mtp_intermediate_size=16,
)
HYBRID = replace(
    MICRO,
    num_hidden_layers=4,
    hybrid_layer_pattern=(0, 1, 1, 0),
    moe_layer_freq=(0, 1, 0, 1),
    mtp_layers=0,
)
"""Without draft heads; two windows between global layers."""


def untrained(
    config: TinyConfig = MICRO,
    seed: int = 0,
    compute: torch.dtype = torch.float32,
    *,
    by: float = 1.0,
    parts: Sequence[str] = ("q_proj", "k_proj"),
) -> TinyModel:
    """Draw a model; ``by`` scales these projections of its attention, which is far from even then."""
    model = TinyModel(config, compute)
    model.initialise(seed)
    with torch.no_grad():
        for layer in model.layers:
            for name in parts:
                getattr(layer.self_attn, name).weight.mul_(by)
    return model
