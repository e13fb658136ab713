"""Attention to all of a KV cache, and what each block of keys got: the oracle of HySparse (arXiv 2602.03560).

`cached_attention` of a full cache, and ``score_keys kind=oracle agg=max`` of the same queries and keys: the
largest exact probability in each block of ``block`` positions, then the largest over the heads that share a
KV head. One op, because the softmax that attention computes is all that the scores need. There is no sink:
probabilities are those of keys. Blocks behind a token's own, and all blocks of padding tokens, have -inf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.ops.cached_attention import CachedAttention, attend
from mimo_compile.ir.ops.score_keys import ScoreKeys, key_scores
from mimo_compile.ir.workload import Workload


@torch.library.custom_op("mimo::oracle_attention", mutates_args=())
def oracle_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend and score.

    Args:
        q: ``[T, H, D]``.
        k_cache: ``[cap, KV, D]``.
        v_cache: ``[cap, KV, DV]``.
        pos: int32 [2], start and valid.
        block: Positions in a block.
        scale: Factor on q.k.

    Returns:
        ``out [T, H, DV]`` and ``score [T, KV, ceil(cap / block)]``.
    """
    out = attend(q, k_cache, v_cache, pos, None, scale, 0)
    return out, key_scores(q, k_cache, pos, None, None, "oracle", "max", block, 0, scale)


@oracle_attention.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    cap, kv, _ = k_cache.shape
    out = q.new_empty((q.shape[0], q.shape[1], v_cache.shape[2]))
    return out, q.new_empty((q.shape[0], kv, blocks_of(cap, block)))


class OracleAttention(OpDef):
    """``oracle_attention:t=1,h=32,kv=8,d=128,dv=128,cap=65536,block=64``.

    ``len`` is the KV length at which kernels are measured.
    """

    name = "oracle_attention"
    params = (
        Param("t", int, low=1),
        Param("h", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("dv", int, low=1),
        Param("cap", int, low=1),
        Param("block", int, low=1),
        Param("scale", float, 0.0),
        Param("len", int, 0),
        Param("c", str, "f32"),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse heads that do not group, lengths beyond the cache, caches that do not keep single keys."""
        parse_cache_format(p["c"])
        if p["h"] % p["kv"]:
            raise UsageError(f"oracle_attention: h={p['h']} is not a multiple of kv={p['kv']}")
        if not p["t"] <= self.kv_length(p) <= p["cap"]:
            raise UsageError("oracle_attention: len (KV length) must lie between t and cap")

    def kv_length(self, p: Mapping[str, Any]) -> int:
        """Return the KV length (including the new tokens) that inputs are made for."""
        return int(p["len"] or p["cap"])

    def softmax_scale(self, p: Mapping[str, Any]) -> float:
        """Return the factor on q.k: the given one or ``1/sqrt(d)``."""
        return float(p["scale"] or p["d"] ** -0.5)

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return q, pos, k_cache, v_cache, out, score."""
        p = self.full(workload)
        stored = parse_cache_format(p["c"]).dtype
        scored = (p["t"], p["kv"], blocks_of(p["cap"], p["block"]))
        return (
            Arg("q", "input", (p["t"], p["h"], p["d"]), "float32"),
            Arg("pos", "input", (2,), "int32"),
            Arg("k_cache", "state", (p["cap"], p["kv"], p["d"]), stored),
            Arg("v_cache", "state", (p["cap"], p["kv"], p["dv"]), stored),
            Arg("out", "output", (p["t"], p["h"], p["dv"]), "float32"),
            Arg("score", "output", scored, "float32"),
        )

    def parts(self, workload: Workload, cap: int = 0) -> tuple[Workload, Workload]:
        """Return the workloads of both halves, `cached_attention` and `score_keys`, of so many slots."""
        p = self.full(workload)
        shared = {n: p[n] for n in ("t", "h", "kv", "d", "scale", "c")}
        shared |= {"cap": cap or p["cap"], "len": 0 if cap else p["len"]}
        dense = CachedAttention().workload(**shared, dv=p["dv"])
        return dense, ScoreKeys().workload(**shared, kind="oracle", agg="max", block=p["block"])

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw those of `cached_attention`; slots beyond the length hold NaN."""
        return CachedAttention().make_inputs(self.parts(workload)[0], rng)

    def _held(self, inputs: Mapping[str, Array]) -> tuple[int, dict[str, Array]]:
        """Return how many slots hold positions, and the inputs with caches of these alone.

        A full cache never wraps, and float64 over all of a long one is memory for nothing.
        """
        held = max(1, int(inputs["pos"].sum()), len(inputs["q"]))
        caches = {n: inputs[n][:held] for n in ("k_cache", "v_cache")}
        return held, {**inputs, **caches}

    def _scored(self, workload: Workload, score: Array, rest: float) -> Array:
        """Return scores of all blocks: ``rest`` behind those that hold positions."""
        blocks = self.args(workload)[-1].shape[2]
        wide = np.pad(score, ((0, 0), (0, 0), (0, blocks - score.shape[2])), constant_values=rest)
        return np.asarray(wide)

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64."""
        held, given = self._held(inputs)
        dense, scored = self.parts(workload, held)
        score = ScoreKeys().reference(scored, given)["score"]
        out = CachedAttention().reference(dense, given)["out"]
        return {"out": out, "score": self._scored(workload, score, -np.inf)}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Allow what both halves allow: scores of 16-bit keys are exact, whatever weights are rounded to."""
        held, given = self._held(inputs)
        dense, scored = self.parts(workload, held)
        blocks = blocks_of(held, self.full(workload)["block"])
        score = {"score": expected["score"][..., :blocks]}
        allowed = ScoreKeys().bound(scored, given, score)["score"]
        out = CachedAttention().bound(dense, given, {"out": expected["out"]})["out"]
        return {"out": out, "score": self._scored(workload, allowed, 0.0)}

    def counts(self, workload: Workload) -> Counts:
        """Those of attention; a comparison for each logit, and scores are written."""
        p = self.full(workload)
        found = CachedAttention().counts(self.parts(workload)[0])
        length = self.kv_length(p)
        work = float(p["t"]) * p["h"] * (length - (p["t"] - 1) / 2)
        written = 4.0 * p["t"] * p["kv"] * blocks_of(length, p["block"])
        return found + Counts({"int_op": work}, {"dram": written})
