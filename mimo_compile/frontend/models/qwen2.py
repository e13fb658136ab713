"""Qwen2 and Qwen2.5 (dense): biases on q, k and v; optional sliding windows from some layer on."""

from __future__ import annotations

from mimo_compile.frontend.models.decoder import DecoderConfig
from mimo_compile.frontend.models.family import Fields, dense_decoder, standard_names
from mimo_compile.frontend.weights.checkpoint import Checkpoint

__all__ = ["configure", "layer_names"]


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate a Qwen2 ``config.json``."""
    return dense_decoder(fields, qkv_bias=True)


layer_names = standard_names
