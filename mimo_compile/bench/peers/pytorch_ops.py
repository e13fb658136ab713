"""PyTorch's attention and mixture of experts beside ours, from the same real weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mimo_compile.bench.peers.base import Ask, LeftOut, Variant

if TYPE_CHECKING:
    import torch


def attention(ask: Ask) -> Iterator[Variant | LeftOut]:
    """`scaled_dot_product_attention` over the visible keys, laid out as it likes them; it knows no sink."""
    import torch

    from mimo_compile.ir.ops.cached_attention import CachedAttention

    op, p, inputs = CachedAttention(), ask.params, ask.inputs
    scale, length = op.softmax_scale(p), min(op.kv_length(p), p["cap"])
    window = p["window"]
    for label, dtype in (("sdpa fp32", torch.float32), ("sdpa bf16", torch.bfloat16)):
        q = torch.from_numpy(inputs["q"]).to(dtype).transpose(0, 1)[None].contiguous()
        keys = min(length, window + p["t"] - 1) if window else length
        mask = _mask(p["t"], keys, window)

        def make(dtype: torch.dtype = dtype, keys: int = keys) -> tuple[torch.Tensor, ...]:
            def rows(name: str) -> torch.Tensor:
                part = torch.nan_to_num(torch.from_numpy(inputs[name][:keys])).to(dtype, copy=True)
                return part.transpose(0, 1)[None].contiguous()

            return rows("k_cache"), rows("v_cache")

        def call(arguments: Any, q: Any = q, mask: Any = mask) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(
                q, arguments[0], arguments[1], attn_mask=mask, scale=scale, enable_gqa=True
            )

        yield Variant(label, make, call, sum(t.nbytes for t in make()))


def _mask(tokens: int, keys: int, window: int) -> Any:
    """Return what each of the last ``tokens`` positions may see, or None when that is everything."""
    import torch

    if tokens == 1:
        return None
    query = torch.arange(keys - tokens, keys)[:, None]
    key = torch.arange(keys)[None]
    seen = key <= query
    return seen & (key > query - window) if window else seen


def experts(ask: Ask) -> Iterator[Variant | LeftOut]:
    """The loop over chosen experts that model code in PyTorch has, on dequantised weights."""
    import torch

    from mimo_compile.ir.ops.mpgemm import real_weights

    p, inputs = ask.params, ask.inputs
    w13 = real_weights(inputs, "w13_", ask.format)
    w2 = real_weights(inputs, "w2_", ask.format)
    ids, share = torch.from_numpy(inputs["ids"]).long(), torch.from_numpy(inputs["weights"])
    hit = sorted(set(ids.flatten().tolist()))
    for label, dtype in (("loop fp32", torch.float32), ("loop bf16", torch.bfloat16)):
        x, weights = torch.from_numpy(inputs["x"]).to(dtype), share.to(dtype)

        def make(dtype: torch.dtype = dtype) -> tuple[torch.Tensor, ...]:
            return w13.to(dtype, copy=True), w2.to(dtype, copy=True)

        def call(arguments: Any, x: Any = x, weights: Any = weights) -> Any:
            a, b = arguments
            y = torch.zeros_like(x)
            for e in hit:
                rows, slot = torch.where(ids == e)
                gate, up = torch.nn.functional.linear(x[rows], a[e]).chunk(2, -1)
                h = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, b[e])
                y.index_add_(0, rows, h * weights[rows, slot, None])
            return y

        used = (w13.numel() + w2.numel()) * dtype.itemsize * len(hit) / p["e"]
        yield Variant(label, make, call, used, 8.0 * dtype.itemsize)
