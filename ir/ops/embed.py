"""Rows of an embedding table, as float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.numerics import bf16_to_f32, f32_to_bf16
from mimo_compile.ir.workload import Workload


@torch.library.custom_op("mimo::embed", mutates_args=())
def embed(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of a table: ``ids int32 [T]``, ``table [V, D]`` f32 or bf16 -> float32 ``[T, D]``."""
    return table[ids.long()].float()


@embed.register_fake
def _(ids: Tensor, table: Tensor) -> Tensor:
    return table.new_empty((ids.shape[0], table.shape[1]), dtype=torch.float32)


class Embed(OpDef):
    """``embed:t=1,v=32000,d=2048,w=bf16``; ``mimo::embed`` or ``torch.nn.functional.embedding``."""

    name = "embed"
    params = (
        Param("t", int, low=1),
        Param("v", int, low=1),
        Param("d", int, low=1),
        Param("w", str, "f32"),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse formats that have no row reader."""
        if p["w"] not in ("f32", "bf16"):
            raise UsageError("embed: w must be f32 or bf16")

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return ids, table, y."""
        p = self.full(workload)
        return (
            Arg("ids", "input", (p["t"],), "int32"),
            Arg("table", "weight", (p["v"], p["d"]), "float32" if p["w"] == "f32" else "uint16"),
            Arg("y", "output", (p["t"], p["d"]), "float32"),
        )

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw ids over the whole vocabulary, its ends included."""
        p = self.full(workload)
        table = rng.standard_normal((p["v"], p["d"]), dtype=np.float32)
        ids = rng.integers(0, p["v"], p["t"]).astype(np.int32)
        ids[0], ids[-1] = 0, p["v"] - 1
        return {"ids": ids, "table": table if p["w"] == "f32" else f32_to_bf16(table)}

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Copy rows."""
        rows = inputs["table"][inputs["ids"]]
        return {"y": (bf16_to_f32(rows) if rows.dtype == np.uint16 else rows).astype(np.float64)}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Copies are exact."""
        return {"y": np.zeros(expected["y"].shape)}

    def counts(self, workload: Workload) -> Counts:
        """Rows once in, once out."""
        p = self.full(workload)
        size = 4 if p["w"] == "f32" else 2
        return Counts({}, {"dram": float(p["t"] * p["d"] * (size + 4))})
