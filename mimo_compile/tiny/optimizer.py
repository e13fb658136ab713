"""Muon for the matrices, AdamW for everything else.

Muon (K. Jordan, 2024) replaces each matrix's momentum by the nearest semi-orthogonal matrix,
found with a few Newton-Schulz steps, and learns more per token than AdamW at this size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix of g: [count, rows, columns] close to 1."""
    a, b, c = _COEFFICIENTS
    tall = g.shape[-2] > g.shape[-1]
    x = g.transpose(-1, -2) if tall else g
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        square = x @ x.transpose(-1, -2)
        x = a * x + (b * square + c * (square @ square)) @ x
    out: Tensor = x.transpose(-1, -2) if tall else x
    return out


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised; for parameters [rows, columns] or stacks [count, rows, columns].

    The step of a matrix is scaled by sqrt(max(1, rows / columns)); `weight_decay` is decoupled.
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply one step; parameters of equal shape are orthogonalised together."""
        for group in self.param_groups:
            lr, beta = group["lr"], group["momentum"]
            shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1.0 - beta)
                update = torch.lerp(p.grad, state["momentum"], beta)
                flat = update.view(-1, *p.shape[-2:])
                shapes.setdefault((p.shape[-2], p.shape[-1]), []).append((p, flat))
            for (rows, columns), members in shapes.items():
                done = orthogonalise(torch.cat([flat for _, flat in members]))
                scale = max(1.0, rows / columns) ** 0.5
                for (p, _), part in zip(
                    members, done.split([f.shape[0] for _, f in members]), strict=True
                ):
                    p.mul_(1.0 - lr * group["weight_decay"])
                    p.add_(part.reshape(p.shape).to(p.dtype), alpha=-lr * scale)


def split_parameters(
    model: torch.nn.Module,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(matrices for Muon, embedding, norms and sinks for AdamW, routers for a slower AdamW).

    Parameters that need no gradient are left out.
    """
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    routers: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "router" in name:
            routers.append(parameter)
        elif parameter.ndim >= 2 and "embed" not in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    return matrices, rest, routers
