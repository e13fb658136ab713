"""Queries and keys of SeerAttention-R's gates (float reference; products are ordinary matmuls in kernels).

Both start from what attention has before rotation: the queries of a group, concatenated, and the three pools
of a block's keys (`describe_blocks`, ``pool3``). Each is projected for its KV head, normalised if the model's
gates are, and rotated: the query at its own position, the key at its block's first (or last) one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimo_compile.ir.ops.kv_append import rotate


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
