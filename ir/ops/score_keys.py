"""Scores of blocks of keys from the keys themselves.

``kind`` says which; token i stands at ``start + i`` (``pos = [start, valid]``), heads of a group share a
KV head:

- ``oracle``: the largest exact attention probability in each block (HySparse, SeerAttention's target). Each
  head is normalised before heads are brought together: raw maxima of different heads cannot be compared;
- ``logits``: the largest logit ``scale * q.k`` in each block;
- ``channels``: the largest ``q.k`` over the ``channels`` channels with the greatest ``|q_c| peak_c`` alone,
  ties to the lower channel (TailorKV); with ``guess`` a predicted query chooses them and q itself scores.
  ``peak`` is the greatest magnitude of each channel, or with ``span`` that of each so many positions: then
  a token takes the greatest of the entries that are complete at its position, and 1 where none is.
  Keys are those of a copy by channels (`index_keys`).

``agg`` brings the heads of a group together: ``none`` keeps a score for each, ``max``, ``mean`` and ``sum``
give one for each KV head; for ``channels``, ``mean`` is that of the queries. A block scores over the
positions up to the token's own; later blocks, and all blocks of padding tokens, have -inf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import check_cache_order, parse_cache_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops import batches, pages, pooled
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.ops.edge_keys import spike_spans
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.workload import Workload

KINDS = {
    "oracle": ("none", "max", "mean", "sum"),
    "logits": ("none", "max", "mean", "sum"),
    "channels": ("none", "mean"),
}
"""Kinds and the ways in which each brings heads together."""


def block_max(values: Tensor, block: int) -> Tensor:
    """Return the largest of each ``block`` along the last axis; the last one may be shorter."""
    short = -values.shape[-1] % block
    padded = torch.nn.functional.pad(values, (0, short), value=-math.inf)
    return padded.reshape(*padded.shape[:-1], -1, block).amax(-1)


def bring_together(score: Tensor, kv_heads: int, agg: str) -> Tensor:
    """Reduce ``[R, H, NB]`` to ``[R, KV, NB]``, or leave it as it is with ``none``."""
    if agg == "none":
        return score
    per = score.reshape(score.shape[0], kv_heads, -1, score.shape[2])
    if agg == "max":
        return per.amax(2)
    return per.mean(2) if agg == "mean" else per.sum(2)


def best_channels(importance: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` greatest along the last axis, ties to the lower index."""
    order = torch.sort(importance, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(-1, order, True)


def dots(q: Tensor, k: Tensor) -> Tensor:
    """Return q.k of each query head with its KV head's keys: ``[T, H, D], [S, KV, D] -> [T, H, S]``."""
    per = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
    return torch.einsum("tugd,sud->tugs", per, k).reshape(*q.shape[:2], k.shape[0])


def peaks_at(peak: Tensor, pos: Tensor, tokens: int, span: int) -> Tensor:
    """Return the peaks that each token chooses by: ``[1, KV, D]``, with ``span`` ``[T, KV, D]``.

    Entries that are not complete at a token, whatever they hold, have no part in its peaks.
    """
    if not span:
        return peak[None]
    start, valid = int(pos[0]), int(pos[1])
    behind = start + torch.arange(1, tokens + 1).clamp(max=max(valid, 0))
    complete = (behind // span).clamp(max=peak.shape[0])
    running = torch.cummax(peak, 0).values[(complete - 1).clamp(min=0)]
    return torch.where((complete > 0)[:, None, None], running, 1)


def prepared(
    q: Tensor, k_cache: Tensor, pos: Tensor, peak: Tensor | None, guess: Tensor | None,
    kind: str, agg: str, channels: int, scale: float, span: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return q as it is multiplied ``[T, HQ, D]``, keys ``[cap, KV, D]`` and the mask ``[T, 1, cap]``.

    Keys that no token sees are zero, whatever the cache holds there.
    """
    cap, kv_heads, _ = k_cache.shape
    start, valid = int(pos[0]), int(pos[1])
    token, slot = torch.arange(q.shape[0]), torch.arange(cap)
    seen = (slot <= start + token[:, None]) & (token[:, None] < valid)
    k = torch.where((slot < start + valid)[:, None, None], k_cache, 0).to(q.dtype)
    if kind == "channels":
        assert peak is not None
        chooser = q if guess is None else guess.to(q.dtype)
        if agg == "mean":
            q, chooser = (x.unflatten(1, (kv_heads, -1)).mean(2) for x in (q, chooser))
        peaks = peaks_at(peak.to(q.dtype), pos, q.shape[0], span)
        peaks = peaks.repeat_interleave(q.shape[1] // kv_heads, 1)
        q = torch.where(best_channels(chooser.abs() * peaks, channels), q, 0)
    else:
        q = q * scale
    return q, k, seen[:, None]


def key_scores(
    q: Tensor, k_cache: Tensor, pos: Tensor, peak: Tensor | None, guess: Tensor | None,
    kind: str, agg: str, block: int, channels: int, scale: float, span: int = 0,
) -> Tensor:  # fmt: skip
    """Score in q's dtype; see the module's text and `score_keys`."""
    kv_heads = k_cache.shape[1]
    q, k, seen = prepared(q, k_cache, pos, peak, guess, kind, agg, channels, scale, span)
    logits = dots(q, k).masked_fill(~seen, -math.inf)
    if kind == "oracle":
        logits = torch.softmax(logits, -1).masked_fill(~seen, -math.inf)
    score = block_max(logits, block)
    return score if kind == "channels" else bring_together(score, kv_heads, agg)


@torch.library.custom_op("mimo::score_keys", mutates_args=())
def score_keys(
    q: Tensor, k_cache: Tensor, pos: Tensor, peak: Tensor | None, guess: Tensor | None,
    kind: str, agg: str, block: int, channels: int, scale: float, span: int = 0,
    table: Tensor | None = None, cap: int = 0, page: int = 0,
) -> Tensor:  # fmt: skip
    """Score blocks of keys.

    Args:
        q: ``[T, H, D]``.
        k_cache: ``[cap, KV, D]``.
        pos: int32 [2], start and valid.
        peak: Greatest magnitude of each channel ``[KV, D]`` (`channels` only); with ``span`` that of
            each so many positions, ``[ceil(cap / span), KV, D]`` in the type of the keys.
        guess: ``[T, H, D]`` or None, the query that chooses channels.
        kind: See the module's text.
        agg: Likewise.
        block: Positions in a block.
        channels: Number of channels.
        scale: Factor on q.k.
        span: Positions of an entry of peaks; 0: there is one for all.
        table: Block tables, int32 ``[B, width]``, of pages that all keys lie in; or None. Not for `channels`.
        cap: With them, most positions of a sequence.
        page: Likewise, positions in a page.

    Returns:
        ``[T, HS, ceil(cap / block)]``; HS is H with ``agg=none``, else KV.

    Of B sequences: ``q [B * T, H, D]``, ``k_cache [B, cap, KV, D]``, ``pos [B, 2]``, ``peak [B, ...]``; in
    pages ``k_cache [slots, KV, D]``.
    """
    if table is not None:
        (k_cache,) = pooled.of_each(pos, (k_cache,), (1,), table, page, cap)

    def one(
        at: Tensor, mine: Tensor, chooser: Tensor | None, keys: Tensor, most: Tensor | None = None
    ) -> Tensor:
        return key_scores(mine, keys, at, most, chooser, kind, agg, block, channels, scale, span)

    states = (k_cache,) if peak is None else (k_cache, peak)
    return torch.cat(batches.several(one, pos, (q, guess), states))


@score_keys.register_fake
def _(
    q: Tensor, k_cache: Tensor, pos: Tensor, peak: Any, guess: Any,
    kind: str, agg: str, block: int, channels: int, scale: float, span: int = 0, table: Any = None,
    cap: int = 0, page: int = 0,
) -> Tensor:  # fmt: skip
    heads = q.shape[1] if agg == "none" else k_cache.shape[-2]
    return q.new_empty((q.shape[0], heads, blocks_of(cap or k_cache.shape[-3], block)))


class ScoreKeys(OpDef):
    """``score_keys:t=1,h=32,kv=8,d=128,cap=65536,kind=oracle,agg=max,block=64``.

    ``c`` and ``lay`` say how the keys are kept: see `sparse_attention`.
    """

    name = "score_keys"
    params = (
        Param("t", int, low=1),
        Param("h", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("cap", int, low=1),
        Param("kind", str),
        Param("agg", str, "none"),
        Param("block", int, 1, low=1),
        Param("channels", int, 0),
        Param("guess", int, 0),
        Param("scale", float, 0.0),
        Param("len", int, 0),
        Param("c", str, "f32"),
        Param("lay", str, ""),
        Param("span", int, 0),
        Param("b", int, 1, low=1),
        *pages.PARAMS,
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse unknown kinds, heads that do not group, channels that are not there."""
        parse_cache_format(p["c"])
        check_cache_order(self.name, p)
        batches.check_batch(self.name, p)
        pages.check_pages(self.name, p)
        if p["page"] and p["kind"] == "channels":
            raise UsageError(
                f"score_keys: kind=channels reads a copy of keys, which has no pages (page={p['page']})",
                remedy="leave out page and pool",
            )
        if p["kind"] not in KINDS or p["agg"] not in KINDS[p["kind"]]:
            ways = "; ".join(f"{kind}: {', '.join(aggs)}" for kind, aggs in KINDS.items())
            raise UsageError(f"score_keys: no kind={p['kind']}, agg={p['agg']}", remedy=ways)
        if p["h"] % p["kv"]:
            raise UsageError(f"score_keys: h={p['h']} is not a multiple of kv={p['kv']}")
        if not p["t"] <= int(p["len"] or p["cap"]) <= p["cap"]:
            raise UsageError("score_keys: len (KV length) must lie between t and cap")
        if p["kind"] == "channels" and not 1 <= p["channels"] <= p["d"]:
            raise UsageError(f"score_keys: channels={p['channels']} is outside of 1 ... d")
        if p["kind"] != "channels" and (p["channels"] or p["guess"] or p["span"]):
            raise UsageError("score_keys: channels, guess and span go with kind=channels only")
        if p["kind"] == "channels" and p["lay"]:
            raise UsageError(
                f"score_keys: kind=channels reads a copy of keys by channels, not caches with lay={p['lay']}",
                remedy="leave out lay",
            )
        if p["span"] < 0:
            raise UsageError(f"score_keys: span={p['span']} is below 0")

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return q, pos, guess, peak, k_cache, score."""
        p = self.full(workload)
        heads = p["h"] if p["agg"] == "none" else p["kv"]
        stored = parse_cache_format(p["c"]).dtype
        out = [
            Arg("q", "input", (p["t"], p["h"], p["d"]), "float32"),
            Arg("pos", "input", (2,), "int32"),
        ]
        if p["guess"]:
            out.append(Arg("guess", "input", (p["t"], p["h"], p["d"]), "float32"))
        if p["kind"] == "channels" and p["span"]:
            spans = blocks_of(p["cap"], p["span"])
            out.append(Arg("peak", "state", (spans, p["kv"], p["d"]), stored))
        elif p["kind"] == "channels":
            out.append(Arg("peak", "state", (p["kv"], p["d"]), "float32"))
        out += [
            Arg("k_cache", "state", (p["cap"], p["kv"], p["d"]), stored),
            Arg("score", "output", (p["t"], heads, blocks_of(p["cap"], p["block"])), "float32"),
        ]
        return pages.paged_args(out, p) if pages.paged(p) else batches.batched(out, p["b"])

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw normal queries and keys, channels of unequal size; slots beyond the length hold NaN.

        So do entries of peaks that are not complete; of some that are, each decides (`spike_spans`).
        """
        p = self.full(workload)
        fmt = parse_cache_format(p["c"])
        length, span = int(p["len"] or p["cap"]), int(p["span"])
        if p["b"] > 1 or pages.paged(p):
            return batches.drawn(self, workload, rng, batches.lengths(length, p))
        shapes = {a.name: a.shape for a in self.args(workload) if a.role != "output"}
        out: dict[str, Array] = {
            name: rng.standard_normal(shape, dtype=np.float32)
            for name, shape in shapes.items()
            if name != "pos"
        }
        out["k_cache"] *= np.exp(rng.standard_normal(p["d"])).astype(np.float32)
        if span:
            choosers = [out[name] for name in ("q", "guess") if name in out]
            spike_spans(out["k_cache"], choosers, span, length // span, p["channels"], rng)
        out["k_cache"][length:] = np.nan
        out["pos"] = np.array([length - p["t"], p["t"]], np.int32)
        if p["kind"] == "channels" and not span:
            out["peak"] = np.abs(out["k_cache"][:length]).max(0)
        out["k_cache"] = fmt.encode(out["k_cache"])
        if span:
            whole = length // span
            keys = np.abs(fmt.decode(out["k_cache"][: whole * span]))
            out["peak"][...] = np.nan
            out["peak"][:whole] = keys.reshape(whole, span, *keys.shape[1:]).max(1)
            out["peak"] = fmt.encode(out["peak"])
        return out

    def _tensors(self, p: Mapping[str, Any], inputs: Mapping[str, Array]) -> tuple[Any, ...]:
        stored = ("k_cache", "peak") if p["span"] else ("k_cache",)
        arrays = dict(inputs)
        arrays |= {name: parse_cache_format(p["c"]).decode(inputs[name]) for name in stored}
        t = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in arrays.items()}
        return t["q"].double(), t["k_cache"].double(), t["pos"], t.get("peak"), t.get("guess")

    def softmax_scale(self, p: Mapping[str, Any]) -> float:
        """Return the factor on q.k: the given one or ``1/sqrt(d)``."""
        return float(p["scale"] or p["d"] ** -0.5)

    @batches.one_by_one
    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64."""
        p = self.full(workload)
        q, k, pos, peak, guess = self._tensors(p, inputs)
        scored = key_scores(
            q, k, pos, peak, guess, p["kind"], p["agg"], p["block"], p["channels"],
            self.softmax_scale(p), p["span"],
        )  # fmt: skip
        return {"score": scored.numpy()}

    @batches.one_by_one
    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Follow the arithmetic; a maximum is off by no more than the greatest error of what it is over.

        A float32 dot product of d terms, in any order, is off by ``D = (d + 4) U32 sum |q_c k_c|`` (four for
        the scale and a mean of queries). Probabilities are off by a factor of ``exp(+-2 max D)`` and by the
        sum's and the exponential's own roundings; sums of n positive terms in lanes by 4 sqrt(n) units.
        Channels whose importance lies within rounding of the last one chosen may or may not be in. 16-bit
        keys are widened, exactly: q is not to be rounded.
        """
        p = self.full(workload)
        q, k, pos, peak, guess = self._tensors(p, inputs)
        scale, group = self.softmax_scale(p), p["h"] // p["kv"]
        parts = (p["kind"], p["agg"], p["channels"], scale)
        used, keys, seen = prepared(q, k, pos, peak, guess, *parts, p["span"])
        size = dots(used.abs(), keys.abs())
        if p["kind"] == "channels":
            whole, _, _ = prepared(
                q.abs(), k, pos, peak, None, *parts[:2], p["d"], scale, p["span"]
            )
            size = dots(whole, keys.abs())  # a mean of queries may cancel
        error = size.masked_fill(~seen, 0.0) * (p["d"] + 4) * U32
        if p["kind"] == "channels":
            assert peak is not None
            peaks = peaks_at(peak.double(), pos, q.shape[0], p["span"])
            chooser = q if guess is None else guess.double()
            error = error + self._contested(p, q, chooser, used, keys, peaks)
        if p["kind"] == "oracle":
            logits = dots(used, keys).masked_fill(~seen, -math.inf)
            lse = torch.logsumexp(logits, -1, keepdim=True)
            arg = (logits - lse).abs().masked_fill(~seen, 0.0)
            rho = 2 * error.amax(-1, keepdim=True) + (16 + 4 * p["cap"] ** 0.5 + 2 * arg) * U32
            error = torch.exp(logits - lse).nan_to_num(0.0) * torch.expm1(rho) + 1e-37
        bound = block_max(error, p["block"])
        if p["kind"] != "channels":
            bound = bring_together(bound, p["kv"], p["agg"])
        if p["agg"] in ("mean", "sum"):
            size = torch.from_numpy(expected["score"]).abs().nan_to_num(posinf=0.0)
            bound = bound + group * U32 * size
        return {"score": np.where(np.isfinite(expected["score"]), bound.numpy(), 0.0)}

    def _contested(
        self, p: Mapping[str, Any], q: Tensor, chooser: Tensor, used: Tensor, keys: Tensor,
        peaks: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return what channels at the edge of the choice can change, ``[T, HQ, cap]``.

        Which ones are says the query that chooses; how much each changes, that which scores.
        """
        group = p["h"] // used.shape[1]
        mean = chooser.unflatten(1, (used.shape[1], -1)).mean(2)
        size = chooser.abs().unflatten(1, (used.shape[1], -1)).mean(2)
        peaks = peaks.repeat_interleave(used.shape[1] // p["kv"], 1)
        importance, band = mean.abs() * peaks, size * peaks * (group + 4) * U32
        chosen = best_channels(importance, p["channels"])
        inf = math.inf
        least = torch.where(chosen, importance - band, inf).amin(-1, keepdim=True)
        most = torch.where(chosen, -inf, importance + band).amax(-1, keepdim=True)
        edge = ((importance + band >= least) & ~chosen) | ((importance - band <= most) & chosen)
        edge &= (most >= least).expand_as(edge)
        scored = q.abs().unflatten(1, (used.shape[1], -1)).mean(2)
        return dots(torch.where(edge, scored, 0.0), keys.abs())

    def counts(self, workload: Workload) -> Counts:
        """Keys (of ``channels``: those channels, and peaks) once for each KV head, scores written once."""
        p = self.full(workload)
        lengths = batches.lengths(int(p["len"] or p["cap"]), p)
        if pages.paged(p):
            each = batches.counted(self, workload, lengths)
            numbers = parse_cache_format(p["c"]).bytes * p["kv"] * p["d"]
            return pages.counted(p, each, lengths, numbers)
        if p["b"] > 1:
            return batches.counted(self, workload, lengths)
        length = float(p["len"] or p["cap"])
        heads = p["kv"] if p["kind"] == "channels" and p["agg"] == "mean" else p["h"]
        deep = p["channels"] or p["d"]
        work = p["t"] * heads * (length - (p["t"] - 1) / 2)
        ops = {"fma_f32": work * deep, "int_op": work}
        if p["kind"] == "oracle":
            ops["exp_f32"] = work
        written = p["t"] * (p["h"] if p["agg"] == "none" else p["kv"]) * length / p["block"]
        entries = length // p["span"] if p["span"] else 0
        numbers = length * deep + entries * p["d"]
        read = parse_cache_format(p["c"]).bytes * p["kv"] * numbers
        return Counts(ops, {"dram": read + 4.0 * (p["t"] * p["h"] * p["d"] + written)})
