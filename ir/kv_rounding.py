"""What rounding to integers may do to attention over a cache in groups: draws of it, for bounds.

A kernel may multiply codes by integers. With ``q' = q * scale`` for the channels of a group of keys, an
element of q' may be off by half of ``max |q'| / (2**(bits - 1) - 1)``, with ``w' = w * scale`` for the
tokens of a group of values a weight by half of ``max w' / 255``. Codes count from the middle one. A draw is
off by all of that, up or down; roundings are 1.7 times as near, in the mean square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mimo_compile.ir.kv_groups import GroupedFormat, visible

WEIGHT_LEVELS = 255
"""Integers above 0 that stand for weights."""


def _signs(shape: torch.Size, draw: torch.Generator) -> Tensor:
    return (2 * torch.randint(0, 2, tuple(shape), generator=draw) - 1).to(torch.float32)


def attend_rounded(
    inputs: Mapping[str, Tensor], scale: float, fmt: GroupedFormat, draw: torch.Generator
) -> Tensor:
    """Return attention in float32 with roundings drawn anew.

    Args:
        inputs: ``q``, ``pos``, perhaps ``sink``, and the arrays of the cache.
        scale: Factor on q.k.
        fmt: Format of the cache.
        draw: Where the signs come from.

    Returns:
        ``[T, H, DV]``.
    """
    q, pos = inputs["q"], inputs["pos"]
    t, heads, d = q.shape
    k, v, seen = visible(inputs, pos, t, fmt, torch.float32)
    kv, group = k.shape[1], heads // k.shape[1]
    packed = max(int(pos.sum()) - 1, 0) // fmt.group * fmt.group
    rows = q.reshape(t, kv, group, d)
    logits = torch.einsum("tkgd,skd->kgts", rows, k) * scale
    if packed:
        logits[..., :packed] += scale * _key_noise(rows, inputs, packed, fmt, draw)
    logits = logits.masked_fill(~seen, -math.inf)
    top = logits.amax(-1, keepdim=True)
    total = torch.zeros(())
    if "sink" in inputs:
        sink = inputs["sink"].reshape(kv, group, 1, 1)
        top = torch.maximum(top, sink)
        total = torch.exp(sink - top)
    weights = torch.exp(logits - top)
    total = total + weights.sum(-1, keepdim=True)
    out = torch.einsum("kgts,ske->kgte", weights, v)
    if packed:
        out = out + _value_noise(weights[..., :packed], inputs, packed, fmt, draw)
    out = (out / total).permute(2, 0, 1, 3).reshape(t, heads, -1)
    out[int(pos[1]) :] = 0
    return out


def _key_noise(
    rows: Tensor,
    inputs: Mapping[str, Tensor],
    packed: int,
    fmt: GroupedFormat,
    draw: torch.Generator,
) -> Tensor:
    """Return what logits ``[KV, G, T, packed]`` are off by, before their scale."""
    n = packed // fmt.group
    codes = inputs["k_cache"][:packed].to(torch.float32) - (fmt.levels + 1) // 2
    codes = codes.reshape(n, fmt.group, *codes.shape[1:])
    step = inputs["k_scale"][:n, ..., 0].to(torch.float32)
    scaled = rows[:, None] * step[None, :, :, None]
    half = scaled.abs().amax(-1, keepdim=True) / ((1 << (fmt.query_bits - 1)) - 1) / 2
    noise = torch.einsum("tnkgd,nckd->kgtnc", half * _signs(scaled.shape, draw), codes)
    return noise.reshape(*noise.shape[:3], packed)


def _value_noise(
    weights: Tensor, inputs: Mapping[str, Tensor], packed: int, fmt: GroupedFormat,
    draw: torch.Generator,
) -> Tensor:  # fmt: skip
    """Return what sums of values ``[KV, G, T, DV]`` are off by."""
    n = packed // fmt.group
    codes = inputs["v_cache"][:packed].to(torch.float32) - (fmt.levels + 1) // 2
    out = []
    for i, part in enumerate(codes.split(fmt.columns, -1)):
        step = inputs["v_scale"][:packed, :, i, 0].to(torch.float32).T[:, None, None]
        scaled = (weights * step).reshape(*weights.shape[:3], n, fmt.group)
        half = scaled.amax(-1, keepdim=True) / WEIGHT_LEVELS / 2
        noise = (half * _signs(scaled.shape, draw)).reshape(weights.shape)
        out.append(torch.einsum("kgts,ske->kgte", noise, part))
    return torch.cat(out, -1)
