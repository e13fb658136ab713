# mypy: disable-error-code="no-untyped-def, valid-type"
"""RMS normalisation, with the residual addition fused in when there is one.

A row is read once from memory: the pass that sums squares leaves it in the nearest cache for the second.
"""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.elementwise.rows import RowSchedule
from mimo_compile.schedules.emit.vector import LANES, T, ramp, splat


def _make(t: int, d: int, eps: float, residual: bool, rows: Any, unroll: int) -> Any:
    vectors, tail = divmod(d, LANES)
    groups, rest = divmod(vectors, unroll)

    @T.inline
    def add(x, other, total, i, at):
        if residual:
            total[i, at] = x[i, at] + other[i, at]

    @T.inline
    def row(x, other, weight, y, total, i):
        # without a residual, `total` is x itself
        acc = T.sblock_alloc_buffer((unroll, LANES), "float32")
        norm = T.sblock_alloc_buffer((1,), "float32")
        for u in T.unroll(unroll):
            acc[u, ramp(0)] = splat(0.0)
        for j in range(groups):
            for u in T.unroll(unroll):
                add(x, other, total, i, ramp((j * unroll + u) * LANES))
                v: T.let = total[i, ramp((j * unroll + u) * LANES)]
                acc[u, ramp(0)] = acc[u, ramp(0)] + v * v
        for u in T.unroll(rest):
            add(x, other, total, i, ramp((groups * unroll + u) * LANES))
            w: T.let = total[i, ramp((groups * unroll + u) * LANES)]
            acc[u, ramp(0)] = acc[u, ramp(0)] + w * w
        for u in T.unroll(1, unroll):
            acc[0, ramp(0)] = acc[0, ramp(0)] + acc[u, ramp(0)]
        norm[0] = T.float32(0)
        for j in T.unroll(tail):
            add(x, other, total, i, vectors * LANES + j)
            norm[0] = norm[0] + total[i, vectors * LANES + j] * total[i, vectors * LANES + j]
        for u in T.unroll(LANES):
            norm[0] = norm[0] + acc[0, u]
        norm[0] = T.float32(1) / T.sqrt(norm[0] / T.float32(d) + T.float32(eps))
        for j in range(vectors):
            y[i, ramp(j * LANES)] = (
                total[i, ramp(j * LANES)] * splat(norm[0]) * weight[ramp(j * LANES)]
            )
        for j in T.unroll(tail):
            y[i, vectors * LANES + j] = (
                total[i, vectors * LANES + j] * norm[0] * weight[vectors * LANES + j]
            )

    if residual:

        @T.prim_func(s_tir=True)
        def added(
            x: T.Buffer((t, d), "float32"), other: T.Buffer((t, d), "float32"),
            weight: T.Buffer((d,), "float32"), y: T.Buffer((t, d), "float32"),
            total: T.Buffer((t, d), "float32"),
        ):  # fmt: skip
            T.func_attr({"tirx.noalias": True})
            for i in rows(t):
                with T.sblock("row"):
                    T.reads(x[i, 0:d], other[i, 0:d], weight[0:d])
                    T.writes(y[i, 0:d], total[i, 0:d])
                    row(x, other, weight, y, total, i)

        return added

    @T.prim_func(s_tir=True)
    def plain(
        x: T.Buffer((t, d), "float32"),
        weight: T.Buffer((d,), "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for i in rows(t):
            with T.sblock("row"):
                T.reads(x[i, 0:d], weight[0:d])
                T.writes(y[i, 0:d])
                row(x, x, weight, y, x, i)

    return plain


class X86RmsNorm(RowSchedule):
    """One row per task; ``unroll`` partial sums in flight."""

    name = "rms_norm.x86"
    op = "rms_norm"

    def make(self, p: dict[str, Any], rows: Any, unroll: int) -> Any:
        """Return the PrimFunc (x, [residual], weight, y, [total])."""
        return _make(p["t"], p["d"], p["eps"], bool(p["residual"]), rows, unroll)
