"""INT8 arithmetic of attention (after INT-FlashAttention), defined so that no tuning changes it.

Each token's row of q, k and v, head by head, is quantised by its own largest magnitude, as `quantize_rows`
does: ``x = x^ s``. Logits come from integers, ``S_ij = (q^_i . k^_j) s_i s_j scale``.

*int8half*: the softmax of S weighs v as it is stored.

*int8*: weights become integers too. Slots are cut into tiles of `TILE` (slot ``p % cap`` of position p
belongs to tile ``slot // TILE``). In tile b, ``a_ij = S_ij + ln s_j`` (the scale of value j), ``m_ib`` is its
maximum over the keys of the tile that query i sees, and

    P^_ij = round_half_even(LEVELS e^(a_ij - m_ib))
    out_i = sum_b e^m_ib / LEVELS sum_j P^_ij v^_j / (sum_j e^S_ij + e^sink)

Each tile's weights are relative to its own maximum. Published forms use the running maximum: there, keys that
follow an outlier vanish while those before it stay, and sizes of tiles change the result. A query's result
depends on the keys that it sees and on their slots, so on the length of a ring, and on nothing else: not on
the tokens beside it in a call. The denominator is a sum of floats, so a key whose value is almost zero (a
sink that a model learned) keeps its weight.

Other departures from the published form: the denominator is never the sum of the integers; v has a scale for
each token, not one for all; weights have `LEVELS` steps and no other number; no logarithm of the denominator
is returned. Kernels take every product from instructions of unsigned with signed bytes or of 16-bit pairs;
there are none on matrix tiles (AMX). GPUs multiply signed bytes.

A row with a NaN or an infinity has no codes: a query that is one, or that sees one as key or value, has NaN
for its result of that head, and no other query has. (Values of int8half stay floats: as in float attention,
one that is no number may reach the other queries of a call.)

Magnitudes of up to 1e30 are in range on CPUs, on GPUs about 1e20 beside keys of almost no value. Beside
normal ones a value near the largest float32 leaves the others a scale at which float32 kernels miss the
bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.numerics import quantize_rows, roundings

ARITHMETIC = ("float", "int8", "int8half")
"""Values of the parameter ``arith`` of `cached_attention`."""
FORMATS = ("f32", "bf16")
"""Caches that are quantised as they are read."""
TILE = 128
"""Slots whose weights share a maximum."""
LEVELS = 255
"""A tile's largest weight, as an unsigned byte."""
LEAST = 2.0**-60
"""Scales of values are not below it, so that their logarithms are numbers."""
MOST_WIDTH = 1040
"""Width of heads up to which float32 holds every integer logit (127 * 127 * d < 2**24)."""
_WEIGHT_ERROR = 2.0**-17
"""Relative error of a weight from a kernel's exponential, which its logit's roundings add to."""


@dataclass(frozen=True, slots=True)
class Attended:
    """What `attend_int8` found, in float64."""

    out: Tensor
    """``[T, H, DV]``; zeros for padding."""
    slack: Tensor
    """``[T, H, DV]``: what honest float32 kernels may be off."""


@dataclass(frozen=True, slots=True)
class _Scene:
    logits: Tensor
    """``[H, T, cap]``; -inf where a query does not see."""
    error: Tensor
    """``[H, T, cap]``: by how much float32 logits may be off."""
    written: Tensor
    """``[cap]``."""


def attend_int8(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pos: Tensor,
    sink: Tensor | None,
    scale: float,
    window: int,
    *,
    half: bool,
    disturb: Callable[[Tensor], Tensor] | None = None,
) -> Attended:
    """Attend by the rules above.

    Args:
        q: ``[T, H, D]`` float32.
        k_cache: ``[cap, KV, D]`` float32.
        v_cache: ``[cap, KV, DV]`` float32.
        pos: Start and number of valid tokens.
        sink: ``[H]`` logits of phantom keys, or None.
        scale: Factor on q.k.
        window: Positions that a query sees; 0: all.
        half: `int8half`.
        disturb: Changes the weights of `int8half` (see `cached_attention.attend`).
    """
    valid, group = int(pos[1]), q.shape[1] // k_cache.shape[1]
    weigh, found = _half if half else _full, []
    for head in range(
        k_cache.shape[1]
    ):  # one at a time: arrays of [H, T, cap] may not fit into memory
        own, mine = slice(head, head + 1), slice(head * group, (head + 1) * group)
        scene = _scene(q[:, mine], k_cache[:, own], pos, scale, window)
        values = torch.where(scene.written[:, None, None], v_cache[:, own], 0).to(torch.float32)
        logits = None if sink is None else sink[mine]
        found.append(weigh(scene, values, group, _top(scene.logits, logits), logits, disturb))
    out, slack = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    out[valid:], slack[valid:] = 0, 0
    return Attended(out, slack)


