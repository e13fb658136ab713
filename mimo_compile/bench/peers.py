"""Peers: the same workload done by PyTorch, from the same real weights.

Formats differ, so each peer states its own: eager ``fp32`` and ``bf16`` multiply dequantised weights,
``int8-dynamic`` is PyTorch's own dynamically quantised linear layer (8 bits whatever the workload has).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mimo_compile.bench.contest import Contestant
from mimo_compile.bench.runnable import copies
from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload

if TYPE_CHECKING:
    import torch

Make = Callable[[], "tuple[tuple[torch.Tensor, ...], float]"]
"""Makes a fresh set of the tensors that a cold run rotates over; returns it with its bytes."""


def known_peers() -> dict[str, Callable[..., list[Contestant]]]:
    """Return the peers there are, by the name that ``--peers`` takes."""
    return {"torch": torch_contestants}


def parse_peers(text: str) -> list[str]:
    """Parse ``--peers``: names with commas between, or ``none``.

    Raises:
        UsageError: an unknown peer.
    """
    names = [n for n in text.split(",") if n and n != "none"]
    for name in names:
        if name not in known_peers():
            raise UsageError(
                f"unknown peer {name!r} (--peers)", remedy=f"use {', '.join(known_peers())} or none"
            )
    return names


def torch_contestants(
    workload: Workload,
    hardware: Hardware,
    inputs: Mapping[str, Array],
    cache: str,
    cold_bytes: int,
    memory_bytes: int,
) -> list[Contestant]:
    """Return PyTorch's ways to compute a workload, on as many threads as ours."""
    import torch

    maker = {"mpgemm": _mpgemm, "cached_attention": _attention, "moe": _moe}.get(workload.op)
    if maker is None:
        return []
    op = get_op(workload.op)
    flops = op.counts(workload).flops

    def use_threads() -> None:
        torch.set_num_threads(hardware.threads)

    out = []
    for label, call, make in maker(op.full(workload), inputs):
        first, nbytes = make()
        count = copies(int(nbytes), cold_bytes if cache == "cold" else 0, memory_bytes)
        sets = [first, *(make()[0] for _ in range(count - 1))]

        def guarded(args: tuple[torch.Tensor, ...], call: Callable[..., Any] = call) -> object:
            with torch.inference_mode():
                return call(*args)

        contestant = Contestant(
            op=str(workload),
            impl=f"torch {label} {version('torch')}",
            threads=hardware.threads,
            cache=cache,
            call=guarded,
            sets=sets,
            bytes=nbytes,
            operations=flops,
            prepare=use_threads,
        )
        out.append(contestant)
    return out


def _mpgemm(p: Mapping[str, Any], inputs: Mapping[str, Array]) -> list[tuple[str, Any, Make]]:
    import torch

    from mimo_compile.ir.ops.mpgemm import real_weights

    fmt = parse_weight_format(p["w"])
    weight = real_weights(inputs, "", fmt).to(torch.float32)
    x = torch.from_numpy(inputs["x"])
    bias = torch.from_numpy(inputs["bias"]) if p["bias"] else None
    out: list[tuple[str, Any, Make]] = []
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rows = x.to(dtype)
        add = None if bias is None else bias.to(dtype)

        def make(dtype: torch.dtype = dtype) -> tuple[tuple[torch.Tensor, ...], float]:
            w = weight.to(dtype, copy=True)
            return (w,), w.nbytes + 4.0 * p["m"] * (p["n"] + p["k"])

        def call(w: Any, rows: Any = rows, add: Any = add) -> Any:
            return torch.nn.functional.linear(rows, w, add)

        out.append((label, call, make))
    out.append(("int8-dynamic", lambda layer: layer(x), lambda: _int8_dynamic(weight, bias, p)))
    return out


def _int8_dynamic(weight: Any, bias: Any, p: Mapping[str, Any]) -> tuple[tuple[Any, ...], float]:
    import torch

    layer = torch.nn.Linear(p["k"], p["n"], bias=bias is not None)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the API is marked as moving to another package
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
        quantised = torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, torch.qint8)
    return (quantised,), p["n"] * p["k"] + 4.0 * p["m"] * (p["n"] + p["k"])


def _attention(p: Mapping[str, Any], inputs: Mapping[str, Array]) -> list[tuple[str, Any, Make]]:
    """`scaled_dot_product_attention` over the visible keys, laid out as it likes them; it knows no sink."""
    import torch

    from mimo_compile.ir.ops.cached_attention import CachedAttention

    op = CachedAttention()
    scale, length = op.softmax_scale(p), min(op.kv_length(p), p["cap"])
    window = p["window"]
    out: list[tuple[str, Any, Make]] = []
    for label, dtype in (("sdpa fp32", torch.float32), ("sdpa bf16", torch.bfloat16)):
        q = torch.from_numpy(inputs["q"]).to(dtype).transpose(0, 1)[None].contiguous()
        keys = min(length, window + p["t"] - 1) if window else length
        mask = _mask(p["t"], keys, window)

        def make(
            dtype: torch.dtype = dtype, keys: int = keys, other: float = 2.0 * q.nbytes
        ) -> tuple[tuple[torch.Tensor, ...], float]:
            def rows(name: str) -> torch.Tensor:
                part = torch.nan_to_num(torch.from_numpy(inputs[name][:keys])).to(dtype, copy=True)
                return part.transpose(0, 1)[None].contiguous()

            k, v = rows("k_cache"), rows("v_cache")
            return (k, v), k.nbytes + v.nbytes + other

        def call(k: Any, v: Any, q: Any = q, mask: Any = mask) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
            )

        out.append((label, call, make))
    return out


def _mask(tokens: int, keys: int, window: int) -> Any:
    """Return what each of the last ``tokens`` positions may see, or None when that is everything."""
    import torch

    if tokens == 1:
        return None
    query = torch.arange(keys - tokens, keys)[:, None]
    key = torch.arange(keys)[None]
    seen = key <= query
    return seen & (key > query - window) if window else seen


def _moe(p: Mapping[str, Any], inputs: Mapping[str, Array]) -> list[tuple[str, Any, Make]]:
    """The loop over chosen experts that model code in PyTorch has, on dequantised weights."""
    import torch

    from mimo_compile.ir.ops.mpgemm import real_weights

    fmt = parse_weight_format(p["w"])
    w13 = real_weights(inputs, "w13_", fmt)
    w2 = real_weights(inputs, "w2_", fmt)
    ids, share = torch.from_numpy(inputs["ids"]).long(), torch.from_numpy(inputs["weights"])
    hit = sorted(set(ids.flatten().tolist()))
    out: list[tuple[str, Any, Make]] = []
    for label, dtype in (("loop fp32", torch.float32), ("loop bf16", torch.bfloat16)):
        x, weights = torch.from_numpy(inputs["x"]).to(dtype), share.to(dtype)

        def make(dtype: torch.dtype = dtype) -> tuple[tuple[torch.Tensor, ...], float]:
            a, b = w13.to(dtype, copy=True), w2.to(dtype, copy=True)
            used = (a.nbytes + b.nbytes) * len(hit) / p["e"]
            return (a, b), used + 8.0 * p["t"] * p["d"]

        def call(a: Any, b: Any, x: Any = x, weights: Any = weights) -> Any:
            y = torch.zeros_like(x)
            for e in hit:
                rows, slot = torch.where(ids == e)
                gate, up = torch.nn.functional.linear(x[rows], a[e]).chunk(2, -1)
                h = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, b[e])
                y.index_add_(0, rows, h * weights[rows, slot, None])
            return y

        out.append((label, call, make))
    return out
