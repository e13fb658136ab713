"""Cosines and sines of one step's rotary angles, shared by all layers with the same base.

``table[i, 0, j] = cos((start + i) * inv_freq[j])``, ``table[i, 1, j] = sin(...)``; the angle is rounded
to float32 before the cosine is taken, as the reference implementations do.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.workload import Workload


@torch.library.custom_op("mimo::rope_table", mutates_args=())
def rope_table(pos: Tensor, inv_freq: Tensor, t: int) -> Tensor:
    """Return the table ``[t, 2, R/2]`` for ``pos = [start, valid]`` and ``inv_freq [R/2]`` float32."""
    angle = (pos[0] + torch.arange(t)).to(torch.float32)[:, None] * inv_freq
    return torch.stack([angle.cos(), angle.sin()], dim=1)


@rope_table.register_fake
def _(pos: Tensor, inv_freq: Tensor, t: int) -> Tensor:
    return inv_freq.new_empty((t, 2, inv_freq.shape[0]))


class RopeTable(OpDef):
    """``rope_table:t=1,rot=64``."""

    name = "rope_table"
    params = (Param("t", int, low=1), Param("rot", int, low=2))

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return pos, inv_freq, table."""
        p = self.full(workload)
        return (
            Arg("pos", "input", (2,), "int32"),
            Arg("inv_freq", "weight", (p["rot"] // 2,), "float32"),
            Arg("table", "output", (p["t"], 2, p["rot"] // 2), "float32"),
        )

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw a far start and the usual geometric frequencies."""
        p = self.full(workload)
        inv = 1e4 ** -(np.arange(0, p["rot"], 2, dtype=np.float64) / p["rot"])
        return {
            "pos": np.array([int(rng.integers(0, 200_000)), p["t"]], np.int32),
            "inv_freq": inv.astype(np.float32),
        }

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Take the float32 angle, then float64 functions."""
        p = self.full(workload)
        step = (int(inputs["pos"][0]) + np.arange(p["t"])).astype(np.float32)
        angle = (step[:, None] * inputs["inv_freq"]).astype(np.float64)
        return {"table": np.stack([np.cos(angle), np.sin(angle)], axis=1)}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """A few units in the last place of one."""
        return {"table": np.full(expected["table"].shape, 8 * U32)}

    def counts(self, workload: Workload) -> Counts:
        """One cosine and one sine per angle."""
        p = self.full(workload)
        return Counts({"exp_f32": float(p["t"] * p["rot"])}, {"dram": 4.0 * p["t"] * p["rot"]})
