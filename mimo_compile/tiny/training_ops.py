"""Differentiable building blocks that make training on a CPU quick."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_compile.ir.formats import WeightFormat
from mimo_compile.ir.ops.numerics import fake_quantize


def round_straight(x: Tensor, fmt: WeightFormat) -> Tensor:
    """x: [..., in], rounded to int8 per row as `fmt` multiplies it; its gradient passes unchanged."""
    wide = x.float()
    return (wide + (fake_quantize(wide, fmt, "a8") - wide).detach()).to(x.dtype)


def route(x: Tensor, router: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts: x [tokens, hidden] f32, router [experts, hidden] f32, bias [experts] f32.

    Returns as `choose`.
    """
    return choose(F.linear(x, router), bias, top_k)


def choose(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts by a router's logits [tokens, experts] f32.

    Returns (weights [tokens, top_k] f32, experts [tokens, top_k] int64). The bias takes part in
    the choice only; the weights are the chosen scores divided by their sum.
    """
    scores = torch.sigmoid(logits)
    chosen = torch.topk(scores + bias, top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, chosen)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20), chosen


class _PermuteRows(torch.autograd.Function):
    """Row permutation whose gradient is the inverse permutation (no scatter-add)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grads[0].index_select(0, back), None, None


def permute_rows(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """x[order], where `back` is the inverse permutation; x: [rows, columns]."""
    apply: Callable[..., Tensor] = _PermuteRows.apply
    return apply(x, order, back)


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows of x times the matrix of their group.

    x: [rows, in], sorted by group; weights: [groups, out, in]; ends: [groups] int32, the row
    after each group's last. Returns [rows, out].
    """
    if x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    starts = [0, *ends.tolist()]
    parts = [F.linear(x[a:b], w) for a, b, w in zip(starts, starts[1:], weights, strict=False)]
    return torch.cat(parts)


def _softmax_error(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """logits: [rows, vocab]; target: [rows] → (losses f32 [rows], gradient on the logits)."""
    x = logits.float()
    top = x.amax(-1, keepdim=True)
    e = torch.exp(x - top)
    total = e.sum(-1, keepdim=True)
    hit = torch.arange(x.shape[1], device=x.device)[None, :] == target[:, None]
    error = e / total - hit.float()
    own = x.gather(1, target[:, None])
    return (top + total.log() - own)[:, 0], error.to(logits.dtype)


@cache
def _softmax_error_compiled() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`_softmax_error`, fused; made on use, because torch.compile imports its whole code generator."""
    return torch.compile(_softmax_error)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `x @ table.T`, computed chunk by chunk with its gradients at once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        chunk: int,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        error_of = _softmax_error_compiled() if compiled else _softmax_error
        low = table.to(x.dtype)
        grad_x = torch.empty_like(x)
        grad_table = torch.zeros(table.shape, dtype=torch.float32)
        losses = torch.empty(x.shape[0], dtype=torch.float32)
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            losses[rows], error = error_of(F.linear(x[rows], low), targets[rows])
            if weights is not None:
                error = error * weights[rows, None].to(error.dtype)
            grad_x[rows] = error @ low
            grad_table += error.T @ x[rows]
        ctx.save_for_backward(grad_x, grad_table)
        ctx.mark_non_differentiable(losses)
        ctx.total = float(x.shape[0] if weights is None else max(float(weights.sum()), 1e-6))
        summed = losses.sum() if weights is None else losses @ weights
        return summed / ctx.total, losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_x, grad_table = ctx.saved_tensors
        scale = grads[0] / ctx.total
        return (grad_x * scale).to(grad_x.dtype), grad_table * scale, None, None, None, None


def linear_cross_entropy(
    x: Tensor, table: Tensor, targets: Tensor, chunk: int = 512, compiled: bool = False
) -> Tensor:
    """Mean cross-entropy (nats) of the logits x @ table.T against the targets.

    x: [rows, hidden]; table: [vocab, hidden] f32; targets: [rows] int64. Returns a scalar f32.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _LinearCrossEntropy.apply
    return apply(x, table, targets, None, chunk, compiled)[0]


def weighted_cross_entropy(
    x: Tensor,
    table: Tensor,
    targets: Tensor,
    weights: Tensor,
    chunk: int = 512,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy`, but the mean is weighted: weights [rows] f32, not negative.

    Returns (scalar f32, 0 if no row has any weight; the losses of all rows [rows], detached).
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _LinearCrossEntropy.apply
    return apply(x, table, targets, weights, chunk, compiled)
