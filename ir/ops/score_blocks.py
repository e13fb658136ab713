"""Scores of blocks from what describes them (see `describe_blocks`), not from the keys themselves.

``kind`` says which, with a score row for each ``rows`` tokens (1: every token):

- ``quest``: ``scale * sum_c max(q_c lo_c, q_c hi_c)``, at least every ``scale * q.k`` of the block;
- ``mean``: ``scale * q . mean(keys)`` (MoBA);
- ``gate``: ``scale * q_g . k_g`` of a gate's query and its compressed key for each KV head
  (SeerAttention-R); with ``soft`` the softmax of it over complete blocks and the running one, whose logit
  is 0;
- ``compressed``: softmax over the complete compressed keys (``size`` positions each, ``stride`` apart),
  summed onto the blocks by the share of each compressed key that lies in them (NSA); 0 while no key is
  complete;
- ``indexer``: ``scale * sum_h w_h relu(q_h . key)``, one score for all heads (DSA).

``agg`` brings the heads of a group together: ``none``, ``max``, ``mean``, ``sum``, or ``query``: the mean
of the queries scores (ReSA). A block counts once it is complete at the row's last token, so that nothing of
later tokens can leak in; an incomplete one has -inf and has to be forced by the selection (``gate`` and
``compressed`` score it without looking at it). Later blocks, and rows of padding, have -inf.

``b`` sequences have descriptors and a ``pos`` each: see `batches`; or descriptors lie in pages: see `pages`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops import batches, pages, pooled
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.block_lists import blocks_of, row_spans
from mimo_compile.ir.ops.describe_blocks import entries_of
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.ops.score_keys import bring_together
from mimo_compile.ir.workload import Workload

KINDS = {
    "quest": ("none", "max", "mean", "sum", "query"),
    "mean": ("none", "max", "mean", "sum", "query"),
    "gate": ("none",),
    "compressed": ("none", "sum"),
    "indexer": ("sum",),
}
"""Kinds and the ways in which each brings heads together."""
PAGED = ("quest", "mean", "gate")
"""Kinds whose descriptors may lie in pages: one for each block."""


def shares(entries: int, blocks: int, block: int, size: int, stride: int) -> Tensor:
    """Return how much of each compressed key lies in each block, float64 ``[entries, blocks]``."""
    key, at = torch.arange(entries)[:, None] * stride, torch.arange(blocks)[None] * block
    low, high = torch.maximum(key, at), torch.minimum(key + size, at + block)
    return (high - low).clamp(min=0).double() / size


def products(q: Tensor, desc: Tensor, kind: str) -> Tensor:
    """Return the unscaled score of each query head and entry, ``[R, H, entries]``."""
    per = q.shape[1] // desc.shape[1]
    desc = desc.to(q.dtype).repeat_interleave(per, 1)
    if kind != "quest":
        return torch.einsum("rhd,nhd->rhn", q, desc[:, :, 0])
    # a maximum of products is the product with one of the bounds, by the query's sign
    low, high = desc[:, :, 0], desc[:, :, 1]
    return torch.einsum("rhd,nhd->rhn", q.clamp(min=0), high) + torch.einsum(
        "rhd,nhd->rhn", q.clamp(max=0), low
    )


def block_scores(
    q: Tensor, desc: Tensor, weight: Tensor | None, pos: Tensor, kind: str, agg: str, soft: bool,
    block: int, rows: int, blocks: int, size: int, stride: int, scale: float,
) -> Tensor:  # fmt: skip
    """Score in q's dtype; see the module's text and `score_blocks`."""
    kv_heads = desc.shape[1]
    ends = row_spans(int(pos[0]), int(pos[1]), q.shape[0], rows)[:, 1, None]
    first = torch.arange(desc.shape[0])[None] * stride
    complete = first + size - 1 <= ends
    known = complete.any(0)[:, None, None, None]
    desc = torch.where(known, desc, 0)  # entries that nobody may see can hold anything
    if agg == "query":
        q = q.reshape(q.shape[0], kv_heads, -1, q.shape[2]).mean(2)
    raw = products(q, desc, kind)
    if kind == "indexer":
        assert weight is not None
        raw = (torch.relu(raw) * weight.to(q.dtype)[..., None]).sum(1, keepdim=True)
    score, complete = raw * scale, complete[:, None]
    started = torch.arange(blocks) * block <= ends[:, None]
    if kind == "compressed":
        score = score.masked_fill(~complete, -math.inf)
        score = torch.softmax(score, -1).nan_to_num(0.0)
        score = score @ shares(desc.shape[0], blocks, block, size, stride).to(q.dtype)
        return bring_together(score, kv_heads, agg).masked_fill(~started, -math.inf)
    if kind == "gate" and soft:
        score = torch.where(complete, score, 0).masked_fill(~started, -math.inf)
        return torch.softmax(score, -1).masked_fill(~started, -math.inf)
    score = score.masked_fill(~complete, -math.inf)
    together = "none" if kind in ("gate", "indexer") or agg == "query" else agg
    return bring_together(score, kv_heads, together)


@torch.library.custom_op("mimo::score_blocks", mutates_args=())
def score_blocks(
    q: Tensor, desc: Tensor, weight: Tensor | None, pos: Tensor, kind: str, agg: str, soft: bool,
    block: int, rows: int, blocks: int, size: int, stride: int, scale: float,
    table: Tensor | None = None, cap: int = 0, page: int = 0,
) -> Tensor:  # fmt: skip
    """Score blocks by their descriptors.

    Args:
        q: ``[R, H, D]``, R = ceil(T / rows); of `gate` ``[R, KV, D]``, projected and rotated.
        desc: ``[entries, KV, parts, D]``; two parts (least, greatest) for `quest`, else one.
        weight: ``[R, H]``, of `indexer`.
        pos: int32 [2], start and valid.
        kind: See the module's text.
        agg: Likewise.
        soft: Likewise.
        block: Positions in a block.
        rows: Tokens that share a score row.
        blocks: Number of blocks to score.
        size: Positions of an entry.
        stride: Positions from one entry to the next.
        scale: Factor.
        table: Block tables, int32 ``[B, width]``, of pages that all descriptors lie in; or None.
        cap: With them, most positions of a sequence.
        page: Likewise, positions in a page.

    Returns:
        ``[R, HS, blocks]``; HS is H, or KV where heads are brought together, or 1 for `indexer`.

    Of B sequences: R times B rows, ``desc [B, entries, KV, parts, D]``, ``pos [B, 2]``; in pages
    ``desc [entries of the pool, KV, parts, D]``.
    """
    if table is not None:
        (desc,) = pooled.of_each(pos, (desc,), (size,), table, page, cap)

    def one(at: Tensor, mine: Tensor, own: Tensor | None, entries: Tensor) -> Tensor:
        return block_scores(
            mine, entries, own, at, kind, agg, soft, block, rows, blocks, size, stride, scale
        )

    return torch.cat(batches.several(one, pos, (q, weight), (desc,)))


@score_blocks.register_fake
def _(
    q: Tensor, desc: Tensor, weight: Any, pos: Tensor, kind: str, agg: str, soft: bool,
    block: int, rows: int, blocks: int, size: int, stride: int, scale: float,
    table: Any = None, cap: int = 0, page: int = 0,
) -> Tensor:  # fmt: skip
    heads = q.shape[1] if agg == "none" else desc.shape[-3]
    return q.new_empty((q.shape[0], heads, blocks))


class ScoreBlocks(OpDef):
    """``score_blocks:t=1,h=32,kv=8,d=128,cap=65536,kind=quest,agg=max,block=16``.

    ``e`` is the format of the descriptors.
    """

    name = "score_blocks"
    params = (
        Param("t", int, low=1),
        Param("h", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("cap", int, low=1),
        Param("kind", str),
        Param("agg", str, "none"),
        Param("block", int, low=1),
        Param("rows", int, 1, low=1),
        Param("soft", int, 0),
        Param("size", int, 0),
        Param("stride", int, 0),
        Param("scale", float, 0.0),
        Param("len", int, 0),
        Param("e", str, "f32"),
        Param("b", int, 1, low=1),
        *pages.PARAMS,
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse unknown kinds, heads that do not group, sizes that mean nothing."""
        parse_cache_format(p["e"])
        batches.check_batch(self.name, p)
        pages.check_entries(self.name, p)
        if p["kind"] not in KINDS or p["agg"] not in KINDS[p["kind"]]:
            ways = "; ".join(f"{kind}: {', '.join(aggs)}" for kind, aggs in KINDS.items())
            raise UsageError(f"score_blocks: no kind={p['kind']}, agg={p['agg']}", remedy=ways)
        if p["h"] % p["kv"]:
            raise UsageError(f"score_blocks: h={p['h']} is not a multiple of kv={p['kv']}")
        if not p["t"] <= int(p["len"] or p["cap"]) <= p["cap"]:
            raise UsageError("score_blocks: len (KV length) must lie between t and cap")
        if (p["kind"] == "compressed") != bool(p["size"] and p["stride"]):
            raise UsageError(
                "score_blocks: size and stride go with kind=compressed, which needs both"
            )
        if p["soft"] and p["kind"] != "gate":
            raise UsageError("score_blocks: soft goes with kind=gate only")
        if p["kind"] == "indexer" and (p["kv"], p["block"]) != (1, 1):
            raise UsageError("score_blocks: an indexer has kv=1 and block=1")
        if p["page"] and p["kind"] not in PAGED:
            raise UsageError(
                f"score_blocks: page={p['page']} is for kind={' and '.join(PAGED)}",
                remedy="leave out page and pool",
            )

    def heads(self, p: Mapping[str, Any]) -> tuple[int, int]:
        """Return the heads of q and of the scores."""
        if p["kind"] == "gate":
            return int(p["kv"]), int(p["kv"])
        return int(p["h"]), int(p["h"] if p["agg"] == "none" else p["kv"])

    def sizes(self, p: Mapping[str, Any]) -> tuple[int, int]:
        """Return an entry's size and stride."""
        return int(p["size"] or p["block"]), int(p["stride"] or p["block"])

    def softmax_scale(self, p: Mapping[str, Any]) -> float:
        """Return the factor: the given one, or ``1/sqrt(d)`` (of `indexer`: 1, its weights have it)."""
        return float(p["scale"] or (1.0 if p["kind"] == "indexer" else p["d"] ** -0.5))

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return q, pos, weight (of `indexer`), desc, score."""
        p = self.full(workload)
        rows, (heads, scored) = blocks_of(p["t"], p["rows"]), self.heads(p)
        entries = entries_of(p["cap"], *self.sizes(p))
        parts = 2 if p["kind"] == "quest" else 1
        out = [
            Arg("q", "input", (rows, heads, p["d"]), "float32"),
            Arg("pos", "input", (2,), "int32"),
        ]
        if p["kind"] == "indexer":
            out.append(Arg("weight", "input", (rows, heads), "float32"))
        stored = parse_cache_format(p["e"]).dtype
        out += [
            Arg("desc", "state", (entries, p["kv"], parts, p["d"]), stored),
            Arg("score", "output", (rows, scored, blocks_of(p["cap"], p["block"])), "float32"),
        ]
        return pages.paged_args(out, p) if pages.paged(p) else batches.batched(out, p["b"])

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw normal values, bounds in order; entries that no row may see hold NaN."""
        p = self.full(workload)
        length, (size, stride) = int(p["len"] or p["cap"]), self.sizes(p)
        if p["b"] > 1 or pages.paged(p):
            return batches.drawn(self, workload, rng, batches.lengths(length, p))
        out: dict[str, Array] = {
            a.name: rng.standard_normal(a.shape, dtype=np.float32)
            for a in self.args(workload)
            if a.role != "output" and a.name != "pos"
        }
        if p["kind"] == "quest":
            out["desc"].sort(axis=2)
        out["desc"][max(0, (length - size) // stride + 1) :] = np.nan
        out["desc"] = parse_cache_format(p["e"]).encode(out["desc"])
        out["pos"] = np.array([length - p["t"], p["t"]], np.int32)
        return out

    def _score(self, p: Mapping[str, Any], inputs: Mapping[str, Array]) -> Tensor:
        held = {**inputs, "desc": parse_cache_format(p["e"]).decode(inputs["desc"])}
        t = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in held.items()}
        return block_scores(
            t["q"].double(), t["desc"].double(), t.get("weight"), t["pos"], p["kind"], p["agg"],
            bool(p["soft"]), p["block"], p["rows"], blocks_of(p["cap"], p["block"]),
            *self.sizes(p), self.softmax_scale(p),
        )  # fmt: skip

    @batches.one_by_one
    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64."""
        return {"score": self._score(self.full(workload), inputs).numpy()}

    @batches.one_by_one
    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Follow the arithmetic.

        A float32 sum of n products, in any order, is off by ``n U32`` of the sum of their magnitudes, which
        the same formulas give for ``|q|``, ``|descriptor|`` and ``|weight|``. Softmax: logits that are off
        by D make probabilities off by a factor of ``exp(+-2 D)``, beside the sum's own roundings.
        """
        p = dict(self.full(workload))
        held = {**inputs, "desc": parse_cache_format(p["e"]).decode(inputs["desc"])}
        parts = {n: np.abs(a) if n != "pos" else a for n, a in held.items()}
        p["e"] = "f32"
        if p["kind"] == "quest":
            parts["desc"] = np.broadcast_to(
                parts["desc"].max(2, keepdims=True), parts["desc"].shape
            )
        terms = (
            p["d"] + 6 + p["h"] * (p["kind"] == "indexer" or p["agg"] in ("mean", "sum", "query"))
        )
        if p["kind"] == "compressed" or p["soft"]:
            plain = {**p, "kind": "mean", "agg": "none", "soft": 0, "rows": p["rows"]}
            plain |= {
                "block": self.sizes(p)[1],
                "size": self.sizes(p)[0],
                "stride": self.sizes(p)[1],
            }
            size = self._score(plain, parts).nan_to_num(neginf=0.0)
            entries = size.shape[-1]
            rho = 2 * (terms * U32 * size.amax(-1).amax(-1) + 8 * U32 * (1 + size.amax()))
            rho = rho + (16 + 4 * entries**0.5 + p["h"]) * U32
            wide = torch.expm1(rho)[:, None, None].numpy()
            bound = np.where(np.isfinite(expected["score"]), expected["score"], 0.0) * wide + 1e-37
        else:
            bound = self._score(p, parts).numpy() * terms * U32 + 1e-37
        return {"score": np.where(np.isfinite(expected["score"]), bound, 0.0)}

    def counts(self, workload: Workload) -> Counts:
        """Descriptors once, a product for each query head and entry, scores written once."""
        p = self.full(workload)
        lengths = batches.lengths(int(p["len"] or p["cap"]), p)
        if pages.paged(p):
            parts = 2 if p["kind"] == "quest" else 1
            numbers = parse_cache_format(p["e"]).bytes * p["kv"] * p["d"] * parts
            each = batches.counted(self, workload, lengths)
            return pages.counted(p, each, lengths, numbers / self.sizes(p)[0])
        if p["b"] > 1:
            return batches.counted(self, workload, lengths)
        filled = float(p["len"] or p["cap"]) / p["cap"]
        sizes = {a.name: float(math.prod(a.shape)) for a in self.args(workload)}
        entries = sizes["desc"] * filled / p["kv"]  # elements of one KV head
        rows, (heads, _) = blocks_of(p["t"], p["rows"]), self.heads(p)
        used = p["kv"] if p["agg"] == "query" else heads
        moved = (sizes["desc"] * parse_cache_format(p["e"]).bytes / 4.0 + sizes["score"]) * filled
        moved += sizes["q"]
        ops = {"fma_f32": entries * rows * used}
        if p["kind"] == "compressed" or p["soft"]:
            ops["exp_f32"] = entries * rows * used / p["d"]
        return Counts(ops, {"dram": 4.0 * moved})
