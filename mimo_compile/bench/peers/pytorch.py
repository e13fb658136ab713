"""PyTorch as a peer: eager linear layers in its own formats, forms of experts and of attention.

Formats differ, so each variant states its own: ``fp32`` and ``bf16`` linear layers; ``int8-dynamic``, the
quantised linear layer (activations 7 bits, one scale); ``int8-int-mm``, rows of activations quantised by
eager operations around `_int_mm`; ``int8-weight-only`` and ``int4-weight-only`` with bf16 activations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mimo_compile.bench.contest import Contestant
from mimo_compile.bench.peers.base import (
    Ask,
    LeftOut,
    Peer,
    Variant,
    dequantise,
    int8_error,
    packed,
    quantise,
    random_weights,
)

if TYPE_CHECKING:
    import torch

    from mimo_compile.bench.models.entrant import Entrant, ModelAsk

_BF16_ERROR = 0.01
_INT4_GROUPS = (32, 64, 128, 256)


class TorchPeer(Peer):
    """Eager PyTorch on as many threads as ours."""

    name = "torch"
    packages = ("torch",)
    remedy = "pip install 'mimo-compile[compile]'"

    def models(self, ask: ModelAsk) -> Iterator[Entrant | LeftOut]:
        """Offer transformers' own implementation, in float32 and bfloat16 where memory allows."""
        import psutil

        from mimo_compile.bench.models.eager import entrants

        yield from entrants(ask, psutil.virtual_memory().available)

    def prepare(self, ask: Ask) -> Callable[[], None]:
        """Return what sets the number of threads."""
        import torch

        return lambda: torch.set_num_threads(ask.hardware.threads)

    def enter(self, ask: Ask) -> tuple[list[Contestant], list[LeftOut]]:
        """Check the variants, for attention those of all its forms, and return who takes part."""
        if ask.workload.op != "cached_attention":
            return super().enter(ask)
        from mimo_compile.bench.peers.torch_attention import enter_all

        return enter_all(ask)

    def variants(self, ask: Ask) -> Iterator[Variant | LeftOut]:
        """Offer eager linear layers in the formats near the workload's, or its experts."""
        op = ask.workload.op
        if op == "mpgemm":
            made: Iterator[Variant | LeftOut] = _linear(ask)
        else:
            from mimo_compile.bench.peers.expert_forms import experts

            made = experts(ask) if op == "moe" else iter(())
        for offer in made:
            if isinstance(offer, Variant):
                _guard(offer)
            yield offer


def _guard(variant: Variant) -> None:
    """Let a variant compute without PyTorch's bookkeeping for gradients."""
    import torch

    call, result = variant.call, variant.result

    def guarded(arguments: Any) -> object:
        with torch.inference_mode():
            return call(arguments)

    def value(arguments: Any) -> Any:
        return guarded(arguments).float().numpy()  # type: ignore[attr-defined]

    variant.call = guarded
    if result is None and variant.weights is not None:
        variant.result = value


def _linear(ask: Ask) -> Iterator[Variant | LeftOut]:
    fmt = ask.format
    yield from _floats(ask)
    yield _int8_dynamic(ask)
    if fmt.is_float or fmt.bits_per_weight > 4:
        yield _int_mm(ask)
        yield _int8_weight_only(ask)
    if not fmt.is_float and fmt.bits_per_weight <= 4:
        yield _int4_weight_only(ask)


