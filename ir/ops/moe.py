"""Routed experts: ``y[t] = sum_j weight[t, j] * W2[e] (silu(g) * u)``.

``[g; u] = W13[e] x[t]`` with ``e = ids[t, j]``; ids outside ``[0, E)`` add nothing.

Gate rows come first in W13. Both matmuls round or quantise their input rows as ``a`` says. In complex
formats W13 is one complex matrix, so that gates are the real and ups the imaginary parts of its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.formats import (
    ActFormat,
    WeightFormat,
    parse_act_format,
    parse_weight_format,
)
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.mpgemm import (
    check_acts,
    magnitudes,
    matmul_bound,
    product_kind,
    random_weights,
    real_activations,
    real_weights,
    weight_args,
    weight_bytes,
)
from mimo_compile.ir.ops.numerics import U32, fake_quantize, real_matrix, round_values
from mimo_compile.ir.workload import Workload

Matrices = Callable[[int], tuple[Tensor, Tensor]]
"""Gives the real W13 ``[2F, D]`` and W2 ``[D, F]`` of an expert."""
LOADS = ("zipf", "even", "same")
"""How drawn tokens choose experts: as real routers, the r-th of them in proportion to 1 / r; all alike; all
tokens the same ones."""


def _experts(
    x: Tensor, ids: Tensor, weights: Tensor, matrices: Matrices, count: int, fmt: WeightFormat, act: str
) -> Tensor:  # fmt: skip
    def quantised(rows: Tensor) -> Tensor:
        return fake_quantize(rows, fmt, act)

    y = torch.zeros_like(x)
    xq = quantised(x)
    for e, rows, slot in _hits(ids, count):
        w13, w2 = matrices(e)
        gate, up = (xq[rows] @ w13.mT).chunk(2, dim=-1)
        hidden = quantised(torch.nn.functional.silu(gate) * up)
        y.index_add_(0, rows, (hidden @ w2.mT) * weights[rows, slot, None].to(x.dtype))
    return y


def _hits(ids: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert below ``count`` that tokens chose, with the tokens and the places of the choice."""
    for e in range(count):
        rows, slot = torch.nonzero(ids == e, as_tuple=True)
        if rows.numel():
            yield e, rows, slot


