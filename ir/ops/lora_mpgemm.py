"""Mixed-precision matmul with low-rank adapters (QLoRA) over weights that never change.

``y[m] = W x[m] (+ bias) + gain[i, part] * B[i] (A[i] x[m])`` with ``i = adapter[m]``; any number that is
no adapter's (-1) means W alone. A sees the activations as they are, also where W takes them quantised.

Several matrices that share an input may stand on top of each other in W (``parts``, rows of each): each
has r rows of its own in A, a gain of its own, and its rows of B act on these alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.formats import E4M3_NAN, parse_weight_format
from mimo_compile.ir.ops.base import Arg, Array, Param
from mimo_compile.ir.ops.mpgemm import MpGemm
from mimo_compile.ir.ops.numerics import U32, bf16_to_f32, f32_to_bf16, torch_f64
from mimo_compile.ir.workload import Workload

ADAPTER_DTYPES = {"f32": "float32", "bf16": "uint16", "fp8": "uint8"}
"""How A and B may be stored: name in workloads -> numpy dtype. fp8 is E4M3, its scales are in ``gain``."""
_SPAN = {torch.float32: "f32", torch.bfloat16: "bf16", torch.uint8: "fp8"}


@torch.library.custom_op("mimo::lora_mpgemm", mutates_args=())
def lora_mpgemm(
    x: Tensor,
    adapter: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gain: Tensor,
    w: str,
    a: str,
    s: str,
    parts: str,
) -> Tensor:
    """Quantised linear layer with adapters: ``x [T, K]``, ``adapter [T]`` int32 -> ``[T, N]``.

    ``lora_a [L, P r, K]``, ``lora_b [L, N, r]`` (f32, bf16, or E4M3 bits), ``gain [L, P]`` f32;
    ``parts``: rows of each of P matrices in the weight, such as ``64+16+16`` (empty: one matrix).
    """
    y: Tensor = torch.ops.mimo.mpgemm(x, codes, scale, zero, bias, w, a, s)
    return add_adapters(y, x, adapter, lora_a, lora_b, gain, parts)


@lora_mpgemm.register_fake
def _(
    x: Tensor, adapter: Any, codes: Tensor, scale: Any, zero: Any, bias: Any, lora_a: Any,
    lora_b: Tensor, gain: Any, w: str, a: str, s: str, parts: str,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], lora_b.shape[1]))


@torch.library.custom_op("mimo::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor, adapter: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor,
    gain: Tensor, parts: str, a: str = "a16",
) -> Tensor:  # fmt: skip
    """Float linear layer with adapters; see `linear` and `lora_mpgemm`."""
    y: Tensor = torch.ops.mimo.linear(x, weight, bias, a)
    return add_adapters(y, x, adapter, lora_a, lora_b, gain, parts)


@lora_linear.register_fake
def _(
    x: Tensor, adapter: Any, weight: Tensor, bias: Any, lora_a: Any, lora_b: Any, gain: Any,
    parts: str, a: str = "a16",
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def add_adapters(
    y: Tensor, x: Tensor, adapter: Tensor, lora_a: Tensor, lora_b: Tensor, gain: Tensor, parts: str
) -> Tensor:
    """Return y with each row's adapter added; rows without one, and zero deltas, keep their bits."""
    out = y.clone()
    rows = part_rows(parts, y.shape[-1])
    for i in range(lora_a.shape[0]):
        at = (adapter == i).nonzero()[:, 0]
        if not at.numel():
            continue
        inner = x[at] @ _values(lora_a[i], x.dtype).T * part_gain(gain[i], lora_b.shape[-1], x)
        pieces = [
            t @ b.T
            for t, b in zip(
                inner.chunk(len(rows), -1), _values(lora_b[i], x.dtype).split(rows), strict=True
            )
        ]
        delta = torch.cat(pieces, -1)
        out[at] = torch.where(delta != 0, y[at] + delta, y[at])
    return out


def part_gain(gain: Tensor, r: int, like: Tensor) -> Tensor:
    """Return ``gain [P]`` for each row of A: ``[P r]``."""
    return gain.to(like.dtype).repeat_interleave(r)


def part_rows(parts: str, n: int) -> list[int]:
    """Return the rows of each matrix that W is made of.

    Raises:
        UsageError: they are no positive numbers whose sum is ``n``.
    """
    if not parts:
        return [n]
    rows = [int(t) if t.isdecimal() else 0 for t in parts.split("+")]
    if min(rows) < 1 or sum(rows) != n:
        raise UsageError(f"lora_mpgemm: parts={parts} are not row counts that add up to n={n}")
    return rows


def adapter_dtype(tensor: Tensor) -> str:
    """Return the name in workloads of how an adapter's matrix is stored."""
    return _SPAN[tensor.dtype]


def adapter_f32(stored: Array) -> Array:
    """Return stored values of A or B as float32 (E4M3 without its scale)."""
    if stored.dtype == np.uint16:
        return bf16_to_f32(stored)
    if stored.dtype == np.uint8:
        table = np.array(parse_weight_format("fp8b128").values, np.float32)
        decoded: Array = table[stored]
        return decoded
    return stored


