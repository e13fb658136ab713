"""Turn scores of blocks into lists of blocks: the choice of a sparse-attention policy.

The candidates of a list row are the blocks up to that of its last token. Forced are the ``first`` blocks,
and with ``last > 0`` the blocks of the row's own tokens and ``last - 1`` before them. A candidate whose score
is -inf (or NaN) is chosen only by force; with ``positive`` so is one below 2^-126, the least normal float32:
a probability that underflowed, of which nobody knows the order. Of equal scores the lower block wins. Rules:

- ``topk``: the best blocks, until ``max(k, ceil(share * candidates))`` are chosen, forced ones counted;
- ``threshold``: every score at or above ``value[head]``, and at least the ``k`` best;
- ``mass``: the fewest best blocks (forced ones scored like the rest) whose scores sum to at least
  ``value[head]`` of the sum over the candidates, and at least the ``k`` best; scores are finite and
  not negative: +inf has no share of a sum.

A row holds at most ``kmax`` blocks: forced ones, then the best. ``merge=rank`` makes one list for all heads:
blocks that are not forced stand in the order of their best rank over the heads, at equal rank by head
(LessIsMore, arXiv 2508.07101: walk rank by rank over the heads, keep first occurrences).

``b`` sequences have rows and a ``pos`` each: see `batches`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops import batches
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.block_lists import blocks_of, row_spans, to_lists
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.workload import Workload

RULES = ("topk", "threshold", "mass")
SUMS = 64
"""Lanes in which kernels sum scores."""
LEAST_POSITIVE = 2.0**-126
"""The least normal float32, and the least score that ``positive`` lets a list hold."""


def frame(
    pos: Tensor, count: int, rows: int, blocks: int, block: int, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Return candidates and forced blocks of each list row, bool ``[count, blocks]``."""
    spans = row_spans(int(pos[0]), int(pos[1]), count, rows)
    ids = torch.arange(blocks)
    own, end = spans[:, :1] // block, torch.div(spans[:, 1:], block, rounding_mode="floor")
    candidates = ids <= end  # padding ends at -1, which is before every block
    forced = ids < first
    if last:
        forced = forced | (ids > own - last)
    return candidates, candidates & forced


def merge_ranks(score: Tensor) -> Tensor:
    """Return one score for all heads, best first rank by rank: ``[R, HS, NB] -> [R, 1, NB]``.

    ``-min over heads of (rank * HS + head)``; a block that no head may choose stays at -inf.
    """
    heads, blocks = score.shape[1:]
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(blocks).expand_as(order))
    key = rank * heads + torch.arange(heads)[:, None]
    key = torch.where(score > -math.inf, key.double(), math.inf)
    return -key.amin(1, keepdim=True)


def choose(
    score: Tensor, pos: Tensor, value: Tensor | None, rule: str, k: int, share: float,
    block: int, rows: int, first: int, last: int, merge: str, kmax: int, positive: bool = False,
) -> Tensor:  # fmt: skip
    """Return the choice as a mask ``[R, HS, NB]`` (HS 1 if merged); see the module's text."""
    count, _, blocks = score.shape
    candidates, forced = (m[:, None] for m in frame(pos, count, rows, blocks, block, first, last))
    there = score >= LEAST_POSITIVE if positive else ~score.isnan()
    score = torch.where(candidates & there, score, -math.inf)
    if merge == "rank":
        score = merge_ranks(torch.where(forced, -math.inf, score))
    candidates, forced = candidates.expand_as(score), forced.expand_as(score)
    allowed = forced | (score > -math.inf)
    best = torch.sort(score, dim=-1, descending=True, stable=True).indices
    if rule == "topk":
        most = torch.ceil(share * candidates.sum(-1).double()).clamp(min=k)
        chosen = allowed
    else:
        most = torch.tensor(float(kmax))
        assert value is not None
        wanted = value.to(score.dtype)[:, None]
        if rule == "threshold":
            chosen = score >= wanted
        else:
            sums = torch.where(candidates, score, 0).clamp(min=0).gather(-1, best).cumsum(-1)
            before = torch.nn.functional.pad(sums, (1, 0))[..., :-1]
            chosen = torch.zeros_like(forced).scatter(-1, best, before < wanted * sums[..., -1:])
        at_least = torch.zeros_like(forced)
        at_least.scatter_(-1, best[..., :k], True)
        chosen = allowed & (forced | chosen | at_least)
    # forced ones first, then by score: cut at what the rule and the list's length allow
    pushed = torch.sort(forced.gather(-1, best).int(), dim=-1, descending=True, stable=True)
    order = best.gather(-1, pushed.indices)
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(blocks).expand_as(order))
    within = (place < most[..., None]) if rule == "topk" else torch.ones_like(forced)
    chosen = chosen & (within | forced)
    kept = chosen.gather(-1, order)
    kept &= kept.cumsum(-1) <= kmax
    return torch.zeros_like(forced).scatter(-1, order, kept)


