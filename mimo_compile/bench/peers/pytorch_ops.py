"""PyTorch's mixture of experts beside ours, from the same real weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mimo_compile.bench.peers.base import Ask, Variant


def experts(ask: Ask) -> Iterator[Variant]:
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