def _scene(q: Tensor, k_cache: Tensor, pos: Tensor, scale: float, window: int) -> _Scene:
    t, heads, _ = q.shape
    cap, kv, _ = k_cache.shape
    start, valid = int(pos[0]), int(pos[1])
    last = start + valid - 1
    slot = torch.arange(cap)
    key_pos = last - (last - slot) % cap
    query_pos = start + torch.arange(t)
    seen = (key_pos[None] <= query_pos[:, None]) & (key_pos[None] >= 0)
    if window:
        seen &= key_pos[None] > query_pos[:, None] - window
    written = key_pos >= 0
    # neither padding nor slots that were never written are numbers
    q = torch.where((torch.arange(t) < valid)[:, None, None], q, 0)
    k = torch.where(written[:, None, None], k_cache, 0)
    (q_codes, q_scale), (k_codes, k_scale) = _codes(q), _codes(k)
    group = heads // kv
    logits = torch.einsum(
        "thd,shd->hts", q_codes.double(), k_codes.double().repeat_interleave(group, 1)
    )
    logits *= q_scale.double()[..., 0].T[:, :, None]
    logits *= k_scale.double().repeat_interleave(group, 1)[..., 0].T[:, None] * scale
    error = (logits.abs() * 2.0**-21).masked_fill(~seen, 0.0)
    return _Scene(logits.masked_fill(~seen, -math.inf), error, written)