@torch.library.custom_op("mimo::select_blocks", mutates_args=())
def select_blocks(
    score: Tensor, pos: Tensor, value: Tensor | None, rule: str, k: int, share: float,
    block: int, rows: int, first: int, last: int, merge: str, kmax: int, positive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose blocks: ``score [R, HS, NB]``, ``pos`` int32 [2], ``value [HS]`` -> lists.

    Returns:
        ``idx`` int32 ``[R, HS, kmax]`` and ``cnt`` int32 ``[R, HS]``; HS is 1 with ``merge=rank``.

    Of B sequences: R times B rows, ``pos [B, 2]``.
    """

    def one(at: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
        chosen = choose(
            mine, at, value, rule, k, share, block, rows, first, last, merge, kmax, positive
        )
        return to_lists(chosen, kmax)

    idx, cnt = zip(*batches.several(one, pos, (score,)), strict=True)
    return torch.cat(idx), torch.cat(cnt)


@select_blocks.register_fake
def _(
    score: Tensor, pos: Tensor, value: Any, rule: str, k: int, share: float, block: int, rows: int,
    first: int, last: int, merge: str, kmax: int, positive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lists = (score.shape[0], 1 if merge == "rank" else score.shape[1])
    return (
        score.new_empty((*lists, kmax), dtype=torch.int32),
        score.new_empty(lists, dtype=torch.int32),
    )


class SelectBlocks(OpDef):
    """``select_blocks:t=1,hs=8,cap=65536,block=64,k=16,last=1``; ``rule=threshold``, ``rule=mass``.

    ``kmax`` defaults to what ``topk`` can choose, and to every block for the other rules.
    """

    name = "select_blocks"
    params = (
        Param("t", int, low=1),
        Param("hs", int, low=1),
        Param("cap", int, low=1),
        Param("block", int, low=1),
        Param("k", int, 0),
        Param("rule", str, "topk"),
        Param("share", float, 0.0),
        Param("rows", int, 1, low=1),
        Param("first", int, 0),
        Param("last", int, 0),
        Param("merge", str, "none"),
        Param("kmax", int, 0),
        Param("len", int, 0),
        Param("positive", int, 0),
        Param("b", int, 1, low=1),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse unknown rules and lists that cannot hold what is forced."""
        batches.check_batch(self.name, p)
        if p["rule"] not in RULES or p["merge"] not in ("none", "rank"):
            raise UsageError(
                f"select_blocks: no rule={p['rule']}, merge={p['merge']}",
                remedy=f"rule is one of {', '.join(RULES)}; merge is none or rank",
            )
        if p["merge"] == "rank" and p["rule"] != "topk":
            raise UsageError("select_blocks: merge=rank goes with rule=topk only")
        if p["share"] > 1:
            raise UsageError(f"select_blocks: share={p['share']:g} is above 1")
        if not p["t"] <= int(p["len"] or p["cap"]) <= p["cap"]:
            raise UsageError("select_blocks: len (KV length) must lie between t and cap")
        if p["kmax"] and p["kmax"] < self.most_forced(p):
            raise UsageError(f"select_blocks: kmax={p['kmax']} cannot hold what is forced")

    def most_forced(self, p: Mapping[str, Any]) -> int:
        """Return the largest number of forced blocks."""
        own = blocks_of(p["rows"] - 1, p["block"]) if p["last"] else 0
        most: int = p["first"] + p["last"] + own
        blocks: int = blocks_of(p["cap"], p["block"])
        return min(blocks, most)

    def list_length(self, p: Mapping[str, Any]) -> int:
        """Return kmax, the length of a list."""
        blocks = blocks_of(p["cap"], p["block"])
        if p["kmax"] or p["rule"] != "topk":
            return min(int(p["kmax"]) or blocks, blocks)
        wanted = max(int(p["k"]), math.ceil(float(p["share"]) * blocks), 1)
        return max(min(blocks, wanted), self.most_forced(p))

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return score, pos, value (not for topk), idx, cnt."""
        p = self.full(workload)
        rows = blocks_of(p["t"], p["rows"])
        heads = 1 if p["merge"] == "rank" else p["hs"]
        out = [
            Arg("score", "input", (rows, p["hs"], blocks_of(p["cap"], p["block"])), "float32"),
            Arg("pos", "input", (2,), "int32"),
        ]
        if p["rule"] != "topk":
            out.append(Arg("value", "weight", (p["hs"],), "float32"))
        out += [
            Arg("idx", "output", (rows, heads, self.list_length(p)), "int32"),
            Arg("cnt", "output", (rows, heads), "int32"),
        ]
        return batches.batched(out, p["b"])

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw scores on a coarse grid, so that ties occur; later blocks hold NaN, a few -inf."""
        p = self.full(workload)
        length = int(p["len"] or p["cap"])
        if p["b"] > 1:
            return batches.drawn(self, workload, rng, batches.lengths(length, p))
        arg = self.args(workload)[0]
        low = 0 if p["rule"] == "mass" else -96
        score = (rng.integers(low, 97, arg.shape) / 32).astype(np.float32)
        if p["rule"] != "mass":
            score[rng.random(arg.shape) < 0.02] = -np.inf
        score[..., blocks_of(length, p["block"]) :] = np.nan
        out: dict[str, Array] = {
            "score": score,
            "pos": np.array([length - p["t"], p["t"]], np.int32),
        }
        if p["rule"] != "topk":
            out["value"] = rng.uniform(0.3, 0.9, p["hs"]).astype(np.float32)
        return out

    def _choose(self, workload: Workload, inputs: Mapping[str, Array], nudge: float) -> Tensor:
        p = self.full(workload)
        value = None
        if p["rule"] != "topk":
            value = torch.from_numpy(inputs["value"]).double() * (1 + nudge)
        return choose(
            torch.from_numpy(inputs["score"]).double(), torch.from_numpy(inputs["pos"]), value,
            p["rule"], p["k"], p["share"], p["block"], p["rows"], p["first"], p["last"],
            p["merge"], self.list_length(p), bool(p["positive"]),
        )  # fmt: skip

    @batches.one_by_one
    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Choose by float64 sums; comparisons of float32 scores are exact."""
        idx, cnt = to_lists(
            self._choose(workload, inputs, 0.0), self.list_length(self.full(workload))
        )
        return {"idx": idx.numpy(), "cnt": cnt.numpy()}

    @batches.one_by_one
    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Exact, but for cuts of ``mass`` that rounding may move.

        A float32 sum in `SUMS` lanes of n scores that are not negative is off by at most
        ``(n / SUMS + 20) U32`` of it (20 additions join the lanes), and so is the total. Of the choices when
        ``value`` moves by both, the smaller is part of the greater, and an honest one lies between them: so
        does its count, and each of its ascending ids as far as the smaller one's reach.
        """
        p = self.full(workload)
        if p["rule"] != "mass":
            return {name: np.zeros(expected[name].shape) for name in ("idx", "cnt")}
        nudge = 2 * (-(-blocks_of(p["cap"], p["block"]) // SUMS) + 22) * U32
        kmax = self.list_length(p)
        (few, least), (many, most) = (
            to_lists(self._choose(workload, inputs, sign * nudge), kmax) for sign in (-1, 1)
        )
        idx, cnt = (torch.from_numpy(np.asarray(expected[name])) for name in ("idx", "cnt"))
        place = torch.arange(kmax)
        sure, there = place < least[..., None], place < most[..., None]
        # behind the smaller choice stands -1 or an id up to the greater one's last
        high = torch.where(sure, few, many.amax(-1, keepdim=True))
        low = torch.where(sure, many, -1)
        free = torch.where(there, torch.maximum(high - idx, idx - low), 0)
        same = (least == most)[..., None]
        return {
            "idx": torch.where(same, 0, free).double().numpy(),
            "cnt": torch.maximum(most - cnt, cnt - least).double().numpy(),
        }

    def counts(self, workload: Workload) -> Counts:
        """Scores are read and compared once, lists are written once."""
        p = self.full(workload)
        if p["b"] > 1:
            lengths = batches.lengths(int(p["len"] or p["cap"]), p)
            return batches.counted(self, workload, lengths)
        args = {a.name: math.prod(a.shape) for a in self.args(workload)}
        visible = args["score"] * min(1.0, (p["len"] or p["cap"]) / p["cap"])
        return Counts({"int_op": visible}, {"dram": 4.0 * (visible + args["idx"] + args["cnt"])})
