"""OpenVINO as a peer: its fully connected layer over compressed weights (u2, i4, i8) with f16 scales.

``dyn-quant`` quantises activations to int8 in groups at run time; ``bf16`` widens weights and multiplies in
bfloat16 (AMX or AVX-512 BF16 where the processor has them).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from mimo_compile.bench.peers.base import (
    Ask,
    LeftOut,
    Peer,
    Variant,
    dequantise,
    int8_error,
    nearest_bits,
    packed,
    quantise,
)
from mimo_compile.bench.peers.onnx_runtime import pack_bits
from mimo_compile.ir.ops.base import Array

_BITS = (2, 4, 8)
_ACTIVATIONS_GROUP = 128
"""Columns of x that share a scale, where the weights' groups are not smaller."""


class OpenVinoPeer(Peer):
    """One compiled model for each argument set."""

    name = "openvino"
    packages = ("openvino",)
    no_models = "has no way from a checkpoint to a whole model (optimum-intel has)"

    def variants(self, ask: Ask) -> Iterator[Variant | LeftOut]:
        """Offer the nearest bits at the workload's group and at 128, both kinds of arithmetic."""
        if ask.workload.op != "mpgemm":
            return
        bits = nearest_bits(ask.format, _BITS)
        if bits is None or "bias" in ask.inputs:
            yield LeftOut("compressed", "is compared on quantised weights without bias only")
            return
        k = ask.shape[2]
        own = ask.format.group if ask.format.group > 0 else k if bits == 8 else 64
        groups = [g for g in dict.fromkeys((own, 128)) if k % g == 0]
        if not groups:
            yield LeftOut("compressed", f"K={k} is no multiple of a group's size")
        for group in groups:
            yield _compressed(ask, bits, group, "dyn-quant")
        for group in groups[:1]:
            yield _compressed(ask, bits, group, "bf16")


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _compressed(ask: Ask, bits: int, group: int, arithmetic: str) -> Variant:
    import openvino

    m, n, k = ask.shape
    label = f"{'u' if bits == 2 else 'i'}{bits}-{f'g{group}' if group < k else 'row'}-{arithmetic}"
    x = openvino.Tensor(np.ascontiguousarray(ask.inputs["x"]))
    y = openvino.Tensor(np.zeros((m, n), np.float32))
    dynamic = arithmetic == "dyn-quant"
    group_x = min(group, _ACTIVATIONS_GROUP)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(ask.hardware.threads),
        "ENABLE_CPU_PINNING": "NO",
        "INFERENCE_PRECISION_HINT": "f32" if dynamic else "bf16",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group_x if dynamic else 0),
    }

    def pack() -> tuple[Array, Array]:
        codes, scale = quantise(n, k, bits, group)
        if bits > 2:  # signed types: two's complement
            codes = codes ^ (1 << (bits - 1))
        return pack_bits(codes, bits), scale.astype(np.float16)

    def make() -> Any:
        codes, scale = packed(f"openvino {bits} {group}", n, k, pack)
        model, kept = _model(m, n, k, bits, group, codes, scale)
        compiled = _core().compile_model(model, "CPU", settings)
        request = compiled.create_infer_request()
        request.set_input_tensor(x)
        request.set_output_tensor(y)
        return request, compiled, kept

    def call(arguments: Any) -> None:
        request = arguments[0]
        request.start_async()  # `infer` converts results to dictionaries besides
        request.wait()

    def result(arguments: Any) -> Array:
        call(arguments)
        out: Array = np.array(y.data)
        return out

    def weights(rows: Any) -> Array:
        codes, scale = quantise(n, k, bits, group)
        return dequantise(codes[rows], scale[rows], bits, group)

    nbytes = n * k * bits // 8 + 2 * n * (k // group)
    error = int8_error(ask.inputs["x"], group_x) if dynamic else 0.01
    return Variant(label, make, call, nbytes, bits + 16 / group, result, weights, error)


def _model(
    m: int, n: int, k: int, bits: int, group: int, codes: Array, scale: Array
) -> tuple[Any, Any]:
    """Return a model of one linear layer, and what must live as long: it does not copy the codes."""
    import openvino
    from openvino import opset13 as op

    groups = k // group
    kind = {2: openvino.Type.u2, 4: openvino.Type.i4, 8: openvino.Type.i8}[bits]
    mine = codes.copy()
    tensor = openvino.Tensor(mine, openvino.Shape([n, groups, group]), kind)
    if bits == 8:
        tensor = openvino.Tensor(mine.view(np.int8).reshape(n, groups, group))
    x = op.parameter([m, k], openvino.Type.f32, name="x")
    weight = op.convert(op.constant(tensor), np.float32)
    if bits == 2:
        zero = op.convert(op.constant(np.full((1, 1, 1), 2, np.uint8)), np.float32)
        weight = op.subtract(weight, zero)
    factor = op.convert(op.constant(scale.reshape(n, groups, 1)), np.float32)
    weight = op.reshape(op.multiply(weight, factor), op.constant(np.array([n, k])), False)
    y = op.matmul(x, weight, False, True)
    return openvino.Model([y], [x], "mpgemm"), (mine, tensor)
