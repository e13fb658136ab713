"""Attention of T new tokens over a KV cache: GQA, causal, optional sliding window and learnable sink.

The cache holds position p in slot ``p % cap``; a full cache never wraps, a sliding-window layer keeps a
ring. New keys and values are appended before the call (op `kv_append`). ``pos = [start, valid]``: token i
of the call stands at position ``start + i``; tokens ``i >= valid`` are padding and give zeros. Values that
were appended must be finite: a kernel may multiply what one of several tokens does not see by zero.

The sink is a phantom key with logit ``sink[h]`` and zero value: it only adds to the softmax denominator.

Caches are float32, or (``c=bf16``) bfloat16, or (``c=e4m3``) 8-bit floats with a power of two for each row
(`ir.float8`), whose values are exact operands of float32 arithmetic, or (``c=i8``, ``i4``, ``i2``, ``i1``)
groups of few bits with a float32 tail: see `ir.kv_groups`. In torch these have an op of their own,
``grouped_attention``, since a schema fixes the tensors that an op takes; both are workloads of
`CachedAttention`.

With ``b`` sequences each has T tokens, a cache and a ``pos`` of its own: see `batches`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir import kv_groups, kv_rounding
from mimo_compile.ir.caches import SCALED, check_cache_format, check_cache_order, single_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops import batches, edge_keys, int8_attention, pages, pooled
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.numerics import U32, roundings
from mimo_compile.ir.workload import Workload


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pos: Tensor,
    sink: Tensor | None,
    scale: float,
    window: int,
    disturb: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Plain masked softmax attention; see `cached_attention` for shapes.

    ``disturb`` changes the weights of the keys ``[H, T, cap]``, relative to the largest logit; their sums are
    those of the changed ones.
    """
    cap = k_cache.shape[0]
    start, valid = int(pos[0]), int(pos[1])
    last = start + valid - 1
    slot = torch.arange(cap)
    key_pos = last - (last - slot) % cap  # the newest position that lives in each slot
    query_pos = start + torch.arange(q.shape[0])
    seen = (key_pos[None] <= query_pos[:, None]) & (key_pos[None] >= 0)
    if window:
        seen &= key_pos[None] > query_pos[:, None] - window
    # Slots never written may hold anything, NaN too: they must not reach the sums.
    v = torch.where((key_pos >= 0)[:, None, None], v_cache, 0)
    return attend_seen(q, k_cache, v, seen, valid, sink, scale, disturb)


