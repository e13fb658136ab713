"""``silu(gate) * up`` on rows ``[gate | up]``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.workload import Workload


@torch.library.custom_op("mimo::swiglu", mutates_args=())
def swiglu(x: Tensor) -> Tensor:
    """Return ``silu(x[:, :F]) * x[:, F:]``: ``[T, 2F]`` -> ``[T, F]``."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@swiglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


class SwiGlu(OpDef):
    """``swiglu:t=1,f=8192``."""

    name = "swiglu"
    params = (Param("t", int, low=1), Param("f", int, low=1))

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return x, y."""
        p = self.full(workload)
        return (
            Arg("x", "input", (p["t"], 2 * p["f"]), "float32"),
            Arg("y", "output", (p["t"], p["f"]), "float32"),
        )

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw wide rows, so that both tails of the sigmoid occur."""
        p = self.full(workload)
        x = 4 * rng.standard_normal((p["t"], 2 * p["f"]), dtype=np.float32)
        x[0, 0], x[0, p["f"] - 1] = -120.0, 120.0
        return {"x": x}

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64."""
        gate, up = torch.from_numpy(inputs["x"]).double().chunk(2, dim=-1)
        return {"y": (torch.nn.functional.silu(gate) * up).numpy()}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Relative error of a float32 exponential grows with its argument."""
        gate = np.abs(inputs["x"][:, : expected["y"].shape[1]])
        return {"y": (16 + 2 * gate) * U32 * np.abs(expected["y"]) + 1e-30}

    def counts(self, workload: Workload) -> Counts:
        """One exponential per output."""
        p = self.full(workload)
        n = float(p["t"] * p["f"])
        return Counts({"exp_f32": n, "fma_f32": 2 * n}, {"dram": 12 * n})
