"""Attention of T new tokens over a KV cache: GQA, causal, optional sliding window and learnable sink.

The cache holds position p in slot ``p % cap``; a full cache never wraps, a sliding-window layer keeps a
ring. New keys and values are appended before the call (op `kv_append`). ``pos = [start, valid]``: token i
of the call stands at position ``start + i``; tokens ``i >= valid`` are padding and give zeros.

The sink is a phantom key with logit ``sink[h]`` and zero value: it only adds to the softmax denominator.
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
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.workload import Workload


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pos: Tensor,
    sink: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    """Plain masked softmax attention; see `cached_attention` for shapes."""
    t, heads, _ = q.shape
    cap, kv_heads = k_cache.shape[0], k_cache.shape[1]
    start, valid = int(pos[0]), int(pos[1])
    last = start + valid - 1
    slot = torch.arange(cap)
    key_pos = last - (last - slot) % cap  # the newest position that lives in each slot
    query_pos = start + torch.arange(t)
    seen = (key_pos[None] <= query_pos[:, None]) & (key_pos[None] >= 0)
    if window:
        seen &= key_pos[None] > query_pos[:, None] - window
    group = heads // kv_heads
    k = k_cache.to(q.dtype).repeat_interleave(group, dim=1)
    # Slots never written may hold anything, NaN too: they must not reach the sums.
    v = (
        torch.where((key_pos >= 0)[:, None, None], v_cache, 0)
        .to(q.dtype)
        .repeat_interleave(group, 1)
    )
    logits = torch.einsum("thd,shd->hts", q, k) * scale
    logits = logits.masked_fill(~seen[None], -math.inf)
    if sink is not None:
        column = sink.to(q.dtype)[:, None, None].expand(heads, t, 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :cap]
    out = torch.einsum("hts,shd->thd", weights, v)
    out[valid:] = 0
    return out


@torch.library.custom_op("mimo::cached_attention", mutates_args=())
def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pos: Tensor,
    sink: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    """Attend: ``q [T, H, D]``, caches ``[cap, KV, D/DV]``, ``pos`` int32 [2] -> ``[T, H, DV]``."""
    return attend(q, k_cache, v_cache, pos, sink, scale, window)


@cached_attention.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor, sink: Any, scale: float, window: int
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v_cache.shape[2]))


class CachedAttention(OpDef):
    """``cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=4096,len=1024``.

    ``len`` is the KV length at which kernels are measured.
    """

    name = "cached_attention"
    params = (
        Param("t", int, low=1),
        Param("h", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("dv", int, low=1),
        Param("cap", int, low=1),
        Param("window", int, 0),
        Param("sink", int, 0),
        Param("scale", float, 0.0),
        Param("len", int, 0),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse heads that do not group, rings too small for the window."""
        if p["h"] % p["kv"]:
            raise UsageError(f"cached_attention: h={p['h']} is not a multiple of kv={p['kv']}")
        if p["window"] and p["cap"] < p["window"] + p["t"] - 1:
            raise UsageError("cached_attention: cap must be at least window + t - 1")
        if p["len"] and p["len"] < p["t"]:
            raise UsageError("cached_attention: len (KV length) is below t")
        if not p["window"] and p["len"] > p["cap"]:
            raise UsageError("cached_attention: len is above cap, and only a window may wrap")

    def kv_length(self, p: Mapping[str, Any]) -> int:
        """Return the KV length (including the new tokens) that inputs are made for."""
        return int(p["len"] or (p["cap"] if not p["window"] else p["cap"] + p["window"] // 2))

    def softmax_scale(self, p: Mapping[str, Any]) -> float:
        """Return the factor on q.k: the given one or ``1/sqrt(d)``."""
        return float(p["scale"] or p["d"] ** -0.5)

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return q, pos, sink, k_cache, v_cache, out."""
        p = self.full(workload)
        out = [
            Arg("q", "input", (p["t"], p["h"], p["d"]), "float32"),
            Arg("pos", "input", (2,), "int32"),
        ]
        if p["sink"]:
            out.append(Arg("sink", "weight", (p["h"],), "float32"))
        return (
            *out,
            Arg("k_cache", "state", (p["cap"], p["kv"], p["d"]), "float32"),
            Arg("v_cache", "state", (p["cap"], p["kv"], p["dv"]), "float32"),
            Arg("out", "output", (p["t"], p["h"], p["dv"]), "float32"),
        )

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw normal q, k, v; slots beyond the length hold NaN, which must not reach the output."""
        p = self.full(workload)
        length = self.kv_length(p)
        out: dict[str, Array] = {
            a.name: rng.standard_normal(a.shape, dtype=np.float32)
            for a in self.args(workload)
            if a.role != "output" and a.name != "pos"
        }
        out["pos"] = np.array([length - p["t"], p["t"]], np.int32)
        if length < p["cap"]:
            out["k_cache"][length:] = np.nan
            out["v_cache"][length:] = np.nan
        return out

    def _attend(
        self, workload: Workload, inputs: Mapping[str, Array], dtype: torch.dtype
    ) -> Tensor:
        p = self.full(workload)
        q, k, v = (torch.from_numpy(inputs[n]).to(dtype) for n in ("q", "k_cache", "v_cache"))
        sink = torch.from_numpy(inputs["sink"]).to(dtype) if p["sink"] else None
        pos = torch.from_numpy(inputs["pos"])
        return attend(q, k, v, pos, sink, self.softmax_scale(p), p["window"])

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64."""
        return {"out": self._attend(workload, inputs, torch.float64).numpy()}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Allow eight times the largest error of plain float32 attention, head by head.

        Online softmax in blocks rounds differently from the plain form but not worse; a key that is
        missed or seen too much changes the result by far more.
        """
        plain = self._attend(workload, inputs, torch.float32).double().numpy()
        error = np.abs(plain - expected["out"]).max(axis=(0, 2), keepdims=True)
        vmax = np.nanmax(np.abs(inputs["v_cache"]))
        return {"out": np.broadcast_to(8 * error + 32 * U32 * vmax, expected["out"].shape).copy()}

    def counts(self, workload: Workload) -> Counts:
        """Visible keys and values once for each KV head; two multiply-adds per element and query head."""
        p = self.full(workload)
        length = self.kv_length(p)
        per_query = min(length, p["window"] or length)
        read = min(length, (p["window"] + p["t"] - 1) if p["window"] else length)
        work = float(p["t"]) * p["h"] * (per_query - (0 if p["window"] else (p["t"] - 1) / 2))
        return Counts(
            {"fma_f32": work * (p["d"] + p["dv"]), "exp_f32": work},
            {
                "dram": 4.0 * read * p["kv"] * (p["d"] + p["dv"])
                + 4.0 * p["t"] * p["h"] * (p["d"] + p["dv"])
            },
        )
