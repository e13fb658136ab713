"""RMS normalisation of rows, optionally of the sum with a residual row that is returned too."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.workload import Workload


@torch.library.custom_op("mimo::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``(rms_norm(x + residual) * weight, x + residual)``, all ``[T, D]``."""
    total = x + residual
    return torch.nn.functional.rms_norm(total, (x.shape[-1],), weight, eps), total


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


class RmsNorm(OpDef):
    """``rms_norm:t=1,d=4096,residual=1``; ``torch.nn.functional.rms_norm`` or ``mimo::add_rms_norm``."""

    name = "rms_norm"
    params = (
        Param("t", int, low=1),
        Param("d", int, low=1),
        Param("residual", int, 0),
        Param("eps", float, 1e-6),
    )

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return x, residual, weight, y, total."""
        p = self.full(workload)
        shape = (p["t"], p["d"])
        out = [Arg("x", "input", shape, "float32")]
        if p["residual"]:
            out.append(Arg("residual", "input", shape, "float32"))
        out += [Arg("weight", "weight", (p["d"],), "float32"), Arg("y", "output", shape, "float32")]
        if p["residual"]:
            out.append(Arg("total", "output", shape, "float32"))
        return tuple(out)

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw normal rows."""
        return {
            a.name: rng.standard_normal(a.shape, dtype=np.float32)
            for a in self.args(workload)
            if a.role != "output"
        }

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64; the sum is rounded to float32 as the op defines it."""
        p = self.full(workload)
        total = inputs["x"] + inputs["residual"] if p["residual"] else inputs["x"]
        x = total.astype(np.float64)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + p["eps"]) * inputs["weight"]
        return {"y": y, "total": total.astype(np.float64)} if p["residual"] else {"y": y}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Relative rounding of a sum of d squares; the plain sum is exact."""
        p = self.full(workload)
        out: dict[str, Array] = {"y": (8 + 2 * p["d"] ** 0.5) * U32 * np.abs(expected["y"]) + 1e-30}
        if p["residual"]:
            out["total"] = np.zeros(expected["total"].shape)
        return out

    def counts(self, workload: Workload) -> Counts:
        """Two passes of arithmetic over rows that are read once."""
        p = self.full(workload)
        rows = float(p["t"] * p["d"])
        return Counts({"fma_f32": 2 * rows}, {"dram": 4 * rows * (4 if p["residual"] else 2)})
