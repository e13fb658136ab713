"""What kernels that multiply codes by integers do to attention over a cache in groups: for bounds.

With ``q' = q * scale`` for the channels of a group of keys, a kernel may take the integers ``round(q' /
unit)``, of the format's `query_levels` for the largest ``|q'|`` of the group; with ``w' = w * scale`` for the
tokens of a group of values those of its `weight_levels` for the largest ``w'``. Kernels take these numbers
from the format, too. Codes count from the middle one: what rounding changes at that a kernel knows. So an
error is ``(unit round(x / unit) - x) (code - middle)``, and follows from inputs alone: neither tiles nor
parts of the keys change a group's largest number.

What does not follow is where a number that lies next to the middle between two integers goes: queries and
weights of a kernel are off by roundings of float32, and its weights also by what a query that goes another
way changes in a logit: ``unit |code - middle|`` in that of its key, and as much in the largest of the group.
Of 16-bit integers that is some hundredths of a weight's unit, hundreds of times what roundings are, and few
queries lie near a tie; so it decides on weights that roundings leave alone. `attend_rounded` moves such
numbers on request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mimo_compile.ir.kv_groups import GroupedFormat, visible
from mimo_compile.ir.ops import edge_keys
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.numerics import U32

RUNS = 2
"""Whose numbers between two integers go either way, from which `allowed` follows."""
ROOM = 1 << 26
"""Numbers of one array while bounds are computed: queries beyond that wait."""


def allowed(
    inputs: Mapping[str, Array], scale: float, expected: Array, fmt: GroupedFormat
) -> Array:
    """Return how far integers for queries and weights may move attention over a cache in groups.

    That is, element by element, what they change, and not how much roundings may change at most: in that a
    group of wrong codes among hundreds would hide. Numbers between two integers may go either way: that adds
    one number per head (of a single KV head: per part of `edge_keys`), four times the largest change in it of
    some runs in which each of them goes another way.

    Args:
        inputs: ``q``, ``pos``, perhaps ``sink``, and the arrays of the cache.
        scale: Factor on q.k.
        expected: The result without them ``[T, H, DV]``.
        fmt: Format of the cache.
    """
    given = {n: torch.from_numpy(a) for n, a in inputs.items()}
    rounded = attend_rounded(given, scale, fmt, None)
    draw, ties = torch.Generator().manual_seed(0), np.zeros((), np.float32)
    for _ in range(RUNS):
        moved = (attend_rounded(given, scale, fmt, draw) - rounded).abs().numpy()
        kv = inputs["v_cache"].shape[1]
        ties = np.maximum(ties, 4 * edge_keys.largest(moved, kv, fmt.columns))
    out: Array = np.abs(rounded.double().numpy() - expected) + ties
    return out


def largest_values(inputs: Mapping[str, Array], fmt: GroupedFormat) -> Array:
    """Return the largest magnitude of each column of values ``[KV, DV]``; what was never written is NaN."""
    scale, zero = np.abs(inputs["v_scale"].astype(np.float32)).transpose(3, 0, 1, 2)
    codes = np.nanmax(scale * fmt.levels + zero, axis=0, initial=0.0)
    tail = np.nanmax(np.abs(inputs["v_tail"]), axis=0, initial=0.0)
    wide = np.repeat(codes, fmt.columns, axis=1)[:, : tail.shape[1]]
    return np.asarray(np.maximum(wide, tail))


def attend_rounded(
    inputs: Mapping[str, Tensor], scale: float, fmt: GroupedFormat, draw: torch.Generator | None
) -> Tensor:
    """Return attention in float32 whose queries and weights are integers where they meet codes.

    Args:
        inputs: ``q``, ``pos``, perhaps ``sink``, and the arrays of the cache.
        scale: Factor on q.k.
        fmt: Format of the cache.
        draw: Where the directions come from in which numbers are moved that may go either way; None: none
            is moved.

    Returns:
        ``[T, H, DV]``.
    """
    q, pos = inputs["q"], inputs["pos"]
    t, heads, d = q.shape
    k, v, seen = visible(inputs, pos, t, fmt, torch.float32)
    if not len(k):  # a sequence that rests before its first token
        return q.new_zeros((t, heads, v.shape[2]))
    kv = k.shape[1]
    packed = max(int(pos.sum()) - 1, 0) // fmt.group * fmt.group
    rows = q.reshape(t, kv, heads // kv, d)
    at_once = max(1, ROOM // (heads * (len(k) + packed * d // fmt.group)))
    out = torch.cat([
        _attend(part, k, v, mask, packed, inputs, scale, fmt, draw)
        for part, mask in zip(rows.split(at_once), seen.split(at_once), strict=True)
    ])  # fmt: skip
    out[int(pos[1]) :] = 0
    return out


def _attend(
    rows: Tensor, k: Tensor, v: Tensor, seen: Tensor, packed: int, inputs: Mapping[str, Tensor],
    scale: float, fmt: GroupedFormat, draw: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """Return what some queries ``[T, KV, G, D]`` find among ``packed`` positions of codes and the tail."""
    logits = torch.einsum("tkgd,skd->kgts", rows, k) * scale
    if packed:
        noise, doubt, turns = _key_noise(rows, inputs, packed, fmt, draw)
        logits[..., :packed] += scale * noise
    logits = logits.masked_fill(~seen, -math.inf)
    top = logits.amax(-1, keepdim=True)
    total = torch.zeros(())
    if "sink" in inputs:
        sink = inputs["sink"].reshape(*rows.shape[1:3], 1, 1)
        top = torch.maximum(top, sink)
        total = torch.exp(sink - top)
    weights = torch.exp(logits - top)
    total = total + weights.sum(-1, keepdim=True)
    out = torch.einsum("kgts,ske->kgte", weights, v)
    if packed:
        # here and in a kernel the logits of a weight and of the largest may be off, and powers of two
        doubt = 4 * scale * doubt + 16 * U32 + scale * turns
        out = out + _value_noise(weights[..., :packed], doubt, inputs, packed, fmt, draw)
    return (out / total).permute(2, 0, 1, 3).flatten(1, 2)


def _errors(
    x: Tensor, most: Tensor, levels: int, doubt: Tensor, draw: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return by how much numbers are off that become integers, and what those that may go either way move by.

    Args:
        x: The numbers.
        most: The largest magnitude of those that share a unit; broadcasts.
        levels: What that becomes.
        doubt: By how much of itself a number may be off in a kernel; broadcasts.
        draw: See `attend_rounded`. Moved numbers go up or down by a whole unit.

    Returns:
        What they are off by; and a unit for each that may go either way, 0 for others (and without ``draw``).
    """
    unit = most / levels
    ratio = x / torch.where(unit > 0, unit, 1.0)
    whole = ratio.round()
    if draw is None:
        return (whole - ratio) * unit, torch.zeros(())
    near = 0.5 - (ratio - whole).abs() <= doubt * ratio.abs()
    signs = 2 * torch.randint(0, 2, x.shape, generator=draw).to(x.dtype) - 1
    whole = torch.where(near, whole + signs, whole)
    return (whole - ratio) * unit, torch.where(near, unit, 0.0)


