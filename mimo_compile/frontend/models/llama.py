"""Llama (1 to 3.x): GQA, SwiGLU, RMS norms; rotary scaling ``linear`` and ``llama3``."""

from __future__ import annotations

from mimo_compile.frontend.models.decoder import DecoderConfig
from mimo_compile.frontend.models.family import Fields, dense_decoder, standard_names
from mimo_compile.frontend.models.windows import no_windows
from mimo_compile.frontend.weights.checkpoint import Checkpoint

__all__ = ["configure", "layer_names"]


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate a Llama ``config.json``."""
    fields.require("attention_bias", (False,))
    fields.require("mlp_bias", (False,))
    return dense_decoder(fields, windows=no_windows)


layer_names = standard_names
