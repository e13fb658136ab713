"""The MoE router's selection: scores, top-k with optional bias and group limit, weights.

``score = sigmoid(logit)`` or ``softmax(logits)``; experts are chosen by ``score + bias`` (noaux_tc: the bias
changes the choice, never the weight), ties go to the lowest index; weights are the scores of the chosen
experts, divided by their sum when ``norm``, times ``factor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.workload import Workload


def select(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    scoring: str,
    norm: bool,
    factor: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor]:
    """Return expert ids int32 ``[T, k]`` (best first) and weights ``[T, k]``; see the module's text."""
    scores = scores_of(logits, scoring)
    choice = scores if bias is None else scores + bias.to(scores.dtype)
    if groups > 1:  # a group's rank is the sum of its two best experts
        per = choice.view(choice.shape[0], groups, -1)
        rank = per.topk(min(2, per.shape[-1]), dim=-1).values.sum(-1)
        keep = torch.sort(rank, dim=-1, descending=True, stable=True).indices[:, :top_groups]
        mask = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, keep, True)
        choice = per.masked_fill(~mask[..., None], -torch.inf).view_as(choice)
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :k]
    return ids.to(torch.int32), weights_of(scores, ids, norm, factor)


def scores_of(logits: Tensor, scoring: str) -> Tensor:
    """Return the scores ``[T, E]`` of a router's logits."""
    return torch.sigmoid(logits) if scoring == "sigmoid" else torch.softmax(logits, dim=-1)


def weights_of(scores: Tensor, ids: Tensor, norm: bool, factor: float) -> Tensor:
    """Return the weights ``[T, k]`` of chosen experts ``ids [T, k]`` by the scores ``[T, E]`` of all."""
    weights = scores.gather(1, ids.long())
    if norm:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * factor


@torch.library.custom_op("mimo::route", mutates_args=())
def route(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    scoring: str,
    norm: bool,
    factor: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor]:
    """Choose experts: ``logits [T, E]`` float32 -> ids int32 ``[T, k]``, weights float32 ``[T, k]``."""
    return select(logits.float(), bias, k, scoring, norm, factor, groups, top_groups)


@route.register_fake
def _(
    logits: Tensor,
    bias: Any,
    k: int,
    scoring: str,
    norm: bool,
    factor: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


class Route(OpDef):
    """``route:t=1,e=256,k=8,scoring=sigmoid,bias=1``."""

    name = "route"
    params = (
        Param("t", int, low=1),
        Param("e", int, low=1),
        Param("k", int, low=1),
        Param("scoring", str, "softmax"),
        Param("bias", int, 0),
        Param("norm", int, 1),
        Param("factor", float, 1.0),
        Param("groups", int, 1, low=1),
        Param("topgroups", int, 1, low=1),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse impossible selections."""
        if p["scoring"] not in ("softmax", "sigmoid") or p["e"] % p["groups"]:
            raise UsageError("route: scoring must be softmax or sigmoid, and groups divide e")
        if p["k"] > p["e"] // p["groups"] * p["topgroups"] or p["topgroups"] > p["groups"]:
            raise UsageError("route: k is above the number of experts that can be chosen")

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return logits, bias, ids, weights."""
        p = self.full(workload)
        out = [Arg("logits", "input", (p["t"], p["e"]), "float32")]
        if p["bias"]:
            out.append(Arg("bias", "weight", (p["e"],), "float32"))
        return (
            *out,
            Arg("ids", "output", (p["t"], p["k"]), "int32"),
            Arg("weights", "output", (p["t"], p["k"]), "float32"),
        )

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw logits on a coarse grid, so that float rounding cannot change an order but ties occur."""
        p = self.full(workload)
        out: dict[str, Array] = {
            "logits": (rng.integers(-96, 97, (p["t"], p["e"])) / 32).astype(np.float32)
        }
        if p["bias"]:
            out["bias"] = np.zeros(p["e"], np.float32)
            out["bias"][rng.permutation(p["e"])[: p["e"] // 4]] = 2.0
        return out

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64."""
        p = self.full(workload)
        bias = torch.from_numpy(inputs["bias"]) if p["bias"] else None
        ids, weights = select(
            torch.from_numpy(inputs["logits"]).double(), bias, p["k"], p["scoring"], bool(p["norm"]),
            p["factor"], p["groups"], p["topgroups"],
        )  # fmt: skip
        return {"ids": ids.numpy(), "weights": weights.numpy()}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Ids exact; weights to a few units in the last place per expert summed."""
        p = self.full(workload)
        tol = (32 + 4 * p["e"] ** 0.5) * U32
        return {
            "ids": np.zeros(expected["ids"].shape),
            "weights": tol * np.abs(expected["weights"]) + 1e-30,
        }

    def counts(self, workload: Workload) -> Counts:
        """One exponential per expert and a pass of comparisons per choice."""
        p = self.full(workload)
        work = float(p["t"] * p["e"])
        return Counts(
            {"exp_f32": work, "int_op": work * p["k"]}, {"dram": 4 * work + 8.0 * p["t"] * p["k"]}
        )
