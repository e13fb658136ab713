"""Cosines and sines of one step's rotary angles, shared by all layers with the same base.

``table[i, 0, j] = cos((start + i) * inv_freq[j])``, ``table[i, 1, j] = sin(...)``; the angle is rounded
to float32 before the cosine is taken, as the reference implementations do. With ``b`` sequences, ``pos`` is
``[b, 2]`` and the table ``[b * t, 2, R/2]``, the rows of the first sequence first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops import batches
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.workload import Workload


@torch.library.custom_op("mimo::rope_table", mutates_args=())
def rope_table(pos: Tensor, inv_freq: Tensor, t: int) -> Tensor:
    """Return the table ``[t, 2, R/2]`` for ``pos = [start, valid]`` and ``inv_freq [R/2]`` float32.

    Of B sequences: ``[B * t, 2, R/2]`` for ``pos [B, 2]``.
    """
    steps = pos.view(-1, 2)[:, :1] + torch.arange(t)
    angle = steps.reshape(-1, 1).to(torch.float32) * inv_freq
    return torch.stack([angle.cos(), angle.sin()], dim=1)


@rope_table.register_fake
def _(pos: Tensor, inv_freq: Tensor, t: int) -> Tensor:
    return inv_freq.new_empty((t * (pos.numel() // 2), 2, inv_freq.shape[0]))


class RopeTable(OpDef):
    """``rope_table:t=1,rot=64``; ``b`` sequences of ``t`` tokens each."""

    name = "rope_table"
    params = (Param("t", int, low=1), Param("rot", int, low=2), Param("b", int, 1, low=1))

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return pos, inv_freq, table."""
        p = self.full(workload)
        one = (
            Arg("pos", "input", (2,), "int32"),
            Arg("inv_freq", "weight", (p["rot"] // 2,), "float32"),
            Arg("table", "output", (p["t"], 2, p["rot"] // 2), "float32"),
        )
        return batches.batched(one, p["b"])

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw a far start and the usual geometric frequencies."""
        p = self.full(workload)
        inv = 1e4 ** -(np.arange(0, p["rot"], 2, dtype=np.float64) / p["rot"])
        starts = rng.integers(0, 200_000, p["b"])
        places = np.stack([starts, np.full(p["b"], p["t"])], axis=1).astype(np.int32)
        return {
            "pos": places if p["b"] > 1 else places[0],
            "inv_freq": inv.astype(np.float32),
        }

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Take the float32 angle, then float64 functions."""
        p = self.full(workload)
        step = inputs["pos"].reshape(-1, 2)[:, :1] + np.arange(p["t"])
        angle = (step.reshape(-1, 1).astype(np.float32) * inputs["inv_freq"]).astype(np.float64)
        return {"table": np.stack([np.cos(angle), np.sin(angle)], axis=1)}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """A few units in the last place of one."""
        return {"table": np.full(expected["table"].shape, 8 * U32)}

    def counts(self, workload: Workload) -> Counts:
        """One cosine and one sine per angle."""
        p = self.full(workload)
        numbers = float(p["b"] * p["t"] * p["rot"])
        return Counts({"exp_f32": numbers}, {"dram": 4.0 * numbers})
