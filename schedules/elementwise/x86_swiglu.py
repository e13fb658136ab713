# mypy: disable-error-code="no-untyped-def, valid-type"
"""``silu(gate) * up``: one exponential for each output, evaluated in vector registers."""

from __future__ import annotations

from typing import Any

from mimo_compile.schedules.elementwise.rows import RowSchedule
from mimo_compile.schedules.emit.vector import LANES, T, ramp, sigmoid


def _make(t: int, f: int, rows: Any, unroll: int) -> Any:
    vectors, tail = divmod(f, LANES)
    groups, rest = divmod(vectors, unroll)

    @T.inline
    def step(x, y, i, at, lanes):
        gate: T.let = x[i, ramp(at, lanes)]
        y[i, ramp(at, lanes)] = gate * sigmoid(gate, lanes) * x[i, ramp(f + at, lanes)]

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((t, 2 * f), "float32"), y: T.Buffer((t, f), "float32")):
        T.func_attr({"tirx.noalias": True})
        for i in rows(t):
            with T.sblock("row"):
                T.reads(x[i, 0 : 2 * f])
                T.writes(y[i, 0:f])
                for j in range(groups):
                    for u in T.unroll(unroll):
                        step(x, y, i, (j * unroll + u) * LANES, LANES)
                for u in T.unroll(rest):
                    step(x, y, i, (groups * unroll + u) * LANES, LANES)
                for u in range(tail):
                    step(x, y, i, vectors * LANES + u, 1)

    return kernel


class X86SwiGlu(RowSchedule):
    """One row per task; ``unroll`` exponentials in flight."""

    name = "swiglu.x86"
    op = "swiglu"

    def make(self, p: dict[str, Any], rows: Any, unroll: int) -> Any:
        """Return the PrimFunc (x, y)."""
        return _make(p["t"], p["f"], rows, unroll)
