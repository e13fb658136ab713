"""Queries of SeerAttention-R's gates: one for each KV head, from the queries of its group.

Rotated queries are turned back by the angles of their positions, concatenated, projected, normalised where
the gates have a norm, and rotated again as the gates' own width is (see `seer_gates`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops import batches, seer_gates
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.kv_append import turn_back
from mimo_compile.ir.workload import Workload


@torch.library.custom_op("mimo::gate_queries", mutates_args=())
def gate_queries(
    q: Tensor, pos: Tensor, inv_freq: Tensor, gate_freq: Tensor, weight: Tensor, norm: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """Return the gates' queries ``[T, KV, G]``, float32.

    Args:
        q: ``[T, H, D]``, rotated.
        pos: int32 [2], start and valid; rows of padding are computed, too.
        inv_freq: ``[R/2]``, what q was rotated with.
        gate_freq: ``[r/2]``, what gates are rotated with.
        weight: ``[KV, H/KV * D, G]``, float32 or bfloat16.
        norm: ``[G]`` or None.
        eps: Of the norm.

    Of B sequences: ``q [B * T, H, D]``, ``pos [B, 2]`` -> ``[B * T, KV, G]``.
    """

    def one(where: Tensor, mine: Tensor) -> Tensor:
        at = where[0] + torch.arange(mine.shape[0])
        raw = turn_back(mine, seer_gates.angles(at, inv_freq, q.dtype))
        table = seer_gates.angles(at, gate_freq, q.dtype)
        return seer_gates.gate_queries(raw, weight.to(q.dtype), norm, table, eps)

    return torch.cat(batches.several(one, pos, (q,)))


@gate_queries.register_fake
def _(
    q: Tensor, pos: Tensor, inv_freq: Tensor, gate_freq: Tensor, weight: Tensor, norm: Any, eps: float
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], weight.shape[0], weight.shape[2]))


class GateQueries(OpDef):
    """``gate_queries:t=1,h=32,kv=8,d=128,g=128,rot=128,grot=128,norm=1,w=bf16``; ``b``: see `batches`."""

    name = "gate_queries"
    params = (
        Param("t", int, low=1),
        Param("h", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("g", int, low=1),
        Param("rot", int, low=2),
        Param("grot", int, low=2),
        Param("norm", int, 0),
        Param("eps", float, 1e-6),
        Param("w", str, "f32"),
        Param("b", int, 1, low=1),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse heads that do not group, and what `check_gates` does."""
        if p["h"] % p["kv"]:
            raise UsageError(f"gate_queries: h={p['h']} is not a multiple of kv={p['kv']}")
        seer_gates.check_gates(self.name, p)

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return q, pos, frequencies, projection, norm (if any), out."""
        p = self.full(workload)
        one = (
            Arg("q", "input", (p["t"], p["h"], p["d"]), "float32"),
            Arg("pos", "input", (2,), "int32"),
            *seer_gates.weight_args(p, p["h"] // p["kv"] * p["d"]),
            Arg("out", "output", (p["t"], p["kv"], p["g"]), "float32"),
        )
        return batches.batched(one, p["b"])

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw normal queries at far positions, some of them padding."""
        p = self.full(workload)
        if p["b"] > 1:
            alone = batches.alone(workload)
            each = [self.make_inputs(alone, rng) for _ in range(p["b"])]
            return batches.join(self, workload, each)
        start, valid = int(rng.integers(0, 200_000)), int(rng.integers(1, p["t"] + 1))
        return {
            "q": rng.standard_normal((p["t"], p["h"], p["d"]), dtype=np.float32),
            "pos": np.array([start, valid], np.int32),
            **seer_gates.draw_weights(p, p["h"] // p["kv"] * p["d"], rng),
        }

    @batches.one_by_one
    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64, from float32 angles."""
        w = seer_gates.real_weights(inputs)
        q, pos = torch.from_numpy(inputs["q"]).double(), torch.from_numpy(inputs["pos"])
        eps = self.full(workload)["eps"]
        out = gate_queries(q, pos, w["inv_freq"], w["gate_freq"], w["weight"], w.get("norm"), eps)
        return {"out": out.numpy()}

    @batches.one_by_one
    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Follow the arithmetic: see `seer_gates`."""
        p, w = self.full(workload), seer_gates.real_weights(inputs)
        q = torch.from_numpy(inputs["q"]).double()
        at = int(inputs["pos"][0]) + torch.arange(p["t"])
        raw = turn_back(q, seer_gates.angles(at, w["inv_freq"], torch.float64))
        off = seer_gates.turned_bound(q, p["rot"] // 2)
        rows = (p["t"], p["kv"], -1)
        bound = seer_gates.finished_bound(
            raw.reshape(rows),
            off.reshape(rows),
            w["weight"],
            w.get("norm"),
            p["grot"] // 2,
            p["eps"],
        )
        return {"out": bound.numpy()}

    def counts(self, workload: Workload) -> Counts:
        """Each weight once for each token, angles once; queries in, results out, weights read once."""
        p = self.full(workload)
        columns, tokens = p["h"] // p["kv"] * p["d"], p["b"] * p["t"]
        macs = float(tokens * p["kv"] * columns * p["g"])
        weights = float(p["kv"] * columns * p["g"] * (4 if p["w"] == "f32" else 2))
        turns = float(tokens * (p["h"] * p["rot"] + p["kv"] * p["grot"]))
        moved = 4.0 * tokens * (p["h"] * p["d"] + p["kv"] * p["g"])
        ops = {"fma_f32": macs + 2 * turns, "exp_f32": float(tokens * (p["rot"] + p["grot"]))}
        return Counts(ops, {"dram": weights + moved})
