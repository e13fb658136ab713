"""ONNX Runtime as a peer: its `MatMulNBits` with int8 activations (accuracy level 4).

Weights have 2, 4 or 8 bits and blocks of 32, 64 or 128 columns with one f32 scale each; zero points are the
format's middle, which needs no storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mimo_compile.bench.peers.base import (
    Ask,
    LeftOut,
    Peer,
    Variant,
    dequantise,
    groups_of,
    int8_error,
    nearest_bits,
    packed,
    quantise,
)
from mimo_compile.ir.ops.base import Array

_BITS = (2, 4, 8)
_BLOCKS = (32, 64, 128)
_IR_VERSION, _OPSET = 10, 21

_threads = 0
"""Threads of the pool that all sessions of this process share; 0 before the first one."""


class OnnxRuntimePeer(Peer):
    """One session for each argument set; all share one pool of threads, so that none spins for itself."""

    name = "onnxruntime"
    packages = ("onnxruntime", "onnx")
    no_models = "has no way from a checkpoint to a whole model (onnxruntime-genai has)"

    def variants(self, ask: Ask) -> Iterator[Variant | LeftOut]:
        """Offer `MatMulNBits` at the nearest bits, for each block size."""
        if ask.workload.op != "mpgemm":
            return
        bits = nearest_bits(ask.format, _BITS)
        if bits is None or "bias" in ask.inputs:
            yield LeftOut("MatMulNBits", "is compared on quantised weights without bias only")
            return
        if not _share_threads(ask.hardware.threads):
            yield LeftOut(
                "MatMulNBits",
                "this process has its pool of threads already, of another size",
                "start another process for another number of threads",
            )
            return
        for block in groups_of(ask.format, _BLOCKS):
            yield _mat_mul(ask, bits, block)


def _share_threads(threads: int) -> bool:
    """Make the pool that all sessions share; False if there is one already, of another size."""
    import onnxruntime

    global _threads
    if not _threads:
        try:
            onnxruntime.set_global_thread_pool_sizes(threads, 1)
        except RuntimeError:  # somebody else made a session before
            return False
        _threads = threads
    return _threads == threads


def _mat_mul(ask: Ask, bits: int, block: int) -> Variant:
    import onnxruntime

    m, n, k = ask.shape
    label = f"MatMulNBits-{bits}-g{block}"
    x = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(ask.inputs["x"]))
    y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((m, n), np.float32))

    def make() -> Any:
        model = _model(m, n, k, bits, block, *packed(f"ort {label}", n, k, pack))
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x)
        binding.bind_ortvalue_output("y", y)
        return session, binding

    def pack() -> tuple[Array, Array]:
        codes, scale = quantise(n, k, bits, block)
        return pack_bits(np.pad(codes, ((0, 0), (0, -k % block))), bits), scale

    def call(arguments: Any) -> None:
        session, binding = arguments
        session.run_with_iobinding(binding)

    def result(arguments: Any) -> Array:
        call(arguments)
        out: Array = y.numpy().copy()
        return out

    def weights(rows: Any) -> Array:
        codes, scale = quantise(n, k, bits, block)
        return dequantise(codes[rows], scale[rows], bits, block)

    blocks = -(-k // block)
    nbytes = n * blocks * (block * bits // 8 + 4)
    error = int8_error(ask.inputs["x"], block)
    return Variant(label, make, call, nbytes, 8 * nbytes / (n * k), result, weights, error)


def pack_bits(codes: Array, bits: int) -> Array:
    """Pack codes along the last axis into bytes, the first code in the lowest bits."""
    each = 8 // bits
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] // each), np.uint8)
    for i in range(each):
        out |= codes[..., i::each] << (bits * i)
    return out


def _model(m: int, n: int, k: int, bits: int, block: int, codes: Array, scale: Array) -> bytes:
    """Return a serialised model of one `MatMulNBits`."""
    from onnx import TensorProto, helper

    blocks = -(-k // block)
    shape = (n, blocks, block * bits // 8)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft",
        K=k, N=n, bits=bits, block_size=block, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "mpgemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
        [
            helper.make_tensor("codes", TensorProto.UINT8, shape, codes.tobytes(), raw=True),
            helper.make_tensor("scale", TensorProto.FLOAT, (n, blocks), scale.tobytes(), raw=True),
        ],
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = _IR_VERSION
    out: bytes = model.SerializeToString()
    return out
