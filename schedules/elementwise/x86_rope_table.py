# mypy: disable-error-code="no-untyped-def, valid-type"
"""Cosines and sines of rotary angles, with an own range reduction: no library, any position."""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.elementwise.rows import RowSchedule
from mimo_compile.schedules.emit.vector import LANES, T, cos, ramp, sin, splat


def _make(t: int, half: int, b: int, rows: Any) -> Any:
    vectors, tail = divmod(half, LANES)

    @T.inline
    def step(inv_freq, table, position, i, at, lanes):
        # the product is rounded to f32 before the cosine is taken: that is the op's definition
        angle: T.let = splat(position, lanes) * inv_freq[ramp(at, lanes)]
        table[i, 0, ramp(at, lanes)] = cos(angle, lanes)
        table[i, 1, ramp(at, lanes)] = sin(angle, lanes)

    @T.prim_func(s_tir=True)
    def kernel(
        pos: T.Buffer((2,) if b == 1 else (b, 2), "int32"),
        inv_freq: T.Buffer((half,), "float32"),
        table: T.Buffer((b * t, 2, half), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for i in rows(b * t):
            with T.sblock("row"):
                T.reads()
                T.writes()
                position: T.let = T.cast(_position(pos, b, t, i), "float32")
                for j in range(vectors):
                    step(inv_freq, table, position, i, j * LANES, LANES)
                for j in range(tail):
                    step(inv_freq, table, position, i, vectors * LANES + j, 1)

    return kernel


def _position(pos: Any, b: int, t: int, i: Any) -> Any:
    """Return where row ``i`` stands, of the sequences' rows one after the other."""
    return pos[0] + i if b == 1 else pos[i // t, 0] + i % t


class X86RopeTable(RowSchedule):
    """One position per task; the arithmetic of a vector is long enough without unrolling."""

    name = "rope_table.x86"
    op = "rope_table"

    def make(self, p: dict[str, Any], rows: Any, unroll: int) -> Any:
        """Return the PrimFunc (pos, inv_freq, table)."""
        return _make(p["t"], p["rot"] // 2, p["b"], rows)
