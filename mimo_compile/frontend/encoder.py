"""torch's fused encoder operators (``nn.TransformerEncoderLayer`` without gradients), in plain operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mimo_compile.errors import InputError

SOURCE_MASK, PADDING_MASK = 0, 1
"""torch's mask types: ``[L, L]``, ``[batch, L]``; 2 is both together, ``[batch, heads, L, L]``."""


def _allowed(mask: Tensor | None, kind: int | None) -> Tensor | None:
    """Return torch's mask (True or -inf: leave out) as the one of attention (True: look at)."""
    if mask is None:
        return None
    if kind == PADDING_MASK:
        mask = mask[:, None, None, :]
    return ~mask if mask.dtype == torch.bool else mask


def attention(
    x: Tensor, heads: int, qkv: Tensor, qkv_bias: Tensor, out: Tensor, out_bias: Tensor,
    mask: Tensor | None, mask_type: int | None,
) -> Tensor:  # fmt: skip
    """Self-attention of ``x [batch, L, D]`` with one matrix ``qkv [3 D, D]``."""
    batch, length, width = x.shape
    parts = F.linear(x, qkv, qkv_bias).view(batch, length, 3, heads, width // heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=_allowed(mask, mask_type))
    return F.linear(y.transpose(1, 2).reshape(batch, length, width), out, out_bias)


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float,
    norm_weight_1: Tensor, norm_bias_1: Tensor, norm_weight_2: Tensor, norm_bias_2: Tensor,
    ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor, ffn_bias_2: Tensor,
    mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """``aten::_transformer_encoder_layer_fwd``."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    def attend(x: Tensor) -> Tensor:
        return attention(
            x, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type
        )

    def feed(x: Tensor) -> Tensor:
        h = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(h) if use_gelu else F.relu(h), ffn_weight_2, ffn_bias_2)

    if norm_first:
        src = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return src + feed(norm(src, norm_weight_2, norm_bias_2))
    src = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(src + feed(src), norm_weight_2, norm_bias_2)


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor,
    qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None,
    need_weights: bool = True, average_attn_weights: bool = True, mask_type: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``aten::_native_multi_head_attention`` of one tensor with itself, without the weights."""
    if need_weights:
        raise InputError(
            "nn.MultiheadAttention returns its attention weights", file="exported graph",
            remedy="Call it with need_weights=False",
        )  # fmt: skip
    y = attention(query, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)
    return y, y.new_empty(0)


ENCODER: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._transformer_encoder_layer_fwd.default: encoder_layer,
    torch.ops.aten._native_multi_head_attention.default: multi_head_attention,
}
"""Rules for `run_decompositions`."""