def _codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales as `quantize_rows` does; scales of rows with a NaN or an infinity are NaN."""
    codes, scale = quantize_rows(rows)
    return codes, torch.where(torch.isfinite(scale), scale, math.nan)


def _top(logits: Tensor, sink: Tensor | None) -> Tensor:
    """Return a finite number near the largest logit of each row, ``[H, T, 1]``."""
    top = logits.amax(-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink.double()[:, None, None])
    return torch.where(torch.isfinite(top), top, torch.zeros_like(top))


def _sum(weights: Tensor, top: Tensor, sink: Tensor | None) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink.double()[:, None, None] - top)
    return torch.where(total > 0, total, torch.ones_like(total))


def _weighted(weights: Tensor, values: Tensor, group: int) -> Tensor:
    return torch.einsum("hts,shd->thd", weights, values.double().repeat_interleave(group, 1))


def _slack(relative: Tensor, weights: Tensor, values: Tensor, group: int) -> Tensor:
    """Return what relative errors of weights, and sums of many terms, change a result by."""
    return _weighted(weights * (relative + _WEIGHT_ERROR), values.abs(), group)


def _half(
    scene: _Scene, values: Tensor, group: int, top: Tensor, sink: Tensor | None,
    disturb: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    weights = torch.exp(scene.logits - top)
    if disturb is not None:
        weights = disturb(weights)
    shares = weights / _sum(weights, top, sink)
    # errors of the denominator are those of its terms: as much again
    slack = 4 * _slack(scene.error + top.abs() * 2.0**-21, shares, values, group)
    return _weighted(shares, values, group), slack


def _full(
    scene: _Scene, values: Tensor, group: int, top: Tensor, sink: Tensor | None,
    disturb: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    codes, scales = _codes(values)
    cap = values.shape[0]
    log_scale = scales.double().clamp_min(LEAST).log().repeat_interleave(group, 1).permute(1, 2, 0)
    # a value that is no number counts for those who see it alone
    log_scale = torch.where(torch.isneginf(scene.logits), 0.0, log_scale)
    total = _sum(torch.exp(scene.logits - top), top, sink)
    spare = -cap % TILE
    tiles = torch.nn.functional.pad(scene.logits + log_scale, (0, spare), value=-math.inf)
    tiles = tiles.unflatten(-1, (-1, TILE))
    best = tiles.amax(-1, keepdim=True)
    relative = torch.where(torch.isneginf(best), 0.0, torch.exp(tiles - best))
    exact = LEVELS * relative
    by = torch.exp(best - top[..., None]) / (LEVELS * total[..., None])
    weights = (torch.round(exact) * by).flatten(-2)[..., :cap]
    # a weight that is almost half-way between two integers may become either
    off = scene.error + (top.abs() + log_scale.abs()) * 2.0**-21 + _WEIGHT_ERROR
    wide = torch.nn.functional.pad(off, (0, spare)).unflatten(-1, (-1, TILE))
    wide = wide + torch.where(torch.isfinite(best), best, torch.zeros_like(best)).abs() * 2.0**-21
    near = (exact - exact.floor() - 0.5).abs() <= exact * wide
    slack = _weighted((near * by).flatten(-2)[..., :cap], codes.abs(), group)
    slack += 4 * _slack(off, weights, codes, group)
    return _weighted(weights, codes, group), slack


def check_arith(p: Mapping[str, Any]) -> None:
    """Refuse arithmetic that there is not, or not over these caches.

    Raises:
        UsageError: which, and what to use.
    """
    if p["arith"] not in ARITHMETIC:
        raise UsageError(
            f"cached_attention: there is no arithmetic arith={p['arith']}",
            remedy=f"use one of {', '.join(ARITHMETIC)}",
        )
    if p["arith"] == "float":
        return
    if p["c"] not in FORMATS:
        raise UsageError(
            f"cached_attention: arith={p['arith']} has no form for caches c={p['c']}",
            remedy=f"use caches of {' or '.join(FORMATS)}, or leave arith out",
        )
    if p["d"] > MOST_WIDTH:
        raise UsageError(f"cached_attention: arith={p['arith']} takes d of up to {MOST_WIDTH}")


def attended(
    p: Mapping[str, Any],
    scale: float,
    inputs: Mapping[str, Array],
    disturb: Callable[[Tensor], Tensor] | None = None,
) -> Attended:
    """Attend by the parameters and canonical inputs of `cached_attention`, whose ``arith`` is not float."""
    stored = parse_cache_format(p["c"])
    arrays = [inputs["q"], stored.decode(inputs["k_cache"]), stored.decode(inputs["v_cache"])]
    q, k, v = (torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)
    sink = torch.from_numpy(inputs["sink"]) if p["sink"] else None
    return attend_int8(
        q, k, v, torch.from_numpy(inputs["pos"]), sink, scale, p["window"],
        half=p["arith"] == "int8half", disturb=disturb,
    )  # fmt: skip


def allowed(p: Mapping[str, Any], scale: float, inputs: Mapping[str, Array]) -> Array:
    """Return the error of each output that is allowed ``[T, H, DV]``.

    Float32 roundings, and weights that are almost half-way between integers may become either. Weights that
    stay floats may be rounded to the precision of the cache, as in `CachedAttention.bound`.
    """
    exact = attended(p, scale, inputs)
    worst = torch.zeros((1, p["h"], 1), dtype=torch.float64)
    unit = parse_cache_format(p["c"]).unit
    if unit and p["arith"] == "int8half":
        for rounded in roundings(unit):
            off = (attended(p, scale, inputs, rounded).out - exact.out).abs()
            worst = torch.maximum(worst, off.amax((0, 2), keepdim=True))
    out: Array = (exact.slack + 4 * worst + 1e-30).numpy()
    return out


def products(p: Mapping[str, Any], work: float) -> dict[str, float]:
    """Return the multiply-adds of so many pairs of query and key, by kind of `ir.counts`."""
    if p["arith"] == "float":
        return {"fma_f32": work * (p["d"] + p["dv"])}
    if p["arith"] == "int8":
        return {"dot_i8": work * (p["d"] + p["dv"])}
    return {"dot_i8": work * p["d"], "fma_f32": work * p["dv"]}


@torch.library.custom_op("mimo::int8_attention", mutates_args=())
def int8_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pos: Tensor,
    sink: Tensor | None,
    scale: float,
    window: int,
    arith: str,
) -> Tensor:
    """Attend as `cached_attention` does, in ``arith`` ``int8`` or ``int8half``: ``-> [T, H, DV]``."""
    found = attend_int8(
        q, k_cache.float(), v_cache.float(), pos, sink, scale, window, half=arith == "int8half"
    )
    return found.out.to(q.dtype)


@int8_attention.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor, sink: Any, scale: float, window: int,
    arith: str,
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[1], v_cache.shape[2]))