def _inputs(ask: Ask, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return x and bias."""
    import torch

    bias = ask.inputs.get("bias")
    x = torch.from_numpy(ask.inputs["x"]).to(dtype)
    return x, None if bias is None else torch.from_numpy(bias).to(dtype)


def _floats(ask: Ask) -> Iterator[Variant]:
    import torch

    _, n, k = ask.shape
    weight = torch.from_numpy(random_weights(n, k).copy())
    for label, dtype, error in (
        ("fp32", torch.float32, 1e-4),
        ("bf16", torch.bfloat16, _BF16_ERROR),
    ):
        x, bias = _inputs(ask, dtype)

        def call(w: Any, x: Any = x, bias: Any = bias) -> Any:
            return torch.nn.functional.linear(x, w, bias)

        yield Variant(
            label,
            lambda dtype=dtype: weight.to(dtype, copy=True),  # type: ignore[misc]
            call,
            n * k * dtype.itemsize,
            8.0 * dtype.itemsize,
            weights=lambda rows, dtype=dtype: weight[rows].to(dtype).double().numpy(),  # type: ignore[misc]
            error=error,
        )


def _int8_dynamic(ask: Ask) -> Variant:
    import torch

    _, n, k = ask.shape
    x, bias = _inputs(ask, torch.float32)

    def make() -> Any:
        layer = torch.nn.Linear(k, n, bias=bias is not None)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the API is marked as moving to another package
            layer.weight.copy_(torch.from_numpy(random_weights(n, k).copy()))
            if bias is not None:
                layer.bias.copy_(bias)
            # it replaces modules inside the one it is given, never that one itself
            outer = torch.nn.Sequential(layer)
            return torch.ao.quantization.quantize_dynamic(outer, {torch.nn.Linear}, torch.qint8)[0]

    def weights(rows: Any) -> Any:
        return packed("torch int8-dynamic", n, k, make).weight().dequantize()[rows].double().numpy()

    error = int8_error(ask.inputs["x"], None)
    return Variant(
        "int8-dynamic", make, lambda layer: layer(x), n * k, 8.0, weights=weights, error=error
    )


def _rows_int8(n: int, k: int) -> tuple[Any, Any]:
    """Return codes int8 [N, K] around zero and scales f32 [N] as tensors."""
    import torch

    codes, scale = quantise(n, k, 8, k)
    return torch.from_numpy((codes ^ 0x80).view(np.int8)), torch.from_numpy(scale[:, 0].copy())


def _int_mm(ask: Ask) -> Variant:
    import torch

    _, n, k = ask.shape
    x, bias = _inputs(ask, torch.float32)

    def make() -> Any:
        codes, scale = _rows_int8(n, k)
        return codes.clone(), scale.clone()

    def call(arguments: Any) -> Any:
        codes, scale = arguments
        step = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
        y = torch._int_mm((x / step).round_().to(torch.int8), codes.t())
        y = y.float().mul_(step).mul_(scale)
        return y if bias is None else y.add_(bias)

    return Variant(
        "int8-int-mm", make, call, n * (k + 4), 8 + 32 / k,
        weights=_stored(ask, 8, k), error=int8_error(ask.inputs["x"], 0),
    )  # fmt: skip


def _int8_weight_only(ask: Ask) -> Variant:
    import torch

    _, n, k = ask.shape
    x, bias = _inputs(ask, torch.bfloat16)

    def make() -> Any:
        codes, scale = _rows_int8(n, k)
        return codes.clone(), scale.to(torch.bfloat16)

    def call(arguments: Any) -> Any:
        y = torch.ops.aten._weight_int8pack_mm(x, *arguments)
        return y if bias is None else y + bias

    return Variant(
        "int8-weight-only", make, call, n * (k + 2), 8 + 16 / k,
        weights=_stored(ask, 8, k), error=_BF16_ERROR,
    )  # fmt: skip


def _int4_weight_only(ask: Ask) -> Variant | LeftOut:
    import torch

    _, n, k = ask.shape
    group = ask.format.group if ask.format.group in _INT4_GROUPS else 128
    label = f"int4-weight-only-g{group}"
    if k % group or n % 16:
        return LeftOut(label, f"K={k} is no multiple of {group}, or N={n} of 16")
    x, bias = _inputs(ask, torch.bfloat16)

    def pack() -> Any:
        codes, scale = quantise(n, k, 4, group)
        whole = torch.from_numpy(codes.astype(np.int32))
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
        columns = torch.from_numpy(scale.T.copy()).to(torch.bfloat16)
        return weight, torch.stack([columns, torch.zeros_like(columns)], dim=-1)

    def make() -> Any:
        weight, scales = packed(f"torch {label}", n, k, pack)
        return weight.clone(), group, scales.clone()

    def call(arguments: Any) -> Any:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, *arguments)
        return y if bias is None else y + bias

    # a scale and an offset for each group, both bf16
    return Variant(
        label, make, call, n * k // 2 + 4 * n * (k // group), 4 + 32 / group,
        weights=_stored(ask, 4, group), error=_BF16_ERROR,
    )  # fmt: skip


def _stored(ask: Ask, bits: int, group: int) -> Callable[[Any], Any]:
    """Return what gives real rows of `quantise`."""
    _, n, k = ask.shape

    def weights(rows: Any) -> Any:
        codes, scale = quantise(n, k, bits, group)
        return dequantise(codes[rows], scale[rows], bits, group)

    return weights
