"""Mixed-precision matmul: few-bit (or float) weights times float or int8 activations.

``y[m, n] = sum_k x[m, k] * w[n, k] (+ bias[n])``. With ``a=a8`` each row of x is first quantised to int8
(`numerics.quantize_rows`), with ``a=a8g64`` each 64 columns of it, so that inner sums are integers and exact;
with ``a=abf16`` and ``a=af16`` x is rounded (`ir.formats`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.formats import (
    E4M3_NAN,
    WeightFormat,
    parse_act_format,
    parse_weight_format,
)
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.numerics import (
    TINY,
    U32,
    bf16_to_f32,
    complex_magnitudes,
    f32_to_bf16,
    fake_quantize,
    real_matrix,
    round_values,
    torch_f64,
)
from mimo_compile.ir.workload import Workload


@torch.library.custom_op("mimo::mpgemm", mutates_args=())
def mpgemm(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    w: str,
    a: str,
    s: str = "f16",
) -> Tensor:
    """Quantised linear layer ``x [..., K] -> [..., N]``; codes, scale and zero as in `ir.formats`.

    ``s`` says in what kernels keep scales and zero points: float16 only where that loses nothing.
    """
    fmt = parse_weight_format(w)
    weight = real_matrix(fmt, codes, scale, zero, x.dtype)
    return torch.nn.functional.linear(fake_quantize(x, fmt, a), weight, bias)


@mpgemm.register_fake
def _(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Any, bias: Any, w: str, a: str, s: str = "f16"
) -> Tensor:
    return x.new_empty((*x.shape[:-1], parse_weight_format(w).rows(codes.shape[0])))


@torch.library.custom_op("mimo::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: str = "a16") -> Tensor:
    """Float linear layer: ``x [..., K]``, ``weight [N, K]`` f32 or bf16 (widened exactly) -> ``[..., N]``."""
    how = parse_act_format(a)
    x = round_values(x, how) if how.rounded else x
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, a: str = "a16") -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def weight_args(prefix: str, fmt: WeightFormat, lead: tuple[int, ...], n: int, k: int) -> list[Arg]:
    """Return the canonical weight arguments of a matrix ``[*lead, n, k]`` in a format."""
    if fmt.is_float:
        dtype = {"f32": "float32", "bf16": "uint16", "f16": "float16"}[fmt.name]
        return [Arg(f"{prefix}w", "weight", (*lead, n, k), dtype)]
    scales = (*lead, *fmt.scale_shape(n, k))
    out = [
        Arg(f"{prefix}codes", "weight", (*lead, *fmt.code_shape(n, k)), "uint8"),
        Arg(f"{prefix}scale", "weight", scales, "float32"),
    ]
    if fmt.has_zero:
        out.append(Arg(f"{prefix}zero", "weight", scales, "float32"))
    return out


def random_weights(
    args: list[Arg], fmt: WeightFormat, rng: np.random.Generator
) -> dict[str, Array]:
    """Draw weights for `weight_args` (scales representable in float16)."""
    out: dict[str, Array] = {}
    for arg in args:
        if arg.name.endswith("codes"):
            codes = rng.integers(0, fmt.max_code + 1, arg.shape, dtype=np.uint8)
            if fmt.family == "fp8":
                codes[np.isin(codes, E4M3_NAN)] = 0
            out[arg.name] = codes
        elif arg.name.endswith("scale"):
            half = (rng.random(arg.shape) * 0.01 + 1e-3).astype(np.float16)
            out[arg.name] = half.astype(np.float32)
        elif arg.name.endswith("zero"):
            out[arg.name] = rng.integers(0, fmt.max_code + 1, arg.shape).astype(np.float32)
        else:
            values = rng.standard_normal(arg.shape, dtype=np.float32)
            out[arg.name] = (
                f32_to_bf16(values) if arg.dtype == "uint16" else values.astype(arg.dtype)
            )
    return out


def real_weights(inputs: Mapping[str, Array], prefix: str, fmt: WeightFormat) -> Tensor:
    """Return the real weights ``[..., N, K]`` as a float64 tensor."""
    if fmt.is_float:
        w = inputs[f"{prefix}w"]
        return torch_f64(bf16_to_f32(w) if w.dtype == np.uint16 else w)
    zero = inputs.get(f"{prefix}zero")
    codes = torch.from_numpy(np.ascontiguousarray(inputs[f"{prefix}codes"]))
    scale = torch_f64(inputs[f"{prefix}scale"])
    return real_matrix(fmt, codes, scale, None if zero is None else torch_f64(zero), torch.float64)


def magnitudes(
    inputs: Mapping[str, Array], prefix: str, fmt: WeightFormat, real: Tensor, act: str
) -> Tensor:
    """Return what bounds are computed of: the real weights, or sizes of terms that may cancel."""
    if fmt.has_zero and parse_act_format(act).kind == "bf16":
        return _zeros_apart(inputs, prefix, fmt)
    if fmt.family != "complex":
        return real
    codes = torch.from_numpy(np.ascontiguousarray(inputs[f"{prefix}codes"]))
    return complex_magnitudes(fmt, codes, torch_f64(inputs[f"{prefix}scale"]))


def real_activations(x: Array, fmt: WeightFormat, act: str) -> Tensor:
    """Return activations as the op uses them, float64: rounded, or quantised and scaled back."""
    return fake_quantize(torch_f64(x), fmt, act)


def matmul_bound(x: Tensor, w: Tensor, fmt: WeightFormat, act: str) -> Tensor:
    """Bound the float32 rounding of ``x @ w.T`` element by element.

    Groups of integer codes and int8 activations are exact, so only the sum over groups rounds:
    ``(G + 4) u * sum_g |group sum|``, G: runs of columns that share both scales. Float kernels get the
    statistical bound ``4 sqrt(K) u * |x| |w|`` for sums of K rounded products; with ``abf16`` also what
    an instruction that takes and gives zero for subnormal numbers loses.
    """
    k, how = x.shape[-1], parse_act_format(act)
    if how.is_int8 and fmt.is_integer:
        size = fmt.group_size(k)
        size = min(size, how.group) if how.group > 0 else size
        total = torch.zeros((*x.shape[:-1], w.shape[-2]), dtype=torch.float64)
        for start in range(0, k, size):
            total += (x[..., start : start + size] @ w[..., start : start + size].mT).abs()
        return (-(-k // size) + 4) * U32 * total * 2 + 1e-30
    bound: Tensor = 4 * max(k, 16) ** 0.5 * U32 * (x.abs() @ w.abs().mT) + 1e-30
    if how.kind == "bf16":
        bound = bound + TINY * (x.abs().sum(-1, keepdim=True) + w.abs().sum(-1) + 2 * k)
    return bound


def check_acts(op: str, fmt: WeightFormat, act: str) -> None:
    """Refuse activation formats that weights of a format cannot have.

    Raises:
        UsageError: it is unknown, or does not fit.
    """
    how = parse_act_format(act)
    if fmt.is_float and how.is_int8:
        raise UsageError(
            f"{op}: a={act} needs quantised weights (w=)", remedy="use a16, abf16 or af16"
        )
    if fmt.family == "complex" and how.group > 0:
        raise UsageError(f"{op}: {fmt} has no groups of activations", remedy="use a=a8")


def _zeros_apart(inputs: Mapping[str, Array], prefix: str, fmt: WeightFormat) -> Tensor:
    """Return magnitudes ``[..., N, K]`` of codes and zero points, both less the middle code, added up.

    bfloat16 holds no code less a fractional zero point, so that kernels sum both apart.
    """
    middle = float(1 << (fmt.bits - 1))
    codes = torch.from_numpy(np.ascontiguousarray(inputs[f"{prefix}codes"]))
    scale, zero = torch_f64(inputs[f"{prefix}scale"]), torch_f64(inputs[f"{prefix}zero"])
    both = [
        real_matrix(fmt, codes, scale, torch.full_like(zero, middle), torch.float64),
        real_matrix(fmt, torch.full_like(codes, int(middle)), scale, zero, torch.float64),
    ]
    return both[0].abs() + both[1].abs()


class MpGemm(OpDef):
    """``mpgemm:m=1,n=4096,k=4096,w=w4g64,a=a8``."""

    name = "mpgemm"
    params: ClassVar[tuple[Param, ...]] = (
        Param("m", int, low=1),
        Param("n", int, low=1),
        Param("k", int, low=1),
        Param("w", str, "f32"),
        Param("a", str, "a16"),
        Param("s", str, "f16"),
        Param("bias", int, 0),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse unknown formats and int8 activations with float weights."""
        fmt = parse_weight_format(p["w"])
        if p["s"] not in ("f16", "f32"):
            raise UsageError("mpgemm: s (scale storage) must be f16 or f32")
        check_acts("mpgemm", fmt, p["a"])
        if fmt.family == "complex" and (p["n"] % 2 or p["k"] % 2):
            raise UsageError(f"mpgemm: {fmt} needs even n and k")

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return x [m, k]; w or codes/scale(/zero); bias [n]; y [m, n]."""
        p = self.full(workload)
        m, n, k = p["m"], p["n"], p["k"]
        out = [Arg("x", "input", (m, k), "float32")]
        out += weight_args("", parse_weight_format(p["w"]), (), n, k)
        if p["bias"]:
            out.append(Arg("bias", "weight", (n,), "float32"))
        return (*out, Arg("y", "output", (m, n), "float32"))

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw normal activations with a few outliers, uniform codes."""
        p = self.full(workload)
        args = self.args(workload)
        x = rng.standard_normal(args[0].shape, dtype=np.float32)
        x[:, rng.integers(0, p["k"], 2)] *= 8
        out: dict[str, Array] = {"x": x}
        fmt = parse_weight_format(p["w"])
        out |= random_weights(weight_args("", fmt, (), p["n"], p["k"]), fmt, rng)
        if p["bias"]:
            out["bias"] = rng.standard_normal(p["n"], dtype=np.float32)
        return out

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64 (integer part exact)."""
        p = self.full(workload)
        fmt = parse_weight_format(p["w"])
        y = real_activations(inputs["x"], fmt, p["a"]) @ real_weights(inputs, "", fmt).mT
        if p["bias"]:
            y = y + torch_f64(inputs["bias"])
        return {"y": y.numpy()}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """See `matmul_bound`, plus one rounding of the result."""
        p = self.full(workload)
        fmt = parse_weight_format(p["w"])
        x = real_activations(inputs["x"], fmt, p["a"])
        w = magnitudes(inputs, "", fmt, real_weights(inputs, "", fmt), p["a"])
        bound = matmul_bound(x, w, fmt, p["a"]).numpy()
        extra = 4 * U32 * (np.abs(inputs["bias"]) if p["bias"] else 0.0)
        return {"y": bound + extra + 2 * U32 * np.abs(expected["y"])}

    def counts(self, workload: Workload) -> Counts:
        """Each multiply-add once; packed weights, activations and result once."""
        p = self.full(workload)
        fmt, m, n, k = parse_weight_format(p["w"]), p["m"], p["n"], p["k"]
        return Counts(
            {product_kind(p["a"]): float(m) * n * k},
            {"dram": weight_bytes(fmt, n, k, p["s"]) + 4.0 * m * (n + k)},
        )


def product_kind(act: str) -> str:
    """Return the kind of `ir.counts` of products with activations of a format."""
    return {"int8": "dot_i8", "bf16": "dot_bf16"}.get(parse_act_format(act).kind, "fma_f32")


def weight_bytes(fmt: WeightFormat, n: int, k: int, scale_dtype: str = "f16") -> float:
    """Return the bytes of a packed weight matrix with its scales and zero points."""
    if fmt.is_float:
        return n * k * fmt.bits / 8
    rows, columns = fmt.scale_shape(n, k)
    width = (2 if scale_dtype == "f16" else 4) * (2 if fmt.has_zero else 1)
    return n * k * fmt.bits_per_weight / 8 + rows * columns * width
