# mypy: disable-error-code="no-untyped-def, valid-type"
"""The MoE router: scores in vector registers, then k passes for the best expert that is left.

Ids stay inside ``[0, E)`` whatever the logits are: a NaN ranks below every number.
"""

from __future__ import annotations

from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.elementwise.rows import RowConfig, RowSchedule
from mimo_compile.schedules.emit.vector import LANES, T, exp, ramp, sigmoid, splat

_LOWEST, _TAKEN = -3e38, float("-inf")


def _vectors(experts: int) -> int:
    """Return the vectors that cover the experts."""
    return -(-experts // LANES)


def _scoring(p: dict[str, Any]) -> Any:
    """Return the step that writes the scores of row ``i`` to ``s``."""
    e, softmax = p["e"], p["scoring"] == "softmax"
    vectors, tail = divmod(e, LANES)

    def score(x: Any, top: Any, lanes: int) -> Any:
        return exp(x - splat(top, lanes), lanes) if softmax else sigmoid(x, lanes)

    @T.inline
    def scores(logits, s, one, i):
        one[0] = T.float32(_LOWEST)
        if softmax:
            for j in range(e):
                one[0] = T.max(logits[i, j], one[0])
        for j in range(vectors):
            s[ramp(j * LANES)] = score(logits[i, ramp(j * LANES)], one[0], LANES)
        for j in range(tail):
            s[vectors * LANES + j] = score(logits[i, vectors * LANES + j], one[0], 1)
        if softmax:
            one[0] = T.float32(0)
            for j in range(e):
                one[0] = one[0] + s[j]
            for j in range(e):
                s[j] = s[j] / one[0]

    return scores


def _grouping(p: dict[str, Any]) -> Any:
    """Return the step that takes the experts of all but the best groups out of the choice ``c``."""
    e, groups = p["e"], p["groups"]
    size = e // groups

    @T.inline
    def drop_groups(c, rank, kept, index):
        # a group's rank is the sum of its two best experts
        for g in range(groups):
            rank[0] = T.float32(_TAKEN)
            rank[1] = T.float32(_TAKEN)
            for j in range(size):
                rank[1] = T.max(rank[1], T.min(rank[0], c[g * size + j]))
                rank[0] = T.max(rank[0], c[g * size + j])
            rank[2 + g] = rank[0] + rank[1] if size > 1 else rank[0]
            kept[g] = T.int32(0)
        for _ in range(p["topgroups"]):
            index[0] = T.int32(-1)
            for g in range(groups):
                if kept[g] == 0 and (index[0] < 0 or rank[2 + g] > rank[2 + index[0]]):
                    index[0] = g
            kept[index[0]] = T.int32(1)
        for j in range(e):
            if kept[j // size] == 0:
                c[j] = T.float32(_TAKEN)

    return drop_groups


def _taking(p: dict[str, Any]) -> Any:
    """Return the step that moves the best expert left in ``c`` to ``ids[i, j]`` with its score."""
    e, full = p["e"], _vectors(p["e"])

    @T.inline
    def take(c, s, best, where, index, ids, weights, i, j):
        best[ramp(0)] = c[ramp(0)]
        for v in range(1, full):
            best[ramp(0)] = T.max(best[ramp(0)], c[ramp(v * LANES)])
        top: T.let = T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fmax", best[ramp(0)])
        where[ramp(0)] = splat(T.int32(e - 1))
        for v in range(full):
            at: T.let = splat(T.int32((full - 1 - v) * LANES)) + T.ramp(
                T.int32(0), T.int32(1), LANES
            )
            where[ramp(0)] = T.Select(
                c[ramp((full - 1 - v) * LANES)] == splat(top), at, where[ramp(0)]
            )
        index[0] = T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smin", where[ramp(0)])
        c[index[0]] = T.float32(_TAKEN)
        ids[i, j] = index[0]
        weights[i, j] = s[index[0]]

    return take


def _routing(p: dict[str, Any]) -> Any:
    """Return the steps of one row, in order."""
    e, k, groups = p["e"], p["k"], p["groups"]
    padded = _vectors(e) * LANES
    biased_choice, norm, factor = bool(p["bias"]), bool(p["norm"]), p["factor"]
    scores, drop_groups, take = _scoring(p), _grouping(p), _taking(p)

    @T.inline
    def row(logits, bias, ids, weights, i):
        s = T.sblock_alloc_buffer((padded,), "float32")
        c = T.sblock_alloc_buffer((padded,), "float32")
        one = T.sblock_alloc_buffer((1,), "float32")
        rank = T.sblock_alloc_buffer((2 + groups,), "float32")
        kept = T.sblock_alloc_buffer((groups,), "int32")
        index = T.sblock_alloc_buffer((1,), "int32")
        best = T.sblock_alloc_buffer((LANES,), "float32")
        where = T.sblock_alloc_buffer((LANES,), "int32")
        scores(logits, s, one, i)
        for j in range(e):
            # max(NaN, limit) is the limit
            if biased_choice:
                c[j] = T.max(s[j] + bias[j], T.float32(_LOWEST))
            else:
                c[j] = T.max(s[j], T.float32(_LOWEST))
        for j in range(padded - e):
            c[e + j] = T.float32(_TAKEN)
        if groups > 1:
            drop_groups(c, rank, kept, index)
        one[0] = T.float32(0)
        for j in range(k):
            take(c, s, best, where, index, ids, weights, i, j)
            one[0] = one[0] + weights[i, j]
        for j in range(k):
            if norm:
                weights[i, j] = weights[i, j] / (one[0] + T.float32(1e-20)) * T.float32(factor)
            else:
                weights[i, j] = weights[i, j] * T.float32(factor)

    return row


def _make(p: dict[str, Any], rows: Any) -> Any:
    t, e, k = p["t"], p["e"], p["k"]
    row = _routing(p)
    if p["bias"]:

        @T.prim_func(s_tir=True)
        def biased(
            logits: T.Buffer((t, e), "float32"), bias: T.Buffer((e,), "float32"),
            ids: T.Buffer((t, k), "int32"), weights: T.Buffer((t, k), "float32"),
        ):  # fmt: skip
            T.func_attr({"tirx.noalias": True})
            for i in rows(t):
                with T.sblock("row"):
                    T.reads(logits[i, 0:e], bias[0:e])
                    T.writes(ids[i, 0:k], weights[i, 0:k])
                    row(logits, bias, ids, weights, i)

        return biased

    @T.prim_func(s_tir=True)
    def plain(
        logits: T.Buffer((t, e), "float32"), ids: T.Buffer((t, k), "int32"),
        weights: T.Buffer((t, k), "float32"),
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        for i in rows(t):
            with T.sblock("row"):
                T.reads(logits[i, 0:e])
                T.writes(ids[i, 0:k], weights[i, 0:k])
                row(logits, logits, ids, weights, i)

    return plain


class X86Route(RowSchedule):
    """One token per task."""

    name = "route.x86"
    op = "route"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Threads or not."""
        base = super().space(workload, hardware)
        default = RowConfig(parallel=base.default.parallel, unroll=1)
        return Space(RowConfig, {**base.knobs, "unroll": (1,)}, default)

    def make(self, p: dict[str, Any], rows: Any, unroll: int) -> Any:
        """Return the PrimFunc (logits, [bias], ids, weights)."""
        return _make(p, rows)
