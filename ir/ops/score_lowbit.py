"""Scores of blocks for prefill from low-bit products of queries and keys (SALE).

For tiles of ``rows`` queries. Means are taken off first, ``q' = q - q_mean``, ``k' = k - k_mean`` (in
float32; that of the keys shifts all logits of a row and so changes nothing), then each token's q' and k'
become codes of ``bits`` bits by their largest magnitude. The estimate of a logit is ``S = scale * (s_q s_k
(codes . codes) + q_mean . k')``; its weight is taken relative to the mass of the exact region, which are
the first ``first`` blocks and from ``last - 1`` blocks before the tile's own up to it: ``exp(min(S - lse,
80))``, where lse is that of the exact logits ``scale * q . k'`` there. A block's score is the largest such
weight of its keys over the tile's queries; blocks of the exact region have +inf, later ones, and tiles of
padding, -inf.

``score >= tau`` is ``S >= lse + ln tau`` for one of its elements. Since lse leaves out the rest of the row,
the score is never below the row's true estimated probability.

With ``every`` above 1, only the queries 0, ``every``, 2 ``every`` ... of a tile are estimated: neighbours
attend alike, and the estimate is most of the work. Where no more than ``least`` keys exist, nothing is
estimated and every block up to the tile's last query has +inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.ops.score_keys import block_max
from mimo_compile.ir.ops.select_blocks import frame
from mimo_compile.ir.workload import Workload

MOST = 80.0
"""Largest logarithm of a weight, so that float32 can hold it."""


def to_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise along the last axis by the largest magnitude, in float32; a zero row gives scale 0, codes 0.

    Returns:
        Whole numbers of at most ``2**(bits - 1) - 1`` as float32 ``[..., D]``, and their scale ``[..., 1]``.
    """
    top = float(2 ** (bits - 1) - 1)
    x = x.to(torch.float32)
    most = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, torch.full_like(most, top) / most, torch.zeros_like(most))
    return torch.round(x * inverse).clamp(-top, top), most / top


