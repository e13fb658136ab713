"""Qwen3 (dense): RMS norms on each query and key head, a head width of its own."""

from __future__ import annotations

from mimo_compile.frontend.models.decoder import DecoderConfig
from mimo_compile.frontend.models.family import Fields, dense_decoder, standard_names
from mimo_compile.frontend.weights.checkpoint import Checkpoint

__all__ = ["configure", "layer_names"]


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate a Qwen3 ``config.json``."""
    fields.require("attention_bias", (False,))
    return dense_decoder(fields, qk_norm="head")


layer_names = standard_names