def attend_seen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    valid: int,
    sink: Tensor | None,
    scale: float,
    disturb: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Softmax attention under a mask.

    Args:
        q: ``[T, H, D]``.
        k: ``[S, KV, D]``.
        v: ``[S, KV, DV]``, finite.
        seen: ``[T, S]`` bool.
        valid: Queries that count; the others give zeros.
        sink: Logits ``[H]`` of phantom keys.
        scale: Factor on q.k.
        disturb: As for `attend`.
    """
    t, heads, _ = q.shape
    keys, kv_heads = k.shape[0], k.shape[1]
    group = heads // kv_heads
    k = k.to(q.dtype).repeat_interleave(group, dim=1)
    v = v.to(q.dtype).repeat_interleave(group, 1)
    logits = torch.einsum("thd,shd->hts", q, k) * scale
    logits = logits.masked_fill(~seen[None], -math.inf)
    if sink is not None:
        column = sink.to(q.dtype)[:, None, None].expand(heads, t, 1)
        logits = torch.cat([logits, column], dim=-1)
    if disturb is None:
        weights = torch.softmax(logits, dim=-1)[..., :keys]
    else:
        logits = torch.exp(logits - logits.amax(-1, keepdim=True))
        weights = disturb(logits[..., :keys])
        total = weights.sum(-1, keepdim=True) + logits[..., keys:].sum(-1, keepdim=True)
        weights = weights / total
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
    c: str = "",
) -> Tensor:
    """Attend: ``q [T, H, D]``, caches ``[cap, KV, D/DV]``, ``pos`` int32 [2] -> ``[T, H, DV]``.

    Of B sequences: ``q [B * T, H, D]``, caches ``[B, cap, KV, D/DV]``, ``pos [B, 2]`` -> ``[B * T, H, DV]``.
    ``c`` names the caches' format where their type does not, as for `kv_append`.
    """

    def one(at: Tensor, mine: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attend(mine, keys, values, at, sink, scale, window)

    return torch.cat(batches.several(one, pos, (q,), (k_cache, v_cache)))


@cached_attention.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor, sink: Any, scale: float, window: int,
    c: str = "",
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[1], v_cache.shape[-1]))


@torch.library.custom_op("mimo::grouped_attention", mutates_args=())
def grouped_attention(
    q: Tensor, k_cache: Tensor, k_scale: Tensor, k_tail: Tensor, v_cache: Tensor, v_scale: Tensor,
    v_tail: Tensor, pos: Tensor, sink: Tensor | None, scale: float, c: str, pages: Tensor | None = None,
    cap: int = 0, page: int = 0,
) -> Tensor:  # fmt: skip
    """Attend over a cache in groups (`ir.kv_groups`, format ``c``): ``q [T, H, D]`` -> ``[T, H, DV]``.

    Several sequences: as for `cached_attention`; pages of a pool: as for `kv_append_groups`.
    """

    def one(at: Tensor, mine: Tensor, *held: Tensor) -> Tensor:
        states, fmt = dict(zip(kv_groups.STATES, held, strict=True)), kv_groups.GROUPED[c]
        k, v, seen = kv_groups.visible(states, at, mine.shape[0], fmt, mine.dtype)
        return attend_seen(mine, k, v, seen, int(at[1]), sink, scale)

    held = [k_cache, k_scale, k_tail, v_cache, v_scale, v_tail]
    if pages is not None:
        held = pooled.of_each(pos, held, kv_groups.spans(c), pages, page, cap)
    return torch.cat(batches.several(one, pos, (q,), held))


@grouped_attention.register_fake
def _(
    q: Tensor, k_cache: Tensor, k_scale: Tensor, k_tail: Tensor, v_cache: Tensor, v_scale: Tensor,
    v_tail: Tensor, pos: Tensor, sink: Any, scale: float, c: str, pages: Any = None, cap: int = 0,
    page: int = 0,
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[1], v_cache.shape[-1]))


class CachedAttention(OpDef):
    """``cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=4096,len=1024``.

    ``len`` is the KV length at which kernels are measured. Those of the ``b`` sequences of a batch go from it
    down to its half, so that each must go by its own; with ``even=1`` all are equal. With ``page`` and
    ``pool`` caches are pages of a pool: see `pages`.
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
        Param("c", str, "f32"),
        Param("tail", int, 0),
        Param("arith", str, "float"),
        Param("lay", str, ""),
        Param("b", int, 1, low=1),
        Param("even", int, 0),
        *pages.PARAMS,
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse heads that do not group, rings too small for the window, unknown cache formats."""
        check_cache_format(p["c"])
        check_cache_order(self.name, p)
        int8_attention.check_arith(p)
        batches.check_batch(self.name, p)
        if p["h"] % p["kv"]:
            raise UsageError(f"cached_attention: h={p['h']} is not a multiple of kv={p['kv']}")
        if p["window"] and p["cap"] < p["window"] + p["t"] - 1:
            raise UsageError("cached_attention: cap must be at least window + t - 1")
        if p["len"] and p["len"] < p["t"]:
            raise UsageError("cached_attention: len (KV length) is below t")
        if not p["window"] and p["len"] > p["cap"]:
            raise UsageError("cached_attention: len is above cap, and only a window may wrap")
        kv_groups.check_groups(self.name, p)
        pages.check_pages(self.name, p, ring=p["window"])

    def kv_length(self, p: Mapping[str, Any]) -> int:
        """Return the KV length (including the new tokens) that inputs are made for."""
        return int(p["len"] or (p["cap"] if not p["window"] else p["cap"] + p["window"] // 2))

    def lengths(self, p: Mapping[str, Any]) -> list[int]:
        """Return the KV length of each sequence that inputs are made for, the longest first."""
        return batches.lengths(self.kv_length(p), p)

    def softmax_scale(self, p: Mapping[str, Any]) -> float:
        """Return the factor on q.k: the given one or ``1/sqrt(d)``."""
        return float(p["scale"] or p["d"] ** -0.5)

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return q, pos, sink, the caches' arrays, out."""
        p = self.full(workload)
        out = [
            Arg("q", "input", (p["t"], p["h"], p["d"]), "float32"),
            Arg("pos", "input", (2,), "int32"),
        ]
        if p["sink"]:
            out.append(Arg("sink", "weight", (p["h"],), "float32"))
        if fmt := kv_groups.grouped(p):
            states = kv_groups.states_of(p, fmt, mutated=False)
        else:
            stored = single_format(p["c"]).dtype
            states = (
                Arg("k_cache", "state", (p["cap"], p["kv"], p["d"]), stored),
                Arg("v_cache", "state", (p["cap"], p["kv"], p["dv"]), stored),
            )
        out += [*states, Arg("out", "output", (p["t"], p["h"], p["dv"]), "float32")]
        if pages.paged(p):
            return pages.paged_args(out, p)
        return batches.batched(out, p["b"])

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw normal q, k, v; what no query sees holds NaN, which must not reach the output.

        Values at the ends of what queries see are heavy where kernels may round; see `edge_keys`.
        """
        p = self.full(workload)
        if p["b"] > 1 or pages.paged(p):
            return batches.drawn(self, workload, rng, self.lengths(p))
        length = self.kv_length(p)
        if fmt := kv_groups.grouped(p):
            out = {
                a.name: rng.standard_normal(a.shape, dtype=np.float32)
                for a in self.args(workload)
                if a.name in ("q", "sink")
            }
            k, v = (
                rng.standard_normal((length, p["kv"], n), dtype=np.float32)
                for n in (p["d"], p["dv"])
            )
            edges = edge_keys.edges_of_range(length - p["t"], p["t"], 0, fmt.group)
            v[edges] *= edge_keys.weights_of_edges(p["kv"], p["dv"], length, rng, fmt.columns)
            out |= kv_groups.encoded(
                k, v, length - p["t"], p["cap"], kv_groups.tail_of(p, fmt), fmt
            )
            return out | {"pos": np.array([length - p["t"], p["t"]], np.int32)}
        out = {
            a.name: rng.standard_normal(a.shape, dtype=np.float32)
            for a in self.args(workload)
            if a.role != "output" and a.name != "pos"
        }
        out["pos"] = np.array([length - p["t"], p["t"]], np.int32)
        if length < p["cap"]:
            out["k_cache"][length:] = np.nan
            out["v_cache"][length:] = np.nan
        # kernels over 8-bit floats are exact: heavy values would only widen their bound
        if single_format(p["c"]).unit and p["c"] not in SCALED and p["arith"] == "float":
            edges = edge_keys.edges_of_range(length - p["t"], p["t"], p["window"])
            slots = [at % p["cap"] for at in edges if at >= length - p["cap"]]
            seen = min(length, p["window"] or length)
            out["v_cache"][slots] *= edge_keys.weights_of_edges(p["kv"], p["dv"], seen, rng)
        for name in ("k_cache", "v_cache"):
            out[name] = single_format(p["c"]).encode(out[name])
        return out

    def _attend(
        self,
        workload: Workload,
        inputs: Mapping[str, Array],
        dtype: torch.dtype,
        disturb: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        p = self.full(workload)
        q = torch.from_numpy(inputs["q"]).to(dtype)
        q = q if disturb is None else disturb(q)
        sink = torch.from_numpy(inputs["sink"]).to(dtype) if p["sink"] else None
        pos = torch.from_numpy(inputs["pos"])
        scale = self.softmax_scale(p)
        if fmt := kv_groups.grouped(p):
            states = {n: torch.from_numpy(inputs[n]) for n in kv_groups.STATES}
            k, v, seen = kv_groups.visible(states, pos, p["t"], fmt, dtype)
            return attend_seen(q, k, v, seen, int(pos[1]), sink, scale, disturb)
        stored = single_format(p["c"])
        k, v = (
            torch.from_numpy(stored.decode(inputs[n])).to(dtype) for n in ("k_cache", "v_cache")
        )
        return attend(q, k, v, pos, sink, scale, p["window"], disturb)

    @batches.one_by_one
    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64."""
        p = self.full(workload)
        if p["arith"] != "float":
            return {"out": int8_attention.attended(p, self.softmax_scale(p), inputs).out.numpy()}
        return {"out": self._attend(workload, inputs, torch.float64).numpy()}

    @batches.one_by_one
    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Allow what roundings of a kernel's arithmetic do, head by head.

        Caches of float32 and of 8-bit floats: `exact_bound`. 16-bit caches: kernels may round q and the
        weights to bfloat16, by at most ``u = 2**-8`` relative each. Weights ``w (1 + e)``, which are summed
        as they are rounded, move an output by ``sum_j p_j e_j (v_j - o)`` at first order, so by at most ``u
        sum_j p_j |v_j - o|``, under ``2**-7 max|V|``; a rounded q moves logit j by ``D_j = scale sum_i q_i
        e_i k_ji`` and the output by ``sum_j p_j D_j (v_j - o)``. Over long contexts both are so far above
        what roundings do, whose signs do not conspire, that the worst case would let a kernel miss keys. So
        they allow four times the largest error of runs in which each factor ``1 + e`` is drawn anew from {1 -
        u, 1 + u} (see `roundings`), 2.4 times as far from 1, in the mean square, as roundings are. Caches in
        groups: see `kv_rounding.allowed`.
        """
        p = self.full(workload)
        if p["arith"] != "float":
            return {"out": int8_attention.allowed(p, self.softmax_scale(p), inputs)}
        out = self.exact_bound(workload, inputs, expected)["out"]
        if fmt := kv_groups.grouped(p):
            return {
                "out": out
                + kv_rounding.allowed(inputs, self.softmax_scale(p), expected["out"], fmt)
            }
        unit = single_format(p["c"]).unit
        if unit and p["c"] not in SCALED:
            for rounded in roundings(unit):
                seen = self._attend(workload, inputs, torch.float32, rounded).double().numpy()
                error = edge_keys.largest(np.abs(seen - expected["out"]), p["kv"])
                out = np.maximum(out, 4 * error)
        return {"out": out}

    @batches.one_by_one
    def exact_bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Allow eight times the largest error of plain float32 attention, by the parts of `edge_keys`.

        Online softmax in blocks rounds differently from the plain form but not worse; a key that is
        missed or seen too much changes the result by far more.
        """
        plain = self._attend(workload, inputs, torch.float32).double().numpy()
        p = self.full(workload)
        fmt = kv_groups.grouped(p)
        if fmt is not None:
            values = kv_rounding.largest_values(inputs, fmt)[None]
        else:
            values = np.abs(single_format(p["c"]).decode(inputs["v_cache"]))
        columns = 1 if fmt is None else fmt.columns
        error = edge_keys.largest(np.abs(plain - expected["out"]), p["kv"], columns)
        vmax = edge_keys.largest(values, p["kv"], columns)
        room = 32 * U32 * np.repeat(vmax, p["h"] // p["kv"], axis=1)
        return {"out": np.broadcast_to(8 * error + room, expected["out"].shape).copy()}

    def counts(self, workload: Workload) -> Counts:
        """Visible keys and values once for each KV head; two multiply-adds per element and query head."""
        p = self.full(workload)
        if pages.paged(p):
            lengths = self.lengths(p)
            each = (self.counts(batches.alone(workload, len=n)) for n in lengths)
            if fmt := kv_groups.grouped(p):
                numbers = fmt.bytes_of(p["d"], keys=True) + fmt.bytes_of(p["dv"], keys=False)
            else:
                numbers = single_format(p["c"]).bytes * (p["d"] + p["dv"])
            numbers *= p["kv"]
            return pages.counted(p, sum(each, Counts()), lengths, numbers)
        if p["b"] > 1:
            return batches.counted(self, workload, self.lengths(p))
        length = self.kv_length(p)
        per_query = min(length, p["window"] or length)
        read = min(length, (p["window"] + p["t"] - 1) if p["window"] else length)
        work = float(p["t"]) * p["h"] * (per_query - (0 if p["window"] else (p["t"] - 1) / 2))
        if fmt := kv_groups.grouped(p):
            caches = kv_groups.read_bytes(p, length, fmt)
        else:
            caches = single_format(p["c"]).bytes * read * p["kv"] * (p["d"] + p["dv"])
        return Counts(
            {**int8_attention.products(p, work), "exp_f32": work},
            {"dram": caches + 4.0 * p["t"] * p["h"] * (p["d"] + p["dv"])},
        )
