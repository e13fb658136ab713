"""Frequencies of rotary position embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.frontend.models.decoder import LayerSpec


def inverse_frequencies(spec: LayerSpec) -> Tensor:
    """Return the rotary frequencies ``[rotary_dim / 2]`` float32 of a layer, scaling applied.

    Llama 3 scaling divides slow frequencies by ``factor``, keeps fast ones and blends between, by how often
    a wave fits into the original context (between ``low`` and ``high`` times).
    """
    steps = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    inverse = 1.0 / (spec.rope_theta**steps)
    scaling = spec.rope_scaling
    if scaling is None:
        return inverse
    factor = float(scaling["factor"])
    if scaling["type"] == "linear":
        return inverse / factor
    if scaling["type"] != "llama3":
        raise UsageError(f"unknown rope scaling {scaling['type']!r}", remedy="use linear or llama3")
    low, high = float(scaling["low"]), float(scaling["high"])
    waves = float(scaling["original"]) * inverse / (2 * math.pi)
    keep = ((waves - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * inverse / factor + keep * inverse