def _values(stored: Tensor, dtype: torch.dtype) -> Tensor:
    if stored.dtype == torch.uint8:
        table = torch.tensor(parse_weight_format("fp8b128").values, dtype=dtype)
        return table[stored.to(torch.int64)]
    return stored.to(dtype)


class LoraMpGemm(MpGemm):
    """``lora_mpgemm:m=1,n=4096,k=4096,w=w4g64,a=a8,r=16,l=4``: l adapters of rank r."""

    name = "lora_mpgemm"
    params = (
        *MpGemm.params,
        Param("r", int, low=1),
        Param("l", int, 1, low=1),
        Param("d", str, "bf16"),
        Param("parts", str, ""),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse what `MpGemm` refuses, unknown storage and parts that are not the matrix."""
        super().check(p)
        if p["d"] not in ADAPTER_DTYPES:
            raise UsageError(
                f"lora_mpgemm: d (adapter storage) must be {', '.join(ADAPTER_DTYPES)}"
            )
        part_rows(p["parts"], p["n"])

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return x [m, k], adapter [m]; the matrix; lora_a [l, P r, k], lora_b [l, n, r], gain [l, P]; y."""
        p = self.full(workload)
        x, *weights, y = super().args(workload)
        kind, count = ADAPTER_DTYPES[p["d"]], len(part_rows(p["parts"], p["n"]))
        return (
            x,
            Arg("adapter", "input", (p["m"],), "int32"),
            *weights,
            Arg("lora_a", "weight", (p["l"], count * p["r"], p["k"]), kind),
            Arg("lora_b", "weight", (p["l"], p["n"], p["r"]), kind),
            Arg("gain", "weight", (p["l"], count), "float32"),
            y,
        )

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw `MpGemm`'s inputs, adapters of trained size, the first row's adapter 0, others any or none."""
        p = self.full(workload)
        shapes = {a.name: a.shape for a in self.args(workload)}
        out = super().make_inputs(workload, rng)
        ids = rng.integers(-1, p["l"], p["m"]).astype(np.int32)
        ids[0] = 0
        out["adapter"] = ids
        for name, spread in (("lora_a", p["k"] ** -0.5), ("lora_b", 0.02)):
            values = rng.standard_normal(shapes[name], dtype=np.float32)
            if p["d"] == "fp8":
                codes = rng.integers(0, 256, shapes[name], dtype=np.uint8)
                codes[np.isin(codes, E4M3_NAN)] = 0
                out[name] = codes
            else:
                values *= np.float32(spread)
                out[name] = f32_to_bf16(values) if p["d"] == "bf16" else values
        size = 1e-6 if p["d"] == "fp8" else 1.0
        out["gain"] = (rng.random(shapes["gain"]) * 2 + 0.5).astype(np.float32) * np.float32(size)
        return out

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64."""
        y = super().reference(workload, inputs)["y"]
        return {"y": y + self._deltas(workload, inputs)[0]}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Add both small products' rounding of float32 sums to `MpGemm.bound`."""
        base = super().bound(workload, inputs, expected)["y"]
        return {"y": base + self._deltas(workload, inputs)[1]}

    def _deltas(self, workload: Workload, inputs: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return what adapters add, ``[m, n]`` float64, and its bound."""
        p = self.full(workload)
        rows = part_rows(p["parts"], p["n"])
        delta, bound = np.zeros((p["m"], p["n"])), np.zeros((p["m"], p["n"]))
        for m, i in enumerate(inputs["adapter"]):
            if not 0 <= i < p["l"]:
                continue
            x = inputs["x"][m].astype(np.float64)
            a = torch_f64(adapter_f32(inputs["lora_a"][i])).numpy()
            b = torch_f64(adapter_f32(inputs["lora_b"][i])).numpy()
            gain = np.repeat(inputs["gain"][i].astype(np.float64), p["r"])
            t, size = a @ x * gain, np.abs(a) @ np.abs(x) * np.abs(gain)
            wrong = (4 * max(p["k"], 16) ** 0.5 + 4) * U32 * size
            at = 0
            for part, count in enumerate(rows):
                mine, own = slice(part * p["r"], (part + 1) * p["r"]), slice(at, at + count)
                delta[m, own] = b[own] @ t[mine]
                bound[m, own] = np.abs(b[own]) @ (
                    wrong[mine] + 4 * max(p["r"], 16) ** 0.5 * U32 * np.abs(t[mine])
                )
                at += count
        return delta, bound + 2 * U32 * np.abs(delta)

    def counts(self, workload: Workload) -> Counts:
        """`MpGemm.counts` and one row's adapter: other rows may have none."""
        p = self.full(workload)
        count = len(part_rows(p["parts"], p["n"]))
        each = float(p["r"] * (count * p["k"] + p["n"]))
        width = np.dtype(ADAPTER_DTYPES[p["d"]]).itemsize
        return super().counts(workload) + Counts({"fma_f32": each}, {"dram": each * width})
