# mypy: disable-error-code="no-untyped-def, valid-type"
"""Rows of an embedding table as f32; an id outside of the table reads the nearest row of it."""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.elementwise.rows import RowSchedule
from mimo_compile.schedules.emit.vector import LANES, T, ramp, splat


def _make(t: int, v: int, d: int, bf16: bool, rows: Any, unroll: int) -> Any:
    vectors, tail = divmod(d, LANES)
    groups, rest = divmod(vectors, unroll)

    def widen(value: Any, lanes: int) -> Any:
        if not bf16:
            return value
        kind = "" if lanes == 1 else f"x{lanes}"
        return T.reinterpret(
            f"float32{kind}", T.cast(value, f"uint32{kind}") << splat(T.uint32(16), lanes)
        )

    @T.prim_func(s_tir=True)
    def kernel(
        ids: T.Buffer((t,), "int32"),
        table: T.Buffer((v, d), "uint16" if bf16 else "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for i in rows(t):
            with T.sblock("row"):
                T.reads(ids[i], table[0:v, 0:d])
                T.writes(y[i, 0:d])
                row: T.let = T.max(T.min(ids[i], T.int32(v - 1)), T.int32(0))
                for j in range(groups):
                    for u in T.unroll(unroll):
                        at: T.let = (j * unroll + u) * LANES
                        y[i, ramp(at)] = widen(table[row, ramp(at)], LANES)
                for u in T.unroll(rest):
                    y[i, ramp((groups * unroll + u) * LANES)] = widen(
                        table[row, ramp((groups * unroll + u) * LANES)], LANES
                    )
                for u in range(tail):
                    y[i, vectors * LANES + u] = widen(table[row, vectors * LANES + u], 1)

    return kernel


class X86Embed(RowSchedule):
    """One row per task."""

    name = "embed.x86"
    op = "embed"

    def make(self, p: dict[str, Any], rows: Any, unroll: int) -> Any:
        """Return the PrimFunc (ids, table, y)."""
        return _make(p["t"], p["v"], p["d"], p["w"] == "bf16", rows, unroll)
