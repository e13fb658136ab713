"""What SeerAttention-R's gates compute (arXiv 2506.08889), and how far float32 may be off.

Both sides start from what attention has before rotation: the queries of a group, concatenated, and the three
pools of a block's keys (greatest, least, mean). Each is projected for its KV head, normalised if the model's
gates are, and rotated: the query at its own position, the key at its block's first (or last) one. Caches hold
rotated keys, and attention gets rotated queries, so the ops `gate_queries` and `gate_keys` turn them back by
the same angles first: nothing has to be kept of a running block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.kv_append import rotate
from mimo_compile.ir.ops.numerics import U32, bf16_to_f32, f32_to_bf16

ANGLE = 8 * U32
"""How far a cosine or sine may be off, as in `rope_table`."""
TURN = ANGLE + 3 * U32
"""Error of a turned number over the sum of the magnitudes of its two parts: angles, two products, one sum."""


def angles(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> Tensor:
    """Return cosines and sines ``[n, 2, R/2]``; the angle is rounded to float32 first, as in `rope_table`."""
    angle = (positions.to(torch.float32)[:, None] * inv_freq.to(torch.float32)).to(dtype)
    return torch.stack([angle.cos(), angle.sin()], 1)


def _finish(x: Tensor, norm: Tensor | None, table: Tensor, eps: float) -> Tensor:
    if norm is not None:
        x = torch.nn.functional.rms_norm(x, (x.shape[-1],), norm.to(x.dtype), eps)
    return rotate(x, table.to(x.dtype))


def gate_queries(
    q: Tensor, weight: Tensor, norm: Tensor | None, table: Tensor, eps: float = 1e-6
) -> Tensor:
    """Return the gates' queries.

    Args:
        q: ``[T, H, D]``, not rotated.
        weight: ``[KV, group * D, G]``; a KV head's queries are concatenated.
        norm: ``[G]`` or None.
        table: cos and sin ``[T, 2, r]`` at the tokens' positions.
        eps: Of the norm.

    Returns:
        ``[T, KV, G]``.
    """
    joined = q.reshape(q.shape[0], weight.shape[0], -1)
    return _finish(torch.einsum("tud,udg->tug", joined, weight), norm, table, eps)


def gate_keys(
    pools: Tensor, weight: Tensor, norm: Tensor | None, table: Tensor, eps: float = 1e-6
) -> Tensor:
    """Return the compressed keys of blocks.

    Args:
        pools: ``[NB, KV, 3, D]``, greatest, least and mean of the unrotated keys.
        weight: ``[KV, 3 * D, G]``.
        norm: ``[G]`` or None.
        table: cos and sin ``[NB, 2, r]`` at the blocks' positions.
        eps: Of the norm.

    Returns:
        ``[NB, KV, G]``.
    """
    joined = pools.reshape(*pools.shape[:2], -1)
    return _finish(torch.einsum("nud,udg->nug", joined, weight), norm, table, eps)


# -- errors ------------------------------------------------------------------------------------------


def turned_bound(x: Tensor, half: int) -> Tensor:
    """Return how far float32 may be off after turning the first ``2 * half`` channels of ``x [..., D]``."""
    size = x.abs()
    pair = (size[..., :half] + size[..., half : 2 * half]) * TURN
    return torch.cat([pair, pair, torch.zeros_like(size[..., 2 * half :])], -1)


def finished_bound(
    x: Tensor, off: Tensor, weight: Tensor, norm: Tensor | None, half: int, eps: float
) -> Tensor:
    """Return how far float32 may be off after projection, norm and rotation.

    A sum of K products is off by ``K U32`` of the sum of their magnitudes, in any order. The root of a mean
    square moves by no more than the root mean square of what its terms move by; a quotient by what its
    parts do.

    Args:
        x: ``[n, KV, K]`` float64, exact.
        off: ``[n, KV, K]``, how far each may be off already.
        weight: ``[KV, K, G]`` float64.
        norm: ``[G]`` float64 or None.
        half: Pairs of channels that are rotated.
        eps: Of the norm.
    """
    size = torch.einsum("nuk,ukg->nug", x.abs() + off, weight.abs())
    y = torch.einsum("nuk,ukg->nug", x, weight).abs()
    d = torch.einsum("nuk,ukg->nug", off, weight.abs()) + (x.shape[-1] + 2) * U32 * size
    if norm is not None:
        root = (y.square().mean(-1, keepdim=True) + eps).sqrt()
        moved = d.square().mean(-1, keepdim=True).sqrt()
        moved = moved + (y.shape[-1] / 2 + 4) * U32 * (root + moved)
        least = (root - moved).clamp(min=0.5 * eps**0.5)  # kernels add eps, too
        d = (d + 4 * U32 * (y + d)) / least + y * moved / (least * root)
        y, d = y / root * norm.abs(), d * norm.abs()
    a, b = (slice(0, half), slice(half, 2 * half))
    pair = d[..., a] + d[..., b] + TURN * (y[..., a] + y[..., b] + d[..., a] + d[..., b])
    return torch.cat([pair, pair, d[..., 2 * half :]], -1) + 1e-37


# -- what the definitions of both ops share ------------------------------------------------------------


def check_gates(op: str, p: Any) -> None:
    """Refuse odd or too wide rotations, and formats of weights that there are none of."""
    if p["rot"] % 2 or p["grot"] % 2 or p["rot"] > p["d"] or p["grot"] > p["g"]:
        raise UsageError(f"{op}: rot and grot must be even, rot at most d and grot at most g")
    if p["w"] not in ("f32", "bf16"):
        raise UsageError(f"{op}: w must be f32 or bf16")


def weight_args(p: Any, columns: int) -> list[Arg]:
    """Return both frequencies, the projection ``[KV, columns, G]`` and the norm, where there is one."""
    stored = "float32" if p["w"] == "f32" else "uint16"
    out = [
        Arg("inv_freq", "weight", (p["rot"] // 2,), "float32"),
        Arg("gate_freq", "weight", (p["grot"] // 2,), "float32"),
        Arg("weight", "weight", (p["kv"], columns, p["g"]), stored),
    ]
    if p["norm"]:
        out.append(Arg("norm", "weight", (p["g"],), "float32"))
    return out


def draw_weights(p: Any, columns: int, rng: Any) -> dict[str, Array]:
    """Draw what `weight_args` lists: the usual frequencies, a projection that keeps magnitudes."""
    shapes = {arg.name: arg.shape for arg in weight_args(p, columns)}
    out: dict[str, Array] = {
        name: (1e4 ** (-torch.arange(n, dtype=torch.float64) / n)).float().numpy()
        for name, (n,) in ((name, shapes[name]) for name in ("inv_freq", "gate_freq"))
    }
    weight = rng.standard_normal(shapes["weight"], dtype="float32") * columns**-0.5
    out["weight"] = weight if p["w"] == "f32" else f32_to_bf16(weight)
    if p["norm"]:
        out["norm"] = rng.uniform(0.5, 1.5, shapes["norm"]).astype("float32")
    return out


def real_weights(inputs: Any) -> dict[str, Tensor]:
    """Return frequencies (float32), projection and norm (float64) as tensors."""
    out = {name: torch.from_numpy(inputs[name]) for name in ("inv_freq", "gate_freq")}
    for name in ("weight", "norm"):
        if name in inputs:
            array = inputs[name]
            out[name] = torch.from_numpy(
                bf16_to_f32(array) if array.dtype == "uint16" else array
            ).double()
    return out
