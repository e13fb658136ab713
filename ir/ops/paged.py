"""Torch ops over caches in pages: `paged_attention` and `kv_append_pages`.

Their schemas have the block table, which those of caches of their own have not. They are workloads of
`CachedAttention` and `KvAppend`; see `pages`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimo_compile.ir import float8
from mimo_compile.ir.caches import SCALED
from mimo_compile.ir.ops.cached_attention import attend
from mimo_compile.ir.ops.kv_append import prepare
from mimo_compile.ir.ops.pages import row_of
from mimo_compile.ir.ops.pooled import own_rows


@torch.library.custom_op("mimo::paged_attention", mutates_args=())
def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, pos: Tensor, sink: Tensor | None,
    scale: float, cap: int, page: int, c: str = "",
) -> Tensor:  # fmt: skip
    """Attend over a pool: ``q [B * T, H, D]``, caches ``[slots, KV, D/DV]`` -> ``[B * T, H, DV]``.

    Args:
        q: Queries.
        k_cache: Keys of all sequences.
        v_cache: Values of all sequences.
        pages: Block tables, int32 ``[B, width]``.
        pos: int32 ``[2]`` of one sequence, else ``[B, 2]``: start and valid.
        sink: Logits ``[H]`` of phantom keys.
        scale: Factor on q.k.
        cap: Most positions of a sequence.
        page: Positions in a page.
        c: Names the caches' format where their type does not, as for `kv_append`.
    """
    out = []
    for mine, table, at in zip(q.chunk(len(pages)), pages, pos.reshape(-1, 2), strict=True):
        keys, values = (
            own_rows(pool, table, page, 1, int(at.sum())) for pool in (k_cache, v_cache)
        )
        made = mine.new_zeros((*mine.shape[:2], v_cache.shape[2]))
        if int(at[1]):
            made = attend(mine, keys, values, at, sink, scale, 0)
        out.append(made)
    return torch.cat(out)


@paged_attention.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, pos: Tensor, sink: Any, scale: float,
    cap: int, page: int, c: str = "",
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[1], v_cache.shape[-1]))


@torch.library.custom_op("mimo::kv_append_pages", mutates_args=("k_cache", "v_cache"))
def kv_append_pages(
    qkv: Tensor, table: Tensor, pos: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, k_cache: Tensor,
    v_cache: Tensor, pages: Tensor, heads: int, eps: float, v_scale: float, cap: int, page: int, c: str = "",
) -> Tensor:  # fmt: skip
    """Append to a pool: ``qkv [B * T, ...]``, caches ``[slots, KV, D/DV]`` -> q ``[B * T, H, D]``.

    ``table [B * T, 2, R/2]`` are angles; what comes last is that of `paged_attention`.
    """
    kv_heads, d, dv = *k_cache.shape[1:], v_cache.shape[2]
    made = []
    each = zip(
        qkv.chunk(len(pages)), table.chunk(len(pages)), pages, pos.reshape(-1, 2), strict=True
    )
    for mine, angles, own, at in each:
        q, k, v, positions = prepare(
            mine, angles, at, q_norm, k_norm, heads, kv_heads, d, dv, eps, v_scale, cap
        )
        if c in SCALED:
            k, v = float8.rounded(k), float8.rounded(v)
        slots = row_of(own.long(), page, 1, positions)
        k_cache[slots], v_cache[slots] = k.to(k_cache.dtype), v.to(v_cache.dtype)
        made.append(q)
    return torch.cat(made)


@kv_append_pages.register_fake
def _(
    qkv: Tensor, table: Tensor, pos: Tensor, q_norm: Any, k_norm: Any, k_cache: Tensor, v_cache: Tensor,
    pages: Tensor, heads: int, eps: float, v_scale: float, cap: int, page: int, c: str = "",
) -> Tensor:  # fmt: skip
    return qkv.new_empty((qkv.shape[0], heads, k_cache.shape[-1]))
