"""Integer, 1-bit and ternary codes of groups of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from mimo_compile.errors import MimoError
from mimo_compile.ir.formats import WeightFormat

_SHRINK = {1: (1.0,), 2: (1.0, 0.8, 0.65), 3: (1.0, 0.9, 0.8), 4: (1.0, 0.94)}
"""Clipping ratios that the search tries, by code width."""
_HALF_MAX = 65504.0


def quantize_rows(
    x: Tensor, stats: Tensor, fmt: WeightFormat, search: bool, what: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise groups to integer or ternary codes.

    Args:
        x: ``[R, G, S]`` float32.
        stats: least value (or 0), largest (or 0) and mean magnitude, ``[3, R, G]`` or ``[3, 1, 1]``.
        fmt: an integer or ternary format.
        search: try clipped scales.
        what: name of the matrix for errors.

    Returns:
        Codes ``[R, G, S]`` as floats, scale ``[R, G]``, zero ``[R, G]`` or None.
    """
    low, high, mean = stats
    shrink = _SHRINK.get(fmt.bits, _SHRINK[4]) if search else (1.0,)
    if fmt.family == "ternary":
        inverse = torch.where(mean > 0, 1.0 / mean, 0.0)  # the reciprocal, as in BitNet's training
        codes = (x * inverse[..., None]).round_().clamp_(-1, 1).add_(1)
        return codes, half(mean, what), None
    if fmt.bits == 1 and not fmt.has_zero:  # plus or minus half a scale
        return (x >= 0).to(torch.float32), half(2 * mean, what), None
    if fmt.has_zero:
        return _asymmetric(x, low, high, fmt.bits, shrink, what)
    least, most = -(1 << (fmt.bits - 1)), (1 << (fmt.bits - 1)) - 1
    amax = torch.maximum(-low, high)
    scale = half(amax / most, what)
    short = scale * most < amax * (1 - 2.0**-10)  # coarse steps of float16 subnormals
    scale = torch.where(short, next_half(scale), scale)
    if len(shrink) > 1:
        scale = _searched_scale(x, low, high, scale, fmt.bits, shrink)
    codes = _round(x, scale).clamp_(least, most).add_(fmt.fixed_zero)
    return codes, scale, None


def _searched_scale(
    x: Tensor, low: Tensor, high: Tensor, scale: Tensor, bits: int, shrink: tuple[float, ...]
) -> Tensor:
    """Return the scale with the least squared error among the candidates, ``scale`` included.

    For codes q and scale s the squared error is ``<x, x> - s * (2 <x, q> - s <q, q>)``, least for
    ``s = <x, q> / <q, q>``: the refitted scale (rounded to float16) with the largest gain wins. A negative
    scale gives the longer side of the code range to positive weights.
    """
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    longest = torch.where(-low >= high, low, high) / least  # the extreme weight gets `least`
    candidates = [scale, *(longest * r for r in shrink)]
    if bits < 4:  # both ends of wider codes are alike
        candidates += [scale * r for r in shrink[1:]]
    best, best_gain = scale, torch.zeros_like(scale)
    for candidate in candidates:
        q = _round(x, candidate).clamp_(least, most)
        cross = (x * q).sum(-1)
        square = q.square_().sum(-1)
        refit = torch.where(square > 0, cross / square, 0.0).to(torch.float16).to(torch.float32)
        for s in (scale, refit) if candidate is scale else (refit,):
            gain = s * (2 * cross - s * square)
            better = (gain > best_gain) & torch.isfinite(s) & (s != 0)
            best, best_gain = torch.where(better, s, best), torch.where(better, gain, best_gain)
    return best


def _asymmetric(
    x: Tensor, low: Tensor, high: Tensor, bits: int, shrink: tuple[float, ...], what: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise with an integer zero point, the range shrunk to the ratio with the least error."""
    most = (1 << bits) - 1
    kept: tuple[Tensor, Tensor, Tensor | None] | None = None
    kept_error = torch.zeros(())
    for ratio in shrink:
        scale = half((high - low) * (ratio / most), what)
        zero = torch.where(scale > 0, (-low * ratio) / scale, 0.0).round_().clamp_(0, most)
        codes = _round(x, scale).add_(zero[..., None]).clamp_(0, most)
        if len(shrink) == 1:
            return codes, scale, zero
        error = ((codes - zero[..., None]) * scale[..., None]).sub_(x).square_().sum(-1)
        if kept is None or kept[2] is None:
            kept, kept_error = (codes, scale, zero), error
            continue
        better = error < kept_error
        kept_error = torch.where(better, error, kept_error)
        kept = (
            torch.where(better[..., None], codes, kept[0]),
            torch.where(better, scale, kept[1]),
            torch.where(better, zero, kept[2]),
        )
    assert kept is not None
    return kept


def group_stats(x: Tensor, k: int) -> Tensor:
    """Return min and max (of values and 0) and mean magnitude of each group: ``[3, R, G]``.

    The last group of ``x [R, G, S]`` may be filled up with zeros; its mean is that of the real columns.
    """
    groups, size = x.shape[1:]
    count = torch.full((groups,), float(size))
    count[-1] = k - (groups - 1) * size
    mean = x.abs().sum(-1) / count
    return torch.stack([x.amin(-1).clamp_max_(0), x.amax(-1).clamp_min_(0), mean])


def _round(x: Tensor, scale: Tensor) -> Tensor:
    """Return ``round(x / scale)``, 0 where the scale is 0, half to even."""
    inverse = torch.where(scale != 0, 1.0 / scale, 0.0)
    return (x * inverse[..., None]).round_()


def half(scale: Tensor, what: str) -> Tensor:
    """Round positive scales to float16; those that would vanish take the smallest float16 instead."""
    if bool((scale > _HALF_MAX).any()):
        raise MimoError(f"{what} holds values too large for a float16 scale")
    rounded = scale.to(torch.float16).to(torch.float32)
    return torch.where((rounded == 0) & (scale > 0), 2.0**-24, rounded)


def next_half(scale: Tensor) -> Tensor:
    """Return the next larger float16 of positive scales."""
    bits = scale.to(torch.float16).view(torch.int16) + 1
    return bits.view(torch.float16).to(torch.float32)
