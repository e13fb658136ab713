"""AWQ (arXiv 2306.00978): input channels scaled up by how large they are before weights are rounded.

``y = W x = (W diag(s)) (x / s)``: a large ``s`` makes a channel's weights lose less by rounding, and the
division goes into what makes x. Candidates are ``s = m^a`` (m the mean magnitude of a channel's inputs) and
``s = m^a / v^(1-a)`` (v that of its weights); the one with the least squared error of the outputs wins,
which second moments of the inputs give without running the layer again. ``s = 1`` takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_compile.ir.formats import WeightFormat
from mimo_compile.quantize import quantize
from mimo_compile.quantize.gptq import Gain
from mimo_compile.quantize.moments import Moments, squared_error

_STEPS = 8
"""Exponents from 0 to 1 in so many steps."""
_SPAN = 1e4
"""Largest ratio of two channels' scales."""
_SAMPLE = 512
"""Rows of one matrix that decide."""


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix whose input channels are scaled, and what came into it."""

    weight: Tensor
    """``[N, K]``."""
    moments: Moments
    what: str


def candidates(magnitude: Tensor, weights: Tensor) -> list[Tensor]:
    """Return scales ``[K]`` to try, ones first.

    Args:
        magnitude: ``[K]``, mean magnitude of each channel's inputs.
        weights: ``[K]``, that of its weights.
    """
    out = [torch.ones_like(magnitude)]
    inputs, own = _positive(magnitude), _positive(weights)
    for step in range(1, _STEPS + 1):
        a = step / _STEPS
        for scale in (inputs**a, inputs**a / own ** (1 - a)):
            centred = scale / (scale.amax() * scale.amin()).sqrt()
            out.append(centred.clamp(_SPAN**-0.5, _SPAN**0.5))
    return out[:-1]  # the last two are alike


def search_scales(
    parts: Callable[[], Iterable[Part]],
    magnitude: Tensor,
    fmt: WeightFormat,
    tie: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> tuple[Tensor, Gain]:
    """Return the scales ``[K]`` that all parts share, and the error beside that without them.

    Args:
        parts: gives the matrices, one after the other, so that one is held at a time; called twice.
        magnitude: ``[K]``, mean magnitude of the inputs.
        fmt: what the matrices are rounded to.
        tie: makes channels equal that have to share a scale.

    Raises:
        MimoError: NaN or infinity among weights or inputs.
    """
    total, rows = torch.zeros_like(magnitude), 0
    for part in parts():
        # each row relative to its largest weight, so that no row decides alone
        size = part.weight.to(torch.float32).abs()
        total += (size / size.amax(1, keepdim=True).clamp_min(1e-12)).sum(0)
        rows += len(size)
    tried = [tie(scale) for scale in candidates(magnitude, total / max(1, rows))]
    errors = torch.zeros(len(tried), dtype=torch.float64)
    for part in parts():
        part.moments.check(part.what)
        hessian = part.moments.hessian
        weight = part.weight[:: max(1, len(part.weight) // _SAMPLE)].to(torch.float32)
        for i, scale in enumerate(tried):
            rounded = quantize(weight * scale, fmt, what=part.what).dequantize()
            errors[i] += squared_error(torch.from_numpy(rounded) / scale - weight, hessian).sum()
    best = int(errors.argmin())
    return tried[best], Gain(float(errors[0]), float(errors[best]))


def _positive(values: Tensor) -> Tensor:
    """Return values relative to their mean, none of them 0."""
    mean = values.mean()
    return (values / mean).clamp_min(1e-4) if mean > 0 else torch.ones_like(values)


__all__ = ["Part", "candidates", "search_scales"]