def estimates(
    q: Tensor, k_cache: Tensor, pos: Tensor, q_mean: Tensor, k_mean: Tensor, bits: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return estimated logits, exact ones (of k') and bounds of the magnitudes of their sums, ``[H, T, L]``.

    float64; L = start + valid, the keys that exist.
    """
    length, per = int(pos.sum()), q.shape[1] // k_cache.shape[1]
    keys = k_cache[:length].to(torch.float32) - k_mean.to(torch.float32)
    near = (q.to(torch.float32) - q_mean.to(torch.float32)).transpose(0, 1)
    qc, qs = (x.double() for x in to_codes(near, bits))
    kc, ks = (x.double() for x in to_codes(keys.transpose(0, 1), bits))
    kc, ks = kc.repeat_interleave(per, 0), ks.repeat_interleave(per, 0)
    k = keys.double().transpose(0, 1).repeat_interleave(per, 0)
    mean, queries = q_mean.double()[:, None], q.double().transpose(0, 1)
    low = (qs * qc) @ (ks * kc).transpose(1, 2)
    estimate = scale * (low + mean @ k.transpose(1, 2))
    exact = scale * queries @ k.transpose(1, 2)
    size = scale * (low.abs() + (queries.abs() + mean.abs()) @ k.abs().transpose(1, 2))
    return estimate, exact, size


def regions(
    pos: Tensor, t: int, length: int, block: int, rows: int, first: int, last: int, least: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the exact region ``[T, L]``, forced and candidate blocks ``[R, NB]`` of each tile."""
    tiles, blocks = blocks_of(t, rows), blocks_of(length, block)
    first = blocks if length <= least else first
    candidates, forced = frame(pos, tiles, rows, blocks, block, first, last)
    token = torch.arange(t)
    seen = torch.arange(length) <= int(pos[0]) + token[:, None]
    region = forced.repeat_interleave(block, 1)[:, :length][token // rows]
    return region & seen & (token < int(pos[1]))[:, None], forced, candidates


def lowbit_scores(
    q: Tensor, k_cache: Tensor, pos: Tensor, q_mean: Tensor, k_mean: Tensor,
    bits: int, block: int, rows: int, first: int, last: int, scale: float,
    least: int = 0, every: int = 1,
) -> Tensor:  # fmt: skip
    """Score in float64; see the module's text and `score_lowbit`."""
    t, blocks, length = q.shape[0], blocks_of(k_cache.shape[0], block), int(pos.sum())
    region, forced, candidates = regions(pos, t, length, block, rows, first, last, least)
    token = torch.arange(t)
    left_out = ((token >= int(pos[1])) | (token % rows % every != 0))[:, None]
    heads = []
    for one in by_head(q, k_cache, q_mean, k_mean):
        estimate, exact, _ = (x[0] for x in estimates(*one[:2], pos, *one[2:], bits, scale))
        lse = torch.logsumexp(exact.masked_fill(~region, -math.inf), -1, keepdim=True)
        weight = torch.exp((estimate - lse).clamp(max=MOST)).masked_fill(left_out, -math.inf)
        heads.append(block_max(block_max(weight, block).T, rows).T)
    score = torch.stack(heads, 1)
    score = torch.where(forced[:, None], math.inf, score)
    score = score.masked_fill(~candidates[:, None], -math.inf)
    return torch.nn.functional.pad(score, (0, blocks - score.shape[2]), value=-math.inf)


def by_head(
    q: Tensor, k_cache: Tensor, q_mean: Tensor, k_mean: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield what each query head reads, one head wide: all heads' products at once are too large."""
    per = q.shape[1] // k_cache.shape[1]
    for h in range(q.shape[1]):
        own, kv = slice(h, h + 1), slice(h // per, h // per + 1)
        yield q[:, own], k_cache[:, kv], q_mean[own], k_mean[kv]


def estimated(p: Mapping[str, Any]) -> int:
    """Return how many queries of a head are estimated, given all parameters of the op."""
    if int(p["len"] or p["cap"]) <= p["least"]:
        return 0
    whole, rest = divmod(p["t"], p["rows"])
    return int(whole * blocks_of(p["rows"], p["every"]) + blocks_of(rest, p["every"]))


@torch.library.custom_op("mimo::score_lowbit", mutates_args=())
def score_lowbit(
    q: Tensor, k_cache: Tensor, pos: Tensor, q_mean: Tensor, k_mean: Tensor,
    bits: int, block: int, rows: int, first: int, last: int, scale: float,
    least: int = 0, every: int = 1,
) -> Tensor:  # fmt: skip
    """Score blocks by low-bit products.

    Args:
        q: ``[T, H, D]``.
        k_cache: ``[cap, KV, D]``.
        pos: int32 [2], start and valid.
        q_mean: ``[H, D]``.
        k_mean: ``[KV, D]``.
        bits: Of the codes.
        block: Positions in a block.
        rows: Queries of a tile.
        first: First blocks of the exact region.
        last: Blocks of the exact region up to the tile's own, from its first one on.
        scale: Factor on q.k.
        least: Number of keys up to which nothing is estimated.
        every: Of a tile's queries, one in so many is estimated.

    Returns:
        ``[ceil(T / rows), H, ceil(cap / block)]``.
    """
    return lowbit_scores(
        q, k_cache, pos, q_mean, k_mean, bits, block, rows, first, last, scale, least, every
    ).to(q.dtype)


@score_lowbit.register_fake
def _(
    q: Tensor, k_cache: Tensor, pos: Tensor, q_mean: Tensor, k_mean: Tensor,
    bits: int, block: int, rows: int, first: int, last: int, scale: float,
    least: int = 0, every: int = 1,
) -> Tensor:  # fmt: skip
    return q.new_empty(
        (blocks_of(q.shape[0], rows), q.shape[1], blocks_of(k_cache.shape[0], block))
    )


class ScoreLowbit(OpDef):
    """``score_lowbit:t=4096,h=32,kv=8,d=128,cap=4096,block=32,rows=64,first=1,last=5``."""

    name = "score_lowbit"
    params = (
        Param("t", int, low=1),
        Param("h", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("cap", int, low=1),
        Param("block", int, low=1),
        Param("rows", int, low=1),
        Param("first", int, low=1),
        Param("last", int, low=1),
        Param("bits", int, 4, low=2),
        Param("scale", float, 0.0),
        Param("len", int, 0),
        Param("c", str, "f32"),
        Param("least", int, 0),
        Param("every", int, 1, low=1),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse heads that do not group and codes above a byte."""
        parse_cache_format(p["c"])
        if p["h"] % p["kv"]:
            raise UsageError(f"score_lowbit: h={p['h']} is not a multiple of kv={p['kv']}")
        if p["bits"] > 8:
            raise UsageError(f"score_lowbit: bits={p['bits']} is above 8")
        if not p["t"] <= int(p["len"] or p["cap"]) <= p["cap"]:
            raise UsageError("score_lowbit: len (KV length) must lie between t and cap")

    def softmax_scale(self, p: Mapping[str, Any]) -> float:
        """Return the factor on q.k: the given one or ``1/sqrt(d)``."""
        return float(p["scale"] or p["d"] ** -0.5)

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return q, pos, q_mean, k_mean, k_cache, score."""
        p = self.full(workload)
        shape = (blocks_of(p["t"], p["rows"]), p["h"], blocks_of(p["cap"], p["block"]))
        return (
            Arg("q", "input", (p["t"], p["h"], p["d"]), "float32"),
            Arg("pos", "input", (2,), "int32"),
            Arg("q_mean", "input", (p["h"], p["d"]), "float32"),
            Arg("k_mean", "input", (p["kv"], p["d"]), "float32"),
            Arg("k_cache", "state", (p["cap"], p["kv"], p["d"]), parse_cache_format(p["c"]).dtype),
            Arg("score", "output", shape, "float32"),
        )

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw normal q and k around means of some size, one zero row; later slots hold NaN."""
        p = self.full(workload)
        length = int(p["len"] or p["cap"])
        q = rng.standard_normal((p["t"], p["h"], p["d"]), dtype=np.float32)
        k = rng.standard_normal((p["cap"], p["kv"], p["d"]), dtype=np.float32)
        q += rng.standard_normal((p["h"], p["d"]), dtype=np.float32)
        k += rng.standard_normal((p["kv"], p["d"]), dtype=np.float32)
        means = {"q_mean": q.mean(0), "k_mean": k[:length].mean(0)}
        k[length // 2] = means["k_mean"]
        k[length:] = np.nan
        k = parse_cache_format(p["c"]).encode(k)
        pos = np.array([length - p["t"], p["t"]], np.int32)
        return {"q": q, "pos": pos, **means, "k_cache": k}

    def _parts(self, p: Mapping[str, Any], inputs: Mapping[str, Array]) -> tuple[Any, ...]:
        keys = parse_cache_format(p["c"]).decode(inputs["k_cache"])
        arrays = (inputs["q"], keys, *(inputs[n] for n in ("pos", "q_mean", "k_mean")))
        return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute codes in float32, as they are defined, and all else in float64."""
        p = self.full(workload)
        q, k, pos, q_mean, k_mean = self._parts(p, inputs)
        scored = lowbit_scores(
            q, k, pos, q_mean, k_mean, p["bits"], p["block"], p["rows"], p["first"], p["last"],
            self.softmax_scale(p), p["least"], p["every"],
        )  # fmt: skip
        return {"score": scored.numpy()}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Follow the arithmetic: codes and their products are exact whole numbers.

        The estimate and the region's logits are float32 sums of d terms, each off by ``(d + 6) U32`` of the
        sum of their magnitudes; lse by the greatest of these and the roundings of its sum. Both are in the
        exponent. Queries of padding count for nothing.
        """
        p = self.full(workload)
        q, k, pos, q_mean, k_mean = self._parts(p, inputs)
        q = q[: int(pos[1])]
        scale = self.softmax_scale(p)
        parts = by_head(q, k, q_mean, k_mean)
        found = [estimates(*one[:2], pos, *one[2:], p["bits"], scale)[2].amax() for one in parts]
        size, length = torch.stack(found), int(pos.sum())
        off = size * 2 * (p["d"] + 6) * U32
        off = off + (16 + 4 * length**0.5 + 4 * (size + MOST)) * U32
        finite = np.isfinite(expected["score"])
        score = np.where(finite, expected["score"], 0.0)
        return {"score": np.where(finite, score * torch.expm1(off)[:, None].numpy() + 1e-37, 0.0)}

    def counts(self, workload: Workload) -> Counts:
        """Products of codes below the diagonal; keys and queries read once, scores written once."""
        p = self.full(workload)
        length = float(p["len"] or p["cap"])
        work = estimated(p) * p["h"] * (length - (p["t"] - 1) / 2)
        written = math.prod(self.args(workload)[-1].shape) * length / p["cap"]
        moved = parse_cache_format(p["c"]).bytes * length * p["kv"] * p["d"]
        moved += 4.0 * (p["t"] * p["h"] * p["d"] + written)
        return Counts({"dot_i8": work * p["d"], "int_op": work}, {"dram": moved})