@torch.library.custom_op("mimo::moe", mutates_args=())
def moe(
    x: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w13_scale: Tensor | None, w13_zero: Tensor | None,
    w2: Tensor, w2_scale: Tensor | None, w2_zero: Tensor | None, w: str, a: str, s: str = "f16",
) -> Tensor:  # fmt: skip
    """Run experts: ``x [T, D]``, ``ids/weights [T, k]``, ``w13 [E, 2F, D]``, ``w2 [E, D, F]`` -> ``[T, D]``.

    ``w13``/``w2`` are codes with scales (and zeros), or real weights when ``w`` is a float format. ``s``: as
    for `mpgemm`.
    """
    fmt = parse_weight_format(w)

    def real(e: int, codes: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        if fmt.is_float or scale is None:
            return codes[e].to(x.dtype)
        return real_matrix(fmt, codes[e], scale[e], None if zero is None else zero[e], x.dtype)

    def matrices(e: int) -> tuple[Tensor, Tensor]:
        return real(e, w13, w13_scale, w13_zero), real(e, w2, w2_scale, w2_zero)

    return _experts(x, ids, weights, matrices, w13.shape[0], fmt, a)


@moe.register_fake
def _(
    x: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w13_scale: Any, w13_zero: Any,
    w2: Tensor, w2_scale: Any, w2_zero: Any, w: str, a: str, s: str = "f16",
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


def expert_arrays(inputs: Mapping[str, Array], expert: int) -> dict[str, Array]:
    """Return the arrays of one expert's weights, by the names of those of all."""
    return {n: a[expert] for n, a in inputs.items() if n.startswith(("w13_", "w2_"))}


def _requantised(values: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes of rows times their scales, and by how much an error of ``slack`` may change them."""
    scale = values.abs().amax(-1, keepdim=True) / 127
    # the scale itself carries the rounding of the largest element
    drift = slack.amax(-1, keepdim=True) / scale.clamp_min(1e-30) / 127
    steps = values / scale.clamp_min(1e-30)
    near = (steps.frac().abs() - 0.5).abs() * scale <= slack + values.abs() * drift
    q = steps.round() * scale
    return q, q.abs() * drift + near * scale


def _seen(
    hidden: Tensor, slack: Tensor, fmt: WeightFormat, how: ActFormat
) -> tuple[Tensor, Tensor]:
    """Return hidden values as W2 sees them, and by how much an error of ``slack`` may change them."""
    if how.rounded:
        q = round_values(hidden, how)
        ends = [(round_values(end, how) - q).abs() for end in (hidden - slack, hidden + slack)]
        return q, torch.maximum(*ends)
    if not how.is_int8:
        return hidden, slack
    size = hidden.shape[-1] if how.group <= 0 else how.group
    if fmt.family == "complex":  # both halves have a scale of their own
        size //= 2
    pairs = zip(hidden.split(size, -1), slack.split(size, -1), strict=True)
    done = [_requantised(values, error) for values, error in pairs]
    return torch.cat([q for q, _ in done], -1), torch.cat([off for _, off in done], -1)


class Moe(OpDef):
    """``moe:t=1,e=8,k=2,d=256,f=128,w=w4g64,a=a8``."""

    name = "moe"
    params = (
        Param("t", int, low=1),
        Param("e", int, low=1),
        Param("k", int, low=1),
        Param("d", int, low=1),
        Param("f", int, low=1),
        Param("w", str, "f32"),
        Param("a", str, "a16"),
        Param("s", str, "f16"),
        Param("load", str, "zipf"),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse impossible selections, unknown loads and activations that the weights cannot have."""
        fmt = parse_weight_format(p["w"])
        if p["load"] not in LOADS:
            raise UsageError(
                f"moe: there is no load {p['load']!r}", remedy=f"use load={', '.join(LOADS)}"
            )
        if p["k"] > p["e"]:
            raise UsageError("moe: k is above e")
        check_acts("moe", fmt, p["a"])
        if fmt.family == "complex" and (p["d"] % 2 or p["f"] % 2):
            raise UsageError(f"moe: {fmt} needs even d and f")

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return x, ids, weights, w13_*, w2_*, y."""
        p = self.full(workload)
        fmt = parse_weight_format(p["w"])
        return (
            Arg("x", "input", (p["t"], p["d"]), "float32"),
            Arg("ids", "input", (p["t"], p["k"]), "int32"),
            Arg("weights", "input", (p["t"], p["k"]), "float32"),
            *weight_args("w13_", fmt, (p["e"],), 2 * p["f"], p["d"]),
            *weight_args("w2_", fmt, (p["e"],), p["d"], p["f"]),
            Arg("y", "output", (p["t"], p["d"]), "float32"),
        )

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw rows and weights; ids as ``load`` says (`LOADS`)."""
        p = self.full(workload)
        fmt = parse_weight_format(p["w"])
        args = [a for a in self.args(workload) if a.role == "weight"]
        out: dict[str, Array] = {"x": rng.standard_normal((p["t"], p["d"]), dtype=np.float32)}
        out["ids"] = self.draw_ids(workload, rng)
        out["weights"] = rng.dirichlet(np.ones(p["k"]), p["t"]).astype(np.float32)
        out |= random_weights(args, fmt, rng)
        if fmt.is_float:  # keep hidden magnitudes near one
            for name in ("w13_w", "w2_w"):
                if out[name].dtype == np.float32:
                    out[name] /= np.float32(p["d"] ** 0.5)
        return out

    def draw_ids(self, workload: Workload, rng: np.random.Generator) -> Array:
        """Draw the experts that tokens choose, int32 ``[T, k]``, none twice by a token."""
        p = self.full(workload)
        places = rng.permutation(p["e"])
        if p["load"] == "same":
            return np.repeat(places[None, : p["k"]], p["t"], axis=0).astype(np.int32)
        load = 1.0 / (1.0 + places) if p["load"] == "zipf" else np.ones(p["e"])
        share = load / load.sum()
        ids = [rng.choice(p["e"], p["k"], replace=False, p=share) for _ in range(p["t"])]
        return np.array(ids, np.int32)

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64, expert by expert."""
        p = self.full(workload)
        fmt = parse_weight_format(p["w"])

        def matrices(e: int) -> tuple[Tensor, Tensor]:
            one = expert_arrays(inputs, e)
            return real_weights(one, "w13_", fmt), real_weights(one, "w2_", fmt)

        x, ids = torch.from_numpy(inputs["x"]).double(), torch.from_numpy(inputs["ids"])
        weights = torch.from_numpy(inputs["weights"]).double()
        return {"y": _experts(x, ids, weights, matrices, p["e"], fmt, p["a"]).numpy()}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Propagate both matmuls' bounds; hidden values next to a tie may be rounded the other way."""
        p = self.full(workload)
        fmt, act = parse_weight_format(p["w"]), p["a"]
        x = real_activations(inputs["x"], fmt, act)
        weights = torch.from_numpy(inputs["weights"]).double().abs()
        out = torch.zeros((p["t"], p["d"]), dtype=torch.float64)
        for e, rows, slot in _hits(torch.from_numpy(inputs["ids"]), p["e"]):
            one = expert_arrays(inputs, e)
            w13, w2 = real_weights(one, "w13_", fmt), real_weights(one, "w2_", fmt)
            both = x[rows] @ w13.mT
            err = matmul_bound(x[rows], magnitudes(one, "w13_", fmt, w13, act), fmt, act)
            (gate, up), (eg, eu) = both.chunk(2, -1), err.chunk(2, -1)
            hidden = torch.nn.functional.silu(gate) * up
            slack = 1.1 * eg * up.abs() + eu * gate.abs() + 8 * U32 * hidden.abs()
            q, off = _seen(hidden, slack, fmt, parse_act_format(act))
            w2_size = magnitudes(one, "w2_", fmt, w2, act)
            step = off @ w2.abs().mT + matmul_bound(q, w2_size, fmt, act)
            out.index_add_(0, rows, weights[rows, slot, None] * step)
        return {"y": (2 * out + 8 * U32 * torch.from_numpy(np.abs(expected["y"])) + 1e-30).numpy()}

    def counts(self, workload: Workload) -> Counts:
        """Each routed multiply-add once; the weights of the experts that can be hit once."""
        p = self.full(workload)
        if p["load"] == "same":
            return self._counts(p, p["k"])
        # expected number under uniform routing
        return self._counts(p, p["e"] * (1 - (1 - p["k"] / p["e"]) ** p["t"]))

    def counts_of(self, workload: Workload, inputs: Mapping[str, Array]) -> Counts:
        """Return `counts` with the experts that the ids hit."""
        p = self.full(workload)
        ids = inputs["ids"]
        return self._counts(p, np.unique(ids[(ids >= 0) & (ids < p["e"])]).size)

    def _counts(self, p: Mapping[str, Any], hit: float) -> Counts:
        fmt = parse_weight_format(p["w"])
        per = weight_bytes(fmt, 2 * p["f"], p["d"], p["s"]) + weight_bytes(
            fmt, p["d"], p["f"], p["s"]
        )
        work = 3.0 * p["t"] * p["k"] * p["d"] * p["f"]
        return Counts({product_kind(p["a"]): work}, {"dram": hit * per + 8.0 * p["t"] * p["d"]})