def _key_noise(
    rows: Tensor,
    inputs: Mapping[str, Tensor],
    packed: int,
    fmt: GroupedFormat,
    draw: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what logits are off by, before their scale.

    Returns:
        By the integers, ``[KV, G, T, packed]``; at most by roundings of float32, the same in a group: a score
        is the sum of ``d`` terms, in lanes, and one of integers, which is exact; and at most by queries that
        go another way, beside any other logit of the group. 0 without ``draw``.
    """
    n, d = packed // fmt.group, rows.shape[-1]
    middle = (fmt.levels + 1) // 2
    codes = inputs["k_cache"][:packed].to(torch.float32) - middle
    codes = codes.reshape(n, fmt.group, *codes.shape[1:])
    step, zero = inputs["k_scale"][:n].to(torch.float32).unbind(-1)
    scaled = rows[:, None] * step[None, :, :, None]
    most = scaled.abs().amax(-1, keepdim=True)
    # q times its scales, the largest, its inverse, their product
    errors, turned = _errors(scaled, most, fmt.query_levels, torch.tensor(8 * U32), draw)
    noise = torch.einsum("tnkgd,nckd->kgtnc", errors, codes)
    exact = torch.einsum("tkgd,nkd->tnkg", rows.abs(), (step * middle + zero).abs())
    size = exact + middle * scaled.abs().sum(-1)
    doubt = ((d / 16 + 8) * U32 * size).permute(2, 3, 0, 1)
    turns = torch.zeros(())
    if turned.any():
        turns = torch.einsum("tnkgd,nckd->kgtnc", turned, codes.abs())
        turns = (turns + turns.amax(-1, keepdim=True)).reshape(*turns.shape[:3], packed)
    noise = noise.reshape(*noise.shape[:3], packed)
    return noise, doubt.repeat_interleave(fmt.group, -1), turns


def _value_noise(
    weights: Tensor, doubt: Tensor, inputs: Mapping[str, Tensor], packed: int, fmt: GroupedFormat,
    draw: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """Return what sums of values ``[KV, G, T, DV]`` are off by.

    Args:
        weights: ``[KV, G, T, packed]``.
        doubt: By how much of themselves weights may be off in a kernel, same shape.
        inputs: The cache.
        packed: Positions that are codes.
        fmt: The format.
        draw: See `attend_rounded`.
    """
    n = packed // fmt.group
    codes = inputs["v_cache"][:packed].to(torch.float32) - (fmt.levels + 1) // 2
    out = []
    for i, part in enumerate(codes.split(fmt.columns, -1)):
        step = inputs["v_scale"][:packed, :, i, 0].to(torch.float32).T[:, None, None]
        scaled = (weights * step).reshape(*weights.shape[:3], n, fmt.group)
        most = scaled.amax(-1, keepdim=True)
        errors, _ = _errors(scaled, most, fmt.weight_levels, doubt.reshape(scaled.shape), draw)
        out.append(torch.einsum("kgts,ske->kgte", errors.reshape(weights.shape), part))
    return torch.cat(out, -1)
