"""Attention of T new tokens over the listed blocks of a KV cache (see `block_lists`).

Token i of the call stands at position ``start + i`` (``pos = [start, valid]``; tokens ``i >= valid`` are
padding) and sees the keys at positions up to its own that lie in a listed block or among the last
``window`` positions, each once. A list that names every block gives dense attention. The cache never
wraps; where it lies in pages of a pool (see `pages`), lists name positions all the same.
With ``first`` it is a ring behind slots of the first positions, which alone may be listed (`caches.slot_of`).

The sink is a phantom key with logit ``sink[h]`` and zero value. ``lse`` is the logarithm, base e, of the
softmax denominator, the sink's share included. A row that sees nothing gives 0 and an lse of -inf (with a
sink: the sink's logit); padding gives 0 and -inf. Values at positions up to the newest token's must be
finite: a kernel may multiply what one of several tokens does not see yet by zero.

``b`` sequences have caches, lists and a ``pos`` each: see `batches`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import check_cache_order, check_first, parse_cache_format, slot_of
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops import batches, edge_keys, pages, pooled
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.block_lists import blocks_of, check_lists, listed_keys, row_spans, to_lists
from mimo_compile.ir.ops.numerics import U32, roundings
from mimo_compile.ir.workload import Workload


def attend_lists(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor, idx: Tensor, cnt: Tensor,
    sink: Tensor | None, block: int, rows: int, scale: float, window: int, first: int = 0,
    disturb: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gather what each row sees and attend to it, in q's dtype; see `sparse_attention` for shapes.

    ``disturb`` changes q, and the weights of the keys relative to the largest logit, before they are summed.
    """
    t, heads, _ = q.shape
    cap, kv_heads = k_cache.shape[0], k_cache.shape[1]
    lists = idx.shape[1]
    check_lists(idx, cnt, first // block if first else blocks_of(cap, block))
    out = q.new_zeros((t, heads, v_cache.shape[2]))
    lse = q.new_full((t, heads), -math.inf)
    start, valid = int(pos[0]), int(pos[1])
    q = q if disturb is None else disturb(q)
    groups = max(lists, kv_heads)  # query heads that share both their list and their keys
    per = heads // groups
    for i in range(min(t, valid)):
        for g in range(groups):
            row, mine = (i // rows, g * lists // groups), slice(g * per, (g + 1) * per)
            keys = listed_keys(idx[row][: int(cnt[row])], start + i, block, window)
            slots = slot_of(keys, cap, first)
            kv = g * kv_heads // groups
            logits = q[i, mine] @ k_cache[slots, kv].to(q.dtype).T * scale
            if sink is not None:  # the phantom key stands first; its value is left out below
                logits = torch.cat([sink[mine].to(q.dtype)[:, None], logits], 1)
            if logits.shape[1] == 0:
                continue
            top = logits.amax(1, keepdim=True)
            top = torch.where(top == -math.inf, 0, top)  # a sink that is -inf, and nothing else
            weights = torch.exp(logits - top)
            phantom, weights = weights.split([logits.shape[1] - len(slots), len(slots)], 1)
            weights = weights if disturb is None else disturb(weights)
            total = weights.sum(1, keepdim=True) + phantom.sum(1, keepdim=True)
            values = weights @ v_cache[slots, kv].to(q.dtype)
            out[i, mine] = torch.where(total == 0, 0, values / total)
            lse[i, mine] = (top + total.log())[:, 0]
    return out, lse


@torch.library.custom_op("mimo::sparse_attention", mutates_args=())
def sparse_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor, idx: Tensor, cnt: Tensor,
    sink: Tensor | None, block: int, rows: int, scale: float, window: int, first: int = 0,
    table: Tensor | None = None, cap: int = 0, page: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to listed blocks.

    Args:
        q: ``[T, H, D]``.
        k_cache: ``[cap, KV, D]``.
        v_cache: ``[cap, KV, DV]``.
        pos: int32 [2], start and valid.
        idx: int32 ``[ceil(T / rows), HS, kmax]``, HS one of 1, KV, H.
        cnt: int32 ``[ceil(T / rows), HS]``.
        sink: ``[H]`` or None.
        block: Positions in a block.
        rows: Tokens that share a list.
        scale: Factor on q.k.
        window: Last positions that are always seen; 0: none.
        first: Positions that stay, where the rest of the cache is a ring; 0: it is none.
        table: Block tables, int32 ``[B, width]``, of pages that all caches lie in; or None.
        cap: With them, most positions of a sequence.
        page: Likewise, positions in a page.

    Returns:
        ``out [T, H, DV]`` and ``lse [T, H]`` (base e).

    Of B sequences: rows of one after the other, ``pos [B, 2]``, caches ``[B, cap, KV, D/DV]``; in pages
    ``[slots, KV, D/DV]``.
    """
    held = [k_cache, v_cache]
    if table is not None:
        held = pooled.of_each(pos, held, (1, 1), table, page, cap)

    def one(
        at: Tensor, mine: Tensor, ids: Tensor, counts: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        return attend_lists(
            mine, keys, values, at, ids, counts, sink, block, rows, scale, window, first
        )

    parts = batches.several(one, pos, (q, idx, cnt), held)
    out, lse = zip(*parts, strict=True)
    return torch.cat(out), torch.cat(lse)


@sparse_attention.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pos: Tensor, idx: Tensor, cnt: Tensor, sink: Any,
    block: int, rows: int, scale: float, window: int, first: int = 0, table: Any = None, cap: int = 0,
    page: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[1], v_cache.shape[-1])), q.new_empty(q.shape[:2])


class SparseAttention(OpDef):
    """``sparse_attention:t=1,h=32,kv=8,d=128,dv=128,cap=65536,hs=8,block=16,kmax=256``.

    ``len`` is the KV length at which kernels are measured.
    """

    name = "sparse_attention"
    params = (
        Param("t", int, low=1),
        Param("h", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("dv", int, low=1),
        Param("cap", int, low=1),
        Param("hs", int, low=1),
        Param("block", int, low=1),
        Param("kmax", int, low=1),
        Param("rows", int, 1, low=1),
        Param("window", int, 0),
        Param("sink", int, 0),
        Param("scale", float, 0.0),
        Param("len", int, 0),
        Param("c", str, "f32"),
        Param("lay", str, ""),
        Param("first", int, 0),
        Param("b", int, 1, low=1),
        *pages.PARAMS,
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse heads that do not group, lengths beyond the cache, pages of a ring."""
        parse_cache_format(p["c"])
        check_cache_order(self.name, p)
        if p["h"] % p["kv"]:
            raise UsageError(f"sparse_attention: h={p['h']} is not a multiple of kv={p['kv']}")
        if p["hs"] not in (1, p["kv"], p["h"]):
            raise UsageError(f"sparse_attention: hs={p['hs']} is none of 1, kv and h")
        check_first(self.name, p)
        batches.check_batch(self.name, p)
        pages.check_pages(self.name, p, ring=p["first"])
        length, ring = self.kv_length(p), p["cap"] - p["first"]
        if length < p["t"] or (length > p["cap"] and not p["first"]):
            raise UsageError("sparse_attention: len (KV length) must lie between t and cap")
        if p["first"] and (p["block"] > p["first"] or p["window"] + p["t"] - 1 > ring):
            raise UsageError(
                "sparse_attention: first must hold a block, and the ring behind it window + t - 1"
            )

    def kv_length(self, p: Mapping[str, Any]) -> int:
        """Return the KV length (including the new tokens) that inputs are made for."""
        return int(p["len"] or p["cap"] + (p["cap"] - p["first"]) // 2 * bool(p["first"]))

    def softmax_scale(self, p: Mapping[str, Any]) -> float:
        """Return the factor on q.k: the given one or ``1/sqrt(d)``."""
        return float(p["scale"] or p["d"] ** -0.5)

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return q, pos, idx, cnt, sink, k_cache, v_cache, out, lse."""
        p = self.full(workload)
        stored = parse_cache_format(p["c"]).dtype
        lists = (blocks_of(p["t"], p["rows"]), p["hs"])
        out = [
            Arg("q", "input", (p["t"], p["h"], p["d"]), "float32"),
            Arg("pos", "input", (2,), "int32"),
            Arg("idx", "input", (*lists, p["kmax"]), "int32"),
            Arg("cnt", "input", lists, "int32"),
        ]
        if p["sink"]:
            out.append(Arg("sink", "weight", (p["h"],), "float32"))
        out += [
            Arg("k_cache", "state", (p["cap"], p["kv"], p["d"]), stored),
            Arg("v_cache", "state", (p["cap"], p["kv"], p["dv"]), stored),
            Arg("out", "output", (p["t"], p["h"], p["dv"]), "float32"),
            Arg("lse", "output", (p["t"], p["h"]), "float32"),
        ]
        return pages.paged_args(out, p) if pages.paged(p) else batches.batched(out, p["b"])

    def lengths(self, p: Mapping[str, Any]) -> list[int]:
        """Return the KV length of each sequence that inputs are made for, the longest first."""
        return batches.lengths(self.kv_length(p), p)

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw lists of the row's visible blocks, mostly full; all that no row lists holds NaN.

        Values at the ends of runs that are seen are heavy where kernels may round; see `edge_keys`.
        """
        p = self.full(workload)
        if p["b"] > 1 or pages.paged(p):
            return batches.drawn(self, workload, rng, self.lengths(p))
        length = self.kv_length(p)
        out: dict[str, Array] = {
            a.name: rng.standard_normal(a.shape, dtype=np.float32)
            for a in self.args(workload)
            if a.role != "output" and a.dtype != "int32"
        }
        out["pos"] = np.array([length - p["t"], p["t"]], np.int32)
        rows = blocks_of(p["t"], p["rows"])
        ends = row_spans(length - p["t"], p["t"], rows, p["rows"])[:, 1].tolist()
        blocks = p["first"] // p["block"] if p["first"] else blocks_of(p["cap"], p["block"])
        chosen = np.zeros((rows, p["hs"], blocks), bool)
        for row, end in enumerate(ends):
            seen = min(end // p["block"] + 1, blocks)
            for head in range(p["hs"]):
                # one list falls short of kmax, as those of thresholds do
                most = min(p["kmax"], seen) - int(row == rows - 1 and head == 0 and seen > 1)
                chosen[row, head, rng.permutation(seen)[:most]] = True
        idx, cnt = to_lists(torch.from_numpy(chosen), p["kmax"])
        out["idx"], out["cnt"] = idx.numpy(), cnt.numpy()
        read = np.zeros(max(p["cap"], length), bool)
        listed = np.repeat(chosen.any((0, 1)), p["block"])[: p["cap"]]
        read[: len(listed)] = listed
        read[length:] = False
        if p["window"]:
            read[max(0, length - p["t"] + 1 - p["window"]) : length] = True
        slots = slot_of(np.arange(len(read)), p["cap"], p["first"])
        unread = np.setdiff1d(np.arange(p["cap"]), slots[read])
        out["k_cache"][unread], out["v_cache"][unread] = np.nan, np.nan
        if parse_cache_format(p["c"]).unit:
            self._weigh_edges(p, out, slots, rng)
        for name in ("k_cache", "v_cache"):
            out[name] = parse_cache_format(p["c"]).encode(out[name])
        return out

    def _weigh_edges(
        self, p: Mapping[str, Any], out: dict[str, Array], slots: Array, rng: np.random.Generator
    ) -> None:
        """Make values at the ends of some runs heavy that the first and the last query see."""
        start, valid = out["pos"].tolist()
        queries = [(0, start), (len(out["idx"]) - 1, start + valid - 1)]
        found = edge_keys.edges_of_lists(out["idx"], out["cnt"], queries, p["block"], p["window"])
        seen = min(start + valid, p["kmax"] * p["block"] + p["window"])
        weights = edge_keys.weights_of_edges(p["kv"], p["dv"], seen, rng)
        heavy = np.ones((p["cap"], *weights.shape), np.float32)
        for head, edges in enumerate(found):
            first, last = head * p["kv"] // p["hs"], ((head + 1) * p["kv"] - 1) // p["hs"]
            heavy[slots[edges], first : last + 1] = weights[first : last + 1]
        out["v_cache"] *= heavy

    def _attend(
        self,
        workload: Workload,
        inputs: Mapping[str, Array],
        dtype: torch.dtype,
        disturb: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Array, Array]:
        p = self.full(workload)
        decode = parse_cache_format(p["c"]).decode
        arrays = {n: decode(a) if n.endswith("_cache") else a for n, a in inputs.items()}
        t = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
        out, lse = attend_lists(
            t["q"].to(dtype), t["k_cache"], t["v_cache"], t["pos"], t["idx"], t["cnt"],
            t["sink"] if p["sink"] else None, p["block"], p["rows"], self.softmax_scale(p), p["window"],
            p["first"], disturb,
        )  # fmt: skip
        return out.double().numpy(), lse.double().numpy()

    @batches.one_by_one
    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64."""
        out, lse = self._attend(workload, inputs, torch.float64)
        return {"out": out, "lse": lse}

    @batches.one_by_one
    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Allow eight times the largest error of plain float32, head by head, as `cached_attention` does.

        16-bit caches: as there, kernels may round q and the weights, so four times the largest error of runs
        with random roundings is allowed, too. Where one or two keys are seen, those of q and of the weights
        may cancel in each run; so lse has also what weights alone may move it by, ``2**-8``. An infinite lse
        must be met exactly.
        """
        stored = parse_cache_format(self.full(workload)["c"])
        most = self.exact_bound(workload, inputs, expected)
        for rounded in roundings(stored.unit) if stored.unit else ():
            errors = self._errors(workload, inputs, expected, rounded)
            most = {n: np.maximum(most[n], 4 * errors[n]) for n in most}
        most["lse"] = most["lse"] + stored.unit
        most["lse"] = np.where(np.isfinite(expected["lse"]), most["lse"], 0.0)
        return most

    @batches.one_by_one
    def exact_bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Bound arithmetic that rounds neither q nor the weights of 16-bit caches: see `bound`."""
        stored = parse_cache_format(self.full(workload)["c"])
        values = stored.decode(inputs["v_cache"])
        kv = values.shape[1]
        vmax = edge_keys.largest(np.abs(values), kv)
        room = 32 * U32 * np.repeat(vmax, workload.integer("h") // kv, axis=1)
        errors = self._errors(workload, inputs, expected, None)
        lse = np.where(np.isfinite(expected["lse"]), expected["lse"], 0.0)
        most = {
            "out": 8 * errors["out"] + room,
            "lse": 8 * errors["lse"] + 16 * U32 * (1 + np.abs(lse)),
        }
        most["lse"] = np.where(np.isfinite(expected["lse"]), most["lse"], 0.0)
        return {n: np.broadcast_to(most[n], expected[n].shape).copy() for n in most}

    def _errors(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array],
        disturb: Callable[[Tensor], Tensor] | None,
    ) -> dict[str, Array]:  # fmt: skip
        """Return the largest errors of plain float32, of each head or part, in shapes that broadcast."""
        out, lse = self._attend(workload, inputs, torch.float32, disturb)
        finite = np.isfinite(expected["lse"])
        off = np.abs(np.where(finite, lse, 0.0) - np.where(finite, expected["lse"], 0.0))
        return {
            "out": edge_keys.largest(np.abs(out - expected["out"]), inputs["v_cache"].shape[1]),
            "lse": off.max(axis=0, keepdims=True),
        }

    def counts(self, workload: Workload) -> Counts:
        """Listed keys and values once for each KV head, as if its lists agreed; q, out and lists once."""
        p = self.full(workload)
        if pages.paged(p):
            lengths = self.lengths(p)
            each = batches.counted(self, workload, lengths)
            named = [min(n, p["kmax"] * p["block"] + p["window"]) for n in lengths]
            return pages.counted(p, each, named, 0.0)
        if p["b"] > 1:
            return batches.counted(self, workload, self.lengths(p))
        length = self.kv_length(p)
        keys = min(length, p["kmax"] * p["block"] + p["window"])
        work = float(p["t"]) * p["h"] * keys
        lists = blocks_of(p["t"], p["rows"]) * p["hs"] * (p["kmax"] + 1)
        wide = parse_cache_format(p["c"]).bytes * keys * p["kv"] + 4.0 * p["t"] * p["h"]
        return Counts(
            {"fma_f32": work * (p["d"] + p["dv"]), "exp_f32": work},
            {"dram": wide * (p["d"] + p["dv"]) + 4.0 * (lists + p["t"] * p["h"])},
        )
