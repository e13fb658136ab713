"""KV caches of few bits: keys quantised channel by channel, values token by token, in groups of positions.

Keys have a few channels of large magnitude, values have not: so a group of `GroupedFormat.group` positions
of one channel of the keys shares a scale and a zero point, and for values `GroupedFormat.columns` channels
of one token do (KIVI). int8 is quantised in the same way: with one scale for each token's key, a channel
that is fifty times as large as the others would leave them three of eight bits.

A code stands for ``scale * code + zero``; ``zero`` is the smallest value of those that share it, ``scale``
the range over ``2**bits - 1``. Both are rounded to the nearest float16, half to even (so ``zero`` may lie a
little above the smallest value), before codes are chosen: ``code = round((x - zero) / scale)``, half to even,
within ``0 .. 2**bits - 1``; 0 where the scale is 0. Numbers beyond the range of float16 saturate. Where one
of those that share them is infinite or NaN, scale and zero point are NaN: a fault stays to be seen.

A code of one bit says only on which side of the mean a number lies, and stands for the mean less or plus the
mean distance from it: of all steps to both sides the one with the least squared error (the scale of signs in
XNOR-Net, arXiv 1603.05279). The smallest and the largest number, which KIVI's rule and with it TailorKV
(arXiv 2505.19586) take at one bit, too, are what hardly any number is near: of 64 normal ones the squared
error is 2.7 times the numbers themselves, with the mean distance 0.36 times.

A group is quantised as soon as its last position is appended, from the float32 rows of the *tail*, a ring
of the newest positions (p in slot ``p % tail``). So the caches depend on the rows alone, not on how many
tokens a call appends. A query sees the float32 rows of its own group and the codes of all groups before:
what it sees does not depend on the call either. For that the tail holds a call's tokens and all but one
position of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.numerics import F16_MOST

STATES = ("k_cache", "k_scale", "k_tail", "v_cache", "v_scale", "v_tail")
"""Arrays of a cache in the order in which ops take them."""


@dataclass(frozen=True, slots=True)
class GroupedFormat:
    """One format of caches in groups."""

    name: str
    """As the ops' parameter ``c`` says it."""
    bits: int
    """Of a code."""
    scheme: str
    """Its spelling in ``--quant``, behind ``kv``."""
    group: int = 64
    """Positions that are quantised together; channels of keys have a scale for each."""
    columns: int = 64
    """Channels of a value that share a scale."""
    query_bits: int = 8
    """Of the signed integers that kernels may take for the queries times the scales of a group, relative to
    the largest of these."""
    weight_levels: int = 255
    """The largest integer without a sign that they may take for the weights times the scales of a group."""

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def query_terms(self) -> int:
        """Bytes with signs whose sum, each 256 times the next, is an integer for a query."""
        return -(-self.query_bits // 8)

    @property
    def query_levels(self) -> int:
        """The largest integer for a query: the last byte may be negative, so the first alone decides."""
        return 127 << 8 * (self.query_terms - 1)

    def value_groups(self, dv: int) -> int:
        """Return how many scales a token's value of ``dv`` channels has."""
        return -(-dv // self.columns)

    def slots(self, positions: int) -> int:
        """Return positions rounded up to whole groups."""
        return -(-positions // self.group) * self.group

    def tail(self, tokens: int, cap: int) -> int:
        """Return the slots of the tail for calls of up to so many tokens."""
        return min(self.slots(tokens + self.group - 1), self.slots(cap))

    def bytes_of(self, width: int, *, keys: bool) -> float:
        """Return the bytes of one position's codes with its share of scales and zero points."""
        shared = width / self.group if keys else float(self.value_groups(width))
        return width * self.bits / 8 + 4.0 * shared

    def __str__(self) -> str:
        """Return the format's name."""
        return self.name


GROUPED = {
    f.name: f for f in (GroupedFormat("i8", 8, "8", query_bits=16), GroupedFormat("i4", 4, "4"),
                        GroupedFormat("i2", 2, "2"), GroupedFormat("i1", 1, "1"))
}  # fmt: skip
"""Every format of caches in groups, by name."""


def spans(c: str) -> tuple[int, ...]:
    """Return for how many positions a row of each of the `STATES` is in pages; 0: tails do not lie there."""
    return 1, GROUPED[c].group, 0, 1, 1, 0


def grouped(p: Mapping[str, Any]) -> GroupedFormat | None:
    """Return the format in groups that an op's parameter ``c`` names, None if it is another."""
    return GROUPED.get(p["c"])


def tail_of(p: Mapping[str, Any], fmt: GroupedFormat) -> int:
    """Return the slots of the tail for an op's parameters: ``tail``, or as many as the call needs."""
    return int(p["tail"] or fmt.tail(p["t"], p["cap"]))


def check_groups(op: str, p: Mapping[str, Any]) -> None:
    """Refuse parameters that do not make whole groups, windows of caches in groups, tails of others.

    Raises:
        UsageError: says which parameter is wrong.
    """
    fmt = grouped(p)
    if fmt is None:
        if p["tail"]:
            raise UsageError(f"{op}: only caches in groups have a tail, not c={p['c']}")
        return
    tail = tail_of(p, fmt)
    if p.get("window"):
        raise UsageError(
            f"{op}: caches in {fmt} hold groups of positions and cannot be the ring of a window",
            remedy="keep the caches of window layers in c=bf16, as models with kv8, kv4, kv2 or kv1 do",
        )
    if p["cap"] % fmt.group or tail % fmt.group:
        raise UsageError(f"{op}: cap and tail must be multiples of {fmt.group} with c={fmt}")
    if tail < fmt.tail(p["t"], p["cap"]):
        raise UsageError(
            f"{op}: tail={tail} is too short for t={p['t']} tokens",
            remedy=f"use tail={fmt.tail(p['t'], p['cap'])} or more",
        )


def state_shapes(
    fmt: GroupedFormat, cap: int, tail: int, kv: int, d: int, dv: int
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and element type of each canonical array of a layer's cache, by name."""
    scales = cap, kv, fmt.value_groups(dv), 2
    return {
        "k_cache": ((cap, kv, d), "uint8"),
        "k_scale": ((cap // fmt.group, kv, d, 2), "float16"),
        "k_tail": ((tail, kv, d), "float32"),
        "v_cache": ((cap, kv, dv), "uint8"),
        "v_scale": (scales, "float16"),
        "v_tail": ((tail, kv, dv), "float32"),
    }


def states_of(p: Mapping[str, Any], fmt: GroupedFormat, *, mutated: bool) -> tuple[Arg, ...]:
    """Return the arguments of an op that are a cache's arrays, in the order of `STATES`."""
    shapes = state_shapes(fmt, p["cap"], tail_of(p, fmt), p["kv"], p["d"], p["dv"])
    return tuple(Arg(n, "state", *shapes[n], mutated=mutated) for n in STATES)


def read_bytes(p: Mapping[str, Any], length: int, fmt: GroupedFormat) -> float:
    """Return the bytes of a cache that the last ``t`` of ``length`` positions see."""
    packed = (length - 1) // fmt.group * fmt.group
    recent = length - (length - p["t"]) // fmt.group * fmt.group
    codes = fmt.bytes_of(p["d"], keys=True) + fmt.bytes_of(p["dv"], keys=False)
    return float(p["kv"] * (packed * codes + 4.0 * recent * (p["d"] + p["dv"])))


def half(x: Tensor) -> Tensor:
    """Round to float16, half to even, saturating."""
    return x.clamp(-F16_MOST, F16_MOST).to(torch.float16)


def ends(x: Tensor, over: int, fmt: GroupedFormat) -> tuple[Tensor, Tensor]:
    """Return what the first and the last code of numbers that share them are to stand for, unrounded.

    They are the smallest and the largest along an axis; of one bit the mean less and plus the mean distance
    from it, float64, so that the order of sums is none of the definition. NaN where a number is, and of one
    bit where one is infinite.
    """
    if fmt.bits > 1:
        return x.amin(over), x.amax(over)
    near = torch.where(torch.isfinite(x), x.clamp(-F16_MOST, F16_MOST), torch.nan).double()
    mean = near.mean(over, keepdim=True)
    away, mean = (near - mean).abs().mean(over), mean.squeeze(over)
    return mean - away, mean + away


def parameters(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, float16, of values between two numbers; NaN unless both are finite."""
    known = torch.isfinite(low) & torch.isfinite(high)
    zero = half(low)
    scale = half(((high - zero.to(high.dtype)) / levels).clamp(min=0.0))
    return torch.where(known, scale, torch.nan), torch.where(known, zero, torch.nan)


def nearest(x: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Return the codes, uint8, of values with these scales and zero points."""
    step = scale.to(x.dtype)
    codes = ((x - zero.to(x.dtype)) / torch.where(step > 0, step, 1.0)).round().clamp(0, levels)
    return torch.where(step > 0, codes, 0.0).to(torch.uint8)


def quantise_keys(k: Tensor, fmt: GroupedFormat) -> tuple[Tensor, Tensor]:
    """Quantise keys ``[n * group, KV, D]``: codes of that shape, and ``[n, KV, D, 2]`` scales with zeros."""
    parts = k.reshape(-1, fmt.group, *k.shape[1:])
    scale, zero = parameters(*ends(parts, 1, fmt), fmt.levels)
    codes = nearest(parts, scale[:, None], zero[:, None], fmt.levels)
    return codes.reshape(k.shape), torch.stack([scale, zero], -1)


def quantise_values(v: Tensor, fmt: GroupedFormat) -> tuple[Tensor, Tensor]:
    """Quantise values ``[n, KV, DV]``: codes of that shape, and ``[n, KV, groups, 2]`` scales with zeros."""
    codes, params = [], []
    for part in v.split(fmt.columns, -1):
        scale, zero = parameters(*ends(part, part.dim() - 1, fmt), fmt.levels)
        codes.append(nearest(part, scale[..., None], zero[..., None], fmt.levels))
        params.append(torch.stack([scale, zero], -1))
    return torch.cat(codes, -1), torch.stack(params, -2)


def real_keys(codes: Tensor, params: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the keys ``[n * group, KV, D]`` that codes stand for."""
    scale, zero = params.to(dtype).unbind(-1)
    if not len(params):
        return codes.to(dtype)
    parts = codes.reshape(len(params), -1, *codes.shape[1:]).to(dtype)
    return (parts * scale[:, None] + zero[:, None]).reshape(codes.shape)


def real_values(codes: Tensor, params: Tensor, fmt: GroupedFormat, dtype: torch.dtype) -> Tensor:
    """Return the values ``[n, KV, DV]`` that codes stand for."""
    wide = params.to(dtype).repeat_interleave(fmt.columns, -2)[..., : codes.shape[-1], :]
    return codes.to(dtype) * wide[..., 0] + wide[..., 1]


def append_rows(
    states: Mapping[str, Tensor], k: Tensor, v: Tensor, start: int, fmt: GroupedFormat
) -> list[int]:
    """Write rows ``[n, KV, D/DV]`` from position ``start`` on into the tail; quantise groups that fill up.

    Args:
        states: The arrays named in `STATES`, changed in place.
        k: New keys.
        v: New values.
        start: Position of the first row.
        fmt: The format.

    Returns:
        The groups that were quantised.
    """
    tail, done, full = states["k_tail"].shape[0], 0, []
    while done < len(k):
        stop = min(len(k), fmt.slots(start + done + 1) - start)
        slots = torch.arange(start + done, start + stop) % tail
        states["k_tail"][slots] = k[done:stop].to(states["k_tail"].dtype)
        states["v_tail"][slots] = v[done:stop].to(states["v_tail"].dtype)
        done = stop
        if (start + done) % fmt.group == 0:
            full.append((start + done) // fmt.group - 1)
            pack_group(states, full[-1], fmt)
    return full


def group_slots(index: int, tail: int, fmt: GroupedFormat) -> slice:
    """Return the slots of the tail in which a group's positions stand."""
    first = index * fmt.group % tail
    return slice(first, first + fmt.group)


def pack_group(states: Mapping[str, Tensor], index: int, fmt: GroupedFormat) -> None:
    """Quantise a group that stands in the tail."""
    own = group_slots(index, states["k_tail"].shape[0], fmt)
    rows = slice(index * fmt.group, (index + 1) * fmt.group)
    codes, params = quantise_keys(states["k_tail"][own], fmt)
    states["k_cache"][rows] = codes
    states["k_scale"][index] = params[0]
    states["v_cache"][rows], states["v_scale"][rows] = quantise_values(states["v_tail"][own], fmt)


def visible(
    states: Mapping[str, Tensor], pos: Tensor, tokens: int, fmt: GroupedFormat, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a call's queries can see.

    Args:
        states: The arrays named in `STATES`, which hold the call's tokens.
        pos: int32 ``[start, valid]``.
        tokens: T, queries of the call.
        fmt: The format.
        dtype: Of the results.

    Returns:
        Keys ``[S, KV, D]``, values ``[S, KV, DV]`` and a mask ``[T, S]``: first the groups of codes, then
        rows of the tail from the first query's group on.
    """
    start, valid = int(pos[0]), int(pos[1])
    last, group = start + valid - 1, fmt.group
    packed = max(last, 0) // group * group
    recent = torch.arange(start // group * group, last + 1)
    slots = recent % states["k_tail"].shape[0]
    k = real_keys(states["k_cache"][:packed], states["k_scale"][: packed // group], dtype)
    v = real_values(states["v_cache"][:packed], states["v_scale"][:packed], fmt, dtype)
    k = torch.cat([k, states["k_tail"][slots].to(dtype)])
    v = torch.cat([v, states["v_tail"][slots].to(dtype)])
    query = start + torch.arange(tokens)[:, None]
    own = query // group * group
    old = torch.arange(packed)[None] < own
    new = (recent[None] >= own) & (recent[None] <= query)
    return k, v, torch.cat([old, new], -1)


def encoded(
    k: Array, v: Array, start: int, cap: int, tail: int, fmt: GroupedFormat
) -> dict[str, Array]:
    """Return the canonical arrays that hold given rows, for queries from position ``start`` on.

    What none of them sees is poison: NaN, and codes of all ones.

    Args:
        k: float32 ``[n, KV, D]``, positions from 0 on.
        v: float32 ``[n, KV, DV]``.
        start: The first query's position.
        cap: Slots of the cache.
        tail: Slots of the tail.
        fmt: The format.
    """
    (n, kv, d), dv = k.shape, v.shape[2]
    out = {
        name: np.full(shape, fmt.levels if dtype == "uint8" else np.nan, dtype)
        for name, (shape, dtype) in state_shapes(fmt, cap, tail, kv, d, dv).items()
    }
    whole = n // fmt.group * fmt.group
    codes, params = quantise_keys(torch.from_numpy(k[:whole]), fmt)
    out["k_cache"][:whole], out["k_scale"][: whole // fmt.group] = codes.numpy(), params.numpy()
    codes, params = quantise_values(torch.from_numpy(v[:whole]), fmt)
    out["v_cache"][:whole], out["v_scale"][:whole] = codes.numpy(), params.numpy()
    recent = np.arange(start // fmt.group * fmt.group, n)
    out["k_tail"][recent % tail], out["v_tail"][recent % tail] = k[recent], v[recent]
    return out
